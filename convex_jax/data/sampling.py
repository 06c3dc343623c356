"""Which example stands where in training: a function of the seed and the position alone.

Position p of the endless sequence of shuffled epochs holds example `order(seed, p // n)[p % n]`,
and step t reads positions t B .. (t + 1) B - 1. So every example comes once an epoch, on any
number of devices and hosts, and a resumed run has nothing to restore but its step. With r
repeats p // r stands for p: each example r times in a row (Hoffer et al. 2020), to be augmented
by its position.
"""

import functools

import numpy as np


@functools.lru_cache(maxsize=4)
def order(seed: int, epoch: int, n: int) -> np.ndarray:
  """The permutation of n examples in one epoch."""
  return np.random.default_rng([seed, 2, epoch]).permutation(n)


def examples_at(position_B: np.ndarray, seed: int, n: int, repeats: int = 1) -> np.ndarray:
  """Which of n examples stand at these positions of the endless training sequence."""
  epochs, offsets = np.divmod(position_B // repeats, n)
  index = np.empty_like(position_B)
  for epoch in np.unique(epochs):
    here = epochs == epoch
    index[here] = order(seed, int(epoch), n)[offsets[here]]
  return index


def positions(steps: range, batch_size: int) -> np.ndarray:
  """Those of the batches of several steps, (steps, B)."""
  return np.arange(steps.start * batch_size, steps.stop * batch_size).reshape(len(steps), -1)
