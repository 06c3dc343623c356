"""Value, slope and second derivative of a scalar function, as enclosures.

A jet holds the three of them over a piece of the line, and in the limit at its two ends. All numbers
are enclosures (`enclosures`): a sign is known only if a whole enclosure has it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from convex_jax.proof.enclosures import (
  FUNCTIONS,
  ONE,
  Ends,
  add,
  at_corners,
  divide,
  integer_power,
  magnitude,
  negative,
  rounded_product,
)

ZERO = (np.float64(0), np.float64(0))
TWO = (np.float64(2), np.float64(2))
HALF = (np.float64(0.5), np.float64(0.5))
TWO_OVER_ROOT_PI = (np.float64(1.1283791670955124), np.float64(1.1283791670955128))
LOG_2 = (np.float64(0.6931471805599453), np.float64(0.6931471805599454))
PIECE, LEFT, RIGHT = range(3)  # Where a jet is taken: all over a piece, and at its ends.


class NoRuleError(Exception):
  """The computation is not a scalar function with these kinks, as far as can be seen."""


def _times(a: Ends, b: Ends) -> Ends:
  """a b, of bounds: 0 times an infinite one is 0."""
  if a is ZERO or b is ZERO:
    return ZERO
  if a is ONE or b is ONE:
    return a if b is ONE else b
  return at_corners(a, b, _product)


def _product(x: Any, y: Any) -> tuple[Any, Any]:
  zero = np.equal(x, 0) | np.equal(y, 0)
  product, exact = rounded_product(x, y)
  return np.where(zero, 0.0, product), exact | zero


def _negated(a: Ends) -> Ends:
  return a if a is ZERO else negative(a)


def _plus(a: Ends, b: Ends) -> Ends:
  if a is ZERO or b is ZERO:
    return a if b is ZERO else b
  return add(a, b)


def is_zero(a: Ends) -> Any:
  """Whether a number surely is 0."""
  return np.equal(a[0], 0) & np.equal(a[1], 0)


# g, g' and g'' of the scalar functions that programs use around kinks.


def _exp2(v: Ends) -> tuple[Ends, Ends, Ends]:
  power = FUNCTIONS["exp2"](v)
  return power, _times(LOG_2, power), _times(_times(LOG_2, LOG_2), power)


def _exp(v: Ends) -> tuple[Ends, Ends, Ends]:
  power = FUNCTIONS["exp"](v)
  return power, power, power


def _expm1(v: Ends) -> tuple[Ends, Ends, Ends]:
  power = FUNCTIONS["exp"](v)
  return FUNCTIONS["expm1"](v), power, power


def _logistic(v: Ends) -> tuple[Ends, Ends, Ends]:
  sigmoid, other = FUNCTIONS["logistic"](v), FUNCTIONS["logistic"](negative(v))
  slope = _times(sigmoid, other)
  return sigmoid, slope, _times(slope, negative(FUNCTIONS["tanh"](_times(HALF, v))))


def _tanh(v: Ends) -> tuple[Ends, Ends, Ends]:
  value, twice = FUNCTIONS["tanh"](v), _times(TWO, v)
  slope = _times((np.float64(4), np.float64(4)), _logistic(twice)[1])
  return value, slope, _times(slope, _times(negative(TWO), value))


def _softplus(v: Ends) -> tuple[Ends, Ends, Ends]:
  sigmoid, slope, _ = _logistic(v)
  return FUNCTIONS["log1p"](FUNCTIONS["exp"](v)), sigmoid, slope


def _erf(v: Ends) -> tuple[Ends, Ends, Ends]:
  slope = _times(TWO_OVER_ROOT_PI, FUNCTIONS["exp"](negative(FUNCTIONS["square"](v))))
  return FUNCTIONS["erf"](v), slope, _times(slope, _times(negative(TWO), v))


def _erfc(v: Ends) -> tuple[Ends, Ends, Ends]:
  _, slope, second = _erf(v)
  return FUNCTIONS["erfc"](v), negative(slope), negative(second)


def _square_root(v: Ends) -> tuple[Ends, Ends, Ends]:
  """Of v >= 0; NaN where it may be 0, from where on its slope is infinite."""
  if not np.all(ends_at(v, PIECE)[0] >= 0):
    raise NoRuleError  # 0 times a root that is not a number is not 0, nor are two such the same.
  root = FUNCTIONS["sqrt"](v)
  slope = divide(HALF, root)
  return root, slope, divide(_times(negative(HALF), slope), v)


def _integer_power(v: Ends, y: int) -> tuple[Ends, Ends, Ends]:
  def multiple(factor: int, power: int) -> Ends:
    times = np.float64(factor)
    return _times((times, times), integer_power(v, power)) if factor else ZERO

  return integer_power(v, y), multiple(y, y - 1), multiple(y * (y - 1), y - 2)


DERIVATIVES: dict[str, Callable[[Ends], tuple[Ends, Ends, Ends]]] = {
  "exp": _exp,
  "erf": _erf,
  "erfc": _erfc,
  "exp2": _exp2,
  "expm1": _expm1,
  "square": lambda v: _integer_power(v, 2),
  "logistic": _logistic,
  "softplus": _softplus,  # log1p(exp(z)).
  "sqrt": _square_root,
  "tanh": _tanh,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Jet:
  """A function, its slope and its second derivative, along a first axis: `PIECE`, ..."""

  value: Ends
  slope: Ends  # Times `over`.
  over: Ends  # Above 0. A quotient would be rounded; so celu(z) = alpha expm1(z / alpha) is not.
  second: Ends
  is_continuous: Any = True  # Whether its limits at the ends are its values there.

  @property
  def is_affine(self) -> bool:
    """Whether it surely is, all over the piece."""
    return bool(np.all(is_zero(ends_at(self.second, PIECE))))

  @property
  def steepness(self) -> Ends:
    return self.slope if self.over is ONE else divide(self.slope, self.over)

  def plus(self, other: "Jet") -> "Jet":
    if self.over is other.over:
      slope, over = _plus(self.slope, other.slope), self.over
    else:
      slope = _plus(_times(self.slope, other.over), _times(other.slope, self.over))
      over = _times(self.over, other.over)
    second = _plus(self.second, other.second)
    return Jet(_plus(self.value, other.value), slope, over, second, self._joined(other))

  def negated(self) -> "Jet":
    value, slope, second = negative(self.value), _negated(self.slope), _negated(self.second)
    return Jet(value, slope, self.over, second, self.is_continuous)

  def repeated(self, times: int) -> "Jet":
    """The sum of so many of it, at least one; for negative numbers, of its negative."""
    part, left = (self if times > 0 else self.negated()), abs(times)
    total = None
    while left:
      if left % 2:
        total = part if total is None else total.plus(part)
      part, left = part.plus(part), left // 2
    assert total is not None
    return total

  def times(self, other: "Jet") -> "Jet":
    slope = _plus(
      _times(_times(self.slope, other.over), other.value),
      _times(_times(other.slope, self.over), self.value),
    )
    twice = _times(TWO, _times(self.steepness, other.steepness))
    second = _plus(_times(self.second, other.value), _times(other.second, self.value))
    over = ONE if self.over is other.over is ONE else _times(self.over, other.over)
    second = _plus(second, twice)
    return Jet(_times(self.value, other.value), slope, over, second, self._joined(other))

  def divided(self, divisor: Ends) -> "Jet":
    """By a known number other than 0."""
    sign = np.sign(divisor[0])
    slope = _times(self.slope, (sign, sign))
    value, second = divide(self.value, divisor), divide(self.second, divisor)
    return Jet(value, slope, _times(self.over, magnitude(divisor)), second, self.is_continuous)

  def through(self, derivatives: tuple[Ends, Ends, Ends]) -> "Jet":
    """g(self), for g, g' and g'' of the value."""
    value, slope, second = derivatives
    square = ONE if self.steepness is ONE else integer_power(self.steepness, 2)
    second = _plus(_times(second, square), _times(slope, self.second))
    return Jet(value, _times(slope, self.slope), self.over, second, self.is_continuous)

  def power(self, y: int) -> "Jet":
    return self.through(_integer_power(self.value, y))

  def softened(self, other: "Jet") -> "Jet":
    """log(e^self + e^other) = other + log(1 + e^(self - other))."""
    difference = self.plus(other.negated())
    return other.plus(difference.through(_softplus(difference.value)))

  def _joined(self, other: "Jet") -> Any:
    return np.logical_and(self.is_continuous, other.is_continuous)


