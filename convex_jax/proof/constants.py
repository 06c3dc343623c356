"""Constant folding: enclosures of the numbers that do not depend on the input.

What a program computes of its weights must be known well enough for signs, orders and places.
Integers, booleans and random bits are computed as the program does, in its own dtypes: they may
wrap. A float is enclosed: the interval contains the real number, and every number that the
program may get by rounding each operation to its dtype. So a product of two tiny positive
weights, which float32 rounds to 0, is not negative, and `floor(0.7 * 10)` is known only if both
agree.
The reduced precision in which some accelerators multiply is left out.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax import lax

from convex_jax.proof import enclosures
from convex_jax.proof.enclosures import ULPS, Ends
from convex_jax.proof.float64 import float64
from convex_jax.proof.values import Known

# Over the reals, these return their input.
SAME = {"copy", "name", "optimization_barrier", "pvary", "reshard"}
SAME |= {"sharding_constraint", "stop_gradient"}

_IMPURE = ("callback", "ffi_call", "rng_uniform")  # Parts of the names of such primitives.

# Applied to the low ends and to the high ends of their data: moves of elements, and functions
# that are non-decreasing in each. The rest of their operands are indices.
_ALL, _FIRST = slice(None), slice(1)
_BY_ENDS: dict[str, slice] = {
  **dict.fromkeys(("transpose", "squeeze", "tile", "rev", "slice", "split"), _ALL),
  **dict.fromkeys(("concatenate", "stack", "pad", "max", "min", "clamp", "floor", "ceil"), _ALL),
  **dict.fromkeys(("round", "sign", "reduce_max", "reduce_min", "cummax", "cummin", "and"), _ALL),
  **dict.fromkeys(
    ("or", "reduce_and", "reduce_or", "reduce_window_max", "reduce_window_min"), _ALL
  ),
  **dict.fromkeys(("sort", "top_k", "reduce_precision", "reshape", "broadcast_in_dim"), _ALL),
  **dict.fromkeys(("dynamic_slice", "gather"), _FIRST),
  "dynamic_update_slice": slice(2),
}
# Of these, which pass NaN on.
_MOVES = {"transpose", "squeeze", "tile", "rev", "slice", "split", "concatenate", "stack", "pad"}
_MOVES |= {"max", "min", "floor", "ceil", "sign", "reshape", "broadcast_in_dim", "dynamic_slice"}
_MOVES |= {"gather", "dynamic_update_slice"}
_SPECIAL_FUNCTIONS = {"acos", "acosh", "asin", "atan2", "atanh", "bessel_i0e", "bessel_i1e", "tan"}
_SPECIAL_FUNCTIONS |= {"lgamma", "zeta", "log2"}  # Not igamma, nor digamma near its poles.
_HUGE = 1e300  # Of a number of which only that is known.
_SUMS = {"reduce_sum", "cumsum", "reduce_window_sum"}
# Which compute no float from others: what the program gets of exact numbers is exact.
_DISCRETE = {"bitcast_convert_type", "sort", "scatter-max", "scatter-min"}
_DISCRETE |= {"real", "imag", "complex", "conj", "rem", "nextafter", "select_and_gather_add"}
_PRODUCTS = {"dot_general", "conv_general_dilated"}
_ARITHMETIC: dict[str, Callable[[Ends, Ends], Ends]] = {
  "add": enclosures.add,
  "add_any": enclosures.add,
  "sub": enclosures.subtract,
  "mul": enclosures.multiply,
  "div": enclosures.divide,
  "pow": enclosures.power,
}
# By IEEE 754.
_ROUNDED_ONCE = {*_ARITHMETIC, "square", "sqrt", "abs", "neg", "iota", "convert_element_type"}
_ROUNDED_ONCE -= {"pow"}
_BY_EXP = {"pow", "exp2", "sinh", "cosh", "erfc"}  # By exp of what was rounded.
_UPDATES = {"scatter-add": "add", "scatter-sub": "sub", "scatter-mul": "mul"}
_UPDATES |= {"scatter-max": "max", "scatter-min": "min"}
_LOOPS = {"scan", "while", "cond"}  # Walked; one that reaches the folding is too long, or unclear.
_ORDERS = {"gt", "ge", "lt", "le", "eq", "ne"}
_INTEGERS = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "neg": np.negative}
# In numpy, which compiles nothing.
_IN_NUMPY = {"max": np.maximum, "min": np.minimum, "floor": np.floor, "ceil": np.ceil}
_IN_NUMPY |= {"sign": np.sign, "and": np.logical_and, "or": np.logical_or}


class Unknown(Exception):
  """A number that cannot be enclosed; the message says why."""


def number(value: Any, dtype: Any, origins: dict[str, np.ndarray] | None = None) -> Known:
  """A number that the program is given, in the dtype in which the program has it."""
  if jnp.issubdtype(dtype, jax.dtypes.prng_key) or isinstance(value, jax.Ref):
    return Known.exactly(value, origins)  # What is read from a mutable array is not known.
  array = np.asarray(value).astype(dtype)
  if not is_float(dtype):
    return Known.exactly(array, origins)
  wide = array.astype(np.float64)
  flushed = (wide != 0) & (np.abs(wide) < float(jnp.finfo(dtype).smallest_normal))
  if flushed.any():  # To 0, as devices do, or not.
    ends = (
      np.where(flushed, np.minimum(wide, 0), wide),
      np.where(flushed, np.maximum(wide, 0), wide),
    )
    return Known(*ends, origins or {})
  return Known.exactly(wide, origins)


def is_float(dtype: Any) -> bool:
  """Whether a dtype is one of floating-point numbers."""
  return bool(jnp.issubdtype(dtype, jnp.floating))


def is_half_or_more(dtype: Any) -> bool:
  """Whether rounding to a dtype is left out of account; to less it is a step function."""
  return is_float(dtype) and jnp.finfo(dtype).nmant >= jnp.finfo(jnp.bfloat16).nmant


def is_step(eqn) -> bool:
  """Whether an equation rounds a number that it computes to less than half precision."""
  return any(is_float(v.aval.dtype) and not is_half_or_more(v.aval.dtype) for v in eqn.outvars)


def keeps_precision(eqn) -> bool:
  """Whether an equation is a `reduce_precision` to no less than what its dtype has."""
  if eqn.primitive.name != "reduce_precision":
    return False
  info = jnp.finfo(eqn.invars[0].aval.dtype)
  bits = eqn.params["exponent_bits"], eqn.params["mantissa_bits"]
  return bits[0] >= info.nexp and bits[1] >= info.nmant


def is_pure(eqn) -> bool:
  """Whether an equation gives the same result each time."""
  return not (eqn.effects or any(part in eqn.primitive.name for part in _IMPURE))


def has_body(eqn) -> bool:
  """Whether an equation computes with a function of the program's, or a scatter with its own."""
  bodies = [jaxpr.eqns for jaxpr in jex.jaxprs_in_params(eqn.params)]
  if eqn.primitive.name.startswith("scatter"):
    wanted = _UPDATES.get(eqn.primitive.name)
    return [[e.primitive.name for e in eqns] for eqns in bodies] not in ([], [[wanted]])
  return bool(bodies)


