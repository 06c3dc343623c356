"""Sums of terms, as `log_sum_exp` reads programs.

A form is

    sum of ± factors / divisors * root[index] + rest,

of which the roots are earlier values, and the rest is known by its curvature alone. Equal terms of
opposite sign cancel, `max(a, b)` and `log1p(exp(-|a - b|))` are joined to one term, and the
curvatures of what remains are those of the sum.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from convex_jax.proof.linear import is_defined, is_total
from convex_jax.proof.parameters import is_plain
from convex_jax.proof.values import Known, Masks, Value, either, is_uniform, thin, uniform

MOVES = {"broadcast_in_dim", "reshape", "rev", "slice", "squeeze", "transpose"}
# In log(e^a + e^b) = max(a, b) + c log1p(e^-|a - b|), convex for c up to 1; with powers of 2 for
# those of e, up to 1 / log(2), of which this is a lower bound.
HEAVIEST = {"exp": 1.0, "exp2": 1.4426950408889634}

NO, YES = uniform(False, ()), uniform(True, ())

Move = Callable[[Known], Known]


@dataclasses.dataclass(frozen=True, eq=False)
class Term:
  """± factors / divisors * root[index]."""

  root: Value
  negative: bool = False
  factors: tuple[Known, ...] = ()
  divisors: tuple[Known, ...] = ()
  moves: tuple[Move, ...] = ()  # That make the index.

  @functools.cached_property
  def index(self) -> np.ndarray:
    """Which of the root's elements each element is."""
    order = np.arange(int(np.prod(self.root.shape))).reshape(self.root.shape)
    return functools.reduce(lambda x, move: move(x), self.moves, Known.exactly(order)).low

  def masks(self, shape: tuple[int, ...]) -> Masks:
    nc, nk = (
      thin(uniform(bool(m.flat[0]), shape)) if m.size and is_uniform(m) else m.ravel()[self.index]
      for m in self.root.masks
    )
    rising, falling = np.bool_(not self.negative), np.bool_(self.negative)
    for k in (*self.factors, *self.divisors):
      up, down = ~(k.high < 0), ~(k.low > 0)
      rising, falling = (rising & up) | (falling & down), (rising & down) | (falling & up)
    return (rising & nc) | (falling & nk), (rising & nk) | (falling & nc)

  def is_alike(self, other: "Term") -> bool:
    """Whether both are surely the same but for their sign."""
    return (
      self.root is other.root
      and _have_same(self.factors, other.factors)
      and _have_same(self.divisors, other.divisors)
      and (self.moves == other.moves or np.array_equal(self.index, other.index))
    )

  def moved(self, move: Move) -> "Term":
    factors, divisors = (
      tuple(move(k) if k.shape else k for k in known) for known in (self.factors, self.divisors)
    )
    return Term(self.root, self.negative, factors, divisors, (*self.moves, move))

  def is_constant_along(self, axes: Sequence[int]) -> bool:
    known = [k for k in (*self.factors, *self.divisors) if k.shape]
    ends = [a for k in known for a in (k.low, k.high)]
    arrays = [self.index, *ends]
    return all(k.is_exact for k in known) and all((a == first_along(a, axes)).all() for a in arrays)


@dataclasses.dataclass(frozen=True, eq=False)
class Form:
  """A sum of terms and a rest known by its curvature, or negative infinity.

  The logarithm of a number is finite where the number is surely `positive`; elsewhere the number
  may be 0.
  """

  shape: tuple[int, ...]
  terms: tuple[Term, ...] = ()
  rest: Masks = dataclasses.field(default_factory=lambda: (NO, NO))
  positive: Any = dataclasses.field(default_factory=lambda: YES)

  def masks(self, without: Sequence[Term] = ()) -> Masks:
    """The curvature of all but some of the terms; of one that occurs twice, each counts."""
    left, each = list(without), []
    for t in self.terms:
      if t in left:
        left.remove(t)
      else:
        each.append(t.masks(self.shape))
    nc, nk = (either(*masks) for masks in zip(self.rest, *each, strict=True))
    return np.broadcast_to(nc, self.shape), np.broadcast_to(nk, self.shape)

  def scaled(
    self, negative: bool = False, by: Sequence[Known] = (), over: Sequence[Known] = ()
  ) -> "Form":
    """± by / over times the form."""
    by, over = (tuple(_spread(k, self.shape) for k in known) for known in (by, over))

    def scale(t: Term) -> Term:
      factors, divisors = (*t.factors, *by), (*t.divisors, *over)
      return Term(t.root, t.negative != negative, factors, divisors, t.moves)

    nc, nk = (np.broadcast_to(m, self.shape) for m in self.rest)
    rest = scale(Term(Value(nc, nk)))
    return Form(self.shape, tuple(map(scale, self.terms)), rest.masks(self.shape), self.positive)

  def plus(self, other: "Form") -> "Form":
    """Of two forms of the same shape."""
    nc, nk = (either(x, y) for x, y in zip(self.rest, other.rest, strict=True))
    return Form(self.shape, self.terms + other.terms, (nc, nk), self.positive & other.positive)

  def moved(self, shape: tuple[int, ...], move: Move) -> "Form":
    """The form after a move of its elements."""

    def mask(m):
      m = np.broadcast_to(m, self.shape)
      plain = m.size and is_uniform(m)
      return uniform(bool(m.flat[0]), shape) if plain else move(Known.exactly(m)).low

    rest = mask(self.rest[0]), mask(self.rest[1])
    return Form(shape, tuple(t.moved(move) for t in self.terms), rest, mask(self.positive))

  def spread(self, shape: tuple[int, ...]) -> "Form":
    """The form broadcast to a shape."""
    if self.shape == shape:
      return self
    return self.moved(shape, lambda k: by_ends(k, lambda a: np.broadcast_to(a, shape)))

  def finite(self) -> "Form":
    """The form as a real number: nothing is known where it may be infinite."""
    if np.all(self.positive):
      return self
    nc, nk = (m | ~self.positive for m in self.rest)
    return Form(self.shape, self.terms, (nc, nk))

  def simplified(self) -> "Form":
    """Terms that cancel are left out; `max` and `log1p` are joined to a logaddexp."""
    left: list[Term] = []
    for term in self.terms:
      for i, other in enumerate(left):
        opposite = term.negative != other.negative and term.is_alike(other)
        if opposite and is_total(term.root):  # Not infinity less infinity.
          del left[i]
          break
        if joined := _joined(term, other) or _joined(other, term):
          left[i] = joined
          break
      else:
        left.append(term)
    return dataclasses.replace(self, terms=tuple(left))


