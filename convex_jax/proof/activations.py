"""Curvature of a scalar function with kinks, found from how it is computed.

ELU is `where(z > 0, z, alpha expm1(where(z > 0, 0, z)))`. Neither the choice nor `expm1` of a
choice has a curvature that a rule could state. But between the kinks, the numbers with which z is
compared, every choice is made, and the rest has derivatives. A continuous function whose second
derivative is nowhere negative, and whose slope falls at no kink, is convex on the whole line.

All numbers are enclosures (`enclosures`): over a piece of the line, or of the limits at its ends.
A sign is known only if a whole enclosure has it. Two numbers are equal only if both are exact, or
the same computation of equal numbers.
"""

import collections
import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
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
  multiply,
  negative,
  rounded_product,
  subtract,
)
from convex_jax.proof.linear import has_no_zero, is_defined
from convex_jax.proof.parameters import is_plain
from convex_jax.proof.values import (
  Known,
  Masks,
  Operation,
  ScalarFunction,
  Value,
  composed,
  thin,
)

COMPARISONS = {"gt": operator.gt, "ge": operator.ge, "lt": operator.lt, "le": operator.le}
COMPARISONS |= {"eq": operator.eq, "ne": operator.ne}
LOGIC = {"and": operator.and_, "or": operator.or_, "not": operator.not_}
ELEMENTWISE = {"add", "sub", "mul", "div", "neg", "max", "min", "abs", "exp", "exp2", "expm1"}
ELEMENTWISE |= {"square", "integer_pow", "tanh", "logistic", "log1p", "select_n"}
# What an activation may end in. A function of one lost value, as exp or a factor, mends nothing.
ENDS = {"add", "sub", "mul", "max", "min", "select_n", "square", "integer_pow"}
LIMIT = 40  # Operations that are searched for the kinks of a value.
MOST = 8  # Earlier values that are tried.

ZERO = (np.float64(0), np.float64(0))
TWO = (np.float64(2), np.float64(2))
HALF = (np.float64(0.5), np.float64(0.5))
LOG_2 = (np.float64(0.6931471805599453), np.float64(0.6931471805599454))
_PIECE, _LEFT, _RIGHT = range(3)  # Where a jet is taken: all over a piece, and at its ends.


class _NoRuleError(Exception):
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


def _is_zero(a: Ends) -> Any:
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


def _integer_power(v: Ends, y: int) -> tuple[Ends, Ends, Ends]:
  def multiple(factor: int, power: int) -> Ends:
    times = np.float64(factor)
    return _times((times, times), integer_power(v, power)) if factor else ZERO

  return integer_power(v, y), multiple(y, y - 1), multiple(y * (y - 1), y - 2)


