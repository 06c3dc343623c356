"""Bounds of slope and second derivative all over a piece of the line, however long.

A finite piece is bisected until the second derivative has a sign on each part. On an infinite one
plain intervals say nothing: there z^2 e^-z would be infinity times 0, and z^3 - z infinity less infinity. Here a number is a
sum of terms w (c_0 + c_1 y + ... + c_n y^n), y = |z| >= L > 0, whose coefficients are intervals
and whose weights w > 0 are products of slopes that decay, as e^-y: what all terms of a sum have in
common says nothing about its sign.
"""

import collections
import contextlib
import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np

from convex_jax.proof.enclosures import (
  FUNCTIONS,
  ONE,
  Ends,
  add,
  divide,
  integer_power,
  multiply,
  negative,
)
from convex_jax.proof.jets import (
  DERIVATIVES,
  HALF,
  LEFT,
  LOG_2,
  PIECE,
  RIGHT,
  TWO,
  ZERO,
  NoRuleError,
  ends_at,
  tight,
)
from convex_jax.proof.linear import has_no_zero
from convex_jax.proof.pieces import STEPS, Piece, operation, softened
from convex_jax.proof.values import Known, Value

FAR = 32.0  # From where on a tail is one part.
ROUNDS = 24  # Bisections of a part.
WIDEST = 500  # Parts that are cut at once.


@dataclasses.dataclass(frozen=True, eq=False)
class Weight:
  """A positive function of z, known by its bounds on the tail."""

  bounds: Ends


_Key = tuple[Weight, ...]
_Polynomial = dict[int, Ends]  # The coefficient of each power; others are 0.


class Tail:
  """A function of y on [L, infinity)."""

  def __init__(self, terms: dict[_Key, _Polynomial]):
    self._terms = terms

  @classmethod
  def power(cls, degree: int, coefficient: Ends = ONE, weight: Weight | None = None) -> "Tail":
    """weight * coefficient * y^degree."""
    return cls({(weight,) if weight else (): {degree: coefficient}})

  def __add__(self, other: "Tail") -> "Tail":
    terms = {key: dict(polynomial) for key, polynomial in self._terms.items()}
    for key, polynomial in other._terms.items():
      _accumulate(terms.setdefault(key, {}), polynomial)
    return Tail(terms)

  def __neg__(self) -> "Tail":
    return Tail({k: {i: negative(c) for i, c in p.items()} for k, p in self._terms.items()})

  def __mul__(self, other: "Tail") -> "Tail":
    terms: dict[_Key, _Polynomial] = {}
    for (key, p), (more, q) in ((x, y) for x in self._terms.items() for y in other._terms.items()):
      product = terms.setdefault(tuple(sorted((*key, *more), key=id)), {})
      for i, a in p.items():
        _accumulate(product, {i + j: multiply(a, b) for j, b in q.items()})
    return Tail(terms)

  def signs(self, start: Any) -> tuple[Any, Any]:
    """Whether it is >= 0 all over [start, infinity), and whether it is <= 0."""
    if not self._terms:
      return np.True_, np.True_
    keys = [collections.Counter(key) for key in self._terms]
    common = keys[0]
    for key in keys[1:]:
      common = common & key
    polynomial = self._collected(common)
    degree, total = max(polynomial), (np.float64(0), np.float64(0))
    for i, coefficient in polynomial.items():  # Over y^degree.
      shrunk = integer_power(divide(ONE, (start, start)), degree - i)
      least = np.zeros_like(shrunk[1]) if i < degree else shrunk[0]
      total = add(total, multiply(coefficient, (least, shrunk[1])))
    return total[0] >= 0, total[1] <= 0

  def growth(self) -> Ends | None:
    """[g], where the function lies between two lines of slopes in [g]; None if it may not."""
    polynomial = self._collected(collections.Counter())
    if max(polynomial, default=0) > 1 or not np.all(np.isfinite(polynomial.get(0, ZERO))):
      return None
    return polynomial.get(1, (np.float64(0), np.float64(0)))

  def _collected(self, common: collections.Counter) -> _Polynomial:
    """The terms over a common weight; each weight that is left is replaced by its bounds."""
    total: _Polynomial = {}
    for key, polynomial in self._terms.items():
      rest = collections.Counter(key) - common
      for weight in rest.elements():
        polynomial = {i: multiply(c, weight.bounds) for i, c in polynomial.items()}
      _accumulate(total, polynomial)
    return total


