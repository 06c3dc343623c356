"""Curvature of any JAX function of one array, element by element, from its jaxpr.

The rules are those of disciplined convex programming (Grant, Boyd and Ye 2006): affine maps
of either sign, sums, non-negative weights, maxima, and convex non-decreasing functions keep
convexity. Every intermediate array carries two boolean masks of its own shape, "not proved
convex" and "not proved concave" here; affine is neither. What does not depend on the input
is a known number, folded in float64. A linear operation P with weights W = W+ - W- sends

    not_convex(P x)  = P(not_convex(x), W+) or P(not_concave(x), W-)

and likewise for concave. An activation is judged by what it computes, whatever its name:
`piecewise` looks at the scalar function on either side of its kink. What has no rule is
not proved, never guessed. The verdicts hold for the function over the reals, on all of
R^n: no rule here has a function (log, sqrt, 1 / x) that is not defined everywhere.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from convex_jax import piecewise
from convex_jax.places import Place

Masks = tuple[np.ndarray, np.ndarray]
LOOP_LIMIT = 1000  # Iterations of a `scan` that are unrolled; above, no rule.


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
    no = _uniform(False, self.shape)
    return no, no


@dataclasses.dataclass(frozen=True, eq=False)
class Operation:
  """One step of the computation: what, of what, where; `order` counts from the input."""

  primitive: str
  params: dict[str, Any]
  inputs: tuple["Known | Value", ...]
  place: Place
  order: int
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


def analyse(
  function: Callable[..., Any], example: Any, weights: Any = None
) -> tuple[list[Value | Known], Any]:
  """The outputs of `function`, flat, as `Value`s, and the tree they make.

  Args:
    function: of an array, or of (weights, array) where `weights` are given.
    example: the array, or its `jax.ShapeDtypeStruct`; only shape and dtype matter.
    weights: a tree of numbers, whose paths name them in explanations.
  """
  if weights is None:
    jaxpr, shape = jax.make_jaxpr(function, return_shape=True)(example)
    given = []
  else:
    jaxpr, shape = jax.make_jaxpr(function, return_shape=True)(weights, example)
    given = [
      Known(real(leaf), {_name(path): real(leaf)})
      for path, leaf in jax.tree_util.tree_leaves_with_path(weights)
    ]
  size = tuple(example.shape)
  entry = Value(_uniform(False, size), _uniform(False, size))
  consts = [Known(real(c)) for c in jaxpr.consts]
  outputs = Walk().run(jaxpr.jaxpr, consts, [*given, entry], Place())
  return outputs, jax.tree.structure(shape)


def _name(path) -> str:
  return "/".join(str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)


def culprit(output: Value, not_mask: Callable[[Value], np.ndarray]) -> Operation | None:
  """The first operation that leaves `output` without the curvature asked for.

  The earliest operation on the way to `output` that makes something neither convex nor
  concave of what was one of them; or, where its own inputs already lack the curvature
  (`not_mask`), or nothing is lost so far, the earliest that turned the curvature round.
  """

  def lacks(value):
    return bool(not_mask(value).any())

  lost = _earliest([output], lambda v: v.is_lost)
  if lost is not None and lost.note:
    return lost
  turned = _earliest(lost.inputs if lost else [output], lacks)
  return turned or lost


def _earliest(outputs: Sequence[Any], is_bad: Callable[[Value], bool]) -> Operation | None:
  """The earliest operation that makes a bad value of good ones, on the bad ways to `outputs`."""
  found, seen, todo = [], set(), list(outputs)
  while todo:
    value = todo.pop()
    if not isinstance(value, Value) or not value.is_real or id(value) in seen or not is_bad(value):
      continue
    seen.add(id(value))
    if value.made_by is None:
      continue
    above = [v for v in value.made_by.inputs if isinstance(v, Value) and v.is_real and is_bad(v)]
    if above and not value.made_by.note:
      todo += above
    else:
      found.append(value.made_by)
  return min(found, key=lambda op: op.order, default=None)


def real(number: Any) -> Any:
  """A number as it is computed with here: float64 for floats, as it is otherwise."""
  if isinstance(number, jax.Array) and jnp.issubdtype(number.dtype, jax.dtypes.prng_key):
    return number
  array = np.asarray(number)
  return array.astype(np.float64) if jnp.issubdtype(array.dtype, jnp.floating) else array


# Masks that are the same everywhere, as nearly all are, take no memory and no time.


def _uniform(value: bool, shape: Sequence[int]) -> np.ndarray:
  return np.broadcast_to(np.bool_(value), tuple(shape))


def _is_uniform(mask: np.ndarray) -> bool:
  return not any(mask.strides)


def _tidy(mask: Any) -> np.ndarray:
  mask = np.asarray(mask)
  if _is_uniform(mask):
    return mask
  if not mask.any():
    return _uniform(False, mask.shape)
  return _uniform(True, mask.shape) if mask.all() else mask


def _nowhere(mask: np.ndarray) -> bool:
  return _is_uniform(mask) and not (mask.size and mask.flat[0])


def _or(*masks: np.ndarray) -> np.ndarray:
  masks = tuple(m for m in masks if not _nowhere(m)) or masks[:1]
  return functools.reduce(np.logical_or, masks)


def _composed(x: Value, convex, concave, rising, falling) -> Masks:
  """Masks of g(x), g a scalar function with these properties (booleans, or arrays of them)."""

  def one(is_curved, same, turned):
    mask = np.where(rising, same, np.where(falling, turned, _or(same, turned)))
    return np.where(is_curved, mask, True)

  if isinstance(convex, bool):  # The common case, by far cheaper.
    both = _or(*x.masks)
    up = x.not_convex if rising else x.not_concave if falling else both
    down = x.not_concave if rising else x.not_convex if falling else both
    yes = _uniform(True, x.shape)
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


def _lost(e: Equation, *_: Any) -> Masks:
  yes = _uniform(True, e.shape)
  return yes, yes


def _structural(positions: Callable[[int], range], padded: bool = False):
  """Moves elements, computes nothing: the masks move alike. The rest are known indices."""

  def rule(e: Equation, *inputs):
    data = [inputs[i] for i in positions(len(inputs))]
    if any(isinstance(x, Value) for i, x in enumerate(inputs) if i not in positions(len(inputs))):
      return _lost(e)

    def move(masks):
      if all(map(_nowhere, masks)):
        return _uniform(False, e.shape)
      if not padded and all(_is_uniform(m) and m.size and m.flat[0] for m in masks):
        return _uniform(True, e.shape)
      arrays = [x.array if isinstance(x, Known) else x.masks[0] for x in inputs]
      for i, mask in zip(positions(len(inputs)), masks, strict=True):
        arrays[i] = mask
      return np.asarray(e.bind(*arrays))

    return move([x.masks[0] for x in data]), move([x.masks[1] for x in data])

  return rule


def _signed(e: Equation, x: Value, weights: np.ndarray, apply: Callable) -> Masks:
  """A linear operation `apply(mask, part of the weights)`, by the signs of its weights."""
  plus, minus = weights > 0, weights < 0

  def one(same, turned):
    parts = [
      apply(mask, part)
      for mask, part in ((same, plus), (turned, minus))
      if not _nowhere(mask) and part.any()
    ]
    return _or(*parts) if parts else _uniform(False, e.shape)

  return one(*x.masks), one(*x.masks[::-1])


def _bilinear(e: Equation, a, b) -> Masks:
  """`dot_general`, `conv_general_dilated`: linear where one side is known."""
  if isinstance(a, Value) and isinstance(b, Value):
    return _lost(e)
  x, weights, first = (a, b.array, True) if isinstance(a, Value) else (b, a.array, False)

  def apply(mask, part):
    pair = (mask, part) if first else (part, mask)
    ones = [np.asarray(array, np.float32) for array in pair]  # Sums of 0 and 1: no rounding.
    return np.asarray(e.bind(*ones, preferred_element_type=np.dtype(np.float32))) > 0.5

  return _signed(e, x, weights, apply)


def _multiply(e: Equation, a, b) -> Masks:
  if isinstance(a, Value) and isinstance(b, Value):
    return _even_power(e, a) if a is b else _lost(e)
  x, weights = (a, b.array) if isinstance(a, Value) else (b, a.array)
  return _signed(e, x, weights, lambda mask, part: np.broadcast_to(mask & part, e.shape))


def _divide(e: Equation, a, b) -> Masks:
  if isinstance(b, Value) or (b.array == 0).any():
    return _lost(e)
  return _multiply(e, a, Known(np.sign(b.array)))


def _even_power(e: Equation, x: Value) -> Masks:
  """Convex where x is affine."""
  return _or(*x.masks), _uniform(True, e.shape)


def _integer_power(e: Equation, x: Value) -> Masks:
  power = e.params["y"]
  if power == 1:
    return x.masks
  return _even_power(e, x) if power > 0 and power % 2 == 0 else _lost(e)


def _add(e: Equation, a, b) -> Masks:
  nc, nk = (_or(p, q) for p, q in zip(a.masks, b.masks, strict=True))
  return np.broadcast_to(nc, e.shape), np.broadcast_to(nk, e.shape)


def _subtract(e: Equation, a, b) -> Masks:
  return _add(e, a, _turned(b))


def _turned(x: Any) -> Value:
  return Value(*x.masks[::-1])


def _maximum(e: Equation, a, b) -> Masks:
  return _add(e, a, b)[0], _uniform(True, e.shape)


def _minimum(e: Equation, a, b) -> Masks:
  return _uniform(True, e.shape), _add(e, a, b)[1]


def _clamp(e: Equation, low, x, high) -> Masks:
  """min(max(x, low), high): convex where nothing is cut above, concave where nothing below."""
  if not isinstance(low, Known) or not isinstance(high, Known):
    return _lost(e)
  return _or(x.masks[0], high.array < np.inf), _or(x.masks[1], low.array > -np.inf)


def _scalar(convex: bool, concave: bool, rising: bool, falling: bool):
  return lambda e, x: _composed(x, convex, concave, rising, falling)


def _over_axes(e: Equation, mask: np.ndarray) -> np.ndarray:
  if _is_uniform(mask) and mask.size:
    return _uniform(bool(mask.flat[0]), e.shape)
  return np.asarray(mask.any(tuple(e.params["axes"])))


def _in_windows(e: Equation, mask: np.ndarray) -> np.ndarray:
  return (
    _uniform(False, e.shape)
    if _nowhere(mask)
    else np.asarray(e.bind(mask.astype(np.float32))) > 0.5
  )


def _so_far(e: Equation, mask: np.ndarray) -> np.ndarray:
  axis = e.params["axis"]
  flip = (lambda m: np.flip(m, axis)) if e.params["reverse"] else (lambda m: m)
  return flip(np.logical_or.accumulate(flip(mask), axis))


def _summed(gather: Callable[[Equation, np.ndarray], np.ndarray]):
  return lambda e, x: (gather(e, x.masks[0]), gather(e, x.masks[1]))


def _largest(gather):
  return lambda e, x: (gather(e, x.masks[0]), _uniform(True, e.shape))


def _smallest(gather):
  return lambda e, x: (_uniform(True, e.shape), gather(e, x.masks[1]))


def _log_of_sum(e: Equation, x: Value) -> Masks:
  """Log of a sum of exponentials of convex values is convex; of anything else, no rule."""
  inner = _exponents(x)
  if inner is None:
    return _lost(e)
  exponent, axes = inner
  nc = exponent.not_convex.any(axes) if axes is not None else exponent.not_convex
  return np.broadcast_to(nc.reshape(e.shape), e.shape), _uniform(True, e.shape)


def _exponents(x: Any) -> tuple[Value, tuple[int, ...] | None] | None:
  """(u, axes) where x is the sum over axes of exp(u)."""
  axes = None
  while isinstance(x, Value) and x.made_by is not None:
    op = x.made_by
    if op.primitive in ("abs", "reshape", "broadcast_in_dim", "squeeze", "expand_dims"):
      if op.primitive != "abs" and np.prod(x.shape) != np.prod(op.inputs[0].shape):
        return None  # It repeats elements.
    elif op.primitive == "reduce_sum" and axes is None:
      axes = tuple(op.params["axes"])
    elif op.primitive == "exp" and isinstance(op.inputs[0], Value):
      return op.inputs[0], axes
    else:
      return None
    x = op.inputs[0]
  return None


def _shifted_log_of_sum(e: Equation, a, b) -> Masks | None:
  """log(sum(exp(u - c))) + c is log(sum(exp(u))), whatever c: how `logsumexp` is computed."""
  for log, shift in ((a, b), (b, a)):
    if not isinstance(log, Value) or log.made_by is None or log.made_by.primitive != "log":
      continue
    inner = _exponents(log.made_by.inputs[0])
    if inner is None or not isinstance(inner[0].made_by, Operation):
      continue
    (exponent, axes), op = inner, inner[0].made_by
    u, c = op.inputs if op.primitive == "sub" else (None, None)
    if axes is None or not isinstance(u, Value):
      continue
    kept = tuple(n for i, n in enumerate(exponent.shape) if i not in axes)
    if u.shape == exponent.shape and _same_along(c, shift, exponent.shape, axes, kept):
      nc = np.asarray(u.not_convex.any(axes))
      return nc.reshape(e.shape), _uniform(True, e.shape)
  return None


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
      dims = op.params["broadcast_dimensions"]
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
    return _lost(e)
  fill = e.params["fill_value"]
  lost = fill is None or not np.isfinite(fill)
  nc, nk = (np.asarray(e.bind(m, indices.array, fill_value=lost)) for m in x.masks)
  return nc, nk


_only_first = _structural(lambda n: range(1))
_everything = _structural(lambda n: range(n))
_choice = _structural(lambda n: range(1, n))

RULES: dict[str, Callable[..., Masks]] = {
  "add": _add,
  "add_any": _add,
  "sub": _subtract,
  "mul": _multiply,
  "div": _divide,
  "neg": lambda e, x: x.masks[::-1],
  "dot_general": _bilinear,
  "conv_general_dilated": _bilinear,
  "max": _maximum,
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
  "pad": _structural(lambda n: range(n), padded=True),
  "reduce_sum": _summed(_over_axes),
  "reduce_max": _largest(_over_axes),
  "reduce_min": _smallest(_over_axes),
  "reduce_window_sum": _summed(_in_windows),
  "reduce_window_max": _largest(_in_windows),
  "reduce_window_min": _smallest(lambda e, mask: _window_any(e, mask)),
  "cumsum": _summed(_so_far),
  "cummax": _largest(_so_far),
  "cummin": _smallest(_so_far),
}
SAME = {  # Of one value, and the same value over the reals.
  "copy",
  "copy_p",
  "name",
  "optimization_barrier",
  "pvary",
  "reduce_precision",
  "reshard",
  "sharding_constraint",
  "stop_gradient",
}
CALLS = {  # Primitives that run the jaxpr under this parameter.
  "jit": "jaxpr",
  "pjit": "jaxpr",
  "closed_call": "call_jaxpr",
  "core_call": "call_jaxpr",
  "custom_jvp_call": "call_jaxpr",
  "custom_vjp_call": "call_jaxpr",
  "checkpoint": "jaxpr",
  "remat": "jaxpr",
  "remat2": "jaxpr",
}


def _window_any(e: Equation, mask: np.ndarray) -> np.ndarray:
  """Whether a window holds a True; the primitive here takes minima."""
  return (
    _uniform(False, e.shape)
    if _nowhere(mask)
    else np.asarray(e.bind(-mask.astype(np.float32))) < -0.5
  )


class Walk:
  """One pass over a jaxpr and all it calls."""

  def __init__(self):
    self._order = 0

  def run(self, jaxpr, consts, arguments, place: Place) -> list[Value | Known]:
    """The outputs of `jaxpr` for these inputs; `place`: where the call to it stands."""
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))

    def read(var):
      return Known(real(var.val)) if isinstance(var, jex.Literal) else env[var]

    for eqn in _needed(jaxpr):
      inputs = [read(v) for v in eqn.invars]
      outputs = self._equation(eqn, inputs, place.within(eqn))
      env.update(zip(eqn.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars]

  def _equation(self, eqn, inputs, place: Place) -> list[Value | Known]:
    name, params = eqn.primitive.name, eqn.params
    if name in CALLS and not (name == "custom_jvp_call" and _is_logaddexp(eqn)):
      inner = params[CALLS[name]]
      closed = isinstance(inner, jex.ClosedJaxpr)
      jaxpr, consts = (inner.jaxpr, inner.consts) if closed else (inner, [])
      return self.run(jaxpr, [Known(real(c)) for c in consts], inputs, place)
    if name == "scan" and not all(isinstance(x, Known) for x in inputs):
      unrolled = self._scan(params, inputs, place)
      if unrolled is not None:
        return unrolled
    if name == "cond" and isinstance(inputs[0], Known):
      branch = params["branches"][int(np.clip(inputs[0].array, 0, len(params["branches"]) - 1))]
      return self.run(branch.jaxpr, [Known(real(c)) for c in branch.consts], inputs[1:], place)
    if all(isinstance(x, Known) for x in inputs):
      origins = {n: a for x in inputs for n, a in x.origins.items()}
      return [Known(real(a), origins) for a in fold(eqn, [x.array for x in inputs])]
    if name in SAME or (name == "convert_element_type" and _stays_real(eqn)):
      return inputs
    return self._values(eqn, inputs, place)

  def _values(self, eqn, inputs, place: Place) -> list[Value | Known]:
    self._order += 1
    name = eqn.primitive.name
    op = Operation(name, eqn.params, tuple(inputs), place, self._order)
    reals = [jnp.issubdtype(v.aval.dtype, jnp.floating) for v in eqn.outvars]
    if len(eqn.outvars) > 1 or not all(reals) or not all(_is_real(x) for x in inputs[1:]):
      return (
        [
          Value(_uniform(True, v.aval.shape), _uniform(True, v.aval.shape), op, is_real)
          for v, is_real in zip(eqn.outvars, reals, strict=True)
        ]
        if name != "split"
        else self._split(eqn, inputs[0], op)
      )
    e = Equation(eqn)
    if name == "custom_jvp_call":
      masks = _maximum(e, *inputs)  # logaddexp: convex and non-decreasing in both.
    else:
      masks = RULES.get(name, _lost)(e, *inputs)
    if not _is_defined(name, inputs):
      masks = _lost(e)
    masks = (_tidy(np.broadcast_to(masks[0], e.shape)), _tidy(np.broadcast_to(masks[1], e.shape)))
    if (masks[0] & masks[1]).any():
      masks, op = self._second_look(e, op, masks)
    return [Value(*masks, op)]

  def _second_look(self, e: Equation, op: Operation, masks: Masks) -> tuple[Masks, Operation]:
    """What no single operation shows: a sum that is a log-sum-exp, a scalar function."""
    found = _shifted_log_of_sum(e, *op.inputs) if op.primitive == "add" else None
    if found is None and op.primitive in piecewise.ELEMENTWISE:
      seen = piecewise.properties(Value(*masks, op), Value)
      if seen is not None:
        root, shape = seen
        found = _composed(root, shape.convex, shape.concave, shape.rising, shape.falling)
        if not np.all(shape.convex | shape.concave) and op.primitive in ("select_n", "add"):
          op = dataclasses.replace(op, note=str(shape))
    if found is None:
      return masks, op
    better = [_tidy(np.broadcast_to(m & f, e.shape)) for m, f in zip(masks, found, strict=True)]
    return (better[0], better[1]), op

  def _split(self, eqn, x: Value, op: Operation) -> list[Value | Known]:
    cuts = np.cumsum(eqn.params["sizes"])[:-1]
    parts = [np.split(mask, cuts, eqn.params["axis"]) for mask in x.masks]
    return [Value(_tidy(nc), _tidy(nk), op) for nc, nk in zip(*parts, strict=True)]

  def _scan(self, params, inputs, place: Place) -> list[Value | Known] | None:
    """A `scan`, unrolled; None where it is too long."""
    length, body = params["length"], params["jaxpr"]
    fixed, carried = params["num_consts"], params["num_carry"]
    if length > LOOP_LIMIT:
      return None
    consts, carry, columns = (
      inputs[:fixed],
      list(inputs[fixed : fixed + carried]),
      inputs[fixed + carried :],
    )
    rows: list[list[Value | Known]] = []
    for i in range(length):
      at = length - 1 - i if params["reverse"] else i
      outputs = self.run(
        body.jaxpr,
        [Known(real(c)) for c in body.consts],
        [*consts, *carry, *(_row(c, at) for c in columns)],
        place,
      )
      carry = outputs[:carried]
      rows.append(outputs[carried:])
    if params["reverse"]:
      rows.reverse()
    return [*carry, *(_stack(column) for column in zip(*rows, strict=True))]


def _row(x: Value | Known, i: int) -> Value | Known:
  if isinstance(x, Known):
    return Known(x.array[i], x.origins)
  return dataclasses.replace(
    x, not_convex=_tidy(x.not_convex[i]), not_concave=_tidy(x.not_concave[i])
  )


def _stack(rows: Sequence[Value | Known]) -> Value | Known:
  if all(isinstance(r, Known) for r in rows):
    return Known(np.stack([r.array for r in rows]))  # pyright: ignore[reportAttributeAccessIssue]
  nc, nk = (np.stack([r.masks[i] for r in rows]) for i in (0, 1))
  worst = max((r for r in rows if isinstance(r, Value)), key=lambda r: r.is_lost)
  return Value(_tidy(nc), _tidy(nk), worst.made_by, worst.is_real)


def _is_real(x: Value | Known) -> bool:
  return isinstance(x, Known) or x.is_real


def _is_defined(name: str, inputs: Sequence[Value | Known]) -> bool:
  """Whether no known number is infinite or NaN, but for a bound that does not bind."""
  floats = [x.array for x in inputs if isinstance(x, Known) and x.array.dtype == np.float64]
  if name == "max":
    return not any(np.isnan(a).any() or np.isposinf(a).any() for a in floats)
  if name == "min":
    return not any(np.isnan(a).any() or np.isneginf(a).any() for a in floats)
  if name == "clamp":
    return not any(np.isnan(a).any() for a in floats)
  return all(np.isfinite(a).all() for a in floats)


def _stays_real(eqn) -> bool:
  both = (eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype)
  return all(jnp.issubdtype(d, jnp.floating) for d in both)


def _needed(jaxpr) -> Iterator[Any]:
  """The equations that the outputs depend on, in order."""
  wanted = {v for v in jaxpr.outvars if not isinstance(v, jex.Literal)}
  kept = []
  for eqn in reversed(jaxpr.eqns):
    if any(v in wanted for v in eqn.outvars):
      wanted |= {v for v in eqn.invars if not isinstance(v, jex.Literal)}
      kept.append(eqn)
  return reversed(kept)


@functools.cache
def _logaddexp_text(shapes) -> str:
  jaxpr = jax.make_jaxpr(jnp.logaddexp)(*(jax.ShapeDtypeStruct(s, d) for s, d in shapes))
  calls = [e for e in jaxpr.eqns if e.primitive.name == "custom_jvp_call"]
  return str(calls[0].params["call_jaxpr"]) if calls else ""


def _is_logaddexp(eqn) -> bool:
  """Whether a custom function computes, step by step, what `jnp.logaddexp` does."""
  if len(eqn.invars) != 2 or eqn.params.get("num_consts"):
    return False
  shapes = tuple((v.aval.shape, str(v.aval.dtype)) for v in eqn.invars)
  return str(eqn.params["call_jaxpr"]) == _logaddexp_text(shapes)


FOLDS: dict[str, Callable[..., Any]] = {  # In float64, without compiling anything.
  "add": np.add,
  "sub": np.subtract,
  "mul": np.multiply,
  "neg": np.negative,
  "max": np.maximum,
  "min": np.minimum,
  "exp": np.exp,
  "sqrt": np.sqrt,
  "rsqrt": lambda x: 1 / np.sqrt(x),
  "square": np.square,
}


def fold(eqn, arrays: list[np.ndarray]) -> list[Any]:
  """An equation of known numbers, in float64 where it has floats and no loop."""
  name, params = eqn.primitive.name, dict(eqn.params)
  if name in SAME:
    return arrays
  if name == "convert_element_type" and jnp.issubdtype(params["new_dtype"], jnp.floating):
    return [np.asarray(arrays[0], np.float64)]
  if name == "div" and arrays[0].dtype == np.float64:
    return [arrays[0] / arrays[1]]
  if name == "broadcast_in_dim":
    thin = [1] * len(params["shape"])
    for d, n in zip(params["broadcast_dimensions"], arrays[0].shape, strict=True):
      thin[d] = n
    return [np.broadcast_to(arrays[0].reshape(thin), params["shape"])]
  if name == "reshape" and params.get("dimensions") is None:
    return [arrays[0].reshape(params["new_sizes"])]
  if name in FOLDS:
    return [FOLDS[name](*arrays)]
  inner = any(True for _ in jex.jaxprs_in_params(params))
  with jax.enable_x64(not inner):
    if inner:  # A loop: its body was traced in the dtypes of the program.
      arrays = [a.astype(v.aval.dtype) for a, v in zip(arrays, eqn.invars, strict=True)]
    for key in ("preferred_element_type", "dtype"):
      if not inner and params.get(key) in (np.float32, jnp.bfloat16, np.float16):
        params[key] = np.dtype(np.float64)
    out = eqn.primitive.bind(*map(jnp.asarray, arrays), **params)
    return list(out) if eqn.primitive.multiple_results else [out]
