"""Enclosures of known numbers of which those at some places are updated by others, by a scatter."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import lax

from convex_jax.proof import enclosures
from convex_jax.proof.enclosures import Ends
from convex_jax.proof.equations import Unknown, has_known_updates
from convex_jax.proof.float64 import float64
from convex_jax.proof.sums import within
from convex_jax.proof.values import Known, may_be_nan

_EXTREMES = {"scatter-max": lax.scatter_max, "scatter-min": lax.scatter_min}


def _scattering(eqn, indices: Known) -> Callable[..., np.ndarray]:
  """A function that updates places of one array by another, as `lax.scatter_add` would."""
  if not has_known_updates(eqn):
    raise Unknown("scatter by a function of its own, or by indices that have no entries")
  if not indices.is_exact:
    raise Unknown("scatter by an index that is known only to within rounding")

  def scatter(update: Callable, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    given = {key: eqn.params[key] for key in ("dimension_numbers", "mode")}
    with float64():
      return np.asarray(update(jnp.asarray(old), indices.low, jnp.asarray(new), **given))

  return scatter


def _add(eqn, x: Known, indices: Known, updates: Known) -> Ends:
  """Sums of the numbers at each place, and of what was there."""
  scatter = _scattering(eqn, indices)

  def added(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    return scatter(lax.scatter_add, old, new)

  low = added(x.low, updates.low)
  high = low if x.is_exact and updates.is_exact else added(x.high, updates.high)
  sizes = [np.maximum(np.abs(t.low), np.abs(t.high)) for t in (x, updates)]
  return within(eqn, low, high, 1 + indices.low.size, added(*sizes), [x, updates])


def _multiply(eqn, x: Known, indices: Known, updates: Known) -> Ends:
  """Products of each number with the factor at its place, of which there is at most one."""
  scatter = _scattering(eqn, indices)
  count = scatter(lax.scatter_add, np.zeros(x.shape), np.ones(updates.shape))
  if count.max(initial=0) > 1:
    raise Unknown("scatter-mul by several factors at one place")

  def factor(end: np.ndarray) -> np.ndarray:
    return scatter(lax.scatter_add, np.where(count == 0, 1.0, 0.0), end)

  return enclosures.multiply((x.low, x.high), (factor(updates.low), factor(updates.high)))


def _extreme(eqn, x: Known, indices: Known, updates: Known) -> Ends:
  """The largest, or the least, of the numbers at each place and of what was there."""
  scatter = _scattering(eqn, indices)
  if np.any(may_be_nan(x)) or np.any(may_be_nan(updates)):
    raise Unknown(f"{eqn.primitive.name} of what may be no number")
  update = _EXTREMES[eqn.primitive.name]
  low = scatter(update, x.low, updates.low)
  return low, low if x.is_exact and updates.is_exact else scatter(update, x.high, updates.high)


def _overwrite(eqn, x: Known, indices: Known, updates: Known) -> Ends:
  """Several numbers at one place: which comes last is not defined."""
  scatter = _scattering(eqn, indices)
  if np.isnan(updates.low + updates.high).any():
    raise Unknown("scatter of what may be no number")
  there = scatter(lax.scatter_add, np.zeros(x.shape), np.ones(updates.shape)) > 0
  ends = []
  for update, old, new in (
    (lax.scatter_min, x.low, updates.low),
    (lax.scatter_max, x.high, updates.high),
  ):
    first = scatter(lax.scatter, old, new)  # Any of them, from which to look for the least.
    ends.append(np.where(there, scatter(update, first, new), old))
  low, high = ends
  return (low, low) if np.array_equal(low, high) else (low, high)


UPDATES: dict[str, Callable[..., Ends]] = {  # Of (equation, numbers, indices, updates).
  "scatter": _overwrite,
  "scatter-add": _add,
  "scatter-mul": _multiply,
  **dict.fromkeys(_EXTREMES, _extreme),
}
