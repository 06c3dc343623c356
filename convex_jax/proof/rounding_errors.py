"""How far the program that is deployed can be from the function over the reals.

A forward error analysis of the jaxpr, with the stored weights, over a whole ball of inputs. Of
each number it knows an enclosure of its real value over the ball, and a bound on the error of the
value that the program computes. An operation passes on the errors of its operands by the mean value
theorem, and adds its own by the standard model of floating-point arithmetic (Higham 2002, "Accuracy
and Stability of Numerical Algorithms", section 2.2),

    fl(a op b) = (a op b)(1 + d) + e,  |d| <= u,  |e| <= smallest normal number,

with the unit roundoff u of the operation's dtype in the jaxpr; e is what is flushed to 0. A sum of
n products, in any order, with or without fused multiply-add, errs by at most

    gamma_n sum |a_i| |b_i|,  gamma_n = n u / (1 - n u)  (section 3.1).

Assumed of the compiler and the machine:

- they compute the jaxpr's operations, rounding to nearest. They may fuse and contract them,
  sum in any order, divide by way of a reciprocal, add constants up first, and keep more precision
  than a dtype has; but products are sums of products (no Strassen or Winograd algorithms), and no
  function is replaced by another one;
- exp, tanh and the like are right to within `FUNCTIONS`, measured on the CPU with a margin;
- how products of matrices are computed is what an `Arithmetic` says.

What has no rule is refused by name.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convex_jax.proof import constants, enclosures, interpreter, layouts
from convex_jax.proof.collectives import on_one_device
from convex_jax.proof.constants import (
  SAME,
  Unknown,
  is_float,
  is_half_or_more,
  keeps_precision,
  number,
)
from convex_jax.proof.enclosures import Ends
from convex_jax.proof.float64 import float64
from convex_jax.proof.source import Place
from convex_jax.proof.values import Known
from convex_jax.proof.wide import equation, widened


@dataclasses.dataclass(frozen=True)
class Arithmetic:
  """How a program computes: its dtype, and its products of matrices and convolutions.

  Attributes:
    dtype: of the program. What counts is the dtype of each operation in its jaxpr.
    factors: relative error with which a factor of a float32 product is read.
    accumulator: dtype in which products of a narrower dtype are summed up; one of float32 or more
      sums up its own. With bfloat16 itself no bound holds from 256 terms on.
  """

  dtype: Any
  factors: float = 0.0
  accumulator: Any = dataclasses.field(default_factory=lambda: jnp.float32)


ARITHMETICS = {
  # Of CPUs, and of GPUs and TPUs with jax_default_matmul_precision=highest.
  "float32": Arithmetic(jnp.float32),
  # Of GPUs by default: tensor cores read ten bits of a factor, rounded or cut off.
  "tensorfloat32": Arithmetic(jnp.float32, factors=2.0**-10),
  "bfloat16": Arithmetic(jnp.bfloat16),
  "float16": Arithmetic(jnp.float16),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Ball:
  """All x with |x - centre| <= radius in a norm: "l1", "l2" or "linf"."""

  centre: np.ndarray
  norm: str
  radius: float


class Program:
  """A program `f(*args)` as a machine computes it, and as a function over the reals.

  Args:
    f: any JAX function, in the dtypes that are deployed.
    *args: its arguments, as for `certify`; argnums: which is the input, a `jax.ShapeDtypeStruct`.
    arithmetic: how it is computed.

  Raises:
    ValueError: the arguments are unfit, or the function does not return one array.
  """

  def __init__(self, f: Callable[..., Any], *args: Any, arithmetic: Arithmetic, argnums: int = -1):
    self._jaxpr, _ = interpreter.trace(f, *args, argnums=argnums)
    if len(self._jaxpr.out_avals) != 1:
      raise ValueError(f"the function returns {len(self._jaxpr.out_avals)} arrays; expected one")
    self._arithmetic = arithmetic
    self._at = len(jax.tree.leaves(args[: argnums % len(args)]))
    self._given = jax.tree.leaves(args)
    self._spreads: dict[tuple[str, int], np.ndarray] = {}

  @property
  def text(self) -> str:
    """Its jaxpr, which tells programs of the same arguments apart."""
    return str(self._jaxpr)

  def exact(self, x: jax.Array) -> jax.Array:
    """The function over the reals, evaluated in float64; to be called under `float64`.

    Its constants are those of the program: a 0.1 that the program holds in bfloat16 is that number.
    """
    given = [*self._given[: self._at], x, *self._given[self._at + 1 :]]
    return widened(self._jaxpr)(*given)[0]

  def error(self, ball: Ball) -> np.ndarray:
    """A bound on |computed - real| of each output, for every x of the program's dtype in a ball.

    Infinite where the program may overflow, or be undefined.

    Raises:
      ValueError: an operation has no rule.
    """
    out = self._output(ball)
    return np.full(self._jaxpr.out_avals[0].shape, np.inf) if out is None else _bound(out.error)

  def differences(self, ball: Ball) -> np.ndarray:
    """Bounds (K, K) on the error of each difference of two of the K outputs, as `error`.

    Where the outputs are h W + b over the last axis, an error of h counts by the difference of two
    columns of W; elsewhere the errors of both outputs add up.
    """
    out = self._output(ball)
    if out is None:
      return np.full((math.prod(self._jaxpr.out_avals[0].shape),) * 2, np.inf)
    error_K = np.ravel(out.error)
    apart_KxK = error_K[:, None] + error_K
    if (end := _linear_end(out)) is not None:
      error_H, weights_HxK = end
      own_K = np.maximum(error_K - error_H @ np.abs(weights_HxK), 0.0)
      columns_KxHxK = np.abs(weights_HxK.T[:, :, None] - weights_HxK)
      apart_KxK = np.minimum(apart_KxK, own_K[:, None] + own_K + error_H @ columns_KxHxK)
    return _bound(apart_KxK)

  def _output(self, ball: Ball) -> "Rounded | None":
    """The output over a ball; None where nothing is known of it."""
    walk = _Walk(self._arithmetic, ball, self._spreads)
    arguments = [
      walk.input(aval.shape) if i == self._at else number(x, aval.dtype)
      for i, (x, aval) in enumerate(zip(self._given, self._jaxpr.in_avals, strict=True))
    ]
    consts = zip(self._jaxpr.consts, self._jaxpr.jaxpr.constvars, strict=True)
    known = [number(value, var.aval.dtype) for value, var in consts]
    with np.errstate(all="ignore"):
      try:
        return _rounded(walk.run(self._jaxpr.jaxpr, known, arguments, Place())[0])
      except _Overflow:
        return None


def _bound(error: Any) -> np.ndarray:
  """A bound that float64 has computed from terms >= 0, and what rounding may have cost it."""
  return np.asarray(error) * (1 + 1e-6)


class _Overflow(Exception):
  """The program may compute infinities, or what is no number."""


# By how many units roundoff of its result a function may err; about twice what was measured over
# all float32 numbers on the CPU.
FUNCTIONS: dict[str, int] = {
  "exp": 12,
  "expm1": 16,
  "log": 8,
  "log1p": 8,
  "tanh": 12,
  "logistic": 8,
  "erf": 12,
  "erfc": 12,  # Of 1, where its result is less.
  "sqrt": 4,
  "rsqrt": 8,
}
_ONCE = {"add": 1, "add_any": 1, "sub": 1, "mul": 1, "square": 1, "div": 2}  # a / b as a (1 / b).


@dataclasses.dataclass(frozen=True, eq=False)
class Chain:
  """A number as a scalar function g of an earlier one, its root, element by element."""

  root: "Rounded"
  slope: Ends  # Encloses g' wherever it exists, between the root's real and computed values.
  error: Any  # Of the computed g at a number without error, and of g where it jumps.

  @functools.cached_property
  def total(self) -> Any:
    """A bound on the error: |g~(z~) - g(z~)| + |g(z~) - g(z)|."""
    return self.error + _product_of(_size(self.slope), self.root.error)


@dataclasses.dataclass(frozen=True, eq=False)
class Rounded:
  """A floating-point number of the program, at any input of the ball."""

  low: Any  # low <= its real value <= high.
  high: Any
  error: Any  # |computed - real| <= error.
  varies: bool = True  # It depends on the input.
  is_affine: bool = False  # It is an affine function of the input.
  made_by: "tuple[Any, Sequence[Any]] | None" = None  # Equation and operands.
  chains: tuple[Chain, ...] = ()
  around: Ends | None = None  # What its operation makes of all that its operands are between.
  shift: Any = None  # Where all of the error is known: computed - real, unless it is 0.

  @property
  def ends(self) -> Ends:
    return self.low, self.high

  @property
  def shape(self) -> tuple[int, ...]:
    return np.shape(self.low)

  @functools.cached_property
  def wide(self) -> Ends:
    """Contains the real value, the computed one, and what a chain takes between them."""
    margin = functools.reduce(np.maximum, [c.total for c in self.chains], self.error)
    low, high = self.low - margin, self.high + margin
    if self.around is None:
      return low, high
    return np.maximum(low, self.around[0]), np.minimum(high, self.around[1])

  @functools.cached_property
  def known(self) -> Known:
    """Both the real and the computed value, for what `constants` decides of them."""
    if not np.any(self.error) and np.array_equal(self.low, self.high):
      return Known.exactly(np.asarray(self.low))
    low, high = self.wide
    return Known(np.asarray(low), np.asarray(high))


@dataclasses.dataclass(frozen=True, eq=False)
class _Condition:
  """A comparison of two numbers, by an equation."""

  known: Known
  made_by: tuple[Any, Sequence[Rounded]]


def _rounded(x: Any) -> Rounded:
  if isinstance(x, Rounded):
    return x
  error = np.where(x.low == x.high, 0.0, x.high - x.low)
  return Rounded(x.low, x.high, error, varies=False)


def _known(x: Any) -> Known:
  return x if isinstance(x, Known) else x.known


def _is_number(x: Any) -> bool:
  return isinstance(x, Rounded) or (isinstance(x, Known) and x.is_float)


def _is_fixed(x: Any) -> bool:
  """Whether a number surely does not depend on the input."""
  if isinstance(x, Known):
    return x.is_float or x.is_exact
  return isinstance(x, Rounded) and not x.varies


def _size(ends: Ends) -> Any:
  return enclosures.magnitude(ends)[1]


def gamma(n: int, u: float) -> float:
  """n u / (1 - n u): how far n roundings can be from none, relatively."""
  return n * u / (1 - n * u) if n * u < 1 else math.inf


# Slopes of scalar functions, given the ends of their arguments and results.


def _falling_from_0(slope: Callable[[Any], Any]) -> Callable[[Ends, Ends], Ends]:
  """Of a function whose slope is even, and falls with the argument's magnitude."""

  def ends(x, _):
    least, most = enclosures.magnitude(x)
    return slope(most), slope(least)

  return ends