DERIVATIVES: dict[str, Callable[[Ends], tuple[Ends, Ends, Ends]]] = {
  "exp": _exp,
  "exp2": _exp2,
  "expm1": _expm1,
  "square": lambda v: _integer_power(v, 2),
  "logistic": _logistic,
  "softplus": _softplus,  # log1p(exp(z)).
  "tanh": _tanh,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Jet:
  """A function, its slope and its second derivative, along a first axis: `_PIECE`, ..."""

  value: Ends
  slope: Ends  # Times `over`.
  over: Ends  # Above 0. A quotient would be rounded; so celu(z) = alpha expm1(z / alpha) is not.
  second: Ends
  is_continuous: Any = True  # Whether its limits at the ends are its values there.

  @property
  def is_affine(self) -> bool:
    """Whether it surely is, all over the piece."""
    return bool(np.all(_is_zero(_ends_at(self.second, _PIECE))))

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

  def _joined(self, other: "Jet") -> Any:
    return np.logical_and(self.is_continuous, other.is_continuous)


class Piece:
  """Reads values as functions of `root` between two of its values, or at one: `low` = `high`.

  Args:
    root: the earlier value.
    low: the left end, of as many axes as the result; so is `high`.
    high: the right end.
    points: the readings at the left and the right end; None where it is infinite.
  """

  def __init__(self, root: Value, low: Any, high: Any, points: Sequence["Piece | None"] = ()):
    ends = [np.where(np.isfinite(end), end, np.nan) for end in (low, high)]
    value = np.stack([low, *ends]), np.stack([high, *ends])
    self._root, self._points = root, points
    # By identity; the nodes are kept, lest another takes their place in memory.
    self._jets: dict[int, tuple[Any, Jet]] = {id(root): (root, Jet(value, ONE, ONE, ZERO))}
    self._settled: dict[int, tuple[Any, Any, Any]] = {}

  def of(self, node: Value | Known) -> Jet:
    if id(node) not in self._jets:
      self._jets[id(node)] = node, self._compute(node)
    return self._jets[id(node)][1]

  def _compute(self, node: Value | Known) -> Jet:
    if isinstance(node, Known):
      if not node.is_float or node.not_finite.any():
        raise _NoRuleError
      low, high = (thin(end)[None] if node.shape else end for end in (node.low, node.high))
      return Jet((low, low if node.low is node.high else high), ZERO, ONE, ZERO)
    chosen, is_continuous = self.settled(node)
    if chosen is not node:
      jet = self.of(chosen)
      both = np.logical_and(jet.is_continuous, is_continuous)
      return dataclasses.replace(jet, is_continuous=both)
    op = _operation(node)
    name, inputs = op.primitive, op.inputs
    if name in ("add", "sub", "mul"):
      a, b = map(self.of, inputs)
      return a.times(b) if name == "mul" else a.plus(b if name == "add" else b.negated())
    if name == "div" and isinstance(inputs[1], Known) and has_no_zero(inputs[1]):
      return self.of(inputs[0]).divided(self.of(inputs[1]).value)
    if name == "log1p":
      op = _operation(inputs[0])
      name = "softplus" if op.primitive == "exp" else name
    jet = self.of(op.inputs[0])
    if name == "neg" or (name == "abs" and self.sign(op.inputs[0]) < 0):
      return jet.negated()
    if name == "abs":
      return jet
    if name == "integer_pow" and op.params["y"] > 0:
      return jet.through(_integer_power(jet.value, op.params["y"]))
    if name in DERIVATIVES:
      return jet.through(DERIVATIVES[name](jet.value))
    raise _NoRuleError

  def sign(self, node: Value | Known) -> int:
    """That of a value, where it is not 0; the same all over the piece."""
    return self._order(self.of(node), strictly=False)

  def settled(self, node: Value | Known) -> tuple[Value | Known, Any]:
    """What the choices that made a node take here, and whether they take no other at the ends."""
    if id(node) not in self._settled:
      self._settled[id(node)] = node, *self._settle(node)
    return self._settled[id(node)][1:]

  def _settle(self, start: Value | Known) -> tuple[Value | Known, Any]:
    node, may_jump, is_continuous = start, False, True
    while isinstance(node, Value) and node is not self._root:
      op = _operation(node)
      if op.primitive in ("max", "min"):
        a, b = op.inputs
        difference = self.of(a).plus(self.of(b).negated())
        # Of continuous functions the larger is continuous, whichever it is.
        may_jump = may_jump or not np.all(difference.is_continuous)
        node = a if (self._order(difference, strictly=False) > 0) == (op.primitive == "max") else b
      elif op.primitive == "select_n" and len(op.inputs) == 3:
        test, *cases = op.inputs
        node, may_jump = cases[self._holds(test)], True
      else:
        break
    for point, end in zip(self._points, (_LEFT, _RIGHT), strict=False):
      if may_jump and point is not None:
        same = _are_equal(self, node, end, point, point.settled(start)[0])
        is_continuous = np.logical_and(is_continuous, same)
    return node, is_continuous

  def _holds(self, test: Any) -> bool:
    op = _operation(test)
    if op.primitive in LOGIC:
      return LOGIC[op.primitive](*map(self._holds, op.inputs))
    if op.primitive not in COMPARISONS:
      raise _NoRuleError
    a, b = map(self.of, op.inputs)
    return COMPARISONS[op.primitive](self._order(a.plus(b.negated()), strictly=True), 0)

  def _order(self, jet: Jet, strictly: bool) -> int:
    """The sign of a value everywhere between the ends."""
    low, high = _tight(jet.value, jet.slope)
    if np.all(_is_zero((low, high))):
      return 0
    # What moves is 0 at most once, at an end.
    up, down = (_at(end, _PIECE) for end in jet.slope)
    moves = ((up > 0) | (down < 0)) & bool(self._points)
    for sign, least in ((1, low), (-1, -high)):
      if np.all((least > 0) | ((least == 0) & moves) if strictly else least >= 0):
        return sign
    raise _NoRuleError


def _operation(node: Any) -> Operation:
  op = node.made_by if isinstance(node, Value) else None
  if op is None or not is_plain(op) or not is_defined(op.primitive, op.inputs):
    raise _NoRuleError
  return op


def _at(end: Any, where: int) -> Any:
  if not np.ndim(end):
    return end
  return end[where] if len(end) > 1 else end[0]


def _tight(value: Ends, slope: Ends) -> Ends:
  """Bounds over a piece: the limits at its ends, where these are finite, of what is monotone."""
  (low, high), (least, most) = ([_at(end, _PIECE) for end in ends] for ends in (value, slope))
  for moves, first, last in ((least >= 0, _LEFT, _RIGHT), (most <= 0, _RIGHT, _LEFT)):
    limits = _at(value[0], first), _at(value[1], last)
    low, high = (
      np.where(moves & np.isfinite(limit), limit, end)
      for limit, end in zip(limits, (low, high), strict=True)
    )
  return low, high


def _are_equal(p: Piece, x: Any, end: int, q: Piece, y: Any) -> Any:
  """Whether the limit of x at an end of the piece p is surely the value of y there, at q."""
  x, y = _without_zeros(p, x, end), _without_zeros(q, y, _PIECE)
  a, b = ([_at(e, i) for e in z.of(v).value] for z, v, i in ((p, x, end), (q, y, _PIECE)))
  exact = np.equal(a[0], a[1]) & np.equal(b[0], b[1]) & np.equal(a[0], b[0]) & np.isfinite(a[0])
  if np.all(exact) or x is y:
    return True
  if isinstance(x, Known) or isinstance(y, Known) or p._root in (x, y):
    return exact
  first, second = _operation(x), _operation(y)
  if (first.primitive, first.params) != (second.primitive, second.params):
    return exact
  pairs = zip(first.inputs, second.inputs, strict=True)
  return exact | all(np.all(_are_equal(p, u, end, q, v)) for u, v in pairs)


def _without_zeros(p: Piece, x: Any, end: int) -> Any:
  """x, without what is added to it and is 0 there."""
  x, _ = p.settled(x)
  if isinstance(x, Value) and x is not p._root and _operation(x).primitive in ("add", "sub"):
    a, b = _operation(x).inputs
    pairs = ((b, a), (a, b)) if _operation(x).primitive == "add" else ((b, a),)
    for nothing, rest in pairs:
      if np.all(_is_zero(tuple(_at(e, end) for e in p.of(nothing).value))):
        return _without_zeros(p, rest, end)
  return x


class Looks:
  """Second looks at the values of one computation, which share what they read."""

  def __init__(self):
    self._pieces: dict[Any, tuple[Value, list[Piece]]] = {}

  def at(self, op: Operation, masks: Masks) -> tuple[Masks, Operation]:
    """The masks of a value, better where it is a scalar function of an earlier one; and it."""
    found, value = None, Value(*masks, op)
    if op.primitive in ("add", "sub", "mul") and any(isinstance(x, Known) for x in op.inputs):
      return masks, op
    for root, kinks in _candidates(value):
      if found is not None and root.is_lost:
        continue
      try:
        with np.errstate(all="ignore"):
          kinks = _reached(root, kinks)
          f = _judged([p.of(value) for p in self._between(root, kinks)], kinks)
      except _NoRuleError:
        continue
      curved = composed(root, f.convex, f.concave, f.rising, f.falling)
      if found is None or not (curved[0] & curved[1]).all():
        bent = not np.all(f.convex | f.concave) and op.primitive in ("select_n", "add")
        note = f.note if bent else ""
        found = curved, dataclasses.replace(op, scalar=(root, f), note=note)
      if not (curved[0] & curved[1]).any():
        break
    return (masks, op) if found is None else found

  def _between(self, root: Value, kinks: list[np.ndarray]) -> list[Piece]:
    """Readings of the pieces of the line, from the first number on."""
    key = id(root), *((k.shape, k.tobytes()) for k in kinks)
    if key not in self._pieces:
      self._pieces[key] = root, pieces_between(root, kinks)
    return self._pieces[key][1]


def pieces_between(root: Value, ends: Sequence[np.ndarray]) -> list[Piece]:
  """Readings of the pieces of the line between these ends, in rising order."""
  points = [Piece(root, k, k) if np.isfinite(k).all() else None for k in ends]
  sides = zip(itertools.pairwise(ends), itertools.pairwise(points), strict=True)
  return [Piece(root, *pair, at) for pair, at in sides]


def _reached(root: Value, kinks: list[np.ndarray]) -> list[np.ndarray]:
  """The ends of the pieces of the line in which a value may be."""
  infinite, least = np.full_like(kinks[0], np.inf), np.full_like(kinks[0], _least(root))
  ends = [least, *(k for k in kinks if not np.all(k <= least)), infinite]
  if not all(np.all(low < high) for low, high in itertools.pairwise(ends)):
    raise _NoRuleError
  return ends


def slope_change(left: Jet, right: Jet) -> tuple[Any, Any]:
  """Whether the slope falls nowhere at the kink between two pieces, and whether it rises nowhere."""
  before = _times(_ends_at(left.slope, _RIGHT), _ends_at(right.over, _LEFT))
  after = _times(_ends_at(right.slope, _LEFT), _ends_at(left.over, _RIGHT))
  return before[1] <= after[0], after[1] <= before[0]


def _judged(jets: list[Jet], ends: list[np.ndarray]) -> ScalarFunction:
  """What is proved of a function of which these are the pieces between these ends."""
  falls, rises, note = np.False_, np.False_, ""
  for k, left, right in zip(ends[1:-1], jets[:-1], jets[1:], strict=True):
    up, down = slope_change(left, right)
    falls, rises = falls | ~up, rises | ~down
    if not note and not np.all(up):
      slopes = (_ends_at(x.steepness, i)[0] for x, i in ((left, _RIGHT), (right, _LEFT)))
      numbers = [f"{float(np.ravel(x)[0]):g}" for x in (*slopes, k)]
      note = "its slope goes from {} to {} at {}".format(*numbers)
  continuous = functools.reduce(np.logical_and, [x.is_continuous for x in jets])
  if not np.all(continuous):
    note = f"it jumps at {float(np.ravel(ends[-2])[0]):g}"
  seconds = [_ends_at(x.second, _PIECE) for x in jets]
  slopes = [_tight(x.slope, x.second) for x in jets]
  steepest = [magnitude(_tight(x.steepness, x.second))[1] for x in jets]

  def everywhere(*tests: Any) -> Any:
    return functools.reduce(np.logical_and, tests, continuous)

  return ScalarFunction(
    convex=everywhere(~falls, *(x[0] >= 0 for x in seconds)),
    concave=everywhere(~rises, *(x[1] <= 0 for x in seconds)),
    rising=everywhere(*(x[0] >= 0 for x in slopes)),
    falling=everywhere(*(x[1] <= 0 for x in slopes)),
    steepest=np.where(continuous, functools.reduce(np.maximum, steepest), np.inf),
    ends=ends,
    note=note,
  )


def _ends_at(ends: Ends, where: int) -> Ends:
  return _at(ends[0], where), _at(ends[1], where)


def _least(root: Value) -> float:
  """A lower bound of an earlier value: 0 for magnitudes and the like."""
  op = root.made_by
  if op is None or not is_plain(op):
    return -np.inf
  even = op.primitive == "integer_pow" and op.params["y"] > 0 and op.params["y"] % 2 == 0
  positive = op.primitive == "max" and any(
    isinstance(k, Known) and np.all(k.low >= 0) for k in op.inputs
  )
  return 0.0 if even or positive or op.primitive in ("abs", "sqrt", "square") else -np.inf


def _candidates(value: Value) -> Iterator[tuple[Value, list[np.ndarray]]]:
  """Earlier values, and where `value`, as a function of them, may have kinks, in rising order."""
  rank = len(value.shape)
  roots: dict[int, tuple[Value, list[np.ndarray]]] = {}
  for node, number in _compared(value):
    for root, kink in _solved(node, number):
      kink = np.reshape(kink, (1,) * (rank - np.ndim(kink)) + np.shape(kink))
      kinks = roots.setdefault(id(root), (root, []))[1]
      if not any(np.array_equal(kink, k) for k in kinks):
        kinks.append(kink)
  for root, kinks in list(roots.values())[:MOST]:
    yield root, list(np.sort(np.stack(np.broadcast_arrays(*kinks)), 0))


def _compared(value: Value) -> Iterator[tuple[Value, np.ndarray]]:
  """Pairs (z, c): values that are compared with known numbers on the way to `value`."""
  todo, seen = collections.deque[Any]([value]), set()
  while todo and len(seen) < LIMIT:  # Breadth first: the nearest comparison comes first.
    node = todo.popleft()
    if id(node) in seen or not isinstance(node, Value) or node.made_by is None:
      continue
    seen.add(id(node))
    op = node.made_by
    if op.primitive == "abs" and isinstance(op.inputs[0], Value):
      yield op.inputs[0], np.array(0.0)
    if op.primitive in COMPARISONS or op.primitive in ("max", "min"):
      for z, c in (op.inputs, op.inputs[::-1]):
        if isinstance(z, Value) and isinstance(c, Known) and _is_number(c):
          yield z, c.low
    if op.primitive in ELEMENTWISE or op.primitive in COMPARISONS or op.primitive in LOGIC:
      todo.extend(op.inputs)


def _is_number(k: Known) -> bool:
  return k.is_float and k.is_exact and not k.not_finite.any()


def _solved(node: Value, number: np.ndarray) -> Iterator[tuple[Value, np.ndarray]]:
  """Pairs (z, c): `node` = `number` only at z = c. Back through what can be solved exactly."""
  yield node, number
  op = node.made_by
  if op is None or op.primitive not in ELEMENTWISE:
    return
  point, solutions = (number, number), []
  values = [x for x in op.inputs if isinstance(x, Value)]
  others = [(k.low, k.high) for k in op.inputs if isinstance(k, Known) and k.is_float]
  if len(values) != 1 or len(others) != len(op.inputs) - 1:
    return
  k = others[0] if others else ZERO
  with np.errstate(all="ignore"):
    if op.primitive == "neg" or (op.primitive == "sub" and values[0] is op.inputs[1]):
      solutions = [subtract(k, point)]
    elif op.primitive in ("add", "sub"):
      solutions = [subtract(point, k) if op.primitive == "add" else add(point, k)]
    elif op.primitive == "mul" or (op.primitive == "div" and values[0] is op.inputs[0]):
      solutions = [divide(point, k) if op.primitive == "mul" else multiply(point, k)]
    elif op.primitive == "abs":
      solutions = [point, negative(point)] if np.all(number > 0) else []
    elif op.primitive in ("max", "min"):
      beyond = number > k[1] if op.primitive == "max" else number < k[0]
      solutions = [point] if np.all(beyond) else []
  for low, high in solutions:
    if np.all(np.equal(low, high)) and np.all(np.isfinite(low)):
      yield from _solved(values[0], low)
