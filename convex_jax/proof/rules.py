"""The rules of disciplined convex programming, element by element.

Affine maps of either sign, sums, non-negative weights, maxima, and convex non-decreasing
functions keep convexity (Grant, Boyd and Ye 2006). A `Value` carries two boolean masks of
its own shape, "not proved convex" and "not proved concave"; affine is neither. A linear
operation P with weights W = W+ - W- sends

    not_convex(P x) = P(not_convex(x), W+) or P(not_concave(x), W-)

and likewise for concave. `RULES` has a function for each primitive; what has none is lost.
No rule here has a function (sqrt, 1 / x) that is not defined everywhere; log is known of
sums of exponentials alone.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from convex_jax.proof.source import Place

Masks = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Known:
  """A number that does not depend on the input; `origins`: weights that it is made of."""

  array: np.ndarray
  origins: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

  @property
  def shape(self) -> tuple[int, ...]:
    return self.array.shape

  @property
  def masks(self) -> Masks:
    no = uniform(False, self.shape)
    return no, no


@dataclasses.dataclass(frozen=True, eq=False)
class Operation:
  """One step of the computation: what, of what, where; `order` counts from the input."""

  primitive: str
  eqn: Any  # Of the jaxpr; None at the border of a loop.
  inputs: tuple["Known | Value", ...]
  place: Place
  order: int
  scalar: Any = None  # (z, piecewise.Shape) where the result is a scalar function of z.
  note: str = ""  # What is wrong with a scalar function that was looked through.


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
  """What depends on the input: where it is not proved convex, and not proved concave."""

  not_convex: np.ndarray
  not_concave: np.ndarray
  made_by: Operation | None = None  # None: the input itself.
  is_real: bool = True  # Or a condition, or an index.

  @property
  def shape(self) -> tuple[int, ...]:
    return self.not_convex.shape

  @property
  def masks(self) -> Masks:
    return self.not_convex, self.not_concave

  @property
  def is_affine(self) -> bool:
    return not (self.not_convex.any() or self.not_concave.any())

  @property
  def is_lost(self) -> bool:
    """Whether some element is proved neither convex nor concave."""
    return bool((self.not_convex & self.not_concave).any())


# Masks that are the same everywhere, as nearly all are, take no memory and no time.


def uniform(value: bool, shape: Sequence[int]) -> np.ndarray:
  """One value everywhere."""
  return np.broadcast_to(np.bool_(value), tuple(shape))


def _is_uniform(mask: np.ndarray) -> bool:
  return not any(mask.strides)


def tidy(mask: Any) -> np.ndarray:
  """The same mask, stored as `uniform` where it is."""
  mask = np.asarray(mask)
  if _is_uniform(mask):
    return mask
  if not mask.any():
    return uniform(False, mask.shape)
  return uniform(True, mask.shape) if mask.all() else mask


def _nowhere(mask: np.ndarray) -> bool:
  return _is_uniform(mask) and not (mask.size and mask.flat[0])


def _or(*masks: np.ndarray) -> np.ndarray:
  masks = tuple(m for m in masks if not _nowhere(m)) or masks[:1]
  return functools.reduce(np.logical_or, masks)


def composed(x: Value, convex, concave, rising, falling) -> Masks:
  """Masks of g(x), g a scalar function with these properties (booleans, or arrays of them)."""

  def one(is_curved, same, turned):
    mask = np.where(rising, same, np.where(falling, turned, _or(same, turned)))
    return np.where(is_curved, mask, True)

  if isinstance(convex, bool):  # The common case, by far cheaper.
    both = _or(*x.masks)
    up = x.not_convex if rising else x.not_concave if falling else both
    down = x.not_concave if rising else x.not_convex if falling else both
    yes = uniform(True, x.shape)
    return (up if convex else yes), (down if concave else yes)
  return one(convex, *x.masks), one(concave, *x.masks[::-1])


# Rules: (equation, inputs) to the masks of its only output.


@dataclasses.dataclass(frozen=True)
class Equation:
  """An equation of a jaxpr, as a rule sees it."""

  eqn: Any

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(self.eqn.outvars[0].aval.shape)

  @property
  def params(self) -> dict[str, Any]:
    return self.eqn.params

  def bind(self, *arrays: np.ndarray, **changed: Any) -> Any:
    """The primitive itself, on other arrays than the equation's."""
    return self.eqn.primitive.bind(*map(jnp.asarray, arrays), **{**self.params, **changed})


def lost(e: Equation, *_: Any) -> Masks:
  """Nothing is proved: no rule, or one whose conditions fail."""
  yes = uniform(True, e.shape)
  return yes, yes