def _slope_of_tanh(x: Any) -> Any:
  return 1 / np.cosh(np.minimum(x, 300.0)) ** 2


def _slope_of_logistic(x: Any) -> Any:
  return 0.25 / np.cosh(np.minimum(x, 300.0) / 2) ** 2


def _slope_of_erf(x: Any) -> Any:
  return 2 / math.sqrt(math.pi) * np.exp(-(x**2))


def _reciprocal(x: Ends) -> Ends:
  return enclosures.divide(enclosures.ONE, x)


_SLOPES: dict[str, Callable[[Ends, Ends], Ends]] = {
  "neg": lambda x, y: (-1.0, -1.0),
  "abs": lambda x, y: (np.where(x[0] >= 0, 1.0, -1.0), np.where(x[1] <= 0, -1.0, 1.0)),
  "square": lambda x, y: (2 * x[0], 2 * x[1]),
  "sqrt": lambda x, y: enclosures.divide((0.5, 0.5), y),
  "rsqrt": lambda x, y: enclosures.multiply((-0.5, -0.5), enclosures.divide(y, x)),
  "exp": lambda x, y: y,
  "expm1": lambda x, y: (y[0] + 1, y[1] + 1),
  "log": lambda x, y: _reciprocal(x),
  "log1p": lambda x, y: _reciprocal((1 + x[0], 1 + x[1])),
  "tanh": _falling_from_0(_slope_of_tanh),
  "logistic": _falling_from_0(_slope_of_logistic),
  "erf": _falling_from_0(_slope_of_erf),
  "erfc": lambda x, y: enclosures.negative(_falling_from_0(_slope_of_erf)(x, y)),
}
_ARITHMETIC: dict[str, Callable[[Ends, Ends], Ends]] = {
  "add": enclosures.add,
  "add_any": enclosures.add,
  "sub": enclosures.subtract,
  "mul": enclosures.multiply,
  "div": enclosures.divide,
}
_EXTREMES = {"max": np.maximum, "min": np.minimum}
_MOVES = {"broadcast_in_dim", "concatenate", "dynamic_slice", "dynamic_update_slice", "gather"}
_MOVES |= {"pad", "reshape", "rev", "slice", "split", "squeeze", "stack", "tile", "transpose"}
_LARGEST = {"reduce_max", "reduce_min", "reduce_window_max", "reduce_window_min"}
_LARGEST |= {"cummax", "cummin"}
_SUMS = {"reduce_sum", "reduce_window_sum", "cumsum"}
_PRODUCTS = {"dot_general", "conv_general_dilated"}
_EXACT_PRODUCTS = ("HIGHEST", "F32_F32_F32")
CHUNK = 64  # Columns of the derivative of an affine value at a time.