def _accumulate(total: _Polynomial, polynomial: _Polynomial) -> None:
  for i, c in polynomial.items():
    total[i] = add(total[i], c) if i in total else c


@dataclasses.dataclass(frozen=True, eq=False)
class _Jet:
  """A function, its slope and its second derivative, in z, on a tail."""

  value: Tail
  slope: Tail
  second: Tail

  def __add__(self, other: "_Jet") -> "_Jet":
    return _Jet(self.value + other.value, self.slope + other.slope, self.second + other.second)

  def __neg__(self) -> "_Jet":
    return _Jet(-self.value, -self.slope, -self.second)

  def __mul__(self, other: "_Jet") -> "_Jet":
    value, middle = self.value * other.value, self.slope * other.slope
    slope = self.slope * other.value + self.value * other.slope
    second = self.second * other.value + self.value * other.second + middle + middle
    return _Jet(value, slope, second)

  def through(self, value: Tail, slope: Tail, second: Tail) -> "_Jet":
    """g(self), for g, g' and g'' of the value."""
    square = self.slope * self.slope
    return _Jet(value, slope * self.slope, second * square + slope * self.second)


class _Reader:
  """Reads values on tails on one side, each z >= L > 0 or each z <= -L < 0."""

  def __init__(self, piece: Piece):
    self._piece, self._done = piece, {}

  def of(self, node: Value | Known) -> _Jet:
    if id(node) not in self._done:
      self._done[id(node)] = self._compute(node)
    return self._done[id(node)]

  def _compute(self, start: Value | Known) -> _Jet:
    node, _ = self._piece.settled(start)
    value = ends_at(self._piece.of(node).value, PIECE)
    if isinstance(node, Known):
      return _constant(value)
    if node is self._piece.root:
      side = np.where(np.isposinf(self._piece.high), 1.0, -1.0)
      return _Jet(Tail.power(1, (side, side)), Tail.power(0), Tail({}))
    if (both := softened(node)) is not None:
      x, y = map(self.of, both)
      difference = x + -y
      ends = [ends_at(self._piece.of(z).value, PIECE) for z in both]
      return y + self._through("softplus", difference, add(ends[0], negative(ends[1])), value)
    op = operation(node)
    name, inputs = op.primitive, op.inputs
    if name in ("add", "sub", "mul"):
      a, b = map(self.of, inputs)
      return a * b if name == "mul" else a + (b if name == "add" else -b)
    if name == "div" and isinstance(inputs[1], Known) and has_no_zero(inputs[1]):
      return self.of(inputs[0]) * _constant(divide(ONE, (inputs[1].low, inputs[1].high)))
    if name in STEPS:
      return _constant(value)
    if name == "log1p":
      op = operation(inputs[0])
      name = "softplus" if op.primitive == "exp" else name
    jet = self.of(op.inputs[0])
    if name == "neg" or (name == "abs" and self._piece.sign(op.inputs[0]) < 0):
      return -jet
    if name == "abs":
      return jet
    if name in ("integer_pow", "square"):
      power = _constant(ONE)
      for _ in range(op.params["y"] if name == "integer_pow" else 2):
        power = power * jet
      return power
    return self._through(name, jet, ends_at(self._piece.of(op.inputs[0]).value, PIECE), value)

  def _through(self, name: str, jet: _Jet, v: Ends, value: Ends) -> _Jet:
    """g(v), of which g'' / g' is known."""
    if name not in DERIVATIVES:
      raise NoRuleError
    slope = DERIVATIVES[name](v)[1]
    if name in ("exp", "exp2", "expm1"):
      rate = Tail.power(0, LOG_2 if name == "exp2" else ONE)
      itself = Tail.power(0, ONE, Weight(FUNCTIONS["exp2" if name == "exp2" else "exp"](v)))
      at = Tail.power(0, value) if name == "expm1" else itself
      return jet.through(at, rate * itself, rate * rate * itself)
    if name == "softplus":  # It is above max(v, 0), and by no more than it is above |v|.
      up = np.all(v[0] >= 0)
      rest = FUNCTIONS["log1p"](FUNCTIONS["exp"](negative(v) if up else v))
      at = Tail.power(0, (np.zeros_like(rest[1]), rest[1]))
      second = Tail.power(0, ONE, Weight(DERIVATIVES["logistic"](v)[1]))
      return jet.through(at + jet.value if up else at, Tail.power(0, slope), second)
    turn = Tail.power(0, negative(ONE) if name == "erfc" else ONE)
    weight = Tail.power(0, ONE, Weight(negative(slope) if name == "erfc" else slope)) * turn
    if name in ("erf", "erfc"):
      change = Tail.power(0, negative(TWO)) * jet.value
    elif name in ("tanh", "logistic"):
      tanh = FUNCTIONS["tanh"](v if name == "tanh" else multiply(HALF, v))
      change = Tail.power(0, negative(multiply(TWO, tanh) if name == "tanh" else tanh))
    else:
      raise NoRuleError
    return jet.through(Tail.power(0, value), weight, weight * change)


