"""Scalar functions of one earlier value, read piece by piece from their computation.

Between the kinks of a function, the numbers with which its argument is compared, every choice is
made, and the rest has derivatives (`jets`). Two numbers are equal only if both are exact, or the same
computation of equal numbers.
"""

import dataclasses
import functools
import itertools
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from convex_jax.proof.enclosures import ONE
from convex_jax.proof.jets import (
  DERIVATIVES,
  LEFT,
  PIECE,
  RIGHT,
  ZERO,
  Jet,
  NoRuleError,
  ends_at,
  is_zero,
  tight,
)
from convex_jax.proof.linear import has_no_zero, is_defined
from convex_jax.proof.parameters import is_plain
from convex_jax.proof.values import Known, Operation, Value, thin

COMPARISONS = {"gt": operator.gt, "ge": operator.ge, "lt": operator.lt, "le": operator.le}
COMPARISONS |= {"eq": operator.eq, "ne": operator.ne}
LOGIC = {"and": operator.and_, "or": operator.or_, "not": operator.not_}
ELEMENTWISE = {"add", "sub", "mul", "div", "neg", "max", "min", "abs", "exp", "exp2", "expm1"}
ELEMENTWISE |= {"square", "integer_pow", "tanh", "logistic", "log1p", "select_n", "erf", "erfc"}
ELEMENTWISE |= {"sqrt"}
STEPS = {"convert_element_type", "sign"}  # The former of conditions.
LARGE = 1000  # Entries of the largest number that a signature holds.
LONG = 500  # Operations of the longest one.
MANY = 100  # Terms of the longest sum in which equal ones are searched for.

