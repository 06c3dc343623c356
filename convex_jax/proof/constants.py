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
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from convex_jax.proof import enclosures, sums
from convex_jax.proof.enclosures import ULPS, Ends
from convex_jax.proof.equations import (
  SAME,
  Unknown,
  bind,
  has_body,
  is_float,
  is_half_or_more,
  is_pure,
  keeps_precision,
)
from convex_jax.proof.in_numpy import broadcast, rearranged, select
from convex_jax.proof.updates import UPDATES
from convex_jax.proof.values import Known, may_be_nan

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
_DISCRETE = {"bitcast_convert_type", "sort"}
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
_LOOPS = {"scan", "while", "cond"}  # Walked; one that reaches the folding is too long, or unclear.
_ORDERS = {"gt", "ge", "lt", "le", "eq", "ne"}
_INTEGERS = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "neg": np.negative}
_INTEGERS["rem"] = lambda a, b: np.where(b == 0, a, np.fmod(a, np.where(b == 0, 1, b)))  # As XLA's.
# In numpy, which compiles nothing.
_IN_NUMPY = {"max": np.maximum, "min": np.minimum, "floor": np.floor, "ceil": np.ceil}
_IN_NUMPY |= {"sign": np.sign, "and": np.logical_and, "or": np.logical_or}


def number(value: Any, dtype: Any, origins: dict[str, np.ndarray] | None = None) -> Known:
  """A number that the program is given, in the dtype in which the program has it."""
  if jnp.issubdtype(dtype, jax.dtypes.prng_key) or isinstance(value, jax.Ref):
    return Known.exactly(value, origins)  # What is read from a mutable array is not known.
  if isinstance(value, Tracer):
    raise ValueError(
      "a weight is traced by jit, grad or vmap and has no value yet; a proof needs its numbers, so call"
      " it outside of these transformations"
    )
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
  kind = getattr(inputs[0].low.dtype, "kind", None) if inputs else None  # None of random keys.
  if name in UPDATES and (kind == "f" or (name == "scatter" and kind in {*"iub"})):
    return [UPDATES[name](eqn, *inputs)]
  if name in _BY_ENDS and not (name == "sort" and len(inputs) > 1):
    return _by_ends(name, eqn, inputs)
  if floats and name in _ARITHMETIC:
    return [_ARITHMETIC[name](*ends)]
  if floats and name in enclosures.FUNCTIONS:
    return [enclosures.FUNCTIONS[name](*ends)]
  if floats and name == "integer_pow":
    return [enclosures.integer_power(ends[0], params["y"])]
  if floats and name in _SUMS:
    return [sums.total(eqn, inputs[0])]
  if floats and name in ("reduce_prod", "cumprod"):
    return [sums.multiplied(name, eqn, inputs[0])]
  if floats and name in _PRODUCTS:
    return [sums.contraction(name, eqn, *inputs)]
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
  errors = [_error(eqn, end, eps) for end in ((low,) if low is high else (low, high))]
  # Where errors are about as large as the numbers, order may be lost: the larger error at both ends.
  wide = np.maximum(errors[0] - np.abs(low) / 4, errors[-1] - np.abs(high) / 4) > 0
  errors = [
    np.where(wide, np.maximum(errors[0], errors[-1]), e) + float(info.smallest_subnormal)
    for e in errors
  ]
  down, up = low - errors[0], high + errors[-1]
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


def _by_ends(name: str, eqn, inputs: Sequence[Known]) -> list[Ends]:
  data = _BY_ENDS[name]
  indices = inputs[data.stop :] if data.stop else []
  if not all(i.is_exact for i in indices):
    raise Unknown(f"{name} by an index that is known only to within rounding")
  if any(jnp.issubdtype(x.low.dtype, jax.dtypes.prng_key) for x in inputs):
    return _as_the_program_does(eqn, [x.low for x in inputs])
  keys = [i.low for i in indices]

  if name not in _MOVES and any(np.any(may_be_nan(x)) for x in inputs):
    raise Unknown(f"{name} of what may be no number")

  def apply(arrays):
    if name in _IN_NUMPY and (arrays[0].dtype in (np.bool_, np.float64) or name in ("max", "min")):
      return [_IN_NUMPY[name](*arrays)]
    found = rearranged(name, eqn.params, [*arrays, *keys])
    return bind(eqn, *arrays, *keys) if found is None else found

  low = apply([x.low for x in inputs[data]])
  if all(x.is_exact for x in inputs[data]):
    return list(zip(low, low, strict=True))
  if name.removeprefix("reduce_") in ("and", "or") and inputs[0].low.dtype != np.bool_:
    raise Unknown(f"{name} of integers that are known only to within rounding")
  if name == "top_k":
    raise Unknown("top_k of numbers that are known only to within rounding")
  return list(zip(low, apply([x.high for x in inputs[data]]), strict=True))


def _move(x: Known, move: Callable[[Any], Any]) -> Ends:
  low = move(x.low)
  return (low, low) if x.low is x.high else (low, move(x.high))


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
  if which.is_exact and all(c.is_exact for c in cases):
    return _point(select(which.low, *(c.low for c in cases)))
  shape = cases[0].shape
  last = len(cases) - 1  # To which XLA clips.
  index = [np.broadcast_to(np.clip(i, 0, last), shape).astype(int) for i in (which.low, which.high)]
  lows = np.stack([np.broadcast_to(c.low, shape) for c in cases])
  highs = np.stack([np.broadcast_to(c.high, shape) for c in cases])
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
  unknown = may_be_nan(a) | may_be_nan(b)
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
