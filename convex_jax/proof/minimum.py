"""The least value of a convex function over a box, with a bound that proves it."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import scipy  # Imports its parts on first use; `optimize` takes 0.2 s, and few need it.

from convex_jax.proof.float64 import ROUNDING, float64
from convex_jax.proof.rounding_errors import Program, in_float64
from convex_jax.proof.rounding_walk import Ball

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
  """The global minimum of a convex function over the box [low, high].

  Projected quasi-Newton steps (L-BFGS-B). A tangent at any z in the box bounds the function from
  below all over it, and its least value there,

      f(z) + sum_i min(g_i (low_i - z_i), g_i (high_i - z_i)),

  is a lower bound on the global minimum. The best bound of all iterates is returned, less what the
  evaluation in float64 may be off by: `ROUNDING` of these terms, and twice a bound on the error of f
  over the box (`rounding_errors.in_float64`) where one is known. Each z lies next to an iterate, inside
  the box and at random: at a kink, as at an end of the box, the derivative that JAX computes may be no
  subgradient.

  Args:
    function: maps an array of the box's shape to a scalar. Its convexity is not checked: of a
      function that is not convex, `bound` says nothing. It is evaluated in float64, and its
      derivatives are its own, whatever `stop_gradient` or `custom_jvp` in it say.
    low: least entries.
    high: greatest entries.
    start: first point; by default the middle of the box.
    steps: most iterations.

  Raises:
    ValueError: the box is empty or not finite, `start` is not of its shape, or the function returns no
      scalar.
  """
  low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
  if low.shape != high.shape or not low.size:
    raise ValueError(
      f"the box has ends of the shapes {low.shape} and {high.shape}; expected equal ones, with entries"
    )
  shape, low, high = low.shape, low.ravel(), high.ravel()
  if not ((low <= high) & np.isfinite(high - low)).all():
    raise ValueError("the box is empty or not finite; expected finite ends, low <= high")
  first = (low + high) / 2 if start is None else np.ravel(np.asarray(start, np.float64))
  if first.shape != low.shape or not np.isfinite(first).all():
    raise ValueError(f"start is {start!r}; expected finite numbers of the shape {shape}")
  aside = np.random.default_rng(0).uniform(0, ASIDE, low.size) * (high - low)
  with float64():
    exact = Program(function, jax.ShapeDtypeStruct(shape, jnp.float64)).exact
    returned = jax.eval_shape(exact, jax.ShapeDtypeStruct(shape, jnp.float64)).shape
    if returned.count(1) != len(returned):
      raise ValueError(f"the function returns an array of shape {returned}; expected a scalar")
    slope = jax.jit(jax.value_and_grad(lambda x: jnp.squeeze(exact(x))))
    best = -np.inf

    def evaluate(flat):
      nonlocal best
      z = flat + np.where(flat - low <= high - flat, aside, -aside)
      value, gradient = slope(jnp.asarray(z.reshape(shape)))
      g = np.asarray(gradient, np.float64).ravel()
      sides = np.minimum(g * (low - z), g * (high - z))
      below = float(value) + float(sides.sum())
      best = max(best, below - ROUNDING * (1 + abs(float(value)) + float(np.abs(sides).sum())))
      return float(value), g

    found = scipy.optimize.minimize(
      evaluate,
      first,
      jac=True,
      method="L-BFGS-B",
      bounds=list(zip(low, high, strict=True)),
      options={"maxiter": steps, "maxfun": 2 * steps, "ftol": 1e-15, "gtol": 1e-12},
    )
    x = np.clip(found.x, low, high).reshape(shape)
    value, _ = slope(jnp.asarray(x))
  box = Ball(((low + high) / 2).reshape(shape), "linf", float((high - low).max() / 2))
  best -= in_float64(exact, box)
  # Above the value, rounding was larger than thought, or the function is not convex.
  return Minimum(x, float(value), best if best <= float(value) else -np.inf)
