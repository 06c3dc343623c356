"""Enclosures of sums and products of many known numbers, in whatever order a program takes them."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from convex_jax.proof import enclosures
from convex_jax.proof.enclosures import Ends
from convex_jax.proof.equations import Unknown, bind
from convex_jax.proof.values import Known


def total(eqn, x: Known) -> Ends:
  """Sums of n terms: rounding changes them by at most n eps times the sum of magnitudes."""
  if eqn.primitive.name == "reduce_sum":
    n = math.prod(x.shape[i] for i in eqn.params["axes"])
  elif eqn.primitive.name == "cumsum":
    n = x.shape[eqn.params["axis"]]
  else:
    n = math.prod(eqn.params["window_dimensions"])
  low = _float_sum(eqn, x.low)
  high = low if x.low is x.high else _float_sum(eqn, x.high)
  size = _float_sum(eqn, np.maximum(np.abs(x.low), np.abs(x.high)))
  return within(eqn, low, high, n, size, [x])


def _float_sum(eqn, array: np.ndarray) -> np.ndarray:
  if eqn.primitive.name == "reduce_sum":
    return np.asarray(array.sum(tuple(eqn.params["axes"])))
  return bind(eqn, array)[0]


def multiplied(name: str, eqn, x: Known) -> Ends:
  """Products over axes, factor by factor; the program may take them in any order."""
  params, ends = eqn.params, (x.low, x.high)
  axes = tuple(params["axes"]) if name == "reduce_prod" else (params["axis"],)
  sizes = [np.where(e == 0, 1, e) for e in enclosures.magnitude(ends)]
  info = jnp.finfo(np.float64 if x.varies else eqn.outvars[0].aval.dtype)
  least, most = np.minimum(sizes[0], 1).prod(axes), np.maximum(sizes[1], 1).prod(axes)
  if not ((least >= info.smallest_normal) & (most <= info.max)).all():
    raise Unknown(f"{name}, of which a part may overflow or underflow")
  shape = [n for i, n in enumerate(x.shape) if i not in axes]
  first = range(len(axes))
  low, high = (np.moveaxis(e, axes, first).reshape(-1, *shape) for e in ends)
  if params.get("reverse"):
    low, high = low[::-1], high[::-1]
  out = np.ones(shape), np.ones(shape)
  steps = []
  for factor in zip(low, high, strict=True):
    out = enclosures.multiply(out, factor)
    steps.append(out)
  if name == "reduce_prod":
    return out
  if params["reverse"]:
    steps.reverse()
  low, high = (np.stack(e, axes[0]) for e in zip(*steps, strict=True))
  return low, high


def contraction(name: str, eqn, a: Known, b: Known) -> Ends:
  """Sums of products, by middles and radii (Rump 1999, "Fast and parallel interval arithmetic")."""
  if name == "dot_general":
    (axes, _), _ = eqn.params["dimension_numbers"]
    n = math.prod(a.shape[i] for i in axes)
  else:
    n = b.low.size // max(1, b.shape[eqn.params["dimension_numbers"].rhs_spec[0]])
  sizes = [np.maximum(np.abs(x.low), np.abs(x.high)) for x in (a, b)]
  middle, size = bind(eqn, a.array, b.array)[0], bind(eqn, *sizes)[0]
  if _overflows(eqn, [a, b], size):
    raise Unknown(f"{name}, of which a part may overflow")
  low = high = middle
  if not (a.is_exact and b.is_exact):
    # The middle's own rounding is within the radius's margin below.
    radii = [np.maximum(x.high - x.array, x.array - x.low) for x in (a, b)]
    radius = bind(eqn, radii[0], sizes[1])[0] + bind(eqn, sizes[0], radii[1])[0]
    low, high = middle - radius, middle + radius
  elif _are_exact(_unit(a.low) * _unit(b.low), size, eqn.outvars[0].aval.dtype):
    return middle, middle
  margin = 2 * (n + 2) * _epsilon(eqn, [a, b]) * size + n * _flushed([a, b])
  return enclosures.outward(low - margin, high + margin, (margin == 0, margin == 0))


def within(eqn, low, high, n: int, size, terms: Sequence[Known]) -> Ends:
  """The ends of sums of n terms, moved outwards by what rounding them one by one may do."""
  if _overflows(eqn, terms, size):
    raise Unknown(f"{eqn.primitive.name}, of which a part may overflow")
  unit = min(_unit(x.low) for x in terms)
  if n <= 1 or (low is high and _are_exact(unit, size, eqn.outvars[0].aval.dtype)):
    return low, high
  margin = (n + 2) * _epsilon(eqn, terms) * size + n * _flushed(terms)
  return enclosures.outward(low - margin, high + margin, (margin == 0, margin == 0))


def _overflows(eqn, terms: Sequence[Known], size: np.ndarray) -> bool:
  """Whether finite terms, the magnitudes of which sum up to `size`, may sum up to infinity."""
  varies = any(x.varies for x in terms)
  most = float(jnp.finfo(np.float64 if varies else eqn.outvars[0].aval.dtype).max)
  return bool((size > most).any()) and all(np.isfinite(x.low + x.high).all() for x in terms)


def _epsilon(eqn, terms: Sequence[Known]) -> float:
  varies = any(x.varies for x in terms)
  return float(jnp.finfo(np.float64 if varies else eqn.outvars[0].aval.dtype).eps)


def _flushed(factors: Sequence[Known]) -> float:
  """More than what XLA loses of a product of such numbers by taking subnormal ones for 0."""
  least = 1.0
  for x in factors:
    size = np.maximum(np.abs(x.low), np.abs(x.high))
    least *= min(1.0, float(np.min(size, initial=1.0, where=size > 0)))
  return 0.0 if least > 1e-290 else 1e-290


def _are_exact(unit: float, size, dtype) -> bool:
  """Whether all sums of multiples of `unit`, a power of 2, fit into the dtype, in any order."""
  info = jnp.finfo(dtype)
  most = min(unit * 2.0**info.nmant, float(info.max))
  return bool(unit >= info.smallest_normal) and bool((size <= most).all())


def _unit(array: np.ndarray) -> float:
  """The largest power of 2 of which all these numbers are multiples."""
  fraction, exponent = np.frexp(array)
  significand = (fraction * 2.0**53).astype(np.int64)
  units = np.ldexp((significand & -significand).astype(np.float64), exponent - 53)
  return float(units.min(initial=1, where=significand != 0))
