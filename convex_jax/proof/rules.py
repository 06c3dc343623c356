"""The rules of disciplined convex programming, one per primitive, element by element.

Affine maps of either sign, sums, non-negative weights, maxima, and convex non-decreasing
functions keep convexity (Grant, Boyd and Ye 2006, "Disciplined Convex Programming"). Turning
the sign swaps convex and concave, so that a linear operation P with weights W = W+ - W- gives

    not_convex(P x)  = P(not_convex(x), W+)  or P(not_concave(x), W-)
    not_concave(P x) = P(not_concave(x), W+) or P(not_convex(x), W-).

A primitive without a rule loses both. No rule is about a function that is undefined somewhere
(sqrt, log, 1 / x): a proof must hold on all of R^n.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from convex_jax.proof.values import (
  Known,
  Masks,
  Value,
  composed,
  either,
  is_nowhere,
  is_uniform,
  uniform,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Equation:
  """An equation of a jaxpr with one output, as a rule sees it."""

  eqn: jex.JaxprEqn

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(self.eqn.outvars[0].aval.shape)

  @property
  def params(self) -> dict[str, Any]:
    return self.eqn.params

  def bind(self, *arrays: np.ndarray, **changed: Any) -> np.ndarray:
    """Applies the primitive to other arrays than the equation's."""
    params = {**self.params, **changed}
    return np.asarray(self.eqn.primitive.bind(*map(jnp.asarray, arrays), **params))


def lost(e: Equation, *_: Any) -> Masks:
  """Nothing is proved: there is no rule, or its conditions do not hold."""
  yes = uniform(True, e.shape)
  return yes, yes


# Moves of elements. They compute nothing, so the masks move in the same way.


def _moving(data: Callable[[int], range], padded: bool = False):
  """Moves the elements of the inputs at the positions `data(count)`; the rest are indices."""

  def rule(e: Equation, *inputs):
    moved = data(len(inputs))
    if any(isinstance(x, Value) for i, x in enumerate(inputs) if i not in moved):
      return lost(e)

    def move(masks):
      if all(map(is_nowhere, masks)):
        return uniform(False, e.shape)
      if not padded and all(is_uniform(m) and m.size and m.flat[0] for m in masks):
        return uniform(True, e.shape)
      arrays = [x.array if isinstance(x, Known) else x.masks[0] for x in inputs]
      for i, mask in zip(moved, masks, strict=True):
        arrays[i] = mask
      return e.bind(*arrays)

    not_convex, not_concave = zip(*(inputs[i].masks for i in moved), strict=True)
    return move(not_convex), move(not_concave)

  return rule


def _gather(e: Equation, x, indices) -> Masks:
  """Indices out of bounds give the fill value, by default NaN, which is not convex."""
  if isinstance(indices, Value):
    return lost(e)
  fill = e.params["fill_value"]
  outside = fill is None or not np.isfinite(fill)
  nc, nk = (e.bind(m, indices.array, fill_value=outside) for m in x.masks)
  return nc, nk


# Linear operations: sums keep convexity, known factors keep or swap it by their sign.


def _signed(e: Equation, x: Value, weights: np.ndarray, apply: Callable) -> Masks:
  """A linear operation `apply(mask, part of the weights)`, by the signs of its weights."""
  if x.is_lost and not weights.all() and not is_total(x):
    return lost(e)  # 0 times a value that may be infinite is not 0.
  plus, minus = weights > 0, weights < 0

  def one(same, turned):
    parts = [
      apply(mask, part)
      for mask, part in ((same, plus), (turned, minus))
      if not is_nowhere(mask) and part.any()
    ]
    return either(*parts) if parts else uniform(False, e.shape)

  return one(*x.masks), one(*x.masks[::-1])


def _bilinear(e: Equation, a, b) -> Masks:
  """`dot_general`, `conv_general_dilated`: linear where one side is known."""
  if isinstance(a, Value) and isinstance(b, Value):
    return lost(e)
  x, weights, first = (a, b.array, True) if isinstance(a, Value) else (b, a.array, False)

  def apply(mask, part):
    pair = (mask, part) if first else (part, mask)
    ones = [np.asarray(array, np.float32) for array in pair]  # Sums of 0 and 1: no rounding.
    return e.bind(*ones, preferred_element_type=np.dtype(np.float32)) > 0.5

  return _signed(e, x, weights, apply)