_Terms = dict[int, tuple[Any, int]]


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
    self.root, self.low, self.high, self.points = root, low, high, points
    # By identity; the nodes are kept, lest another takes their place in memory.
    self._jets: dict[int, tuple[Any, Jet]] = {id(root): (root, Jet(value, ONE, ONE, ZERO))}
    self._settled: dict[int, tuple[Any, Any, Any]] = {}
    self._sums: dict[int, tuple[Any, _Terms, int]] = {}
    self._same: dict[tuple[int, int], tuple[Any, Any, bool]] = {}
    self._equal: dict[tuple[int, int, int, int], tuple[Any, ...]] = {}

  def part(self, low: Any, high: Any) -> "Piece":
    """Parts of it, along a new first axis, where every choice is the same."""
    return _Part(self, low, high)

  def of(self, node: Value | Known) -> Jet:
    if id(node) not in self._jets:
      jet = self._compute(node)
      if not np.all(jet.is_continuous):  # What jumps may be multiplied by 0.
        both = np.logical_or(jet.is_continuous, self._meets(jet, node))
        jet = dataclasses.replace(jet, is_continuous=both)
      self._jets[id(node)] = node, jet
    return self._jets[id(node)][1]

  def _meets(self, jet: Jet, node: Value | Known) -> Any:
    """Whether the limits of a value at the ends are surely its values there, by their numbers."""
    pairs = zip(self.points, (LEFT, RIGHT), strict=False)
    meets = [
      _are_exact(ends_at(jet.value, end), ends_at(point.of(node).value, PIECE))
      for point, end in pairs
      if point is not None
    ]
    return functools.reduce(np.logical_and, meets, np.True_)

  def _compute(self, node: Value | Known) -> Jet:
    if isinstance(node, Known):
      if not node.is_float or node.not_finite.any():
        raise NoRuleError
      low, high = (thin(end)[None] if node.shape else end for end in (node.low, node.high))
      return Jet((low, low if node.low is node.high else high), ZERO, ONE, ZERO)
    chosen, is_continuous = self.settled(node)
    if chosen is not node:
      jet = self.of(chosen)
      both = np.logical_and(jet.is_continuous, is_continuous)
      return dataclasses.replace(jet, is_continuous=both)
    if (both := softened(node)) is not None:
      return self.of(both[0]).softened(self.of(both[1]))
    op = operation(node)
    name, inputs = op.primitive, op.inputs
    if name in ("add", "sub", "mul"):
      a, b = map(self.of, inputs)
      if name == "mul":
        square = inputs[0] is inputs[1]
        return a.power(2) if square else a.times(b)
      whole = a.plus(b if name == "add" else b.negated())
      rest, is_less = self._uncancelled(*self._terms(node))
      if not is_less:
        return whole
      # No number is infinite, so x - x is 0. But a jump stays one: at the point it may not cancel.
      jets = [self.of(x).repeated(times) for x, times in rest]
      total = functools.reduce(Jet.plus, jets, Jet(ZERO, ZERO, ONE, ZERO))
      return dataclasses.replace(total, is_continuous=whole.is_continuous)
    if name == "div" and isinstance(inputs[1], Known) and has_no_zero(inputs[1]):
      return self.of(inputs[0]).divided(self.of(inputs[1]).value)
    if name == "log1p":
      op = operation(inputs[0])
      name = "softplus" if op.primitive == "exp" else name
    if name in STEPS:
      step = self.step(op)
      return Jet((step, step), ZERO, ONE, ZERO, is_continuous=np.False_)
    jet = self.of(op.inputs[0])
    if name == "neg" or (name == "abs" and self.sign(op.inputs[0]) < 0):
      return jet.negated()
    if name == "abs":
      return jet
    if name == "integer_pow" and op.params["y"] > 0:
      return jet.power(op.params["y"])
    if name in DERIVATIVES:
      return jet.through(DERIVATIVES[name](jet.value))
    raise NoRuleError

  def _terms(self, node: Value | Known) -> tuple[_Terms, int]:
    """What a sum consists of on this piece, each with how often it is added; and of how many terms.

    Terms that are one value are together, so that a value that enters by many ways counts once.
    """
    node, _ = self.settled(node)
    op = node.made_by if isinstance(node, Value) and node is not self.root else None
    if op is None or op.primitive not in ("add", "sub", "neg"):
      return {id(node): (node, 1)}, 1
    if id(node) not in self._sums:
      total, size = {}, 0
      signs = {"add": (1, 1), "sub": (1, -1), "neg": (-1,)}[op.primitive]
      for x, sign in zip(operation(node).inputs, signs, strict=True):
        terms, number = self._terms(x)
        size += number
        for key, (term, times) in terms.items():
          total[key] = term, sign * times + total.get(key, (term, 0))[1]
      self._sums[id(node)] = node, total, size
    return self._sums[id(node)][1:]

  def _uncancelled(self, terms: _Terms, size: int) -> tuple[list[tuple[Value | Known, int]], bool]:
    """The terms that are not the negative of another; and whether they are fewer."""
    rest: list[tuple[Value | Known, int]] = []
    for x, times in terms.values():
      for i, (y, other) in enumerate(rest) if len(terms) <= MANY else ():
        if other * times < 0 and self._are_same(x, y):
          rest[i] = y, other + times
          break
      else:
        rest.append((x, times))
    return [(x, times) for x, times in rest if times], sum(abs(n) for _, n in rest) < size

  def _are_same(self, x: Value | Known, y: Value | Known) -> bool:
    """Whether two numbers are the same computation of the same numbers, all over the piece."""
    (x, _), (y, _) = self.settled(x), self.settled(y)
    if x is y:
      return True
    if isinstance(x, Known) and isinstance(y, Known):
      return x.is_float and x.is_exact and y.is_exact and np.array_equal(x.low, y.low)
    if isinstance(x, Known) or isinstance(y, Known) or self.root in (x, y):
      return False
    key = id(x), id(y)
    if key not in self._same:
      first, second = operation(x), operation(y)
      alike = (first.primitive, first.params) == (second.primitive, second.params)
      alike = alike and all(map(self._are_same, first.inputs, second.inputs))
      self._same[key] = x, y, alike
    return self._same[key][2]

  def step(self, op: Operation) -> Any:
    """A sign, or a condition as a number, which is the same all over the piece."""
    if op.primitive == "sign":
      return np.float64(self._order(self.of(op.inputs[0]), strictly=True))
    if op.eqn.invars[0].aval.dtype != np.bool_:
      raise NoRuleError
    return np.float64(self._holds(op.inputs[0]))

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
    while isinstance(node, Value) and node is not self.root and softened(node) is None:
      op = operation(node)
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
    for point, end in zip(self.points, (LEFT, RIGHT), strict=False):
      if may_jump and point is not None:
        same = _are_equal(self, node, end, point, point.settled(start)[0])
        is_continuous = np.logical_and(is_continuous, same)
    return node, is_continuous

  def _holds(self, test: Any) -> bool:
    op = operation(test)
    if op.primitive in LOGIC:
      return LOGIC[op.primitive](*map(self._holds, op.inputs))
    if op.primitive not in COMPARISONS:
      raise NoRuleError
    a, b = map(self.of, op.inputs)
    order = 0 if a is b else self._order(a.plus(b.negated()), strictly=True)
    return COMPARISONS[op.primitive](order, 0)

  def _order(self, jet: Jet, strictly: bool) -> int:
    """The sign of a value everywhere between the ends."""
    low, high = tight(jet.value, jet.slope)
    if np.all(is_zero((low, high))):
      return 0
    # What moves is 0 at most once, at an end.
    up, down = ends_at(jet.slope, PIECE)
    moves = ((up > 0) | (down < 0)) & bool(self.points)
    for sign, least in ((1, low), (-1, -high)):
      if np.all((least > 0) | ((least == 0) & moves) if strictly else least >= 0):
        return sign
    raise NoRuleError


