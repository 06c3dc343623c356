"""Moves of elements and linear operations, by the masks of what they move or add up.

Turning the sign swaps convex and concave, so that a linear operation P with weights W = W+ - W-
gives

    not_convex(P x)  = P(not_convex(x), W+)  or P(not_concave(x), W-)
    not_concave(P x) = P(not_concave(x), W+) or P(not_convex(x), W-).

Signs obey the same two lines, with "not known to be >= 0" and "not known to be <= 0" as masks,
and so does any property that sums and non-negative weights keep: see `carried`.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax import lax

from convex_jax.proof.equations import has_known_updates, is_float
from convex_jax.proof.in_numpy import as_rows, distinct
from convex_jax.proof.values import (
  Known,
  Masks,
  Operation,
  Value,
  either,
  is_nowhere,
  is_uniform,
  swapped,
  uniform,
)


def lost(op: Operation, *_: Any) -> Masks:
  """Nothing is proved: there is no rule, or its conditions do not hold."""
  yes = uniform(True, op.shape)
  return yes, yes


def masks_of(x: Value | Known) -> Masks:
  """The masks of any number; a known one is affine where it is finite."""
  if isinstance(x, Value):
    return x.masks
  bad = x.not_finite
  return bad, bad


def _negated(x: Value | Known) -> Value:
  """-x, as far as its masks."""
  return Value(*swapped(masks_of(x)))


# Moves of elements. They compute nothing, so the masks move in the same way.


def _moving(data: Callable[[int], range], padded: bool = False):
  """Moves the elements of the inputs at the positions `data(count)`; the rest are indices."""

  def rule(op: Operation, *inputs):
    moved = data(len(inputs))
    indices = [x for i, x in enumerate(inputs) if i not in moved]
    if not all(map(_is_index, indices)):
      chosen = op.primitive == "select_n" and isinstance(inputs[0], Known)
      return _any_of(op, inputs[1:]) if chosen else lost(op)

    def move(masks):
      if all(map(is_nowhere, masks)):
        return uniform(False, op.shape)
      if not padded and all(is_uniform(m) and m.size and m.flat[0] for m in masks):
        return uniform(True, op.shape)
      arrays = [x.low if isinstance(x, Known) else x.masks[0] for x in inputs]
      for i, mask in zip(moved, masks, strict=True):
        arrays[i] = mask
      return op.move(*arrays)

    not_convex, not_concave = zip(*(masks_of(inputs[i]) for i in moved), strict=True)
    return move(not_convex), move(not_concave)

  return rule


def _any_of(op: Operation, cases) -> Masks:
  """One of the cases, always the same one, but rounding decides which."""
  nc, nk = (either(*masks) for masks in zip(*map(masks_of, cases), strict=True))
  return np.broadcast_to(nc, op.shape), np.broadcast_to(nk, op.shape)


def _is_index(x: Value | Known) -> bool:
  return isinstance(x, Known) and x.is_exact


def _gather(op: Operation, x, indices) -> Masks:
  """Beyond the array a gather gives the last element, or 0 (`composed`)."""
  if not _is_index(indices):
    return lost(op)
  nc, nk = (np.asarray(op.bind(m, indices.low, fill_value=False)) for m in masks_of(x))
  return nc, nk


# Updates of known places.


def sums_at_places(op: Operation, old, indices: Known, new) -> np.ndarray:
  """The old array and the sums of the new numbers, at the places that a scatter updates."""
  given = {name: op.params[name] for name in ("dimension_numbers", "mode")}
  arrays = (np.asarray(old, np.float32), indices.low, np.asarray(new, np.float32))
  return np.asarray(lax.scatter_add(*arrays, **given))


def updates_of(op: Operation, x, indices, updates) -> np.ndarray | None:
  """How many updates each element gets; None if not known, or if a promise is broken."""
  if not _is_index(indices) or not has_known_updates(op.eqn):
    return None
  count = sums_at_places(op, np.zeros(x.shape), indices, np.ones(updates.shape))
  rows = indices.low.reshape(math.prod(indices.shape[:-1]), indices.shape[-1]).tolist()
  broken = op.params["indices_are_sorted"] and any(a > b for a, b in itertools.pairwise(rows))
  broken |= op.params["unique_indices"] and count.max(initial=0) > 1
  broken |= "PROMISE" in str(op.params["mode"]) and count.sum() != np.prod(updates.shape)
  return None if broken or count.max(initial=0) >= 2**24 else count  # Exact in float32.


def _scatter(op: Operation, x, indices, updates) -> Masks:
  """Several values at one place: which comes last is not defined."""
  count = updates_of(op, x, indices, updates)
  if count is None:
    return lost(op)
  pairs = zip(masks_of(x), masks_of(updates), strict=True)
  kept = [sums_at_places(op, old & (count == 0), indices, new) + (count > 1) for old, new in pairs]
  return kept[0] > 0, kept[1] > 0


def _scatter_add(op: Operation, x, indices, updates) -> Masks:
  if updates_of(op, x, indices, updates) is None:
    return lost(op)
  pairs = zip(masks_of(x), masks_of(updates), strict=True)
  nc, nk = (sums_at_places(op, old, indices, new) > 0 for old, new in pairs)
  return nc, nk


def _scatter_multiply(op: Operation, x, indices, updates) -> Masks:
  """Known factors; several at one place multiply."""
  count = updates_of(op, x, indices, updates)
  if count is None or not isinstance(x, Value) or not isinstance(updates, Known):
    return lost(op)

  def number(mask):
    return sums_at_places(op, np.zeros(x.shape), indices, mask)

  above, below = updates.low > 0, updates.high < 0
  zero = (updates.low == 0) & (updates.high == 0)
  sign = np.where(number(zero) > 0, 0.0, 1 - 2 * (number(below) % 2))
  known = number((above | below | zero) & ~updates.not_finite) == count
  sign = np.where(known, sign, np.nan).astype(np.float64)
  return times(op, x, Known.exactly(sign))


# Linear operations: sums keep convexity, known factors keep or swap it by their sign.


def _signed(op: Operation, x: Value, weights: Known, apply: Callable) -> Masks:
  """A linear operation `apply(mask, part of the weights)`, by the signs of its weights."""
  plus, minus = weights.high > 0, weights.low < 0
  if x.is_lost and not has_no_zero(weights) and not is_total(x):
    return lost(op)  # 0 times a value that may be infinite is not 0.

  def one(same, turned):
    parts = [
      apply(mask, part)
      for mask, part in ((same, plus), (turned, minus))
      if not is_nowhere(mask) and part.any()
    ]
    return either(*parts) if parts else uniform(False, op.shape)

  return one(*x.masks), one(*swapped(x.masks))


def _bilinear(op: Operation, a, b) -> Masks:
  """`dot_general`, `conv_general_dilated`: linear where one side is known."""
  if isinstance(a, Value) and isinstance(b, Value):
    return lost(op)
  x, weights, first = (a, b, True) if isinstance(a, Value) else (b, a, False)
  if weights.not_finite.any():
    return lost(op)

  def apply(mask, part):  # By sums of 0 and 1: no rounding.
    pair = (mask, part) if first else (part, mask)
    if op.primitive == "conv_general_dilated":
      ones = [np.asarray(array, np.float32) for array in pair]
      return np.asarray(op.bind(*ones, preferred_element_type=np.dtype(np.float32))) > 0.5
    sides = as_rows(op.params["dimension_numbers"], *pair)
    rows, columns = sides if first else reversed(sides)
    which, like = distinct(rows)  # Often few: those of the border, and all others.
    ones = rows[:, which].astype(np.float32), columns.astype(np.float32)
    found = ones[0] @ ones[1].swapaxes(1, 2) > 0.5
    if len(which) == 1:  # Stored once again.
      found = np.broadcast_to(found, (len(rows), *like.shape, found.shape[2]))
    else:
      found = found[:, like]
    return (found if first else found.swapaxes(1, 2)).reshape(op.shape)

  return _signed(op, x, weights, apply)


def times(op: Operation, x: Value, weights: Known) -> Masks:
  """A product with a known number, or what has the sign of one."""
  masks = _signed(op, x, weights, lambda mask, part: np.broadcast_to(mask & part, op.shape))
  bad = weights.not_finite
  nc, nk = masks if is_nowhere(bad) else (either(m, bad) for m in masks)
  return nc, nk


def _multiply(op: Operation, a, b) -> Masks:
  if isinstance(a, Value) and isinstance(b, Value):
    return lost(op)
  return times(op, a, b) if isinstance(a, Value) else times(op, b, a)


def _divide(op: Operation, a, b) -> Masks:
  """By known divisors; one that may be 0 has no sign."""
  if isinstance(b, Value):
    return lost(op)
  sign = np.where(b.low > 0, 1.0, np.where(b.high < 0, -1.0, np.nan))
  return times(op, a, Known.exactly(np.where(b.not_finite, np.nan, sign)))


def has_no_zero(x: Known) -> bool:
  """Whether a number is surely not 0 anywhere."""
  return bool(((x.low > 0) | (x.high < 0)).all())


def _add(op: Operation, a, b) -> Masks:
  nc, nk = (either(p, q) for p, q in zip(masks_of(a), masks_of(b), strict=True))
  return np.broadcast_to(nc, op.shape), np.broadcast_to(nk, op.shape)


def _solve(op: Operation, a, b) -> Masks:
  """`triangular_solve`: linear in b, by a known matrix whose inverse has entries of any sign."""
  if not isinstance(a, Known) or not isinstance(b, Value) or a.not_finite.any():
    return lost(op)
  diagonal = np.diagonal(a.low, axis1=-2, axis2=-1), np.diagonal(a.high, axis1=-2, axis2=-1)
  if not op.params["unit_diagonal"] and not has_no_zero(Known(*diagonal)):
    return lost(op)
  axis = -2 if op.params["left_side"] else -1
  mixed = np.broadcast_to(either(*b.masks).any(axis, keepdims=True), op.shape)
  return mixed, mixed


# Sums over axes, windows, and so far.


def over_axes(op: Operation, mask: np.ndarray) -> np.ndarray:
  """Whether there is a True along the axes of a reduction."""
  if is_uniform(mask) and mask.size:
    return uniform(bool(mask.flat[0]), op.shape)
  return np.asarray(mask.any(tuple(op.params["axes"])))


def in_windows(op: Operation, mask: np.ndarray) -> np.ndarray:
  """Whether a window holds a True, for a primitive that takes sums, maxima or minima."""
  sign = -1 if op.primitive == "reduce_window_min" else 1
  if is_nowhere(mask):
    return uniform(False, op.shape)
  return sign * np.asarray(op.bind(sign * mask.astype(np.float32))) > 0.5


def so_far(op: Operation, mask: np.ndarray) -> np.ndarray:
  """Whether there has been a True along the axis of a cumulative operation."""
  axis = op.params["axis"]
  flip = (lambda m: np.flip(m, axis)) if op.params["reverse"] else (lambda m: m)
  return flip(np.logical_or.accumulate(flip(mask), axis))


def _sum(gather: Callable[[Operation, np.ndarray], np.ndarray]):
  return lambda op, x: (gather(op, x.masks[0]), gather(op, x.masks[1]))


_first = _moving(lambda n: range(1))
_all = _moving(lambda n: range(n))

MOVES: dict[str, Callable[..., Masks]] = {
  **dict.fromkeys(("broadcast_in_dim", "reshape", "transpose", "squeeze", "tile"), _first),
  **dict.fromkeys(("rev", "slice", "dynamic_slice"), _first),
  **dict.fromkeys(("concatenate", "stack"), _all),
  "pad": _moving(lambda n: range(n), padded=True),
  "select_n": _moving(lambda n: range(1, n)),
  "dynamic_update_slice": _moving(lambda n: range(2)),
  "gather": _gather,
  "scatter": _scatter,
}

LINEAR = MOVES | {
  **dict.fromkeys(("add", "add_any"), _add),
  "sub": lambda op, a, b: _add(op, a, _negated(b)),
  "neg": lambda op, x: swapped(x.masks),
  "mul": _multiply,
  "div": _divide,
  **dict.fromkeys(("dot_general", "conv_general_dilated"), _bilinear),
  "scatter-add": _scatter_add,
  "scatter-mul": _scatter_multiply,
  "triangular_solve": _solve,
  "reduce_sum": _sum(over_axes),
  "reduce_window_sum": _sum(in_windows),
  "cumsum": _sum(so_far),
}

WEIGHTED = {"mul", "div", "dot_general", "conv_general_dilated", "scatter-mul"}
WEIGHTED |= {"triangular_solve"}


def carried(op: Operation, masks: Callable[[Value | Known], Masks]) -> Masks:
  """What a linear operation makes of another property's masks: those of its inputs."""
  weighted = op.primitive in WEIGHTED

  def seen(x):
    if isinstance(x, Known) and (weighted or not x.is_float):
      return x
    return Value(*masks(x), x.made_by if isinstance(x, Value) else None)

  return LINEAR[op.primitive](op, *map(seen, op.inputs))


