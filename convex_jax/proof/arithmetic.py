"""How machines compute: dtypes, and by how much each operation and function may err.

The model is that of `rounding_errors`. Slopes and enclosures of the functions are here too, by
which errors of their arguments are passed on.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from convex_jax.proof import enclosures
from convex_jax.proof.enclosures import Ends, size_of


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
  # Factors of float32 in such programs: by default TPUs read them in bfloat16, GPUs ten bits.
  "bfloat16": Arithmetic(jnp.bfloat16, factors=2.0**-8),
  "float16": Arithmetic(jnp.float16, factors=2.0**-10),
}
FLOAT64 = Arithmetic(jnp.float64, accumulator=jnp.float64)  # That of radii themselves.


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


def gamma(n: int, u: float) -> float:
  """n u / (1 - n u): how far n roundings can be from none, relatively."""
  return n * u / (1 - n * u) if n * u < 1 else math.inf


def unit_roundoff(dtype) -> float:
  """u, half the distance from 1 to the next number."""
  return float(jnp.finfo(dtype).eps) / 2


def smallest_normal(dtype) -> float:
  """The least number above 0 that is not flushed to it."""
  return float(jnp.finfo(dtype).smallest_normal)


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


# Derivatives of scalar functions, given the ends of their arguments and of their results.
SLOPES: dict[str, Callable[[Ends, Ends], Ends]] = {
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
BASIC: dict[str, Callable[[Ends, Ends], Ends]] = {
  "add": enclosures.add,
  "add_any": enclosures.add,
  "sub": enclosures.subtract,
  "mul": enclosures.multiply,
  "div": enclosures.divide,
}


def enclose(name: str, eqn, ends: Sequence[Ends]) -> Ends:
  """The ends of an elementwise operation's result, given those of its operands."""
  if name in BASIC:
    return BASIC[name](*ends)
  if name == "integer_pow":
    return enclosures.integer_power(ends[0], eqn.params["y"])
  return enclosures.FUNCTIONS[name](*ends)


def slopes_of(name: str, eqn, ends: Sequence[Ends], result: Ends) -> list[Ends]:
  """The ends of its derivatives, by each operand; `result` is what `enclose` returns."""
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
  return [SLOPES[name](ends[0], result)]


def own_error(name: str, eqn, operands, around: Ends, dtype) -> Any:
  """The rounding error of an operation itself, whose result lies in `around`."""
  if name in ("neg", "abs"):
    return 0.0
  u, size = unit_roundoff(dtype), size_of(around)
  if name in ("add", "add_any", "sub"):  # The compiler may add up constants first.
    size = size + sum(size_of(x.ends) for x in operands if not x.varies)
  if name == "integer_pow":
    return gamma(2 * eqn.params["y"], u) * size + smallest_normal(dtype) * (1 + size)
  if name == "erfc":
    size = np.maximum(size, 1.0)
  units = FUNCTIONS[name] if name in FUNCTIONS else _ONCE[name]
  return units * u * size + 2 * smallest_normal(dtype)
