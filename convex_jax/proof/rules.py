"""The rules of disciplined convex programming, one per primitive, element by element.

Affine maps of either sign, sums, non-negative weights, maxima, and convex non-decreasing
functions keep convexity (Grant, Boyd and Ye 2006, "Disciplined Convex Programming"). Turning
the sign swaps convex and concave, so that a linear operation P with weights W = W+ - W- gives

    not_convex(P x)  = P(not_convex(x), W+)  or P(not_concave(x), W-)
    not_concave(P x) = P(not_concave(x), W+) or P(not_convex(x), W-).

A primitive without a rule loses both. No rule is about a function that is undefined somewhere
(sqrt, log, 1 / x): a proof must hold on all of R^n.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from convex_jax.proof.values import (
  Known,
  Masks,
  Operation,
  Value,
  composed,
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


# Moves of elements. They compute nothing, so the masks move in the same way.


def _moving(data: Callable[[int], range], padded: bool = False):
  """Moves the elements of the inputs at the positions `data(count)`; the rest are indices."""

  def rule(op: Operation, *inputs):
    moved = data(len(inputs))
    indices = [x for i, x in enumerate(inputs) if i not in moved]
    if any(isinstance(x, Value) for x in indices):
      return lost(op)
    if not all(x.is_exact for x in indices):
      return _any_of(op, inputs[1:]) if op.primitive == "select_n" else lost(op)

    def move(masks):
      if all(map(is_nowhere, masks)):
        return uniform(False, op.shape)
      if not padded and all(is_uniform(m) and m.size and m.flat[0] for m in masks):
        return uniform(True, op.shape)
      arrays = [x.low if isinstance(x, Known) else x.masks[0] for x in inputs]
      for i, mask in zip(moved, masks, strict=True):
        arrays[i] = mask
      return np.asarray(op.bind(*arrays))

    not_convex, not_concave = zip(*(inputs[i].masks for i in moved), strict=True)
    return move(not_convex), move(not_concave)

  return rule


def _any_of(op: Operation, cases) -> Masks:
  """One of the cases, always the same one, but rounding decides which."""
  nc, nk = (either(*masks) for masks in zip(*(c.masks for c in cases), strict=True))
  return np.broadcast_to(nc, op.shape), np.broadcast_to(nk, op.shape)


def _gather(op: Operation, x, indices) -> Masks:
  """Indices out of bounds give the fill value, by default NaN, which is not convex."""
  if isinstance(indices, Value) or not indices.is_exact:
    return lost(op)
  fill = op.params["fill_value"]
  outside = fill is None or not np.isfinite(fill)
  nc, nk = (np.asarray(op.bind(m, indices.low, fill_value=outside)) for m in x.masks)
  return nc, nk


# Linear operations: sums keep convexity, known factors keep or swap it by their sign.


def _signed(op: Operation, x: Value, weights: Known, apply: Callable) -> Masks:
  """A linear operation `apply(mask, part of the weights)`, by the signs that weights may have."""
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

  def apply(mask, part):
    pair = (mask, part) if first else (part, mask)
    ones = [np.asarray(array, np.float32) for array in pair]  # Sums of 0 and 1: no rounding.
    return np.asarray(op.bind(*ones, preferred_element_type=np.dtype(np.float32))) > 0.5

  return _signed(op, x, weights, apply)


def _multiply(op: Operation, a, b) -> Masks:
  if isinstance(a, Value) and isinstance(b, Value):
    return _square(op, a) if a is b else lost(op)
  x, weights = (a, b) if isinstance(a, Value) else (b, a)
  return _signed(op, x, weights, lambda mask, part: np.broadcast_to(mask & part, op.shape))


def _divide(op: Operation, a, b) -> Masks:
  if isinstance(b, Value) or not has_no_zero(b):
    return lost(op)
  return _multiply(op, a, Known.exactly(np.sign(b.low)))


def has_no_zero(x: Known) -> bool:
  """Whether all entries of a known number are surely other than 0."""
  return bool(((x.low > 0) | (x.high < 0)).all())


def _add(op: Operation, a, b) -> Masks:
  nc, nk = (either(p, q) for p, q in zip(a.masks, b.masks, strict=True))
  return np.broadcast_to(nc, op.shape), np.broadcast_to(nk, op.shape)


def _negated(x: Value | Known) -> Value:
  return Value(*swapped(x.masks))


# Scalar functions and bounds: a composition with a convex function of known monotonicity.


def _exponential(op: Operation, x: Value) -> Masks:
  return composed(x, convex=True, concave=False, rising=True, falling=False)


def _square(op: Operation, x: Value) -> Masks:
  """Even powers and |x|: convex but not monotone, so convex where x is affine."""
  return composed(x, convex=True, concave=False, rising=False, falling=False)


def _integer_power(op: Operation, x: Value) -> Masks:
  power = op.params["y"]
  if power == 1:
    return x.masks
  return _square(op, x) if power > 0 and power % 2 == 0 else lost(op)


def maximum(op: Operation, a, b) -> Masks:
  """Convex where both are, like any convex function that is non-decreasing in both."""
  return _add(op, a, b)[0], uniform(True, op.shape)


def _clamp(op: Operation, low, x, high) -> Masks:
  """min(max(x, low), high): convex where no upper bound cuts, concave where no lower one does."""
  if not isinstance(low, Known) or not isinstance(high, Known):
    return lost(op)
  if np.isposinf(low.high).any() or np.isneginf(high.low).any():
    return lost(op)
  return either(x.masks[0], high.low < np.inf), either(x.masks[1], low.high > -np.inf)


# Reductions: a sum is convex where all its terms are; so is a maximum, unless it is over nothing
# and so infinite.


def _over_axes(op: Operation, mask: np.ndarray) -> np.ndarray:
  if is_uniform(mask) and mask.size:
    return uniform(bool(mask.flat[0]), op.shape)
  return np.asarray(mask.any(tuple(op.params["axes"])))


def _in_windows(op: Operation, mask: np.ndarray) -> np.ndarray:
  """Whether a window holds a True, for a primitive that takes sums, maxima or minima."""
  sign = -1 if op.primitive == "reduce_window_min" else 1
  if is_nowhere(mask):
    return uniform(False, op.shape)
  return sign * np.asarray(op.bind(sign * mask.astype(np.float32))) > 0.5


def _so_far(op: Operation, mask: np.ndarray) -> np.ndarray:
  axis = op.params["axis"]
  flip = (lambda m: np.flip(m, axis)) if op.params["reverse"] else (lambda m: m)
  return flip(np.logical_or.accumulate(flip(mask), axis))


def _is_over_nothing(op: Operation, x: Value | Known) -> np.ndarray:
  """Where a maximum or minimum has no elements, and so is infinite."""
  if op.primitive.startswith("reduce_window"):
    return ~np.isfinite(op.bind(np.zeros(x.shape, np.float32)))
  return uniform(0 in x.shape, op.shape)


def _sum(gather: Callable[[Operation, np.ndarray], np.ndarray]):
  return lambda op, x: (gather(op, x.masks[0]), gather(op, x.masks[1]))


def _largest(gather):
  def rule(op: Operation, x):
    return either(gather(op, x.not_convex), _is_over_nothing(op, x)), uniform(True, op.shape)

  return rule


def _smallest(gather):
  return lambda op, x: swapped(_largest(gather)(op, _negated(x)))


_first = _moving(lambda n: range(1))
_all = _moving(lambda n: range(n))

RULES: dict[str, Callable[..., Masks]] = {
  **dict.fromkeys(("broadcast_in_dim", "reshape", "transpose", "squeeze", "tile"), _first),
  **dict.fromkeys(("rev", "slice", "dynamic_slice"), _first),
  **dict.fromkeys(("concatenate", "stack"), _all),
  "pad": _moving(lambda n: range(n), padded=True),
  "select_n": _moving(lambda n: range(1, n)),
  "dynamic_update_slice": _moving(lambda n: range(2)),
  "gather": _gather,
  **dict.fromkeys(("add", "add_any"), _add),
  "sub": lambda op, a, b: _add(op, a, _negated(b)),
  "mul": _multiply,
  "div": _divide,
  "neg": lambda op, x: swapped(x.masks),
  **dict.fromkeys(("dot_general", "conv_general_dilated"), _bilinear),
  "reduce_sum": _sum(_over_axes),
  "reduce_window_sum": _sum(_in_windows),
  "cumsum": _sum(_so_far),
  **dict.fromkeys(("exp", "exp2", "expm1"), _exponential),
  **dict.fromkeys(("abs", "square"), _square),
  "integer_pow": _integer_power,
  **dict.fromkeys(("max", "logaddexp"), maximum),  # `log_sum_exp` names the latter.
  "min": lambda op, a, b: swapped(maximum(op, _negated(a), _negated(b))),
  "clamp": _clamp,
  "reduce_max": _largest(_over_axes),
  "reduce_window_max": _largest(_in_windows),
  **dict.fromkeys(("cummax", "cumlogsumexp"), _largest(_so_far)),
  "reduce_min": _smallest(_over_axes),
  "reduce_window_min": _smallest(_in_windows),
  "cummin": _smallest(_so_far),
}

# Finite numbers. A rule holds for real numbers; infinity and NaN are excluded here.

_EXTREMES = {"reduce_max", "reduce_min", "reduce_window_max", "reduce_window_min"}
TOTAL = {*RULES} - {"integer_pow"}  # Finite at every finite input.
TOTAL |= {"is_finite", "gt", "ge", "lt", "le", "eq", "ne", "and", "or", "not", "sign"}
TOTAL |= {"convert_element_type", "tanh", "logistic", "erf", "sin", "cos"}


def is_total(x: Any) -> bool:
  """Whether a value is a finite number whatever the input, as functions on all of R^n make it."""
  todo, seen = [x], set()
  while todo:
    node = todo.pop()
    if id(node) in seen or not isinstance(node, Value) or node.made_by is None:
      continue
    if not node.is_lost:
      continue  # A convex or concave function on all of R^n is finite.
    seen.add(id(node))
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
    if op.primitive == "gather" and "FILL" in str(op.params["mode"]):
      return False
    if op.primitive in _EXTREMES and _is_over_nothing(op, op.inputs[0]).any():
      return False
    # Of a clamp both bounds must be finite here: between two equal infinities it is infinite.
    bounds = op.primitive if op.primitive in ("max", "min") else ""
    if not is_defined(bounds, op.inputs):
      return False
    todo += op.inputs
  return True


def is_defined(primitive: str, inputs: Sequence[Value | Known]) -> bool:
  """Whether no known number is NaN or infinite, but for a bound that does not bind."""
  floats = [a for x in inputs if isinstance(x, Known) and x.is_float for a in (x.low, x.high)]
  binds = {"max": np.isposinf, "min": np.isneginf, "clamp": np.zeros_like}.get(primitive, np.isinf)
  return not any(np.isnan(a).any() or np.any(binds(a)) for a in floats)
