"""A falsifier of convexity: midpoints of random pairs, in float64."""

import jax
import jax.numpy as jnp
import numpy as np


def midpoint_gaps(f, shape, *, pairs=300, seed=0, sizes=(0.3, 3, 10), steps=(0.1, 1, 5)):
  """f((a + b) / 2) - (f(a) + f(b)) / 2 over the values' size, of each output: <= 0 if convex.

  Args:
    f: maps a batch of inputs (B, *shape) to a batch of outputs (B, ...).
    shape: of one input.
    pairs: number of pairs a, b.
    seed: of the pairs.
    sizes: standard deviations of a, one of which is drawn for each pair.
    steps: standard deviations of b - a, likewise.

  Returns:
    An array (pairs, ...), to be compared with 0 up to rounding.
  """
  rng, each = np.random.default_rng(seed), (pairs, *(1 for _ in shape))
  with jax.enable_x64(True):
    a = rng.standard_normal((pairs, *shape)) * rng.choice(sizes, each)
    b = a + rng.standard_normal(a.shape) * rng.choice(steps, each)
    every = np.concatenate([a, b, (a + b) / 2])  # Compiled once.
    fa, fb, middle = np.split(np.asarray(f(jnp.asarray(every)), np.float64), 3)
  return (middle - (fa + fb) / 2) / (1 + np.abs(fa) + np.abs(fb) + np.abs(middle))