def _structural(positions: Callable[[int], range], padded: bool = False):
  """Moves elements, computes nothing: the masks move alike. The rest are known indices."""

  def rule(e: Equation, *inputs):
    data = [inputs[i] for i in positions(len(inputs))]
    if any(isinstance(x, Value) for i, x in enumerate(inputs) if i not in positions(len(inputs))):
      return lost(e)

    def move(masks):
      if all(map(_nowhere, masks)):
        return uniform(False, e.shape)
      if not padded and all(_is_uniform(m) and m.size and m.flat[0] for m in masks):
        return uniform(True, e.shape)
      arrays = [x.array if isinstance(x, Known) else x.masks[0] for x in inputs]
      for i, mask in zip(positions(len(inputs)), masks, strict=True):
        arrays[i] = mask
      return np.asarray(e.bind(*arrays))

    return move([x.masks[0] for x in data]), move([x.masks[1] for x in data])

  return rule


def _signed(e: Equation, x: Value, weights: np.ndarray, apply: Callable) -> Masks:
  """A linear operation `apply(mask, part of the weights)`, by the signs of its weights."""
  if x.is_lost and not weights.all() and not _is_total(x):
    return lost(e)  # 0 times what may be infinite is not 0.
  plus, minus = weights > 0, weights < 0

  def one(same, turned):
    parts = [
      apply(mask, part)
      for mask, part in ((same, plus), (turned, minus))
      if not _nowhere(mask) and part.any()
    ]
    return _or(*parts) if parts else uniform(False, e.shape)

  return one(*x.masks), one(*x.masks[::-1])


def _bilinear(e: Equation, a, b) -> Masks:
  """`dot_general`, `conv_general_dilated`: linear where one side is known."""
  if isinstance(a, Value) and isinstance(b, Value):
    return lost(e)
  x, weights, first = (a, b.array, True) if isinstance(a, Value) else (b, a.array, False)

  def apply(mask, part):
    pair = (mask, part) if first else (part, mask)
    ones = [np.asarray(array, np.float32) for array in pair]  # Sums of 0 and 1: no rounding.
    return np.asarray(e.bind(*ones, preferred_element_type=np.dtype(np.float32))) > 0.5

  return _signed(e, x, weights, apply)


def _multiply(e: Equation, a, b) -> Masks:
  if isinstance(a, Value) and isinstance(b, Value):
    return _even_power(e, a) if a is b else lost(e)
  x, weights = (a, b.array) if isinstance(a, Value) else (b, a.array)
  return _signed(e, x, weights, lambda mask, part: np.broadcast_to(mask & part, e.shape))


def _divide(e: Equation, a, b) -> Masks:
  if isinstance(b, Value) or (b.array == 0).any():
    return lost(e)
  return _multiply(e, a, Known(np.sign(b.array)))


def _even_power(e: Equation, x: Value) -> Masks:
  """Convex where x is affine."""
  return _or(*x.masks), uniform(True, e.shape)


def _integer_power(e: Equation, x: Value) -> Masks:
  power = e.params["y"]
  if power == 1:
    return x.masks
  return _even_power(e, x) if power > 0 and power % 2 == 0 else lost(e)


def _add(e: Equation, a, b) -> Masks:
  nc, nk = (_or(p, q) for p, q in zip(a.masks, b.masks, strict=True))
  return np.broadcast_to(nc, e.shape), np.broadcast_to(nk, e.shape)


def _subtract(e: Equation, a, b) -> Masks:
  return _add(e, a, _turned(b))


def _turned(x: Any) -> Value:
  return Value(*x.masks[::-1])


def maximum(e: Equation, a, b) -> Masks:
  """Convex where both are: as any convex function that falls in neither."""
  return _add(e, a, b)[0], uniform(True, e.shape)


def _minimum(e: Equation, a, b) -> Masks:
  return uniform(True, e.shape), _add(e, a, b)[1]


def _clamp(e: Equation, low, x, high) -> Masks:
  """min(max(x, low), high): convex where nothing is cut above, concave where nothing below."""
  if not isinstance(low, Known) or not isinstance(high, Known):
    return lost(e)
  if np.isposinf(low.array).any() or np.isneginf(high.array).any():
    return lost(e)
  return _or(x.masks[0], high.array < np.inf), _or(x.masks[1], low.array > -np.inf)


def _scalar(convex: bool, concave: bool, rising: bool, falling: bool):
  return lambda e, x: composed(x, convex, concave, rising, falling)