def fold(eqn, inputs: Sequence[Known]) -> list[Known]:
  """The outputs of an equation of known numbers.

  Raises:
    Unknown: they cannot be enclosed.
  """
  name = eqn.primitive.name
  if not is_pure(eqn):
    raise Unknown(f"{name}, a call whose result may change")
  if name in SAME or keeps_precision(eqn):
    return list(inputs)
  origins = {n: a for x in inputs for n, a in x.origins.items()}
  varies = any(x.varies for x in inputs)
  with np.errstate(all="ignore"):
    outputs = _enclose(name, eqn, inputs, varies)
    known = []
    for (low, high), var in zip(outputs, eqn.outvars, strict=True):
      if is_float(var.aval.dtype) and not varies and name not in (*_BY_ENDS, "select_n"):
        low, high = _rounded(eqn, low, high, var.aval.dtype)
      known.append(Known(low, high, origins, varies))
  return known


def _enclose(name: str, eqn, inputs: Sequence[Known], varies: bool) -> list[Ends]:
  params, ends = eqn.params, [(x.low, x.high) for x in inputs]
  floats = is_float(eqn.outvars[0].aval.dtype) and all(x.is_float for x in inputs)
  if name in _OWN_RULES:
    return [_OWN_RULES[name](eqn, *inputs)]
  if name in _ORDERS:
    return [_order(name, *inputs)]
  if name == "not" and inputs[0].low.dtype == bool:
    return [(~inputs[0].high, ~inputs[0].low)]
  if name == "is_finite":
    surely = np.isfinite(inputs[0].low) & np.isfinite(inputs[0].high)
    return [(surely, np.ones_like(surely))]
  if name == "scatter-add" and is_float(eqn.outvars[0].aval.dtype):
    return [_scatter_add(eqn, *inputs)]
  if name == "scatter" and getattr(inputs[0].low.dtype, "kind", None) in {*"fiub"}:
    return [_scatter(eqn, *inputs)]
  if name in _BY_ENDS and not (name == "sort" and len(inputs) > 1):
    return _by_ends(name, eqn, inputs)
  if floats and name in _ARITHMETIC:
    return [_ARITHMETIC[name](*ends)]
  if floats and name in enclosures.FUNCTIONS:
    return [enclosures.FUNCTIONS[name](*ends)]
  if floats and name == "integer_pow":
    return [enclosures.integer_power(ends[0], params["y"])]
  if floats and name in _SUMS:
    return [_sum(eqn, inputs[0])]
  if floats and name in ("reduce_prod", "cumprod"):
    return [_products(name, eqn, inputs[0])]
  if floats and name in _PRODUCTS:
    return [_product(name, eqn, *inputs)]
  if any(jnp.issubdtype(v.aval.dtype, jnp.complexfloating) for v in eqn.outvars):
    raise Unknown(f"{name} of complex numbers")
  if name in _LOOPS or has_body(eqn):
    raise Unknown(f"{name}, too long to be walked, or of a predicate known only to within rounding")
  exact = [x.low for x in inputs]
  if all(x.is_exact for x in inputs) and name in ("argmax", "argmin"):
    return [_point(out) for out in bind(eqn, *exact)]  # Of numbers that may not fit their dtype.
  if not all(x.is_exact for x in inputs) or (
    varies and any(map(_has_floats, (*eqn.invars, *eqn.outvars)))
  ):
    raise Unknown(f"{name} of a number that is known only to within rounding")
  if name in _INTEGERS and not floats:
    return [_point(_INTEGERS[name](*exact))]
  outputs = _as_the_program_does(eqn, exact)
  if name in _DISCRETE or not any(map(_has_floats, eqn.outvars)):
    return outputs
  return [_about(name, *out, v.aval.dtype) for out, v in zip(outputs, eqn.outvars, strict=True)]


