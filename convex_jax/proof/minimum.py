"""The least value of a convex function over a box, with a bound that proves it."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import scipy  # Imports its parts on first use; `optimize` takes 0.2 s, and few need it.

from convex_jax.proof.float64 import float64

ROUNDING = 1e-9  # Relative; more than the error of a bound's float64 evaluation.
ASIDE = 2.0**-30  # In widths of the box: how far from a point its tangent is taken, at random.


@dataclasses.dataclass(frozen=True, eq=False)
class Minimum:
  """The least value found, at `x`, and a lower bound on all values in the box."""

  x: np.ndarray
  value: float
  bound: float

  @property
  def gap(self) -> float:
    """The most by which `value` may exceed the global minimum."""
    return self.value - self.bound


def minimise(
  function: Callable[[jax.Array], jax.Array],
  low: np.ndarray,
  high: np.ndarray,
  start: np.ndarray | None = None,
  steps: int = 1000,
) -> Minimum:
  """The global minimum of a differentiable convex function over the box [low, high].

  Projected quasi-Newton steps (L-BFGS-B). At any x the tangent bounds the function from
  below everywhere, and its least value over the box,

      f(x) + sum_i min(g_i (low_i - x_i), g_i (high_i - x_i)),

  is a lower bound on the global minimum. The best bound of all iterates is returned, less
  `ROUNDING` of its size: it is evaluated in float64.

  Args:
    function: maps an array of the box's shape to a scalar. Its convexity is not checked: of a
      function that is not convex, `bound` says nothing.
    low: least entries.
    high: greatest entries.
    start: first point; by default the middle of the box.
    steps: most iterations.

  Raises:
    ValueError: the box is empty or not finite.
  """
  low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
  if not ((low <= high) & np.isfinite(high - low)).all():
    raise ValueError("the box is empty or not finite; expected finite ends, low <= high")
  # At a kink, as at an end of the box, what JAX gives for a slope may be that of no tangent.
  aside = np.random.default_rng(0).uniform(-ASIDE, ASIDE, low.size) * (high - low).ravel()
  with float64():
    slope = jax.jit(jax.value_and_grad(lambda x: jnp.squeeze(function(x))))
    best = -np.inf

    def evaluate(flat):
      nonlocal best
      flat = flat + aside
      value, gradient = slope(jnp.asarray(flat.reshape(low.shape)))
      g = np.asarray(gradient, np.float64).ravel()
      below = np.minimum(g * (low.ravel() - flat), g * (high.ravel() - flat)).sum()
      size = 1 + abs(float(value)) + abs(float(below))
      best = max(best, float(value) + float(below) - ROUNDING * size)
      return float(value), g

    first = (low + high) / 2 if start is None else np.asarray(start, np.float64)
    found = scipy.optimize.minimize(
      evaluate,
      first.ravel(),
      jac=True,
      method="L-BFGS-B",
      bounds=list(zip(low.ravel(), high.ravel(), strict=True)),
      options={"maxiter": steps, "maxfun": 2 * steps, "ftol": 1e-15, "gtol": 1e-12},
    )
    x = np.clip(found.x, low.ravel(), high.ravel())
    evaluate(x)
    value = float(jnp.squeeze(function(jnp.asarray(x.reshape(low.shape)))))
  return Minimum(x.reshape(low.shape), value, best)