def _times(a: Ends, b: Ends) -> Ends:
  """a b, where infinity times 0 is 0."""
  low, high = enclosures.multiply(a, b)
  return np.nan_to_num(low, nan=0.0, posinf=np.inf, neginf=-np.inf), np.nan_to_num(
    high, nan=0.0, posinf=np.inf, neginf=-np.inf
  )


def _hull(possible: Sequence[Any], ends: Sequence[Ends]) -> Ends:
  """Of all that is possible, element by element."""
  lows = [np.where(p, e[0], np.inf) for p, e in zip(possible, ends, strict=True)]
  highs = [np.where(p, e[1], -np.inf) for p, e in zip(possible, ends, strict=True)]
  return functools.reduce(np.minimum, lows), functools.reduce(np.maximum, highs)


def _largest(possible: Sequence[Any], arrays: Sequence[Any]) -> Any:
  return functools.reduce(
    np.maximum, [np.where(p, a, 0.0) for p, a in zip(possible, arrays, strict=True)]
  )


def _run(eqn: Any, *arrays: Any) -> Any:
  """The output of an equation for other arrays, in float64."""
  name, params = eqn.primitive.name, eqn.params
  if name == "reshape" and params.get("dimensions") is None:  # In numpy, which compiles nothing.
    return np.reshape(arrays[0], params["new_sizes"])
  if name == "broadcast_in_dim":
    dimensions = params["broadcast_dimensions"]
    return constants.broadcast(np.asarray(arrays[0]), params["shape"], dimensions)
  if name == "transpose":
    return np.transpose(arrays[0], params["permutation"])
  if name == "squeeze":
    return np.squeeze(arrays[0], tuple(params["dimensions"]))
  if name == "concatenate":
    return np.concatenate(arrays, params["dimension"])
  if name == "slice":
    steps = params["strides"] or (1,) * np.ndim(arrays[0])
    cuts = zip(params["start_indices"], params["limit_indices"], steps, strict=True)
    return np.asarray(arrays[0])[tuple(slice(*cut) for cut in cuts)]
  if name == "reduce_sum":
    return np.sum(arrays[0], tuple(params["axes"]))
  return _all(eqn, *arrays)[0]