def _constant(k: Ends) -> _Jet:
  return _Jet(Tail.power(0, k), Tail({}), Tail({}))


class Cells(NamedTuple):
  """What is known of a value on parts of a piece, which lie along a first axis."""

  low: np.ndarray
  high: np.ndarray
  slope: Ends
  second: Ends  # Of it only the sign is meant where a bound is infinite.
  first: Ends  # The limit of the slope at the low end.
  last: Ends
  limit: Ends  # Of the slope at infinity, on a tail: a convex function below a line is no steeper.

  @property
  def has_sign(self) -> np.ndarray:
    """Of which parts the second derivative has a known sign."""
    signed = np.greater_equal(self.second[0], 0) | np.less_equal(self.second[1], 0)
    return signed.reshape(len(signed), -1).all(1)

  def chosen(self, which: Any) -> "Cells":
    return jax.tree.map(lambda a: a[which], self)


def bounds(piece: Piece, value: Value) -> tuple[Ends, Ends]:
  """Bounds of the slope of a value, and of its second derivative, all over a piece.

  Of the second derivative only the sign is meant where a bound is infinite.
  """
  found = cells(piece, value)
  return _union(found.slope), _union(found.second)


def cells(piece: Piece, value: Value, narrow: float = 0.0) -> Cells:
  """The piece cut into parts until the second derivative has a sign on each.

  Args:
    piece: between two kinks.
    value: what is read on it.
    narrow: relative width below which a part stays without a sign. If 0, no part is cut
      any more as soon as two of them have different signs.
  """
  whole = _read(piece, value, piece.low[None], piece.high[None])
  is_finite = np.isfinite(piece.low).all() and np.isfinite(piece.high).all()
  if whole.has_sign.all() and (is_finite or not np.any(whole.second)):
    return whole
  done, todo = [], _first_cuts(piece, value)
  for _ in range(ROUNDS):
    is_open = [~part.has_sign & _is_wide(part, narrow) for part in todo]
    done += [part.chosen(~which) for part, which in zip(todo, is_open, strict=True)]
    todo = [part.chosen(which) for part, which in zip(todo, is_open, strict=True) if which.any()]
    if not todo or (narrow == 0 and _is_mixed(done)) or sum(len(p.low) for p in todo) > WIDEST:
      break
    low, high = (np.concatenate([getattr(p, end) for p in todo]) for end in ("low", "high"))
    middle = low / 2 + high / 2
    low, high = np.concatenate([low, middle]), np.concatenate([middle, high])
    todo = [_read(piece, value, low, high)]
  parts = [part for part in (*done, *todo) if len(part.low)]
  # Some may hold the numbers of each element, others one for all.
  shape = np.broadcast_shapes(*(a.shape[1:] for part in parts for a in jax.tree.leaves(part)))

  def join(*arrays):
    return np.concatenate([np.broadcast_to(a, (len(a), *shape)) for a in arrays])

  joined = jax.tree.map(join, *parts)
  return joined.chosen(np.argsort(joined.low.reshape(len(joined.low), -1)[:, 0]))


