"""Curvature of a scalar function with one kink, found from how it is computed.

ELU is `where(z > 0, z, alpha expm1(where(z > 0, 0, z)))`. Neither the choice nor `expm1` of a
choice has a curvature that a rule could state. But on either side of the kink every choice is
made, and the rest is a composition that has one. A continuous function that is convex on both
sides, and whose slope does not fall at the kink, is convex on the whole line.

Values and slopes at the kink are compared as real numbers, although float64 computes them: two
values count as equal only if no rounding has touched them; slopes, kept as fractions, are ordered
only if none has, or if they are well apart.
"""

import collections
import dataclasses
import operator
from collections.abc import Iterator
from typing import Any

import numpy as np

from convex_jax.proof.values import Known, ScalarFunction, Value

COMPARISONS = {"gt": operator.gt, "ge": operator.ge, "lt": operator.lt, "le": operator.le}
ELEMENTWISE = {"add", "sub", "mul", "div", "neg", "max", "min", "abs", "exp", "expm1", "select_n"}
APART = 1e-9  # Relative; more than rounding can change slopes in which nothing has cancelled.
LIMIT = 40  # Operations that are searched for the kink of a value.


@dataclasses.dataclass(frozen=True, eq=False)
class Side:
  """A function on one side of the kink: value and slope at it, curvature and monotonicity."""

  value: "Number"
  slope: "Number"  # The numerator of the slope ...
  over: "Number"  # ... and its denominator, above 0.
  convex: Any
  concave: Any
  rising: Any
  falling: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Number:
  """A float64 or an array of them, and whether it is exact: no rounding has occurred."""

  at: Any
  exact: Any = True

  def __add__(self, other: "Number") -> "Number":
    total = self.at + other.at
    exact = np.logical_and(self.exact, other.exact)
    exact = exact & np.equal(total - self.at, other.at) & np.equal(total - other.at, self.at)
    if np.any((np.sign(self.at) * np.sign(other.at) < 0) & ~exact):
      raise _NoRuleError  # The remainder of rounded numbers that cancel may be anything.
    return Number(total, exact)

  def __mul__(self, other: "Number") -> "Number":
    with np.errstate(over="ignore"):
      short = [np.equal(np.float32(x.at), x.at) for x in (self, other)]
    simple = short[0] & short[1]  # A product of two float32 fits into float64.
    for x in (self, other):
      simple = simple | np.equal(np.abs(x.at), 1) | np.equal(x.at, 0)
    exact = np.logical_and(self.exact, other.exact) & simple
    return Number(self.at * other.at, exact)

  def equals(self, other: "Number") -> Any:
    """Whether both are surely the same number."""
    return np.equal(self.at, other.at) & self.exact & other.exact

  def at_most(self, other: "Number") -> Any:
    """Whether surely self <= other."""
    apart = other.at - self.at > APART * (np.abs(self.at) + np.abs(other.at))
    return apart | (np.less_equal(self.at, other.at) & self.exact & other.exact)


ONE, ZERO = Number(1.0), Number(0.0)


class _NoRuleError(Exception):
  """The computation is not a scalar function with this kink, as far as can be seen."""


def as_scalar_function(value: Value) -> tuple[Value, ScalarFunction] | None:
  """(z, f) where `value` is f(z), a scalar function with one kink of an earlier value z."""
  for root, kink in _kinks(value):
    try:
      left, at, right = (_Half(root, kink, side).of(value) for side in (-1, 0, 1))
    except _NoRuleError:
      continue
    numbers = [x.at for s in (left, at, right) for x in (s.value, s.slope, s.over)]
    if not all(np.isfinite(x).all() for x in numbers):
      continue
    joined = left.value.equals(right.value) & left.value.equals(at.value)
    below, above = left.slope * right.over, right.slope * left.over
    return root, ScalarFunction(
      joined & left.convex & right.convex & below.at_most(above),
      joined & left.concave & right.concave & above.at_most(below),
      joined & left.rising & right.rising,
      joined & left.falling & right.falling,
      kink,
      (left.slope.at / left.over.at, right.slope.at / right.over.at),
      joined,
      left.convex & left.concave,
      right.convex & right.concave,
    )
  return None


def _kinks(value: Value) -> Iterator[tuple[Value, np.ndarray]]:
  """Pairs (z, c): values z that are compared with known numbers c on the way to `value`."""
  todo, seen = collections.deque[Any]([value]), set()
  while todo and len(seen) < LIMIT:  # Breadth first: the nearest comparison comes first.
    node = todo.popleft()
    if id(node) in seen or not isinstance(node, Value) or node.made_by is None:
      continue
    seen.add(id(node))
    op = node.made_by
    if op.primitive in COMPARISONS or op.primitive in ("max", "min"):
      for z, c in (op.inputs, op.inputs[::-1]):
        if isinstance(z, Value) and isinstance(c, Known) and c.is_exact:
          yield z, c.low
    if op.primitive in ELEMENTWISE or op.primitive in COMPARISONS:
      todo.extend(op.inputs)