def _about(name: str, low: Any, high: Any, dtype: Any) -> Ends:
  """Ends around a number that the program's library has computed of exact ones.

  A special function or a draw is right to within some units in the last place of the greater of it
  and 1. How far off an incomplete gamma function is, the solution of a linear system, or a Fourier
  transform, is not known: only that it is a number.
  """
  if not is_float(dtype):
    return low, high
  if name in _SPECIAL_FUNCTIONS or name.startswith("random_"):
    margin = 32 * ULPS * float(jnp.finfo(dtype).eps) * np.maximum(1, np.abs(low))
    return low - margin, high + margin
  return np.where(np.isfinite(low), -_HUGE, np.nan), np.where(np.isfinite(high), _HUGE, np.nan)


def _has_floats(var) -> bool:
  return is_float(var.aval.dtype)


def _point(array: Any) -> Ends:
  return array, array


def _error(eqn, result: Any, eps: float) -> Any:
  """How far from a real result the program's own may be, over- and underflow aside."""
  name, size = eqn.primitive.name, np.abs(result)
  if name in ("sin", "cos"):  # Of 1, not of the result, at zeros.
    return np.full_like(size, 4 * ULPS * eps)
  if name in _ROUNDED_ONCE:
    units: Any = 1
  elif name in ("reduce_prod", "cumprod"):
    units = 4 * ULPS + math.prod(eqn.invars[0].aval.shape)
  elif name == "integer_pow":
    units = max(4 * ULPS, abs(eqn.params["y"]))
  elif name in _BY_EXP:  # The error of the exponent counts by its size.
    units = 4 * ULPS * (1 + np.abs(np.log(np.maximum(size, 1e-300))))
  elif name == "erf_inv":  # By log(1 - x^2), of which the error counts by 1 / (1 - x^2).
    units = 4 * ULPS + np.exp(np.minimum(size, 26) ** 2)
  else:
    # XLA's log1p of float64 is off by some 40 units near 0, all others by a few.
    units = (64 if name == "log1p" else 4) * ULPS
  return np.expm1(np.minimum(units * eps, 700)) * size  # Errors of factors compound.


