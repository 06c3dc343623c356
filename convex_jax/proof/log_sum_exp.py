"""Log-sum-exp, a convex function that no single operation shows.

log(sum(exp(u))) is convex and non-decreasing in each u (Boyd and Vandenberghe 2004, 3.1.5). So
log-convex functions, those with a convex logarithm, can be multiplied, added, and weighted by
non-negative numbers. Programs subtract a shift from u before and add it after, and cross-entropies
subtract one of the u: such terms cancel.

`_Reader` goes back through the operations that made a value, in two ways: `sum` reads x, and `log`
reads log(x) of an x that is not negative. Both end in a `Form`,

    sum of ± factors / divisors * root[index] + rest,

of which the roots are earlier values, and the rest is known by its curvature alone. Equal terms of
opposite sign cancel; the curvatures of what remains are those of the sum.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from convex_jax.proof.constants import fold
from convex_jax.proof.equations import bind
from convex_jax.proof.linear import has_no_zero, is_defined, is_total
from convex_jax.proof.parameters import PARAMETERS, is_plain
from convex_jax.proof.rules import RULES
from convex_jax.proof.values import (
  Known,
  Masks,
  Operation,
  Value,
  either,
  is_finite,
  is_uniform,
  thin,
  uniform,
)

LIMIT = 60  # Operations that one reading goes through.
MANY = 100  # Terms of the longest sum that is read: values that enter again and again make it long.
ENDS = {"add", "add_any", "sub", "log", "log1p", "log2", "sign"}  # What a pattern may end in.
MOVES = {"broadcast_in_dim", "reshape", "rev", "slice", "squeeze", "transpose"}
# Log-convexity goes through these as convexity does, where no weight is negative.
MONOTONE = {"concatenate", "conv_general_dilated", "cumsum", "dot_general", "max", "pad"}
MONOTONE |= {"reduce_max", "reduce_sum", "reduce_window_sum", "select_n", "stack"}
WEIGHTED = {"conv_general_dilated", "dot_general"}
POWERS = {"square": 2.0, "sqrt": 0.5}
# In log(e^a + e^b) = max(a, b) + c log1p(e^-|a - b|), convex for c up to 1; with powers of 2 for
# those of e, up to 1 / log(2), of which this is a lower bound.
HEAVIEST = {"exp": 1.0, "exp2": 1.4426950408889634}

LOG_2 = Known(np.array(0.6931471805599453), np.array(0.6931471805599454))
NO, YES = uniform(False, ()), uniform(True, ())

Move = Callable[[Known], Known]


class _NoLogError(Exception):
  """Nothing shows that a number is not negative, or what its logarithm is."""


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
    return all(k.is_exact for k in known) and all((a == _first(a, axes)).all() for a in arrays)


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
    return self.moved(shape, lambda k: _by_ends(k, lambda a: np.broadcast_to(a, shape)))

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


class _Reader:
  """Reads values as forms, back through at most `LIMIT` operations."""

  def __init__(self):
    self._left = LIMIT
    self._sums: dict[int, Form] = {}

  def sum(self, x: Value | Known) -> Form:
    """x itself."""
    if isinstance(x, Known):
      return Form(x.shape)
    if id(x) not in self._sums:
      self._sums[id(x)] = self._sum(x)
    return self._sums[id(x)]

  def _sum(self, x: Value) -> Form:
    whole = Form(x.shape, (Term(x),))
    if (masked := _masked(x)) is not None:
      u, there = masked
      return dataclasses.replace(self.sum(u), positive=self.sum(u).positive & there)
    op = self._enter(x)
    if op is None:
      return whole
    name, inputs, shape = op.primitive, op.inputs, op.shape
    if name in ("add", "add_any", "sub"):
      a, b = (self.sum(i).spread(shape) for i in inputs)
      if len(a.terms) + len(b.terms) > MANY:
        return whole
      return a.plus(b.finite().scaled(negative=True) if name == "sub" else b)
    if name == "neg":
      return self.sum(inputs[0]).finite().scaled(negative=True)
    if name in ("mul", "div"):
      a, b = inputs if isinstance(inputs[0], Value) else inputs[::-1]
      if isinstance(b, Value) or (name == "div" and not (a is inputs[0] and has_no_zero(b))):
        return whole
      form = self.sum(a).spread(shape).finite()
      return form.scaled(by=[b]) if name == "mul" else form.scaled(over=[b])
    if name in MOVES and len(inputs) == 1:
      return self.sum(inputs[0]).moved(shape, lambda k: fold(op.eqn, [k])[0])
    if name in ("log", "log1p", "log2") and _softening(x) is None:
      try:
        form = self.log(inputs[0])
      except _NoLogError:
        return whole
      if name == "log1p":
        form = _log_of_sum(Form(shape), form)
      elif name == "log2":
        form = form.scaled(over=[LOG_2])
      form = form.finite()
      nc, nk = (np.broadcast_to(m, shape) for m in form.rest)
      return Form(shape, (*form.terms, Term(Value(nc, nk, op))))
    return whole

  def log(self, x: Value | Known) -> Form:
    """The logarithm of x; raises `_NoLogError`."""
    if isinstance(x, Known):
      if not x.is_float or not is_finite(x).all() or (x.low < 0).any():
        raise _NoLogError
      return Form(x.shape, positive=np.asarray(x.low > 0))
    op = self._enter(x)
    if op is None:
      raise _NoLogError
    name, inputs, shape = op.primitive, op.inputs, op.shape
    first: Any = inputs[0]
    if name in ("exp", "exp2"):
      form = self.sum(first)
      return form if name == "exp" else form.scaled(by=[LOG_2])
    if name == "logistic":  # -log(1 + exp(-u)).
      return Form(shape, rest=(YES, first.not_concave))
    if name == "cosh":
      return Form(shape, rest=(either(*first.masks), YES))
    if name == "abs":
      return self.log(first)
    if name in POWERS or name == "integer_pow":
      return _power(self.log(first), POWERS.get(name) or op.params["y"])
    if name in MOVES and len(inputs) == 1:
      return self.log(first).moved(shape, lambda k: fold(op.eqn, [k])[0])
    if name in ("mul", "div", "add", "add_any"):
      a, b = (self.log(i).spread(shape) for i in inputs)
      if name == "div":
        b = _power(b, -1)
      return a.plus(b) if name in ("mul", "div") else _log_of_sum(a, b)
    return self._monotone(op)

  def _enter(self, x: Value) -> Operation | None:
    """The operation that made a value, if it may be looked through."""
    op = x.made_by
    if op is None or not self._left or not is_defined(op.primitive, op.inputs):
      return None
    self._left -= 1
    return op if is_plain(op) or op.primitive in MONOTONE - PARAMETERS.keys() else None

  def _monotone(self, op: Operation) -> Form:
    """By the rule for convexity, of the logarithms; then one for which elements are positive."""
    known = [isinstance(x, Known) for x in op.inputs]
    if op.primitive not in MONOTONE or (op.primitive in WEIGHTED and not any(known)):
      raise _NoLogError
    if op.primitive == "reduce_max" and 0 in op.inputs[0].shape:
      raise _NoLogError  # Negative infinity.
    curved, reached, terms = [], [], ()
    for x in op.inputs:
      if isinstance(x, Known) and (op.primitive in WEIGHTED or not x.is_float):
        if not x.is_float and not x.is_exact:
          raise _NoLogError  # Rounding decides which element it takes.
        if x.is_float and (x.low < 0).any():
          raise _NoLogError  # The sum may be negative.
        curved.append(x)
        reached.append(Known.exactly(np.float64(x.low > 0)) if x.is_float else x)
        continue
      form = self.log(x)
      through = None if _is_zero(x) else _through(op, x)
      kept = []
      if through is not None:  # What is constant along the axes of a sum is not changed by it.
        axes, move = through
        kept = [t for t in form.terms if t.is_constant_along(axes)]
        terms = tuple(t.moved(move) for t in kept)
      yes, no = uniform(True, x.shape), uniform(False, x.shape)
      made_by = x.made_by if isinstance(x, Value) else None
      curved.append(Value(form.masks(without=kept)[0], yes, made_by))
      reached.append(Value(np.broadcast_to(form.positive, x.shape), no))
    rule = RULES[op.primitive]
    return Form(op.shape, terms, (rule(op, *curved)[0], YES), rule(op, *reached)[0])


def _masked(x: Value) -> tuple[Any, np.ndarray] | None:
  """(u, mask) where x is u, or negative infinity at known places."""
  op = x.made_by
  if op is None or op.primitive != "select_n" or len(op.inputs) != 3:
    return None
  which, *cases = op.inputs
  if not isinstance(which, Known) or not which.is_exact:
    return None
  for i, k in enumerate(cases):
    if isinstance(k, Known) and k.is_float and np.isneginf(k.low).all() and k.is_exact:
      return cases[1 - i], np.broadcast_to(which.low != i, x.shape)
  return None


def _through(op: Operation, x: Any) -> tuple[tuple[int, ...], Move] | None:
  """Axes of x over which an operation sums, and what it does to numbers constant along them."""
  if op.primitive == "reduce_sum" and 0 not in x.shape:
    axes = tuple(op.params["axes"])
    return axes, lambda k: _by_ends(k, lambda a: _first(a, axes).squeeze(axes))
  if op.primitive == "cumsum":
    return (op.params["axis"],), lambda k: k
  if op.primitive == "select_n" and sum(not _is_zero(i) for i in op.inputs[1:]) == 1:
    return (), lambda k: k  # Something or 0.
  if op.primitive == "dot_general":
    side = 0 if op.inputs[0] is x else 1
    sums, _ = op.params["dimension_numbers"]
    ones = np.zeros(op.inputs[1 - side].shape)  # At the first place of every sum.
    ones[tuple(slice(1) if i in sums[1 - side] else slice(None) for i in range(ones.ndim))] = 1

    def move(a):
      pair = (np.float64(a), ones) if side == 0 else (ones, np.float64(a))
      return bind(op.eqn, *pair)[0].astype(a.dtype)

    return tuple(sums[side]), lambda k: _by_ends(k, move)
  return None


def _by_ends(k: Known, move: Callable[[np.ndarray], np.ndarray]) -> Known:
  low = move(k.low)
  return Known(low, low if k.low is k.high else move(k.high))


def _power(form: Form, power: float) -> Form:
  """The logarithm of a power."""
  if power <= 0 and not np.all(form.positive):
    raise _NoLogError
  size = [] if abs(power) == 1 else [Known.exactly(np.array(abs(power), np.float64))]
  return form.scaled(negative=power < 0, by=size)


def _log_of_sum(a: Form, b: Form) -> Form:
  """log(exp(a) + exp(b)); what both have in common is not changed by it."""
  common, partners, left = [], [], list(b.terms)
  for t in a.terms:
    same = next((s for s in left if s.negative == t.negative and s.is_alike(t)), None)
    if same is not None:
      left.remove(same)
      common.append(t)
      partners.append(same)
  nc = either(a.masks(without=common)[0], b.masks(without=partners)[0])
  return Form(a.shape, tuple(common), (nc, YES), a.positive | b.positive)


def _first(array: np.ndarray, axes: Sequence[int]) -> np.ndarray:
  return array[tuple(slice(1) if i in axes else slice(None) for i in range(array.ndim))]


def _spread(k: Known, shape: tuple[int, ...]) -> Known:
  if k.shape in ((), shape):
    return k
  return _by_ends(k, lambda a: np.broadcast_to(a, shape))


def _is_zero(x: Any) -> bool:
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


def _softening(x: Any) -> tuple[str, Any] | None:
  """(base, d) where x is log1p(base(-|d|))."""
  names = []
  while len(names) < 4 and isinstance(x, Value) and x.made_by is not None and is_plain(x.made_by):
    names.append(x.made_by.primitive)
    x = x.made_by.inputs[0]
  first, base, *last = names if len(names) == 4 else ("", "")
  return (base, x) if first == "log1p" and base in HEAVIEST and last == ["neg", "abs"] else None


def _joined(larger: Term, soft: Term) -> Term | None:
  """max(a, b) + c log1p(exp(-|a - b|)) as one term, convex and non-decreasing in a and b."""
  op, found = larger.root.made_by, _softening(soft.root)
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
  return any(d is x and _is_zero(y) for x, y in ((a, b), (b, a)))


def look(op: Operation) -> tuple[Masks, Operation]:
  """Masks of a value, and the operation by which it is made."""
  if op.primitive == "sign":
    return _look_at_sign(op), op
  nothing = uniform(True, op.shape)
  form = _Reader().sum(Value(nothing, nothing, op)).finite()
  whole = op.primitive == "add" and {id(t.root) for t in form.terms} == set(map(id, op.inputs))
  form = form.simplified()
  if whole and len(form.terms) == 1:  # Nothing but the two terms, no known number or weight.
    (term,) = form.terms
    made_by = term.root.made_by
    if made_by is not None and made_by.primitive == "logaddexp" and not term.factors:
      op = dataclasses.replace(op, primitive="logaddexp", inputs=made_by.inputs)
  return form.masks(), op


def _look_at_sign(op: Operation) -> Masks:
  """The sign of a sum of exponentials is 1."""
  lost = uniform(True, op.shape), uniform(True, op.shape)
  x = op.inputs[0]
  if not _is_not_negative(x) or not is_total(x):
    return lost
  return uniform(False, op.shape), uniform(False, op.shape)


def _is_not_negative(x: Any) -> bool:
  """Whether a number is surely not negative, as a sum of exponentials is."""
  try:
    _Reader().log(x)
  except _NoLogError:
    return False
  return True


def settled(which: Any) -> int | None:
  """What a condition always is everywhere, 0 or 1, if that is known.

  log-sum-exp asks whether its shift is finite, and whether the sum is negative; `logaddexp`,
  whether the difference of its operands is NaN; `nan_to_num`, whether a number is infinite, too.
  """
  while isinstance(which, Value) and which.made_by is not None and which.made_by.primitive in MOVES:
    which = which.made_by.inputs[0]
  if isinstance(which, Known):
    is_one = which.low.dtype == bool and which.is_exact and which.low.size
    return int(which.low.flat[0]) if is_one and np.ptp(which.low.astype(int)) == 0 else None
  op = which.made_by
  if op is None:
    return None
  a, b = op.inputs if len(op.inputs) == 2 else (op.inputs[0], None)
  if op.primitive == "is_finite" and is_total(a):
    return 1
  if op.primitive == "ne" and a is b and is_total(a):
    return 0
  if op.primitive == "eq" and isinstance(b, Known) and b.is_float and np.isinf(b.low).all():
    return 0 if b.is_exact and is_total(a) else None  # As `nan_to_num` asks.
  if op.primitive == "lt" and isinstance(b, Known) and (b.high <= 0).all():
    if isinstance(a, Value) and a.made_by is not None and a.made_by.primitive == "sign":
      a = a.made_by.inputs[0]
    return 0 if _is_not_negative(a) else None
  return None