def _all(eqn: Any, *arrays: Any) -> list[Any]:
  with float64():
    return [np.asarray(out) for out in equation(eqn, [jnp.asarray(a) for a in arrays])]


class _Walk(interpreter.Walk):
  """One pass over a program, for a ball."""

  def __init__(self, arithmetic: Arithmetic, ball: Ball, spreads: dict[tuple[str, int], Any]):
    super().__init__()
    self._arithmetic, self._ball, self._spreads = arithmetic, ball, spreads
    self._input: Any = None

  def input(self, shape: tuple[int, ...]) -> Rounded:
    """The program's input: any number of its dtype in the ball, which it may flush to 0."""
    x, r = self._ball.centre.reshape(shape).astype(np.float64), self._ball.radius
    tiny = float(jnp.finfo(jnp.float32).smallest_normal)
    self._input = Rounded(x - r, x + r, np.full(shape, tiny), is_affine=True)
    return self._input

  def _equation(self, eqn, inputs, place: Place) -> list[Any]:
    self._order += 1
    name = eqn.primitive.name
    called, other = layouts.called(eqn, inputs), on_one_device(eqn) or layouts.composed(eqn)
    if called is not None:
      return self._inner(*called, place)
    if other is not None:
      return self._compute(other, eqn.invars, inputs, place)
    if name in SAME or keeps_precision(eqn):
      return list(inputs)
    try:
      if name == "scan":
        return self._loop(eqn, inputs, place)
      if name == "while" and (outputs := self._while(eqn, inputs, place)) is not None:
        return outputs
      if name == "cond" and isinstance(inputs[0], Known) and inputs[0].is_exact:
        return self._cond(eqn, *inputs, place=place)
      if is_float(eqn.outvars[0].aval.dtype) and any(map(_is_number, inputs)):
        outputs = self._floats(name, eqn, inputs)
        if outputs is not None:
          return outputs
      return self._folded(eqn, inputs)
    except Unknown as reason:
      raise ValueError(
        f"{name} has no bound on its rounding error ({reason}), in {place}; expected arithmetic,"
        " exp, log, tanh, logistic, erf, roots, maxima, sums, products, choices by comparison"
      ) from reason

  def _folded(self, eqn, inputs) -> list[Any]:
    """The outputs that `constants` knows, for the real and the computed operands at once."""
    operands = [x.known if isinstance(x, Rounded | _Condition) else x for x in inputs]
    if any(is_float(v.aval.dtype) for v in eqn.outvars) and not all(map(_is_fixed, inputs)):
      raise Unknown("of what depends on the input")
    outputs = constants.fold(eqn, operands)
    if eqn.primitive.name in ("gt", "ge", "lt", "le") and all(map(_is_number, inputs)):
      return [_Condition(outputs[0], (eqn, list(map(_rounded, inputs))))]
    return outputs

  def _loop(self, eqn, inputs, place: Place) -> list[Any]:
    body, length, reverse, fixed, carried = layouts.scan_of(eqn)
    if not 0 < length <= interpreter.LOOP_LIMIT:
      raise Unknown("too long")
    carry, rows = inputs[fixed : fixed + carried], []
    for i in range(length):
      at = length - 1 - i if reverse else i
      row = [_map(lambda a, at=at: a[at], [x]) for x in inputs[fixed + carried :]]
      outputs = self._inner(body, [*inputs[:fixed], *carry, *row], place)
      carry = outputs[:carried]
      rows.append(outputs[carried:])
    if reverse:
      rows.reverse()
    return [*carry, *(_map(lambda *a: np.stack(a), c) for c in zip(*rows, strict=True))]

  def _floats(self, name: str, eqn, inputs) -> list[Any] | None:
    dtype = eqn.outvars[0].aval.dtype
    if not all(is_float(v.aval.dtype) for v in eqn.outvars):
      return None
    if name == "select_n":
      return [self._checked(self._chosen(eqn, *inputs), dtype)]
    if name in _MOVES:
      return self._moved(eqn, inputs)
    if not all(map(_is_number, inputs)):
      return None
    operands = [_rounded(x) for x in inputs]
    if name == "convert_element_type":
      return [self._checked(self._converted(eqn, operands[0]), dtype)]
    if name in _LARGEST:
      x = operands[0]
      error = _run(eqn, x.error) if "max" in name else -_run(eqn, -x.error)
      return [self._made(eqn, operands, (_run(eqn, x.low), _run(eqn, x.high)), error)]
    if name in _SUMS:
      return [self._checked(self._summed(eqn, operands[0]), dtype)]
    if name in _PRODUCTS:
      return [self._checked(self._product(name, eqn, *operands), dtype)]
    if name in _EXTREMES:
      return [self._extreme(name, eqn, *operands)]
    if name == "clamp":
      low, x, high = operands
      bounded = self._extreme("min", eqn, self._extreme("max", eqn, x, low), high)
      return [dataclasses.replace(bounded, made_by=(eqn, operands))]
    if (name == "integer_pow" and eqn.params["y"] >= 1) or name in _SLOPES or name in _ARITHMETIC:
      return [self._checked(self._elementwise(name, eqn, operands), dtype)]
    return None

  def _made(self, eqn, operands, ends: Ends, error, affine=False, **more) -> Rounded:
    varies = any(x.varies for x in operands if isinstance(x, Rounded))
    affine = affine and varies
    return Rounded(
      *ends, np.asarray(error), varies, affine, (eqn, tuple(operands)) if varies else None, **more
    )

  def _checked(self, x: Rounded, dtype) -> Rounded:
    """The number; of an infinite error where its dtype may not hold it, or it is undefined."""
    size = _size(x.ends) + x.error
    lost = ~(size <= float(jnp.finfo(dtype).max))
    if not lost.any():
      return x
    low, high = np.where(lost, -np.inf, x.low), np.where(lost, np.inf, x.high)
    return dataclasses.replace(
      x,
      low=low,
      high=high,
      error=np.where(lost, np.inf, x.error),
      chains=tuple(Chain(c.root, (-np.inf, np.inf), np.inf) for c in x.chains),
      around=None,
      is_affine=False,
    )

  # Moves, casts, sums, products.

  def _moved(self, eqn, inputs) -> list[Rounded]:
    count = len(inputs)
    if eqn.primitive.name in ("gather", "dynamic_slice"):
      count = 1
    if eqn.primitive.name == "dynamic_update_slice":
      count = 2
    keys = inputs[count:]
    if not all(isinstance(k, Known) and k.is_exact for k in keys):
      raise Unknown("by an index that depends on the input")
    operands, indices = [_rounded(x) for x in inputs[:count]], [k.low for k in keys]

    def move(arrays: Sequence[Any]) -> list[Any]:
      return _all(eqn, *arrays) if len(eqn.outvars) > 1 else [_run(eqn, *arrays, *indices)]

    parts = [move([getattr(x, part) for x in operands]) for part in ("low", "high", "error")]
    shifts: Any = [None] * len(eqn.outvars)
    if count == 1 and operands[0].shift is not None:
      shifts = move([operands[0].shift])
    if any(np.isnan(part).any() for part in parts[2]):
      raise _Overflow  # Beyond the array, where `gather` fills in NaN.
    affine = all(x.is_affine or not x.varies for x in operands) and len(eqn.outvars) == 1
    return [
      self._made(eqn, [*operands, *keys], (low, high), error, affine, shift=shift)
      for low, high, error, shift in zip(*parts, shifts, strict=True)
    ]

  def _converted(self, eqn, x: Rounded) -> Rounded:
    source, target = eqn.invars[0].aval.dtype, np.dtype(eqn.params["new_dtype"])
    if not is_half_or_more(target):
      raise Unknown("to less than half precision, a step function")
    if jnp.promote_types(source, target) == target:
      return x
    error = x.error + _unit(target) * (_size(x.ends) + x.error) + _tiny(target)
    if not x.varies and x.known.is_exact:
      shift = np.asarray(x.low).astype(target).astype(np.float64) - x.low
      return self._made(eqn, [x], x.ends, np.abs(shift) + _tiny(target), shift=shift)
    return self._made(eqn, [x], x.ends, error, affine=x.is_affine)

  def _summed(self, eqn, x: Rounded) -> Rounded:
    name, params = eqn.primitive.name, eqn.params
    if name == "reduce_sum":
      n = math.prod(x.shape[i] for i in params["axes"])
    else:
      n = x.shape[params["axis"]] if name == "cumsum" else math.prod(params["window_dimensions"])
    dtype = eqn.outvars[0].aval.dtype
    size = _run(eqn, _size(x.ends) + x.error)
    error = _run(eqn, x.error) + gamma(max(0, n - 1), _unit(dtype)) * size + n * _tiny(dtype)
    self._check_size(size, dtype)
    ends = tuple(_run(eqn, end) for end in x.ends)
    slack = 1e-12 * size
    ends = self._within_ball(eqn, [x], (ends[0] - slack, ends[1] + slack), x.is_affine)
    return self._made(eqn, [x], ends, error, x.is_affine)

  def _product(self, name: str, eqn, a: Rounded, b: Rounded) -> Rounded:
    if name == "dot_general":
      (axes, _), _ = eqn.params["dimension_numbers"]
      n = math.prod(a.shape[i] for i in axes)
    else:
      n = math.prod(b.shape) // max(1, b.shape[eqn.params["dimension_numbers"].rhs_spec[0]])
    source, target = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
    wide = jnp.promote_types(jnp.promote_types(source, target), self._arithmetic.accumulator)
    factors = self._factors(eqn)
    middles = [(x.low + x.high) / 2 for x in (a, b)]
    radii = [np.maximum(x.high - m, m - x.low) for x, m in zip((a, b), middles, strict=True)]
    sizes = [_size(x.ends) for x in (a, b)]
    middle = _run(eqn, *middles)
    radius = _run(eqn, radii[0], sizes[1])
    if radii[1].any():
      radius = radius + _run(eqn, np.abs(middles[0]), radii[1])
    # The error of the factors, as far as their signs are not known; then that of the sum.
    errors, known = [x.error for x in (a, b)], 0.0
    for i, (x, other) in enumerate(((a, b), (b, a))):
      if x.shift is not None:
        j = 1 - i
        pairs = [(x.shift, middles[j]), (np.abs(x.shift), radii[j] + other.error)]
        at, about = (_run(eqn, *(p if i == 0 else p[::-1])) for p in pairs)
        known, errors[i] = known + np.abs(at) + about, x.error - np.abs(x.shift)
    computed = [s + x.error for s, x in zip(sizes, (a, b), strict=True)]
    if factors:
      errors = [e + factors * c for e, c in zip(errors, computed, strict=True)]
      computed = [(1 + factors) * c for c in computed]
    error = known + _run(eqn, errors[0], computed[1])
    if errors[1].any():
      error = error + _run(eqn, sizes[0], errors[1])
    size = _run(eqn, *computed)
    self._check_size(size, target)
    error = error + gamma(n, _unit(wide)) * size + 2 * n * _tiny(wide)
    slack = 1e-12 * size
    affine = (a.is_affine and not b.varies) or (b.is_affine and not a.varies)
    ends = self._within_ball(
      eqn, [a, b], (middle - radius - slack, middle + radius + slack), affine
    )
    if wide != target:
      error = error + _unit(target) * (_size(ends) + error) + _tiny(target)
    return self._made(eqn, [a, b], ends, error, affine)

  def _factors(self, eqn) -> float:
    """The relative error with which a product's factors are read."""
    precision = eqn.params.get("precision")
    each = precision if isinstance(precision, tuple) else (precision,)
    names = {getattr(p, "name", str(p)) for p in each}
    if names <= set(_EXACT_PRODUCTS) or eqn.invars[0].aval.dtype != jnp.float32:
      return 0.0
    if not names <= {"None", "DEFAULT", "HIGH", *_EXACT_PRODUCTS}:
      raise Unknown(f"of precision {', '.join(sorted(names))}")
    return self._arithmetic.factors

  def _check_size(self, size, dtype) -> None:
    if not (size <= float(jnp.finfo(dtype).max)).all():
      raise _Overflow  # Or NaN, of infinite factors.

  def _within_ball(self, eqn, operands, ends: Ends, affine: bool) -> Ends:
    """The ends, no further apart than an affine function of the input is over the ball.

    Operand by operand, an l1 ball would count as the box around it.
    """
    if not affine:
      return ends
    key = self._ball.norm, self._order
    if key not in self._spreads:
      self._spreads[key] = self._spread(eqn, operands)
    middle, half = (ends[0] + ends[1]) / 2, (ends[1] - ends[0]) / 2
    radius = self._ball.radius * self._spreads[key] * (1 + 1e-9) + 1e-10 * half
    radius = np.minimum(radius + 1e-12 * np.abs(middle), half)
    return np.maximum(ends[0], middle - radius), np.minimum(ends[1], middle + radius)

  def _spread(self, eqn, operands) -> np.ndarray:
    """How far an affine value can move, over the unit ball: the dual norm of its derivative."""
    value = self._made(eqn, operands, (0.0, 0.0), 0.0, affine=True)

    def of_input(x):
      return _affine(value, self._input, x, {})

    shape = self._input.shape
    with float64():
      origin = jnp.zeros(shape)
      columns = jax.jit(
        jax.vmap(lambda d: jnp.abs(jax.jvp(of_input, (origin,), (d.reshape(shape),))[1]))
      )
      size, out = math.prod(shape), np.zeros(())
      for start in range(0, size, CHUNK):
        rows = np.zeros((CHUNK, size))
        rows[np.arange(min(CHUNK, size - start)), np.arange(start, min(start + CHUNK, size))] = 1
        part = np.asarray(columns(rows))
        if self._ball.norm == "l1":
          out = np.maximum(out, part.max(0))
        else:
          out = out + (part**2 if self._ball.norm == "l2" else part).sum(0)
    return np.sqrt(out) if self._ball.norm == "l2" else out

  # Elementwise operations.

  def _elementwise(self, name: str, eqn, operands: Sequence[Rounded]) -> Rounded:
    dtype = eqn.outvars[0].aval.dtype
    wide = [x.wide for x in operands]
    ends, around = (_enclose(name, eqn, e) for e in ([x.ends for x in operands], wide))
    slopes = _slopes_of(name, eqn, wide, around)
    steep = [_size(s) for s in slopes]
    passed = sum(_product_of(s, x.error) for s, x in zip(steep, operands, strict=True))
    own = _own(name, eqn, operands, around, dtype)
    chains = []
    for root in _roots(operands):
      parts = [_chain(x, root) for x in operands]
      terms = [_times(s, c.slope) for s, c in zip(slopes, parts, strict=True)]
      slack = 1e-12 * sum(map(_size, terms))
      slope = sum(t[0] for t in terms) - slack, sum(t[1] for t in terms) + slack
      error = own + sum(_product_of(s, c.error) for s, c in zip(steep, parts, strict=True))
      chains.append(Chain(root, slope, error))
    affine = name in (*_ARITHMETIC, "neg") and _is_affine(name, operands)
    around = around[0] - own, around[1] + own
    return self._best(eqn, operands, ends, around, passed + own, chains, affine)

  def _best(self, eqn, operands, ends, around, error, chains, affine=False) -> Rounded:
    error = functools.reduce(np.minimum, [c.total for c in chains], error)
    error = np.broadcast_to(error, np.shape(ends[0]))
    return self._made(eqn, operands, ends, error, affine, chains=tuple(chains), around=around)

  def _extreme(self, name: str, eqn, a: Rounded, b: Rounded) -> Rounded:
    """The greater or the lesser: no further off than the further of both, and their slopes' hull."""
    f = _EXTREMES[name]
    ends, around = ((f(x[0], y[0]), f(x[1], y[1])) for x, y in ((a.ends, b.ends), (a.wide, b.wide)))
    possible = [x[1] >= y[0] for x, y in ((a.wide, b.wide), (b.wide, a.wide))]
    if name == "min":
      possible.reverse()
    error = _largest(possible, [a.error, b.error])
    chains = []
    for root in _roots([a, b]):
      parts = [_chain(x, root) for x in (a, b)]
      slope = _hull(possible, [c.slope for c in parts])
      chains.append(Chain(root, slope, _largest(possible, [c.error for c in parts])))
    return self._best(eqn, [a, b], ends, around, error, chains)

  def _chosen(self, eqn, which, *cases) -> Rounded:
    """One of several numbers.

    Where the computed choice may differ from the real one, by rounding, the error is how far the
    cases are apart. Of a choice by comparing a root z with a number c, as in an ELU, each case
    counts on its side of c only: from z to its computed value, the result changes by the slopes
    of the cases and by how far they are apart at c.
    """
    known, cases = _known(which), [_rounded(x) for x in cases]
    shape = eqn.outvars[0].aval.shape
    index = [np.broadcast_to(np.asarray(i, int), shape) for i in (known.low, known.high)]
    possible = [(index[0] <= i) & (i <= index[1]) for i in range(len(cases))]
    for case, p in zip(cases, possible, strict=True):
      if p.all() and np.array_equal(index[0], index[1]):
        return case
    unsure = index[0] != index[1]
    chains, operands = [], [which, *cases]
    sides = _sides(which) if unsure.any() else None
    if sides is not None:
      root, below, at, above = sides
      halves = [self._again(x, root, y) for x, y in zip(cases, (below, above), strict=True)]
      there = _hull(possible, [self._again(x, root, at).ends for x in cases])
      jump = np.where(unsure, there[1] - there[0], 0.0)
      if all(_has(x, y) for x, y in zip(halves, (below, above), strict=True)):
        chains.append(_joined(root, possible, halves, (below, above), jump))
      cases = halves
    elif not unsure.any():
      for root in _roots(cases):
        chains.append(_joined(root, possible, cases, [root] * len(cases), 0.0))
    ends, around = (_hull(possible, [getattr(x, e) for x in cases]) for e in ("ends", "wide"))
    error = _largest(possible, [x.error for x in cases])
    error = error + np.where(unsure, around[1] - around[0], 0.0)
    return self._best(eqn, operands, ends, around, error, chains)

  def _again(self, x: Any, root: Rounded, other: Rounded) -> Any:
    """A number with another one in the place of its root."""
    if x is root:
      return other
    if isinstance(x, Known) or x.made_by is None:
      return x
    eqn, operands = x.made_by
    if isinstance(x, _Condition):
      return self._folded(eqn, [self._again(y, root, other) for y in operands])[0]
    if not _has(x, root):
      return x
    operands = [self._again(y, root, other) for y in operands]
    (again,) = self._floats(eqn.primitive.name, eqn, operands) or [x]
    return again