def _rounded(eqn, low: Any, high: Any, dtype: Any) -> Ends:
  """Ends that contain all that the program, in a dtype, makes of the numbers between them."""
  if low is high or np.array_equal(low, high):
    low = high
  name, info = eqn.primitive.name, jnp.finfo(dtype)
  tiny, largest, eps = float(info.smallest_normal), float(info.max), float(info.eps)
  normal = (low == 0) | (np.abs(low) >= tiny)
  exact = (low == high) & (low.astype(dtype).astype(np.float64) == low) & normal
  if exact.all():
    return low, low
  errors = [_error(eqn, end, eps) for end in (low, high)]
  # Where errors are about as large as the numbers, order may be lost: the larger error at both ends.
  wide = np.maximum(errors[0] - np.abs(low) / 4, errors[1] - np.abs(high) / 4) > 0
  errors = [np.where(wide, np.maximum(*errors), e) + float(info.smallest_subnormal) for e in errors]
  down, up = low - errors[0], high + errors[1]
  if name not in ("sin", "cos"):  # All others keep the sign.
    down = np.where(low >= 0, np.maximum(down, 0), down)
    up = np.where(high <= 0, np.minimum(up, 0), up)
  if name == "integer_pow" and eqn.params["y"] < 0:  # 1 over what may be flushed to 0.
    largest = min(largest, 1 / tiny)
  down = np.where((down > 0) & (down < tiny), 0, np.where(down < -largest, -np.inf, down))
  up = np.where((up < 0) & (up > -tiny), 0, np.where(up > largest, np.inf, up))
  return np.where(exact, low, down), np.where(exact, high, up)


def _as_the_program_does(eqn, arrays: Sequence[Any]) -> list[Ends]:
  """The outputs of an equation in the program's own dtypes; floats then in float64.

  One that is subnormal is enclosed together with 0: another device may flush it, or not.
  """
  given = [
    a if jnp.issubdtype(v.aval.dtype, jax.dtypes.prng_key) else jnp.asarray(a, v.aval.dtype)
    for a, v in zip(arrays, eqn.invars, strict=True)
  ]
  try:
    out = eqn.primitive.bind(*given, **eqn.params)
  except Exception as error:  # One with a body, say, which cannot be bound alone.
    raise Unknown(f"{eqn.primitive.name}, which cannot be computed by itself") from error
  outputs = out if eqn.primitive.multiple_results else [out]
  known = [number(o, v.aval.dtype) for o, v in zip(outputs, eqn.outvars, strict=True)]
  return [(k.low, k.high) for k in known]


def bind(eqn, *arrays: Any) -> list[Any]:
  """The outputs of an equation for other arrays, its floats in float64."""
  params = dict(eqn.params)
  for key in ("preferred_element_type", "dtype", "out_dtype"):
    if params.get(key) is not None and is_float(params[key]):
      params[key] = np.dtype(np.float64)
  if "precision" in params:
    params["precision"] = None
  with float64():
    out = eqn.primitive.bind(*map(jnp.asarray, arrays), **params)
    outputs = out if eqn.primitive.multiple_results else [out]
    return [np.asarray(o) for o in outputs]