def slope_change(left: Jet, right: Jet) -> tuple[Any, Any]:
  """Whether the slope falls nowhere at the kink between two pieces, and whether it rises nowhere."""
  before = _times(ends_at(left.slope, RIGHT), ends_at(right.over, LEFT))
  after = _times(ends_at(right.slope, LEFT), ends_at(left.over, RIGHT))
  return before[1] <= after[0], after[1] <= before[0]


def ends_at(ends: Ends, where: int) -> Ends:
  """Bounds all over a piece, or of the limit at one of its ends."""
  return _at(ends[0], where), _at(ends[1], where)


def _at(end: Any, where: int) -> Any:
  if not np.ndim(end):
    return end
  return end[where] if len(end) > 1 else end[0]


def tight(value: Ends, slope: Ends) -> Ends:
  """Bounds over a piece: the limits at its ends, where these are finite, of what is monotone."""
  (low, high), (least, most) = (ends_at(ends, PIECE) for ends in (value, slope))
  for moves, first, last in ((least >= 0, LEFT, RIGHT), (most <= 0, RIGHT, LEFT)):
    limits = _at(value[0], first), _at(value[1], last)
    low, high = (
      np.where(moves & np.isfinite(limit), limit, end)
      for limit, end in zip(limits, (low, high), strict=True)
    )
  return low, high