def _multiply(e: Equation, a, b) -> Masks:
  if isinstance(a, Value) and isinstance(b, Value):
    return _square(e, a) if a is b else lost(e)
  x, weights = (a, b.array) if isinstance(a, Value) else (b, a.array)
  return _signed(e, x, weights, lambda mask, part: np.broadcast_to(mask & part, e.shape))


def _divide(e: Equation, a, b) -> Masks:
  if isinstance(b, Value) or (b.array == 0).any():
    return lost(e)
  return _multiply(e, a, Known(np.sign(b.array)))


def _add(e: Equation, a, b) -> Masks:
  nc, nk = (either(p, q) for p, q in zip(a.masks, b.masks, strict=True))
  return np.broadcast_to(nc, e.shape), np.broadcast_to(nk, e.shape)


def _subtract(e: Equation, a, b) -> Masks:
  return _add(e, a, Value(*b.masks[::-1]))


# Scalar functions and bounds: a composition with a convex function of known monotonicity.


def _scalar(convex: bool, concave: bool, rising: bool, falling: bool):
  return lambda e, x: composed(x, convex, concave, rising, falling)


_increasing_convex = _scalar(True, False, True, False)


def _square(e: Equation, x: Value) -> Masks:
  """An even power: convex but not monotone, so convex where x is affine."""
  return composed(x, True, False, False, False)


def _integer_power(e: Equation, x: Value) -> Masks:
  power = e.params["y"]
  if power == 1:
    return x.masks
  return _square(e, x) if power > 0 and power % 2 == 0 else lost(e)


def maximum(e: Equation, a, b) -> Masks:
  """Convex where both are, like any convex function that is non-decreasing in both."""
  return _add(e, a, b)[0], uniform(True, e.shape)


def _minimum(e: Equation, a, b) -> Masks:
  return uniform(True, e.shape), _add(e, a, b)[1]


def _clamp(e: Equation, low, x, high) -> Masks:
  """min(max(x, low), high): convex where no upper bound cuts, concave where no lower one does."""
  if not isinstance(low, Known) or not isinstance(high, Known):
    return lost(e)
  if np.isposinf(low.array).any() or np.isneginf(high.array).any():
    return lost(e)
  return either(x.masks[0], high.array < np.inf), either(x.masks[1], low.array > -np.inf)


# Reductions: a sum is convex where all its terms are; so is a maximum, unless it is over nothing
# and so infinite.


def _over_axes(e: Equation, mask: np.ndarray) -> np.ndarray:
  if is_uniform(mask) and mask.size:
    return uniform(bool(mask.flat[0]), e.shape)
  return np.asarray(mask.any(tuple(e.params["axes"])))


def _in_windows(e: Equation, mask: np.ndarray) -> np.ndarray:
  """Whether a window holds a True, of a primitive that takes sums or maxima."""
  return uniform(False, e.shape) if is_nowhere(mask) else e.bind(mask.astype(np.float32)) > 0.5


def _in_minimum_windows(e: Equation, mask: np.ndarray) -> np.ndarray:
  return uniform(False, e.shape) if is_nowhere(mask) else e.bind(-mask.astype(np.float32)) < -0.5


def _so_far(e: Equation, mask: np.ndarray) -> np.ndarray:
  axis = e.params["axis"]
  flip = (lambda m: np.flip(m, axis)) if e.params["reverse"] else (lambda m: m)
  return flip(np.logical_or.accumulate(flip(mask), axis))


def _is_over_nothing(e: Equation, x: Value | Known) -> np.ndarray:
  """Where a maximum or minimum has no elements, and so is infinite."""
  if e.eqn.primitive.name.startswith("reduce_window"):
    return ~np.isfinite(e.bind(np.zeros(x.shape, np.float32)))
  return uniform(0 in x.shape, e.shape)


def _sum(gather: Callable[[Equation, np.ndarray], np.ndarray]):
  return lambda e, x: (gather(e, x.masks[0]), gather(e, x.masks[1]))