class _Half:
  """Reads values as functions of `root` on one side of `kink`: -1 below, 0 at, +1 above it."""

  def __init__(self, root: Value, kink: np.ndarray, side: int):
    self._root, self._kink, self._side = root, kink, side
    self._read: dict[int, Side] = {id(root): Side(Number(kink), ONE, ONE, True, True, True, False)}

  def of(self, node: Value | Known) -> Side:
    if id(node) not in self._read:
      self._read[id(node)] = self._compute(node)
    return self._read[id(node)]

  def _compute(self, node: Value | Known) -> Side:
    if isinstance(node, Known):
      if not node.is_exact or not np.isfinite(node.low).all():
        raise _NoRuleError
      return Side(Number(node.low), ZERO, ONE, True, True, True, True)
    if node.made_by is None:
      raise _NoRuleError
    name, inputs = node.made_by.primitive, node.made_by.inputs
    if name == "select_n":
      return self.of(self._chosen(*inputs))
    if name in ("max", "min"):
      a, b = inputs
      return self.of(a if (self._order(a, b) > 0) == (name == "max") else b)
    if name == "abs" and inputs[0] is self._root and not np.any(self._kink):
      return _scaled(self.of(self._root), float(self._side or 1))
    if name == "neg":
      return _scaled(self.of(inputs[0]), -1.0)
    if name in ("exp", "expm1"):
      return _exponential(self.of(inputs[0]), offset=0.0 if name == "exp" else -1.0)
    if name in ("add", "sub"):
      a, b = map(self.of, inputs)
      return _sum(a, b if name == "add" else _scaled(b, -1.0))
    if name in ("mul", "div"):
      return self._product(name, *inputs)
    raise _NoRuleError

  def _order(self, x: Any, y: Any) -> int:
    """The sign of x - y here, one being the root and the other the kink."""
    for a, b, sign in ((x, y, 1), (y, x, -1)):
      if (
        a is self._root
        and isinstance(b, Known)
        and b.is_exact
        and np.array_equal(b.low, self._kink)
      ):
        return self._side * sign
    raise _NoRuleError

  def _chosen(self, test: Any, *cases: Any) -> Any:
    op = test.made_by if isinstance(test, Value) else None
    if len(cases) != 2 or op is None or op.primitive not in COMPARISONS:
      raise _NoRuleError
    return cases[COMPARISONS[op.primitive](self._order(*op.inputs), 0)]

  def _product(self, name: str, a: Any, b: Any) -> Side:
    if name == "mul" and isinstance(a, Known):
      a, b = b, a
    if not isinstance(a, Value) or not isinstance(b, Known) or not b.is_exact:
      raise _NoRuleError
    if not np.isfinite(b.low).all():
      raise _NoRuleError
    if name == "mul":
      return _scaled(self.of(a), b.low)
    if np.any(b.low == 0):
      raise _NoRuleError
    return _divided(self.of(a), b.low)


def _exponential(x: Side, offset: float) -> Side:
  """exp(x) + offset, an offset of -1 by expm1."""
  if np.any(np.abs(x.value.at) > 700):
    raise _NoRuleError  # Over- or underflow would hide a jump.
  exact = np.equal(x.value.at, 0) & x.value.exact
  power = Number(np.exp(x.value.at), exact)
  value = power if offset == 0 else Number(np.expm1(x.value.at), exact)
  flat = np.logical_and(x.rising, x.falling)
  return Side(value, power * x.slope, x.over, x.convex, flat, x.rising, x.falling)


def _sum(a: Side, b: Side) -> Side:
  names = ("convex", "concave", "rising", "falling")
  both = [np.logical_and(getattr(a, name), getattr(b, name)) for name in names]
  return Side(a.value + b.value, a.slope * b.over + b.slope * a.over, a.over * b.over, *both)


def _scaled(x: Side, factor: Any) -> Side:
  """factor x, for a known factor of either sign."""
  return _turned(x, factor, x.value * Number(factor), x.slope * Number(factor), x.over)


def _divided(x: Side, divisor: Any) -> Side:
  """x / divisor, for a known divisor other than 0."""
  value = Number(x.value.at / divisor, np.equal(x.value.at, 0) & x.value.exact)
  slope, over = x.slope * Number(np.sign(divisor)), x.over * Number(np.abs(divisor))
  return _turned(x, divisor, value, slope, over)


def _turned(x: Side, factor: Any, value: Number, slope: Number, over: Number) -> Side:
  """`x` with its curvature and monotonicity swapped where the factor is negative."""
  up, down = np.greater_equal(factor, 0), np.less_equal(factor, 0)
  pairs = ((x.convex, x.concave), (x.concave, x.convex), (x.rising, x.falling))
  pairs += ((x.falling, x.rising),)
  return Side(value, slope, over, *((up & same) | (down & other) for same, other in pairs))