def _by_ends(name: str, eqn, inputs: Sequence[Known]) -> list[Ends]:
  data = _BY_ENDS[name]
  indices = inputs[data.stop :] if data.stop else []
  if not all(i.is_exact for i in indices):
    raise Unknown(f"{name} by an index that is known only to within rounding")
  if any(jnp.issubdtype(x.low.dtype, jax.dtypes.prng_key) for x in inputs):
    return _as_the_program_does(eqn, [x.low for x in inputs])
  keys = [i.low for i in indices]

  if name not in _MOVES and any(np.any(_may_be_nan(x)) for x in inputs):
    raise Unknown(f"{name} of what may be no number")

  def apply(arrays):
    if name in _IN_NUMPY and (arrays[0].dtype in (np.bool_, np.float64) or name in ("max", "min")):
      return [_IN_NUMPY[name](*arrays)]
    return bind(eqn, *arrays, *keys)

  low = apply([x.low for x in inputs[data]])
  if all(x.is_exact for x in inputs[data]):
    return list(zip(low, low, strict=True))
  if name.removeprefix("reduce_") in ("and", "or") and inputs[0].low.dtype != np.bool_:
    raise Unknown(f"{name} of integers that are known only to within rounding")
  if name == "top_k":
    raise Unknown("top_k of numbers that are known only to within rounding")
  return list(zip(low, apply([x.high for x in inputs[data]]), strict=True))


def broadcast(array: np.ndarray, shape: tuple[int, ...], dimensions: Sequence[int]) -> np.ndarray:
  """`lax.broadcast_in_dim`, which compiles."""
  thin = [1] * len(shape)
  for d, n in zip(dimensions, array.shape, strict=True):
    thin[d] = n
  return np.broadcast_to(array.reshape(thin), shape)


def _move(x: Known, move: Callable[[Any], Any]) -> Ends:
  low = move(x.low)
  return (low, low) if x.low is x.high else (low, move(x.high))


def _broadcast_in_dim(eqn, x: Known, *_: Known) -> Ends:
  dimensions = eqn.params["broadcast_dimensions"]
  if jnp.issubdtype(x.low.dtype, jax.dtypes.prng_key):
    return _as_the_program_does(eqn, [x.low])[0]
  return _move(x, lambda a: broadcast(a, eqn.params["shape"], dimensions))


def _reshape(eqn, x: Known, *_: Known) -> Ends:
  if eqn.params.get("dimensions") is not None:
    return _by_ends("reshape", eqn, [x])[0]
  return _move(x, lambda a: a.reshape(eqn.params["new_sizes"]))


def _convert_element_type(eqn, x: Known) -> Ends:
  dtype = np.dtype(eqn.params["new_dtype"])
  floats = x.low.dtype == np.float64
  if is_half_or_more(dtype):
    low, high = _move(x, lambda a: a.astype(np.float64))
    long = np.maximum(np.abs(low), np.abs(high)) >= 2.0**53  # Integers, which it may have rounded.
    return (
      (low, high) if floats or not long.any() else enclosures.outward(low, high, (~long, ~long))
    )
  if is_float(dtype):  # Less than half precision: steps.
    return _move(x, lambda a: a.astype(dtype).astype(np.float64))
  if floats and dtype == np.bool_:
    return _order("ne", x, Known.exactly(np.float64(0)))
  if x.is_exact and not floats:
    return _point(x.low.astype(dtype))
  if x.low.dtype == np.bool_:
    return _move(x, lambda a: a.astype(dtype))
  if not floats or not jnp.issubdtype(dtype, jnp.integer):
    raise Unknown("a cast of a number that is known only to within rounding")
  low, high = np.trunc(x.low), np.trunc(x.high)  # Towards 0, which is non-decreasing.
  info = jnp.iinfo(dtype)
  if not ((low >= info.min) & (high <= info.max) & np.isfinite(high - low)).all():
    raise Unknown(f"a cast to {dtype} of a number beyond its range")
  low, high = low.astype(dtype), high.astype(dtype)
  return _point(low) if x.is_exact else (low, high)


def _select_n(eqn, which: Known, *cases: Known) -> Ends:
  if jnp.issubdtype(cases[0].low.dtype, jax.dtypes.prng_key):
    if not which.is_exact:
      raise Unknown("a random key chosen by a number that is known only to within rounding")
    return _as_the_program_does(eqn, [which.low, *(c.low for c in cases)])[0]
  shape = cases[0].shape
  last = len(cases) - 1  # To which XLA clips.
  index = [np.broadcast_to(np.clip(i, 0, last), shape).astype(int) for i in (which.low, which.high)]
  lows = np.stack([np.broadcast_to(c.low, shape) for c in cases])
  highs = np.stack([np.broadcast_to(c.high, shape) for c in cases])
  if which.is_exact and all(c.is_exact for c in cases):
    return _point(np.take_along_axis(lows, index[0][None], 0)[0])
  number = np.arange(len(cases)).reshape(-1, *[1] * len(shape))
  possible = (number >= index[0]) & (number <= index[1])
  most, least = (np.inf, -np.inf) if cases[0].is_float else (lows.max(), highs.min())
  low = np.where(possible, lows, most).min(0)  # NaN, where possible, stays.
  return low, np.where(possible, highs, least).max(0)