def _sides(which: Any) -> tuple[Rounded, Rounded, Rounded, Rounded] | None:
  """Of a comparison of z with a number c: z; z where it is false, at c, and where it is true."""
  if not isinstance(which, _Condition):
    return None
  eqn, (a, b) = which.made_by
  root, number_ = (a, b) if a.varies else (b, a)
  if number_.varies or not number_.known.is_exact:
    return None
  c = number_.low
  is_above = eqn.primitive.name in ("gt", "ge")

  def cut(f):
    wide = f(root.wide[0], c), f(root.wide[1], c)
    return Rounded(f(root.low, c), f(root.high, c), root.error, around=wide)

  below, above = cut(np.minimum), cut(np.maximum)
  if is_above != (root is a):
    below, above = above, below
  at = np.broadcast_to(c, root.shape)
  return root, below, Rounded(at, at, np.zeros(root.shape)), above


def _has(x: Rounded, root: Rounded) -> bool:
  """Whether a number is a scalar function of a root, or does not vary."""
  return x is root or not x.varies or any(c.root is root for c in x.chains)


def _joined(root: Rounded, possible, cases, roots, jump) -> Chain:
  """A choice among functions of a root, which it has with a smaller range."""
  parts = [_chain(x, r) for x, r in zip(cases, roots, strict=True)]
  slope = _hull(possible, [c.slope for c in parts])
  return Chain(root, slope, _largest(possible, [c.error for c in parts]) + jump)