def _largest(gather):
  return lambda e, x: (
    either(gather(e, x.masks[0]), _is_over_nothing(e, x)),
    uniform(True, e.shape),
  )


def _smallest(gather):
  return lambda e, x: (
    uniform(True, e.shape),
    either(gather(e, x.masks[1]), _is_over_nothing(e, x)),
  )


_first = _moving(lambda n: range(1))
_all = _moving(lambda n: range(n))

RULES: dict[str, Callable[..., Masks]] = {
  "broadcast_in_dim": _first,
  "reshape": _first,
  "transpose": _first,
  "squeeze": _first,
  "rev": _first,
  "slice": _first,
  "dynamic_slice": _first,
  "tile": _first,
  "concatenate": _all,
  "stack": _all,
  "pad": _moving(lambda n: range(n), padded=True),
  "select_n": _moving(lambda n: range(1, n)),
  "dynamic_update_slice": _moving(lambda n: range(2)),
  "gather": _gather,
  "add": _add,
  "add_any": _add,
  "sub": _subtract,
  "mul": _multiply,
  "div": _divide,
  "neg": lambda e, x: x.masks[::-1],
  "dot_general": _bilinear,
  "conv_general_dilated": _bilinear,
  "reduce_sum": _sum(_over_axes),
  "reduce_window_sum": _sum(_in_windows),
  "cumsum": _sum(_so_far),
  "exp": _increasing_convex,
  "exp2": _increasing_convex,
  "expm1": _increasing_convex,
  "abs": _square,
  "square": _square,
  "integer_pow": _integer_power,
  "max": maximum,
  "min": _minimum,
  "clamp": _clamp,
  "reduce_max": _largest(_over_axes),
  "reduce_window_max": _largest(_in_windows),
  "cummax": _largest(_so_far),
  "reduce_min": _smallest(_over_axes),
  "reduce_window_min": _smallest(_in_minimum_windows),
  "cummin": _smallest(_so_far),
}

# Finite numbers. A rule holds for real numbers; infinity and NaN are excluded here.

_EXTREMES = {"reduce_max", "reduce_min", "reduce_window_max", "reduce_window_min"}
TOTAL = {*RULES} - {"integer_pow"}  # Finite at every finite input.
TOTAL |= {"is_finite", "gt", "ge", "lt", "le", "eq", "ne", "and", "or", "not", "sign"}
TOTAL |= {"convert_element_type", "custom_jvp_call", "tanh", "logistic", "erf", "sin", "cos"}


def is_total(x: Any) -> bool:
  """Whether a value is a finite number whatever the input, as functions on all of R^n make it."""
  todo, seen = [x], set()
  while todo:
    node = todo.pop()
    if id(node) in seen or not isinstance(node, Value) or node.made_by is None:
      continue
    seen.add(id(node))
    op = node.made_by
    if op.primitive not in TOTAL:
      return False
    known = [i.array for i in op.inputs if isinstance(i, Known)]
    if op.primitive == "div" and (isinstance(op.inputs[1], Value) or (known[-1] == 0).any()):
      return False
    if op.primitive == "gather" and "FILL" in str(op.params["mode"]):
      return False
    if (
      op.primitive in _EXTREMES
      and op.eqn
      and _is_over_nothing(Equation(op.eqn), op.inputs[0]).any()
    ):
      return False
    bounded = op.primitive in ("max", "min")  # An infinite bound does not bind.
    if not bounded and not all(np.isfinite(k).all() for k in known if k.dtype == np.float64):
      return False
    todo += op.inputs
  return True


def is_defined(primitive: str, inputs: Sequence[Value | Known]) -> bool:
  """Whether no known number is NaN or infinite, but for a bound that does not bind."""
  floats = [x.array for x in inputs if isinstance(x, Known) and x.array.dtype == np.float64]
  if primitive == "max":
    return not any(np.isnan(a).any() or np.isposinf(a).any() for a in floats)
  if primitive == "min":
    return not any(np.isnan(a).any() or np.isneginf(a).any() for a in floats)
  if primitive == "clamp":
    return not any(np.isnan(a).any() for a in floats)
  return all(np.isfinite(a).all() for a in floats)
