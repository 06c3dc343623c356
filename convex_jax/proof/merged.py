"""What a compiler makes of operations in a row that it merges, in other numbers than the program's.

XLA combines constants first, adds up the arguments of exponentials, and divides only once:

    (x c) d = x (c d),  (x c) (y d) = (x y) (c d),  x c + y c = (x + y) c,  x / c = x (1 / c),
    (x + c) + d = x + (c + d),  exp(u) exp(v) = exp(u + v),
    x / y / z = x / (y z),  x / (y / z) = (x z) / y,  (x / y) / (z / w) = (x w) / (y z).

Over the reals these are equal. In a dtype, c d may be too large, or be flushed to 0, where neither
x c nor (x c) d is; and u + v is rounded. What that can add to the error is bounded here as if factors
and terms, weights and constants included, could be combined in any order. The bound goes by the sizes
of whole arrays, because elements may be moved between two such operations, and sums and products of a
single term may lie between. A product of matrices is never merged with an elementwise product or sum.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from convex_jax.proof.enclosures import magnitude, size_of

Range = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Factors:
  """A number as a quotient of products.

  Attributes:
    count: the number of factors.
    above: (least, most) product of any of the factors above the line, in size, but for zeros; of
      none it is 1.
    below: likewise.
  """

  count: int
  above: Range
  below: Range = (1.0, 1.0)

  def __mul__(self, other: "Factors") -> "Factors":
    return Factors(
      self.count + other.count, _times(self.above, other.above), _times(self.below, other.below)
    )

  def __truediv__(self, other: "Factors") -> "Factors":
    return self * Factors(other.count, other.below, other.above)

  def __or__(self, other: "Factors") -> "Factors":
    """For either number."""
    return Factors(
      max(self.count, other.count), _hull(self.above, other.above), _hull(self.below, other.below)
    )

  def error(self, tiny: float, largest: float) -> float:
    """What another order of the factors adds to the number's error."""
    if self.count < 3:
      return 0.0
    (_, above), (least, below) = self.above, self.below
    if not (above <= largest and tiny <= least and below <= largest and above / least <= largest):
      return np.inf
    return self.count * tiny * above / least  # Of what is flushed to 0, with the other factors.


@dataclasses.dataclass(frozen=True)
class Merged:
  """What made a number, as far as more may be merged with it.

  Attributes:
    factors: those that it is a quotient of products of, if it is one.
    added: a bound on the sum of the sizes of the terms that it is a sum of, if it is one.
    exponent: a bound on the sum of the arguments of exponentials that are factors of it.
  """

  factors: Factors | None = None
  added: float = 0.0
  exponent: float = 0.0


NOTHING = Merged()


def kept(operands: Sequence[Any]) -> Merged:
  """What made a number that is one of several, or at least may be simplified to one."""
  parts, factors, added = [x.merged for x in operands], None, 0.0
  if any(m.factors for m in parts):
    factors = functools.reduce(operator.or_, map(_factors_of, operands))
  if any(m.added for m in parts):
    added = max(m.added or _size(x) for m, x in zip(parts, operands, strict=True))
  return Merged(factors, added, max((m.exponent for m in parts), default=0.0))


def merge(
  name: str, eqn: Any, operands: Sequence[Any], around: Any, dtype: Any
) -> tuple[Merged, Any]:
  """Of an elementwise operation: what made its result, and what merging adds to its error."""
  if name == "neg":
    return operands[0].merged, 0.0
  if name == "exp":
    return Merged(exponent=_size(operands[0])), 0.0
  info = jnp.finfo(dtype)
  tiny, largest = float(info.smallest_normal), float(info.max)
  if name in ("add", "add_any", "sub"):
    added, factors = sum(x.merged.added or _size(x) for x in operands), None
    reached, parts = added, [x.merged.factors for x in operands]
    if all(parts):  # a c + b c = (a + b) c.
      most = sum(f.above[1] for f in parts)
      factors = functools.reduce(operator.or_, parts)
      factors = dataclasses.replace(factors, above=(0.0, most))
      reached = max(reached, most)
    return Merged(factors, added), 0.0 if reached <= largest else np.inf
  if name in ("square", "integer_pow"):
    operands = [*operands] * (2 if name == "square" else eqn.params["y"])
  elif name not in ("mul", "div"):
    return NOTHING, 0.0
  error, exponents = 0.0, [x.merged.exponent for x in operands]
  if sum(e > 0 for e in exponents) > 1:  # exp(u + v), of a sum that is rounded.
    error = float(info.eps) * sum(exponents) * size_of(around)
  parts = list(map(_factors_of, operands))
  if name == "div":
    inverse = 1 / np.maximum(_least(operands[1]), 1e-300)
    error = error + np.where(_most(operands[1]) * tiny >= 1, _most(operands[0]) * tiny, 0.0)
    error = error + np.where(inverse * tiny > 1, np.inf, 0.0)
    factors = parts[0] / parts[1]
  else:
    factors = math.prod(parts[1:], start=parts[0])
  return Merged(factors, exponent=sum(exponents)), error + factors.error(tiny, largest)


def _factors_of(x: Any) -> Factors:
  """Those that made a number; of another, itself."""
  if x.merged.factors:
    return x.merged.factors
  some = _most(x) > 0
  if not some.any():
    return Factors(1, (1.0, 1.0))
  return Factors(1, _hull((1.0, 1.0), (float(_least(x)[some].min()), _size(x))))


def _times(a: Range, b: Range) -> Range:
  return a[0] * b[0], a[1] * b[1]


def _hull(a: Range, b: Range) -> Range:
  return min(a[0], b[0]), max(a[1], b[1])


def _most(x: Any) -> np.ndarray:
  return np.asarray(size_of(x.ends) + x.error)


def _least(x: Any) -> np.ndarray:
  return np.maximum(magnitude(x.ends)[0] - x.error, 0.0)


def _size(x: Any) -> float:
  return float(np.max(_most(x), initial=0.0))