def _linear_end(x: Rounded) -> tuple[np.ndarray, np.ndarray] | None:
  """(error of h, W) where the outputs are h W + b over the last axis, of one h; else None."""
  while x.made_by is not None:
    eqn, operands = x.made_by
    name, varying = eqn.primitive.name, [y for y in operands if isinstance(y, Rounded) and y.varies]
    if len(varying) != 1:
      return None
    if name == "dot_general":
      h, weights = operands
      contracted, batched = eqn.params["dimension_numbers"]
      plain = [tuple(axes) for axes in contracted] == [(len(h.shape) - 1,), (0,)]
      fits = h is varying[0] and plain and batched == ((), ()) and len(weights.shape) == 2
      if not fits or math.prod(h.shape) != len(weights.low):
        return None
      return np.ravel(h.error), (weights.low + weights.high) / 2
    if name not in ("add", "reshape", "broadcast_in_dim", "convert_element_type"):
      return None
    if math.prod(x.shape) != math.prod(varying[0].shape):
      return None
    x = varying[0]
  return None


def _roots(operands: Sequence[Rounded]) -> list[Rounded]:
  """The numbers of which all operands are scalar functions."""
  varying = [x for x in operands if x.varies]
  if not varying:
    return []
  known = [[x, *(c.root for c in x.chains)] for x in varying]
  return [r for r in known[0] if all(any(r is s for s in others) for others in known[1:])]