def by_ends(k: Known, move: Callable[[np.ndarray], np.ndarray]) -> Known:
  """A move of a known number's elements, by its two ends."""
  low = move(k.low)
  return Known(low, low if k.low is k.high else move(k.high))


def first_along(array: np.ndarray, axes: Sequence[int]) -> np.ndarray:
  """The first elements along some axes, which are kept."""
  return array[tuple(slice(1) if i in axes else slice(None) for i in range(array.ndim))]


def _spread(k: Known, shape: tuple[int, ...]) -> Known:
  if k.shape in ((), shape):
    return k
  return by_ends(k, lambda a: np.broadcast_to(a, shape))


def is_zero(x: Any) -> bool:
  """Whether a value is surely 0 everywhere."""
  return isinstance(x, Known) and x.is_exact and not x.low.any()


def _have_same(a: Sequence[Known], b: Sequence[Known]) -> bool:
  """Whether two products have the same factors, in any order."""
  left = list(b)
  for x in a:
    at = next((i for i, y in enumerate(left) if _is_same(x, y)), None)
    if at is None:
      return False
    del left[at]
  return not left


def _is_same(x: Any, y: Any) -> bool:
  """Whether two values are surely the same: equal numbers, or the same moves of the same."""
  if x is y:
    return True
  if isinstance(x, Known) or isinstance(y, Known):
    both = isinstance(x, Known) and isinstance(y, Known) and x.is_exact and y.is_exact
    return both and np.array_equal(x.low, y.low)
  a, b = x.made_by, y.made_by
  return (
    a is not None
    and b is not None
    and a.primitive in MOVES
    and (a.primitive, a.params) == (b.primitive, b.params)
    and all(map(_is_same, a.inputs, b.inputs))
  )


def softening(x: Any) -> tuple[str, Any] | None:
  """(base, d) where x is log1p(base(-|d|))."""
  names = []
  while len(names) < 4 and isinstance(x, Value) and x.made_by is not None and is_plain(x.made_by):
    names.append(x.made_by.primitive)
    x = x.made_by.inputs[0]
  first, base, *last = names if len(names) == 4 else ("", "")
  return (base, x) if first == "log1p" and base in HEAVIEST and last == ["neg", "abs"] else None


def _joined(larger: Term, soft: Term) -> Term | None:
  """max(a, b) + c log1p(exp(-|a - b|)) as one term, convex and non-decreasing in a and b."""
  op, found = larger.root.made_by, softening(soft.root)
  if op is None or op.primitive != "max" or found is None or not is_defined("", op.inputs):
    return None
  base, d = found
  extra = list(soft.factors)
  for k in larger.factors:
    at = next((i for i, x in enumerate(extra) if _is_same(k, x)), None)
    if at is None:
      return None
    del extra[at]
  light = all((k.low >= 0).all() and (k.high <= HEAVIEST[base]).all() for k in extra)
  if len(extra) > 1 or not light or larger.negative != soft.negative:
    return None
  if larger.moves != soft.moves or not _have_same(larger.divisors, soft.divisors):
    return None
  if not _is_difference(d, *op.inputs):
    return None
  nc = np.broadcast_to(either(*(x.masks[0] for x in op.inputs)), op.shape)
  made_by = dataclasses.replace(op, primitive=f"logadd{base}")
  root = Value(nc, uniform(True, op.shape), made_by)
  return dataclasses.replace(larger, root=root)


def _is_difference(d: Any, a: Any, b: Any) -> bool:
  """Whether d is a - b or b - a."""
  op = d.made_by if isinstance(d, Value) else None
  if op is not None and op.primitive == "sub":
    x, y = op.inputs
    if (_is_same(x, a) and _is_same(y, b)) or (_is_same(x, b) and _is_same(y, a)):
      return True
  return any(d is x and is_zero(y) for x, y in ((a, b), (b, a)))