def _empty(e: Equation, x: Value | Known) -> np.ndarray:
  """Where a maximum or minimum is one of nothing, and so infinite."""
  if e.eqn.primitive.name.startswith("reduce_window"):
    return ~np.isfinite(np.asarray(e.bind(np.zeros(x.shape, np.float32))))
  return uniform(0 in x.shape, e.shape)


def _over_axes(e: Equation, mask: np.ndarray) -> np.ndarray:
  if _is_uniform(mask) and mask.size:
    return uniform(bool(mask.flat[0]), e.shape)
  return np.asarray(mask.any(tuple(e.params["axes"])))


def _in_windows(e: Equation, mask: np.ndarray) -> np.ndarray:
  return (
    uniform(False, e.shape) if _nowhere(mask) else np.asarray(e.bind(mask.astype(np.float32))) > 0.5
  )


def _so_far(e: Equation, mask: np.ndarray) -> np.ndarray:
  axis = e.params["axis"]
  flip = (lambda m: np.flip(m, axis)) if e.params["reverse"] else (lambda m: m)
  return flip(np.logical_or.accumulate(flip(mask), axis))


def _summed(gather: Callable[[Equation, np.ndarray], np.ndarray]):
  return lambda e, x: (gather(e, x.masks[0]), gather(e, x.masks[1]))


def _largest(gather):
  return lambda e, x: (_or(gather(e, x.masks[0]), _empty(e, x)), uniform(True, e.shape))


def _smallest(gather):
  return lambda e, x: (uniform(True, e.shape), _or(gather(e, x.masks[1]), _empty(e, x)))


def _log_of_sum(e: Equation, x: Value) -> Masks:
  """Log of a sum of exponentials of convex values is convex; of anything else, no rule."""
  inner = _exponents(x)
  if inner is None:
    return lost(e)
  exponent, axes = inner
  nc = exponent.not_convex.any(axes) if axes is not None else exponent.not_convex
  return np.broadcast_to(nc.reshape(e.shape), e.shape), uniform(True, e.shape)


def _exponents(x: Any) -> tuple[Value, tuple[int, ...] | None] | None:
  """(u, axes) where x is the sum over axes of exp(u)."""
  axes = None
  while isinstance(x, Value) and x.made_by is not None:
    op = x.made_by
    if axes is None and op.primitive in _RESHAPES:  # Axes are those of the exponents.
      if op.primitive != "abs" and np.prod(x.shape) != np.prod(op.inputs[0].shape):
        return None  # It repeats elements.
    elif op.primitive == "reduce_sum" and axes is None and 0 not in op.inputs[0].shape:
      axes = tuple(op.eqn.params["axes"])
    elif op.primitive == "exp" and isinstance(op.inputs[0], Value):
      return op.inputs[0], axes
    else:
      return None
    x = op.inputs[0]
  return None


def shifted_log_of_sum(e: Equation, a, b) -> Masks | None:
  """log(sum(exp(u - c))) + c is log(sum(exp(u))) for finite c: how `logsumexp` is computed."""
  for log, shift in ((a, b), (b, a)):
    if not isinstance(log, Value) or log.made_by is None or log.made_by.primitive != "log":
      continue
    inner = _exponents(log.made_by.inputs[0])
    if inner is None or not isinstance(inner[0].made_by, Operation):
      continue
    (exponent, axes), op = inner, inner[0].made_by
    u, c = op.inputs if op.primitive == "sub" else (None, None)
    if axes is None or not isinstance(u, Value) or not _is_total(c):
      continue
    kept = tuple(n for i, n in enumerate(exponent.shape) if i not in axes)
    if u.shape == exponent.shape and _same_along(c, shift, exponent.shape, axes, kept):
      nc = np.asarray(u.not_convex.any(axes))
      return nc.reshape(e.shape), uniform(True, e.shape)
  return None


def _is_total(x: Any) -> bool:
  """Whether a value is a finite number whatever the input: made by functions of all of R."""
  todo, seen = [x], set()
  while todo:
    node = todo.pop()
    if id(node) in seen or not isinstance(node, Value) or node.made_by is None:
      continue
    seen.add(id(node))
    op = node.made_by
    if op.primitive not in _TOTAL:
      return False
    known = [i.array for i in op.inputs if isinstance(i, Known)]
    if op.primitive == "div" and (isinstance(op.inputs[1], Value) or (known[-1] == 0).any()):
      return False
    if op.primitive == "gather" and "FILL" in str(op.eqn.params["mode"]):
      return False
    if op.primitive in _EXTREMES and _empty(Equation(op.eqn), op.inputs[0]).any():
      return False
    bounded = op.primitive in ("max", "min")  # An infinite bound does not bind.
    if not bounded and not all(np.isfinite(k).all() for k in known if k.dtype == np.float64):
      return False
    todo += op.inputs
  return True