class _Part(Piece):
  """Parts of a piece."""

  def __init__(self, whole: Piece, low: Any, high: Any):
    super().__init__(whole.root, low, high)
    self._whole = whole

  def sign(self, node: Value | Known) -> int:
    return self._whole.sign(node)

  def step(self, op: Operation) -> Any:
    return self._whole.step(op)

  def settled(self, node: Value | Known) -> tuple[Value | Known, Any]:
    return self._whole.settled(node)


def operation(node: Any) -> Operation:
  """What made a value; raises `NoRuleError` where that cannot be read."""
  op = node.made_by if isinstance(node, Value) else None
  if op is None or not is_plain(op) or not is_defined(op.primitive, op.inputs):
    raise NoRuleError
  return op


def signature(value: Value, root: Value) -> Any:
  """What two values have in common that are the same function of their roots; None if too large.

  It names every operation between them with its parameters, and every number.
  """
  numbers: dict[int, int] = {id(root): 0}
  lines: list[Any] = [len(value.shape)]
  todo: list[Any] = [value]
  while todo:
    node = todo[-1]
    op = node.made_by if isinstance(node, Value) else None
    inputs = op.inputs if op is not None and id(node) not in numbers else ()
    missing = [x for x in inputs if id(x) not in numbers]
    if missing:
      todo += missing
      continue
    todo.pop()
    if id(node) in numbers:
      continue
    numbers[id(node)] = len(numbers)
    if isinstance(node, Known):
      if not isinstance(node.low, np.ndarray | np.generic) or node.low.size > LARGE:
        return None
      lines.append((str(node.low.dtype), node.shape, node.low.tobytes(), node.high.tobytes()))
    elif op is None or op.eqn is None or len(lines) > LONG:
      return None
    else:
      shape = op.shape if len({x.shape for x in inputs} - {()}) > 1 else ()
      params = tuple(sorted(op.params.items()))
      lines.append((op.primitive, params, op.index, shape, *(numbers[id(x)] for x in inputs)))
  try:
    hash(key := tuple(lines))
  except TypeError:  # Some parameter cannot be compared.
    return None
  return key


def softened(node: Any) -> tuple[Any, Any] | None:
  """(x, y) of a value that was recognised as log(e^x + e^y) of a value and a known number."""
  op = node.made_by if isinstance(node, Value) else None
  if op is None or op.primitive != "logaddexp":
    return None
  x, y = op.inputs if isinstance(op.inputs[0], Value) else op.inputs[::-1]
  alike = isinstance(x, Value) and x.shape == op.shape and isinstance(y, Known)
  return (x, y) if alike and is_defined("", [y]) else None


def _are_equal(p: Piece, x: Any, end: int, q: Piece, y: Any) -> Any:
  """Whether the limit of x at an end of the piece p is surely the value of y there, at q."""
  x, y = _without_zeros(p, x, end), _without_zeros(q, y, PIECE)
  key = id(x), end, id(q), id(y)
  if key not in p._equal:
    p._equal[key] = x, q, y, _compared(p, x, end, q, y)
  return p._equal[key][-1]


def _compared(p: Piece, x: Any, end: int, q: Piece, y: Any) -> Any:
  a, b = ends_at(p.of(x).value, end), ends_at(q.of(y).value, PIECE)
  exact = _are_exact(a, b)
  if np.all(exact) or x is y:
    return True
  if isinstance(x, Known) or isinstance(y, Known) or p.root in (x, y):
    return exact
  first, second = operation(x), operation(y)
  if (first.primitive, first.params) != (second.primitive, second.params):
    return exact
  pairs = zip(first.inputs, second.inputs, strict=True)
  return exact | all(np.all(_are_equal(p, u, end, q, v)) for u, v in pairs)


def _are_exact(a: Sequence[Any], b: Sequence[Any]) -> Any:
  """Whether two enclosures are of one finite number."""
  return np.equal(a[0], a[1]) & np.equal(b[0], b[1]) & np.equal(a[0], b[0]) & np.isfinite(a[0])


def _without_zeros(p: Piece, x: Any, end: int) -> Any:
  """x, without what is added to it and is 0 there."""
  x, _ = p.settled(x)
  if isinstance(x, Value) and x is not p.root and operation(x).primitive in ("add", "sub"):
    a, b = operation(x).inputs
    pairs = ((b, a), (a, b)) if operation(x).primitive == "add" else ((b, a),)
    for nothing, rest in pairs:
      if np.all(is_zero(ends_at(p.of(nothing).value, end))):
        return _without_zeros(p, rest, end)
  return x


def pieces_between(root: Value, ends: Sequence[np.ndarray]) -> list[Piece]:
  """Readings of the pieces of the line between these ends, in rising order."""
  points = [Piece(root, k, k) if np.isfinite(k).all() else None for k in ends]
  sides = zip(itertools.pairwise(ends), itertools.pairwise(points), strict=True)
  return [Piece(root, *pair, at) for pair, at in sides]