def _chain(x: Rounded, root: Rounded) -> Chain:
  """A number as a function of a root that it has, or of none."""
  if x is root:
    return Chain(root, (1.0, 1.0), 0.0)
  if not x.varies:
    return Chain(root, (0.0, 0.0), x.error)
  return next(c for c in x.chains if c.root is root)


def _is_affine(name: str, operands: Sequence[Rounded]) -> bool:
  if not all(x.is_affine for x in operands if x.varies):
    return False
  if name == "div":
    return not operands[1].varies
  return name != "mul" or not all(x.varies for x in operands)


def _product_of(slope: Any, error: Any) -> Any:
  """slope error, where infinity times 0 is 0."""
  return np.where(np.asarray(error) == 0, 0.0, slope * error)


def _enclose(name: str, eqn, ends: Sequence[Ends]) -> Ends:
  if name in _ARITHMETIC:
    return _ARITHMETIC[name](*ends)
  if name == "integer_pow":
    return enclosures.integer_power(ends[0], eqn.params["y"])
  return enclosures.FUNCTIONS[name](*ends)


def _slopes_of(name: str, eqn, ends: Sequence[Ends], result: Ends) -> list[Ends]:
  if name in ("add", "add_any"):
    return [(1.0, 1.0), (1.0, 1.0)]
  if name == "sub":
    return [(1.0, 1.0), (-1.0, -1.0)]
  if name == "mul":
    return [ends[1], ends[0]]
  if name == "div":
    inverse = _reciprocal(ends[1])
    return [inverse, enclosures.negative(enclosures.multiply(result, inverse))]
  if name == "integer_pow":
    power = eqn.params["y"]
    return [enclosures.multiply((power, power), enclosures.integer_power(ends[0], power - 1))]
  return [_SLOPES[name](ends[0], result)]


