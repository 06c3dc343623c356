"""Log-sum-exp, a convex function that no single operation shows.

log(sum(exp(u))) is convex and non-decreasing in each u (Boyd and Vandenberghe 2004, 3.1.5). So
log-convex functions, those with a convex logarithm, can be multiplied, added, and weighted by
non-negative numbers. Programs subtract a shift from u before and add it after, and cross-entropies
subtract one of the u: such terms cancel.

`_Reader` goes back through the operations that made a value, in two ways: `sum` reads x, and `log`
reads log(x) of an x that is not negative. Both end in a `Form`: a sum of earlier values, and a rest
that is known by its curvature alone.
"""

import dataclasses
from typing import Any

import numpy as np

from convex_jax.proof.constants import fold
from convex_jax.proof.equations import bind
from convex_jax.proof.forms import (
  MOVES,
  YES,
  Form,
  Move,
  Term,
  by_ends,
  first_along,
  is_zero,
  softening,
)
from convex_jax.proof.linear import has_no_zero, is_defined, is_total
from convex_jax.proof.parameters import PARAMETERS, is_plain
from convex_jax.proof.rules import RULES
from convex_jax.proof.values import Known, Masks, Operation, Value, either, is_finite, uniform

LIMIT = 60  # Operations that one reading goes through.
MANY = 100  # Terms of the longest sum that is read: values that enter again and again make it long.
ENDS = {"add", "add_any", "sub", "log", "log1p", "log2", "sign"}  # What a pattern may end in.
# Log-convexity goes through these as convexity does, where no weight is negative.
MONOTONE = {"concatenate", "conv_general_dilated", "cumsum", "dot_general", "max", "pad"}
MONOTONE |= {"reduce_max", "reduce_sum", "reduce_window_sum", "select_n", "stack"}
WEIGHTED = {"conv_general_dilated", "dot_general"}
POWERS = {"square": 2.0, "sqrt": 0.5}
LOG_2 = Known(np.array(0.6931471805599453), np.array(0.6931471805599454))


class _NoLogError(Exception):
  """Nothing shows that a number is not negative, or what its logarithm is."""


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
    if name in ("log", "log1p", "log2") and softening(x) is None:
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
      through = None if is_zero(x) else _through(op, x)
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
    return axes, lambda k: by_ends(k, lambda a: first_along(a, axes).squeeze(axes))
  if op.primitive == "cumsum":
    return (op.params["axis"],), lambda k: k
  if op.primitive == "select_n" and sum(not is_zero(i) for i in op.inputs[1:]) == 1:
    return (), lambda k: k  # Something or 0.
  if op.primitive == "dot_general":
    side = 0 if op.inputs[0] is x else 1
    sums, _ = op.params["dimension_numbers"]
    ones = np.zeros(op.inputs[1 - side].shape)  # At the first place of every sum.
    ones[tuple(slice(1) if i in sums[1 - side] else slice(None) for i in range(ones.ndim))] = 1

    def move(a):
      pair = (np.float64(a), ones) if side == 0 else (ones, np.float64(a))
      return bind(op.eqn, *pair)[0].astype(a.dtype)

    return tuple(sums[side]), lambda k: by_ends(k, move)
  return None


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