def _first_cuts(piece: Piece, value: Value) -> list[Cells]:
  """A piece in finite parts, and a tail on each side on which it is infinite."""
  left, right = np.isneginf(piece.low).all(), np.isposinf(piece.high).all()
  cuts = [np.zeros_like(piece.low)] if left and right else []
  cuts = ([] if left else [piece.low]) + cuts + ([] if right else [piece.high])
  parts = []
  if right:
    tail, starts = _tail(piece, value, cuts[-1], 1)
    parts, cuts = [tail], cuts + starts
  if left:
    tail, starts = _tail(piece, value, cuts[0], -1)
    parts, cuts = [*parts, tail], [*starts[::-1], *cuts]
  if len(cuts) > 1:
    parts.append(_read(piece, value, np.stack(cuts[:-1]), np.stack(cuts[1:])))
  return parts


def _tail(piece: Piece, value: Value, end: np.ndarray, side: int) -> tuple[Cells, list[np.ndarray]]:
  """The nearest tail of known sign, or the farthest one, and where to cut up to it."""
  starts = [2 * np.maximum(side * end, 0) + 1]
  while np.any(starts[-1] < FAR):
    starts.append(2 * starts[-1] + 1)
  starts = [side * start for start in starts]
  near, infinite = np.stack(starts), np.full((len(starts), *end.shape), side * np.inf)
  found = _read(piece, value, *((near, infinite) if side > 0 else (infinite, near)))
  first = int(np.argmax(found.has_sign)) if found.has_sign.any() else len(starts) - 1
  # What is known of the limit at infinity is known best from far out.
  low, high = found.limit[0][-1], found.limit[1][-1]
  chosen = found.chosen(slice(first, first + 1))
  rises, falls = chosen.second[0] >= 0, chosen.second[1] <= 0
  if side < 0:
    rises, falls = falls, rises
  least = np.where(falls, np.maximum(chosen.slope[0], low), chosen.slope[0])
  most = np.where(rises, np.minimum(chosen.slope[1], high), chosen.slope[1])
  return chosen._replace(slope=(least, most)), starts[: first + 1]


def _is_wide(part: Cells, narrow: float) -> np.ndarray:
  """Which parts may be cut; infinite ones are not."""
  nearest = np.where(part.low * part.high <= 0, 0.0, np.minimum(abs(part.low), abs(part.high)))
  wide: Any = np.isfinite(part.high - part.low)
  wide &= part.high - part.low > narrow * np.maximum(1.0, nearest)
  return wide.reshape(len(wide), -1).any(1)


def _is_mixed(parts: list[Cells]) -> bool:
  """Whether the second derivative is surely above 0 on one part, and below 0 on another."""
  above = [np.any(part.second[0] > 0, 0) for part in parts if len(part.low)]
  below = [np.any(part.second[1] < 0, 0) for part in parts if len(part.low)]
  return bool(above) and bool(np.all(np.any(above, 0) & np.any(below, 0)))


def _union(a: Ends) -> Ends:
  return np.min(a[0], 0), np.max(a[1], 0)


def _read(piece: Piece, value: Value, low: np.ndarray, high: np.ndarray) -> Cells:
  """A value on parts of a piece."""
  part = piece.part(low, high)
  jet = part.of(value)
  second, limit = _known(ends_at(jet.second, PIECE)), (-np.inf, np.inf)
  right = np.isposinf(high)
  start = np.where(right, low, -high)
  if np.all(start > 0) and (np.all(right) or np.all(np.isneginf(low))):
    with contextlib.suppress(NoRuleError):
      tail = _Reader(part).of(value)
      up, down = tail.second.signs(start)
      least, most = np.maximum(second[0], 0), np.minimum(second[1], 0)
      second = np.where(up, least, second[0]), np.where(down, most, second[1])
      limit = tail.value.growth() or limit
      limit = np.where(right, limit[0], -limit[1]), np.where(right, limit[1], -limit[0])
  slope = _known(tight(jet.steepness, (second[0][None], second[1][None])))
  pairs = (slope, second, *(ends_at(jet.steepness, end) for end in (LEFT, RIGHT)), limit)
  shape = np.broadcast_shapes(low.shape, *(np.shape(end) for pair in pairs for end in pair))
  wide: Any = ((np.broadcast_to(a, shape), np.broadcast_to(b, shape)) for a, b in pairs)
  return Cells(low, high, *wide)


def _known(a: Ends) -> Ends:
  """Infinite bounds in place of those that are NaN."""
  return np.where(np.isnan(a[0]), -np.inf, a[0]), np.where(np.isnan(a[1]), np.inf, a[1])