def _own(name: str, eqn, operands, around: Ends, dtype) -> Any:
  """The rounding error of an operation itself, whose result lies in `around`."""
  if name in ("neg", "abs"):
    return 0.0
  u, size = _unit(dtype), _size(around)
  if name in ("add", "add_any", "sub"):  # The compiler may add up constants first.
    size = size + sum(_size(x.ends) for x in operands if not x.varies)
  if name == "integer_pow":
    return gamma(2 * eqn.params["y"], u) * size + _tiny(dtype) * (1 + size)
  if name == "erfc":
    size = np.maximum(size, 1.0)
  units = FUNCTIONS[name] if name in FUNCTIONS else _ONCE[name]
  return units * u * size + 2 * _tiny(dtype)


def _unit(dtype) -> float:
  return float(jnp.finfo(dtype).eps) / 2


def _tiny(dtype) -> float:
  return float(jnp.finfo(dtype).smallest_normal)


def _map(f: Callable[..., Any], numbers: Sequence[Any]) -> Any:
  """What moves elements, applied to what is known of them."""
  if all(isinstance(x, Known) for x in numbers):
    return Known(f(*(x.low for x in numbers)), f(*(x.high for x in numbers)))
  if not all(map(_is_number, numbers)):
    raise Unknown("of a comparison")
  xs = [_rounded(x) for x in numbers]
  low, high, error = (f(*(getattr(x, part) for x in xs)) for part in ("low", "high", "error"))
  return Rounded(low, high, error)


def _affine(x: Any, root: Rounded, at: Any, done: dict[int, Any]) -> Any:
  """An affine value as a JAX function of the input."""
  if x is root:
    return at
  if not isinstance(x, Rounded):
    return jnp.asarray(x.low)
  if x.made_by is None:
    return jnp.asarray((x.low + x.high) / 2)
  if id(x) not in done:
    eqn, operands = x.made_by
    arrays = [_affine(y, root, at, done) for y in operands]
    done[id(x)] = (
      arrays[0] if eqn.primitive.name == "convert_element_type" else equation(eqn, arrays)[0]
    )
  return done[id(x)]
