"""Interval arithmetic in float64: the ends of intervals that surely contain a real number.

An interval is a pair (low, high) of float64 arrays. IEEE arithmetic rounds to the nearest number,
so the neighbour of a rounded end is outside (Moore, Kearfott and Cloud 2009, "Introduction to
Interval Analysis", chapter 3). An operation that no rounding touches, as 0.5 + 0.25, stays a
point: equal numbers are recognised as equal.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.special

Ends = tuple[Any, Any]

_EPSILON = float(np.finfo(np.float64).eps)
_TINY = float(np.finfo(np.float64).smallest_subnormal)
ONE = (np.float64(1), np.float64(1))
ULPS = 4  # Units in the last place by which a library's exp, tanh, ... may miss, in any precision.


def outward(low: Any, high: Any, exact: Any = (np.False_, np.False_), ulps: int = 1) -> Ends:
  """The ends, each `ulps` further out unless exact."""
  if exact[0].all() and exact[1].all():
    return low, high
  if ulps == 1:
    out = np.nextafter(low, -np.inf), np.nextafter(high, np.inf)
  else:
    out = low - ulps * _EPSILON * np.abs(low) - _TINY, high + ulps * _EPSILON * np.abs(high) + _TINY
  return np.where(exact[0], low, out[0]), np.where(exact[1], high, out[1])


def is_short(x: Any) -> Any:
  """Whether a number fits into float32, so that products of two fit into float64."""
  return np.equal(np.asarray(x).astype(np.float32), x)


def _is_exact_product(a: Any, b: Any, product: Any) -> Any:
  """Whether a product of two, times 0 or a power of 2 if need be, was not rounded."""
  kept = (np.abs(product) >= np.finfo(np.float64).smallest_normal) | (a == 0) | (b == 0)
  kept &= np.isfinite(product)  # 2**1000 x overflows, and is not infinite.
  exact = is_short(a) & is_short(b)
  if not exact.all():
    exact = exact | _is_power_of_2(a) | _is_power_of_2(b)
  return kept & exact


def _is_power_of_2(x: Any) -> Any:
  """Whether a number is a power of 2, with a sign, or 0."""
  fraction = np.abs(np.frexp(x)[0])
  return (fraction == 0.5) | (fraction == 0)


def add(a: Ends, b: Ends) -> Ends:
  """a + b."""
  low, high = a[0] + b[0], a[1] + b[1]
  return outward(low, high, (_is_exact_sum(a[0], b[0], low), _is_exact_sum(a[1], b[1], high)))


def _is_exact_sum(a: Any, b: Any, total: Any) -> Any:
  """Whether the rounding error, which float64 holds (Knuth, TAOCP 2, 4.2.2), is 0."""
  part = total - a
  return ((a - (total - part)) + (b - part) == 0) & np.isfinite(total)


def negative(a: Ends) -> Ends:
  """-a."""
  return -a[1], -a[0]


def subtract(a: Ends, b: Ends) -> Ends:
  """a - b."""
  return add(a, negative(b))


def multiply(a: Ends, b: Ends) -> Ends:
  """a b: its extremes are at corners."""
  return at_corners(a, b, rounded_product)


def rounded_product(x: Any, y: Any) -> tuple[Any, Any]:
  """x y, and whether it was not rounded."""
  product = x * y
  return product, _is_exact_product(x, y, product)


def divide(a: Ends, b: Ends) -> Ends:
  """a / b; NaN where b may be 0."""

  def quotient(x, y):
    q = x / y
    return q, (q * y == x) & _is_exact_product(q, y, x)

  low, high = at_corners(a, b, quotient)
  undefined = (b[0] <= 0) & (b[1] >= 0)
  return np.where(undefined, np.nan, low), np.where(undefined, np.nan, high)


def at_corners(a: Ends, b: Ends, operation: Callable) -> Ends:
  """The extremes of an operation, which gives a rounded result and whether it is exact."""
  ends = []
  for x, y in ((x, y) for x in _distinct(a) for y in _distinct(b)):
    value, exact = operation(x, y)
    ends.append(outward(value, value, (exact, exact)))
  low, high = ends[0]
  for other in ends[1:]:
    low, high = np.minimum(low, other[0]), np.maximum(high, other[1])
  return low, high


def _distinct(a: Ends) -> Ends | tuple[Any]:
  return a[:1] if a[0] is a[1] else a


def magnitude(a: Ends) -> Ends:
  """|a|."""
  least = np.where((a[0] <= 0) & (a[1] >= 0), 0.0, np.minimum(np.abs(a[0]), np.abs(a[1])))
  return least, np.maximum(np.abs(a[0]), np.abs(a[1]))


def size_of(a: Ends) -> Any:
  """The largest |a|."""
  return magnitude(a)[1]


def integer_power(a: Ends, power: int) -> Ends:
  """a to an integer power; NaN where a negative power has 0 among its bases."""
  if power < 0:
    return divide(ONE, integer_power(a, -power))
  base = magnitude(a) if power % 2 == 0 else a  # On which it is non-decreasing.
  return _power_of(base[0], power)[0], _power_of(base[1], power)[1]


def _power_of(x: Any, power: int) -> Ends:
  if power < 2:
    return (x, x) if power else (np.ones_like(x), np.ones_like(x))
  half = _power_of(x, power // 2)
  whole = multiply(half, half)
  return multiply(whole, (x, x)) if power % 2 else whole


def power(a: Ends, b: Ends) -> Ends:
  """a^b of positive a, monotone in either; NaN elsewhere."""
  corners = [np.where(x > 0, np.power(np.abs(x), y), np.nan) for x in a for y in b]
  low, high = outward(np.min(corners, 0), np.max(corners, 0), ulps=ULPS)
  return np.maximum(low, 0), high


def square_root(a: Ends) -> Ends:
  """The square root; NaN where a may be negative."""
  low, high = np.sqrt(a[0]), np.sqrt(a[1])
  exact = [(r * r == x) & is_short(r) for r, x in zip((low, high), a, strict=True)]
  low, high = outward(low, high, exact)
  return np.maximum(low, 0), high


def _cosh(a: Ends) -> Ends:
  return monotone(np.cosh, (0, 1), (1, np.inf))(magnitude(a))


def _wave(f: Callable, derivative_bound: float = 1.0) -> Callable[[Ends], Ends]:
  """An interval extension of sin or cos, which change no faster than their argument."""

  def enclose(a):
    middle = a[0] / 2 + a[1] / 2
    radius = derivative_bound * np.maximum(a[1] - middle, middle - a[0])
    radius = radius + ULPS * _EPSILON * (1 + np.abs(middle))
    value = f(middle)
    return np.maximum(value - radius, -1), np.minimum(value + radius, 1)

  return enclose


def monotone(
  f: Callable,
  fixed: tuple[float, float],
  bounds: tuple[float, float],
  rising: bool = True,
  ulps: int = ULPS,
) -> Callable[[Ends], Ends]:
  """An interval extension of a monotone function of a library, exact at one argument.

  Args:
    f: computes it to within `ulps` units in the last place.
    fixed: (x, f(x)), an exact pair.
    bounds: least and greatest values of f over the reals.
    rising: whether it rises, or falls.
    ulps: of the library's implementation.
  """

  def enclose(a):
    ends = a if rising else a[::-1]
    low, high = f(ends[0]), f(ends[1])
    exact = [
      np.equal(x, fixed[0]) & np.equal(y, fixed[1]) for x, y in zip(ends, (low, high), strict=True)
    ]
    low, high = outward(low, high, exact, ulps)
    # NaN passes through both.
    return np.maximum(low, bounds[0]), np.minimum(high, bounds[1])

  return enclose


_ALL = (-np.inf, np.inf)
FUNCTIONS: dict[str, Callable[[Ends], Ends]] = {  # By the names of primitives.
  "neg": negative,
  "abs": magnitude,
  "square": lambda a: integer_power(a, 2),
  "sqrt": square_root,
  "rsqrt": lambda a: divide(ONE, square_root(a)),
  "cbrt": monotone(np.cbrt, (0, 0), _ALL),
  "exp": monotone(np.exp, (0, 1), (0, np.inf)),
  "exp2": monotone(np.exp2, (0, 1), (0, np.inf)),
  "expm1": monotone(np.expm1, (0, 0), (-1, np.inf)),
  "log": monotone(np.log, (1, 0), _ALL),
  "log1p": monotone(np.log1p, (0, 0), _ALL),
  "logistic": monotone(scipy.special.expit, (0, 0.5), (0, 1)),
  "tanh": monotone(np.tanh, (0, 0), (-1, 1)),
  "sinh": monotone(np.sinh, (0, 0), _ALL),
  "cosh": _cosh,
  "asinh": monotone(np.arcsinh, (0, 0), _ALL),
  "atan": monotone(np.arctan, (0, 0), (-np.pi, np.pi)),
  "erf": monotone(scipy.special.erf, (0, 0), (-1, 1)),
  # SciPy's rounds x^2 before exp(-x^2): off by 260 units at x = 26, beyond which it is 0.
  "erfc": monotone(scipy.special.erfc, (0, 1), (0, 2), rising=False, ulps=1024),
  "erf_inv": monotone(scipy.special.erfinv, (0, 0), _ALL),
  "sin": _wave(np.sin),
  "cos": _wave(np.cos),
}