def _same_along(c, shift, shape, axes, kept) -> bool:
  """Whether c, seen in `shape`, is `shift` repeated along `axes`."""
  (root_c, index_c), (root_shift, index_shift) = _indices(c), _indices(shift)
  if root_c is not root_shift or index_shift.size != np.prod(kept, dtype=int):
    return False
  expected = np.expand_dims(index_shift.reshape(kept), axes)
  return bool((np.broadcast_to(index_c, shape) == expected).all())


def _indices(x: Any) -> tuple[Any, np.ndarray]:
  """(root, where each element of x comes from in it), back through moves of elements."""
  moves = []
  while isinstance(x, Value) and x.made_by is not None:
    if x.made_by.primitive not in ("broadcast_in_dim", "reshape", "squeeze", "expand_dims"):
      break
    moves.append((x.made_by, x.shape))
    x = x.made_by.inputs[0]
  index = np.arange(int(np.prod(x.shape))).reshape(x.shape)
  for op, shape in reversed(moves):
    if op.primitive == "broadcast_in_dim":
      dims = op.eqn.params["broadcast_dimensions"]
      thin = [1] * len(shape)
      for d, n in zip(dims, index.shape, strict=True):
        thin[d] = n
      index = np.broadcast_to(index.reshape(thin), shape)
    else:
      index = index.reshape(shape)
  return x, index


def _gather(e: Equation, x, indices) -> Masks:
  """What lies outside is filled, with NaN unless asked otherwise."""
  if isinstance(indices, Value):
    return lost(e)
  fill = e.params["fill_value"]
  outside = fill is None or not np.isfinite(fill)
  nc, nk = (np.asarray(e.bind(m, indices.array, fill_value=outside)) for m in x.masks)
  return nc, nk


_only_first = _structural(lambda n: range(1))
_everything = _structural(lambda n: range(n))
_choice = _structural(lambda n: range(1, n))


def _window_any(e: Equation, mask: np.ndarray) -> np.ndarray:
  """Whether a window holds a True; the primitive here takes minima."""
  if _nowhere(mask):
    return uniform(False, e.shape)
  return np.asarray(e.bind(-mask.astype(np.float32))) < -0.5


_RESHAPES = ("abs", "reshape", "broadcast_in_dim", "squeeze", "expand_dims")

RULES: dict[str, Callable[..., Masks]] = {
  "add": _add,
  "add_any": _add,
  "sub": _subtract,
  "mul": _multiply,
  "div": _divide,
  "neg": lambda e, x: x.masks[::-1],
  "dot_general": _bilinear,
  "conv_general_dilated": _bilinear,
  "max": maximum,
  "min": _minimum,
  "clamp": _clamp,
  "exp": _scalar(True, False, True, False),
  "exp2": _scalar(True, False, True, False),
  "expm1": _scalar(True, False, True, False),
  "abs": _scalar(True, False, False, False),
  "square": _even_power,
  "integer_pow": _integer_power,
  "log": _log_of_sum,
  "select_n": _choice,
  "broadcast_in_dim": _only_first,
  "reshape": _only_first,
  "transpose": _only_first,
  "squeeze": _only_first,
  "expand_dims": _only_first,
  "rev": _only_first,
  "slice": _only_first,
  "dynamic_slice": _only_first,
  "gather": _gather,
  "dynamic_update_slice": _structural(lambda n: range(2)),
  "concatenate": _everything,
  "stack": _everything,
  "tile": _only_first,
  "pad": _structural(lambda n: range(n), padded=True),
  "reduce_sum": _summed(_over_axes),
  "reduce_max": _largest(_over_axes),
  "reduce_min": _smallest(_over_axes),
  "reduce_window_sum": _summed(_in_windows),
  "reduce_window_max": _largest(_in_windows),
  "reduce_window_min": _smallest(_window_any),
  "cumsum": _summed(_so_far),
  "cummax": _largest(_so_far),
  "cummin": _smallest(_so_far),
}

# Defined, and finite, for all inputs: what may be subtracted and added again.
_EXTREMES = {"reduce_max", "reduce_min", "reduce_window_max", "reduce_window_min"}
_TOTAL = {*RULES} - {"log", "integer_pow"}
_TOTAL |= {"is_finite", "gt", "ge", "lt", "le", "eq", "ne", "and", "or", "not", "sign"}
_TOTAL |= {"convert_element_type", "custom_jvp_call", "tanh", "logistic", "erf", "sin", "cos"}
