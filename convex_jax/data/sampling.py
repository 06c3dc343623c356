"""The order of examples in training: a function of the seed and the position alone.

Position p of the endless sequence of shuffled epochs holds example `order(seed, p // n)[p % n]`,
and step t reads positions t B .. (t + 1) B - 1. So every example is shown once per epoch on any
number of devices and hosts, and a resumed run restores nothing but its step. With r repeats,
p // r takes the place of p: each example is shown r times in a row (Hoffer et al. 2020), each
time augmented by its own position.
"""

import functools

import numpy as np


@functools.lru_cache(maxsize=4)
def order(seed: int, epoch: int, n: int) -> np.ndarray:
  """The permutation of n examples in one epoch."""
  return np.random.default_rng([seed, 2, epoch]).permutation(n)


def examples_at(position_B: np.ndarray, seed: int, n: int, repeats: int = 1) -> np.ndarray:
  """The examples, 0 to n - 1, at these positions of the training sequence."""
  epochs, offsets = np.divmod(position_B // repeats, n)
  index = np.empty_like(position_B)
  for epoch in np.unique(epochs):
    here = epochs == epoch
    index[here] = order(seed, int(epoch), n)[offsets[here]]
  return index


def positions(steps: range, batch_size: int) -> np.ndarray:
  """The positions of the batches of several steps, of shape (steps, B)."""
  return np.arange(steps.start * batch_size, steps.stop * batch_size).reshape(len(steps), -1)
