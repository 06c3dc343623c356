"""A scalar function as the difference of two convex ones of bounded slopes.

phi = phi_1 - phi_2 over the reals, exactly: phi_1 is phi on the pieces of the line where phi is convex
and goes on straight outside of them,

    phi_1(z) = sum over pieces [l, r] of phi(clip(z, l, r)) + s_l (min(z, l) - l) + s_r (max(z, r) - r),

with slopes s_l and s_r just outside of those of phi at the ends; phi_2 is phi_1 - phi. Where the sign
of phi'' is not known, around its zeros, both get a parabola that is steep enough. No two convex
functions differ by phi and change their slopes by less, but for that margin.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convex_jax.proof import activations, interpreter
from convex_jax.proof.jets import NoRuleError
from convex_jax.proof.pieces import Piece, pieces_between
from convex_jax.proof.tails import cells
from convex_jax.proof.values import Value

NARROW = 2.0**-10  # Width of the parts around zeros of the second derivative, relative.
MARGIN = 2.0**-20  # Relative, by which a slope goes beyond its bounds.

Function = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
  """phi = convex - other, where None is 0; both + falling a + rising b are non-decreasing in a, b.

  That is, of z = a - b: `falling` is at least minus their slopes, and `rising` their slopes.
  """

  convex: Function | None
  other: Function | None
  falling: Any
  rising: Any


class NoSplitError(ValueError):
  """A scalar function is not seen to be such a difference; the message says why."""


def split(phi: Function, value: Value, root: Value) -> Split:
  """Splits phi, which `value` is as a function of `root`.

  Raises:
    NoSplitError: the signs of phi'' or the bounds of phi' are not known.
  """
  try:
    with np.errstate(all="ignore"):
      whole = activations.judged(value, root)
      if np.all(whole.convex):
        return _with_slopes(phi, None, value.shape)
      if np.all(whole.concave):
        return _with_slopes(None, lambda z: -phi(z), value.shape)
      return _with_slopes(*_parts(phi, value, root), value.shape)
  except NoRuleError:
    raise NoSplitError("it cannot be read as a scalar function with finitely many kinks") from None


def _with_slopes(convex: Function | None, other: Function | None, shape) -> Split:
  """The split, if the two functions are proved convex."""
  found = [_proved(g, shape) for g in (convex, other) if g is not None]
  least = functools.reduce(np.minimum, [f.least for f in found])
  most = functools.reduce(np.maximum, [f.most for f in found])
  if not np.all(np.isfinite(least) & np.isfinite(most)):
    raise NoSplitError("its slope is not bounded")
  return Split(convex, other, _above(-least), _above(most))


def _proved(g: Function, shape) -> Any:
  (value,), _ = interpreter.analyse(g, jax.ShapeDtypeStruct(shape, np.float32))
  assert isinstance(value, Value)
  f = activations.judged(value, _input(value))
  if not np.all(f.convex):
    raise NoSplitError("the signs of its second derivative are not known closely enough")
  return f


def _input(value: Value) -> Value:
  while value.made_by is not None:
    value = next(x for x in value.made_by.inputs if isinstance(x, Value))
  return value


def _above(slope: np.ndarray) -> Any:
  """A float32 number at or above a slope, and not below 0; small integers are kept."""
  with np.errstate(over="ignore"):
    up = np.nextafter((slope + MARGIN * np.abs(slope)).astype(np.float32), np.float32(np.inf))
  up = np.where(slope == np.round(slope), slope, up).astype(np.float32)
  up = np.maximum(up, 0)
  return float(up.flat[0]) if np.all(up == up.flat[0]) else up


@dataclasses.dataclass(frozen=True)
class _Cell:
  """A part of the line on which phi'' has a sign, or is small."""

  low: float
  high: float
  sign: int | None  # 0: phi is affine there. None: not known.
  size: float  # Bound of |phi''| where the sign is not known.
  slopes: tuple[tuple[float, float], tuple[float, float]]  # At its ends, by their bounds.


def _parts(phi: Function, value: Value, root: Value) -> tuple[Function, Function]:
  """phi_1 and phi_2."""
  kinks = activations.kinks_of(value, root)
  if any(np.ptp(k) > 0 for k in kinks):
    raise NoSplitError("its kinks are not the same for all elements")
  infinite = np.full((1,) * len(value.shape), np.inf)
  points = [np.full_like(infinite, k.flat[0]) for k in kinks]
  pieces = pieces_between(root, [-infinite, *points, infinite])
  if not all(np.all(piece.of(value).is_continuous) for piece in pieces):
    raise NoSplitError("it is not continuous")
  parts = [cell for piece in pieces for cell in _cells(piece, value)]
  runs = _runs(parts, {float(k.flat[0]) for k in kinks})
  gaps = _gaps(parts)

  def rest(z):
    """What phi_1 and phi_2 have in common."""
    terms = []
    for low, high, below, above in runs:
      if np.isfinite(low):
        terms.append(below * (jnp.minimum(z, low) - low))
      if np.isfinite(high):
        terms.append(above * (jnp.maximum(z, high) - high))
    for low, high, curvature in gaps:
      beyond = [jnp.maximum(z, end) - end for end in (low, high)]
      terms.append(curvature / 2 * (jnp.minimum(jnp.maximum(z, low), high) - low) ** 2)
      terms.append(MARGIN * beyond[0])  # The slopes at the ends are known only closely.
      terms.append((curvature * (high - low) + MARGIN) * beyond[1])
    return functools.reduce(operator.add, terms)

  def bent(z):
    return functools.reduce(operator.add, [phi(_clipped(z, low, high)) for low, high, *_ in runs])

  return lambda z: bent(z) + rest(z), lambda z: (bent(z) - phi(z)) + rest(z)


def _clipped(z: jax.Array, low: float, high: float) -> jax.Array:
  z = jnp.maximum(z, low) if np.isfinite(low) else z
  return jnp.minimum(z, high) if np.isfinite(high) else z


def _cells(piece: Piece, value: Value) -> list[_Cell]:
  """A piece between two kinks, cut until phi'' has a sign on each part, or it is narrow."""
  found = cells(piece, value, NARROW)
  out = []
  for i in range(len(found.low)):
    cell = found.chosen(i)
    below, above = cell.second
    tests = ((0, (below >= 0) & (above <= 0)), (1, below >= 0), (-1, above <= 0))
    sign = next((s for s, has in tests if np.all(has)), None)
    size = float(np.max(np.maximum(np.abs(below), np.abs(above))))
    if sign is None and not np.isfinite(size):
      raise NoSplitError("the sign of its second derivative is not known everywhere")
    slopes = [(float(np.min(a)), float(np.max(b))) for a, b in (cell.first, cell.last)]
    low, high = float(cell.low.flat[0]), float(cell.high.flat[0])
    out.append(_Cell(low, high, sign, size, (slopes[0], slopes[1])))
  return out


def _runs(cells: list[_Cell], kinks: set[float]) -> list[tuple[float, float, float, float]]:
  """(l, r, s_l, s_r) of the parts on which phi_1 is phi; l = r at a kink that may bend up alone."""
  groups = [[0]]
  for i in range(1, len(cells)):
    convex = cells[i - 1].sign in (0, 1) and cells[i].sign in (0, 1)
    if convex and (cells[i].low not in kinks or _bend(cells, i)[0] >= 0):
      groups[-1].append(i)
    else:
      groups.append([i])

  def is_bent(group):
    return any(cells[i].sign == 1 for i in group) or any(_bend(cells, i)[1] > 0 for i in group[1:])

  runs = [(g[0], g[-1] + 1) for g in groups if is_bent(g)]  # From one boundary to another.
  seen = {i for first, last in runs for i in range(first, last + 1)}
  for i in range(1, len(cells)):
    if cells[i].low in kinks and _bend(cells, i)[1] > 0 and i not in seen:
      runs.append((i, i))
  out = []
  for first, last in runs:
    low = cells[first].low if first < len(cells) else cells[first - 1].high
    high = cells[last - 1].high if last else cells[0].low
    below = [s[0] for s in _slopes(cells, first)]
    above = [s[1] for s in _slopes(cells, last)]
    out.append((low, high, _float32(min(below), up=False), _float32(max(above), up=True)))
  return out


def _gaps(cells: list[_Cell]) -> list[tuple[float, float, float]]:
  """(c, d, bound of |phi''|) of the parts on which the sign of phi'' is not known."""
  gaps: list[tuple[float, float, float]] = []
  for low, high, size in ((c.low, c.high, c.size) for c in cells if c.sign is None):
    if gaps and gaps[-1][1] == low:
      low, _, before = gaps.pop()
      size = max(size, before)
    gaps.append((low, high, size))
  return [(low, high, _float32(size, up=True)) for low, high, size in gaps]


def _slopes(cells: list[_Cell], i: int) -> list[tuple[float, float]]:
  """Bounds of the slopes on either side of the left end of cell `i`."""
  left = [cells[i - 1].slopes[1]] if i > 0 else []
  return left + ([cells[i].slopes[0]] if i < len(cells) else [])


def _bend(cells: list[_Cell], i: int) -> tuple[float, float]:
  """Bounds of the change of the slope at the left end of cell `i`."""
  before, after = _slopes(cells, i)
  return after[0] - before[1], after[1] - before[0]


def _float32(x: float, up: bool) -> float:
  """The number, if it is in float32, or the next one there beyond a margin."""
  if not np.isfinite(x) or float(np.float32(x)) == x:
    return x
  beyond = x + (1 if up else -1) * MARGIN * max(abs(x), 1.0)
  return float(np.nextafter(np.float32(beyond), np.float32(np.inf if up else -np.inf)))