# Finite numbers. A rule holds for real numbers; infinity and NaN are excluded here.

_EXTREMES = {"reduce_max", "reduce_min", "reduce_window_max", "reduce_window_min"}
TOTAL = {*LINEAR, *_EXTREMES} - {"triangular_solve"}  # Finite at every finite input.
TOTAL |= {"exp", "exp2", "expm1", "abs", "square", "cosh", "sinh", "max", "min", "clamp"}
TOTAL |= {"logaddexp", "cumlogsumexp", "cummax", "cummin", "scatter-max", "scatter-min"}
TOTAL |= {"is_finite", "gt", "ge", "lt", "le", "eq", "ne", "and", "or", "not", "sign"}
TOTAL |= {"convert_element_type", "tanh", "logistic", "erf", "sin", "cos"}


def is_over_nothing(op: Operation, x: Value | Known) -> np.ndarray:
  """Where a maximum or minimum has no elements, and so is infinite."""
  if op.primitive.startswith("reduce_window"):
    return ~np.isfinite(op.bind(np.zeros(x.shape, np.float32)))
  return uniform(op.primitive.startswith("reduce") and 0 in x.shape, op.shape)


def is_total(x: Any) -> bool:
  """Whether a value is a finite number whatever the input, as functions on all of R^n make it.

  What is proved convex or concave is; of what is not, every operation must be.
  """
  todo, seen = [x], set()
  while todo:
    node = todo.pop()
    if id(node) in seen or not isinstance(node, Value) or node.made_by is None:
      continue
    seen.add(id(node))
    if node.is_real and not node.is_lost:
      continue
    op = node.made_by
    if op.primitive not in TOTAL:
      return False
    if op.primitive == "select_n" and isinstance(op.inputs[0], Value):
      test = op.inputs[0].made_by
      if test is not None and test.primitive == "is_finite" and test.inputs[0] is op.inputs[2]:
        todo.append(op.inputs[1])  # x where it is finite, else this.
        continue
    divisor = op.inputs[1] if op.primitive == "div" else None
    if isinstance(divisor, Value) or (divisor is not None and not has_no_zero(divisor)):
      return False
    if op.primitive == "convert_element_type" and all(
      is_float(v.aval.dtype) for v in (*op.eqn.invars, *op.eqn.outvars)
    ):
      return False  # To 8 bits: NaN beyond their range.
    if op.primitive in _EXTREMES and is_over_nothing(op, op.inputs[0]).any():
      return False
    # Of a clamp both bounds must be finite here: between two equal infinities it is infinite.
    bounds = op.primitive if op.primitive in ("max", "min") else ""
    if not is_defined(bounds, op.inputs):
      return False
    todo += op.inputs
  return True


def is_defined(primitive: str, inputs: Sequence[Value | Known]) -> bool:
  """Whether no known number is NaN or infinite, but for a bound that does not bind."""
  known = [x for x in inputs if isinstance(x, Known) and not is_nowhere(x.not_finite)]
  floats = [a for x in known for a in (x.low, x.high)]
  binds = {"max": np.isposinf, "min": np.isneginf, "clamp": np.zeros_like}.get(primitive, np.isinf)
  return not any(np.isnan(a).any() or np.any(binds(a)) for a in floats)