def _iota(eqn) -> Ends:
  """Integers, of which bfloat16 holds those to 256 only; it rounds the others."""
  shape, dtype, axis = (eqn.params[key] for key in ("shape", "dtype", "dimension"))
  numbers = np.arange(shape[axis]).astype(np.float64 if is_float(dtype) else dtype)
  return _point(broadcast(numbers, tuple(shape), (axis,)))


_OWN_RULES: dict[str, Callable[..., Ends]] = {
  "iota": _iota,
  "broadcast_in_dim": _broadcast_in_dim,
  "reshape": _reshape,
  "convert_element_type": _convert_element_type,
  "select_n": _select_n,
}


def _order(name: str, a: Known, b: Known) -> Ends:
  """(surely, perhaps), for a comparison; NaN stands for a number of which nothing is known."""
  if name in ("lt", "le"):
    return _order({"lt": "gt", "le": "ge"}[name], b, a)
  if name == "ne":
    surely, perhaps = _order("eq", a, b)
    return ~perhaps, ~surely
  unknown = _may_be_nan(a) | _may_be_nan(b)
  if a is b:  # A number equals itself: so programs ask whether it is NaN.
    same = np.full(a.shape, name != "gt")
    return same & ~unknown, same | unknown
  if name == "eq":
    surely = (a.low == a.high) & (b.low == b.high) & (a.low == b.low)
    perhaps = (a.low <= b.high) & (b.low <= a.high)
  else:
    compare = np.greater if name == "gt" else np.greater_equal
    surely, perhaps = compare(a.low, b.high), compare(a.high, b.low)
  return surely & ~unknown, perhaps | unknown


def _may_be_nan(x: Known) -> Any:
  if getattr(x.low.dtype, "kind", "") not in ("f", "c"):
    return np.False_
  return np.isnan(x.low) | np.isnan(x.high)


def _sum(eqn, x: Known) -> Ends:
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
  return _within(eqn, low, high, n, size, [x])


def _float_sum(eqn, array: np.ndarray) -> np.ndarray:
  if eqn.primitive.name == "reduce_sum":
    return np.asarray(array.sum(tuple(eqn.params["axes"])))
  return bind(eqn, array)[0]


def _scattering(eqn, indices: Known) -> Callable[..., np.ndarray]:
  """A function that updates places of one array by another, as `lax.scatter_add` would."""
  if has_body(eqn):
    raise Unknown("scatter by a function of its own")
  if not indices.is_exact:
    raise Unknown("scatter by an index that is known only to within rounding")

  def scatter(update: Callable, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    given = {key: eqn.params[key] for key in ("dimension_numbers", "mode")}
    with float64():
      return np.asarray(update(jnp.asarray(old), indices.low, jnp.asarray(new), **given))

  return scatter


def _scatter(eqn, x: Known, indices: Known, updates: Known) -> Ends:
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


def _scatter_add(eqn, x: Known, indices: Known, updates: Known) -> Ends:
  scatter = _scattering(eqn, indices)

  def add(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    return scatter(lax.scatter_add, old, new)

  low = add(x.low, updates.low)
  high = low if x.is_exact and updates.is_exact else add(x.high, updates.high)
  sizes = [np.maximum(np.abs(t.low), np.abs(t.high)) for t in (x, updates)]
  return _within(eqn, low, high, 1 + indices.low.size, add(*sizes), [x, updates])


def _products(name: str, eqn, x: Known) -> Ends:
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


def _within(eqn, low, high, n: int, size, terms: Sequence[Known]) -> Ends:
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


def _product(name: str, eqn, a: Known, b: Known) -> Ends:
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
    return _point(middle)
  margin = 2 * (n + 2) * _epsilon(eqn, [a, b]) * size + n * _flushed([a, b])
  return enclosures.outward(low - margin, high + margin, (margin == 0, margin == 0))
