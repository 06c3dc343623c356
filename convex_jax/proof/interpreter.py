"""Curvature of any JAX function of one array, element by element, from its jaxpr.

The jaxpr is walked once, by the rules of `rules`; calls, rematerialised parts and scans are
entered. What does not depend on the input is a known number, enclosed (`constants`). An operation by
which the rules lose both curvatures gets a second look, back through the operations before it: it
may complete a log-sum-exp (`log_sum_exp`) or an activation (`activations`), which is judged by
what it computes, whatever its name. What nothing shows is not proved, and never guessed. The
verdicts hold for the function over the reals, on all of R^n.
"""

import contextlib
import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax import lax

from convex_jax.proof import (
  activations,
  choices,
  joint,
  layouts,
  linear,
  log_sum_exp,
  own_primitives,
  quadratic,
  rules,
)
from convex_jax.proof.composed import composed
from convex_jax.proof.constants import fold, number
from convex_jax.proof.equations import (
  SAME,
  Unknown,
  is_float,
  is_half_or_more,
  is_pure,
  is_step,
  keeps_precision,
)
from convex_jax.proof.float64 import plain
from convex_jax.proof.source import Place, place_of
from convex_jax.proof.values import (
  Known,
  Masks,
  Operation,
  Value,
  both,
  is_finite,
  overlap,
  tidy,
  uniform,
)

LOOP_LIMIT = 1000  # Iterations up to which a `scan` is unrolled; above, it has no rule.
SMALL = 1000  # Elements of known numbers that are compared: of larger ones only the object.

_context: Any = jax.make_user_context(None)
_traces = itertools.count()


@contextlib.contextmanager
def fresh() -> Iterator[None]:
  """Within it, no trace that JAX has cached is used.

  JAX caches the jaxpr of a function (`jax.jit`, `jax.checkpoint`, the body of a scan) by the
  function object, so that a number which the function closes over, and which has changed since,
  would not be seen. A user context is a part of the key of all these caches.
  """
  with _context(next(_traces)):
    yield


def analyse(
  f: Callable[..., Any], *args: Any, argnums: int = -1
) -> tuple[list[Value | Known], Any]:
  """The outputs of `f(*args)`, flat, as values of one argument, and the tree they make.

  The arguments are those of `certify`, which raises the same errors.
  """
  jaxpr, tree = trace(f, *args, argnums=argnums)
  return values_of(jaxpr, f, args, argnums), tree


def trace(f: Callable[..., Any], *args: Any, argnums: int = -1) -> tuple[jex.ClosedJaxpr, Any]:
  """The jaxpr of `f(*args)` as `f` is now, and the tree of its outputs."""
  at = input_position(args, argnums)
  for i, name, leaf in _leaves(f, args):
    if i != at:
      _check_number(name, leaf)
  with fresh():
    jaxpr, shape = jax.make_jaxpr(lambda *a: f(*a), return_shape=True)(*args)
  own_primitives.check(jaxpr.jaxpr)
  return jaxpr, jax.tree.structure(shape)


def values_of(
  jaxpr: jex.ClosedJaxpr, f: Callable[..., Any], args: Sequence[Any], argnums: int
) -> list[Value | Known]:
  """The outputs of a trace as values of one argument; the others are known."""
  at = input_position(args, argnums)
  inputs: list[Value | Known] = []
  for (i, name, leaf), aval in zip(_leaves(f, args), jaxpr.in_avals, strict=True):
    if i == at:
      nowhere = uniform(False, aval.shape)
      inputs.append(Value(nowhere, nowhere))
    else:
      known = number(leaf, aval.dtype)
      inputs.append(dataclasses.replace(known, origins={name: known.low}))
  with plain():
    return Walk().run(jaxpr.jaxpr, _consts(jaxpr), inputs, Place())


def evaluate(jaxpr: jex.ClosedJaxpr, inputs: Sequence[Known]) -> list[Known]:
  """Enclosures of the outputs of a function over the reals at one point.

  Args:
    jaxpr: of the function.
    inputs: its arguments, flat. Those that are the point have `varies`: what depends on them is
      computed in float64, rounded outwards, whatever the program's dtype.

  Raises:
    Unknown: an operation cannot be enclosed.
  """
  outputs = Walk(casts_round=False).run(jaxpr.jaxpr, _consts(jaxpr), inputs, Place())
  return [x for x in outputs if isinstance(x, Known)]


def input_position(args: Sequence[Any], argnums: int) -> int:
  """The position of the input among the arguments; raises `ValueError` where it is unfit."""
  if not args:
    raise ValueError("the function was given no arguments; expected at least its input")
  if not isinstance(argnums, int) or not -len(args) <= argnums < len(args):
    raise ValueError(
      f"argnums is {argnums!r}; expected an integer from {-len(args)} to {len(args) - 1}, the"
      " position of the input among the arguments"
    )
  example = args[argnums]
  expected = "expected one floating-point array, or its jax.ShapeDtypeStruct"
  if not hasattr(example, "shape") or not hasattr(example, "dtype"):
    raise ValueError(f"the input is a {type(example).__name__}; {expected}")
  if not jnp.issubdtype(example.dtype, jnp.floating):
    raise ValueError(f"the input is an array of {example.dtype}; {expected}")
  return argnums % len(args)


def _leaves(f: Callable[..., Any], args: Sequence[Any]) -> Iterator[tuple[int, str, Any]]:
  """(position of the argument, name, number) of all that the arguments hold, in order."""
  for i, (name, argument) in enumerate(zip(_names(f, args), args, strict=True)):
    for path, leaf in jax.tree_util.tree_leaves_with_path(argument):
      parts = [name] if len(args) > 2 or not path else []
      if path:
        parts.append(jax.tree_util.keystr(path, simple=True, separator="/"))
      yield i, "/".join(parts), leaf


def _check_number(name: str, leaf: Any) -> None:
  try:
    jax.typeof(leaf)
    what = type(leaf).__name__ if isinstance(leaf, jax.ShapeDtypeStruct) else None
  except TypeError:
    what = f"numpy array of {leaf.dtype}" if isinstance(leaf, np.ndarray) else type(leaf).__name__
  if what is not None:
    raise ValueError(
      f"{name} is a {what}; expected an array or a number (functools.partial binds other arguments)"
    )


def _names(f: Callable[..., Any], args: Sequence[Any]) -> list[str]:
  """Names of the arguments: those of the function's parameters, where it shows them."""
  try:
    parameters = inspect.signature(f).parameters.values()
  except (TypeError, ValueError):  # Of a built-in function, say.
    parameters = ()
  names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
  return [names[i] if i < len(names) else f"argument {i}" for i in range(len(args))]


def _consts(closed) -> list[Known]:
  """The numbers that a closed jaxpr closes over."""
  pairs = zip(closed.consts, closed.jaxpr.constvars, strict=True)
  return [number(value, var.aval.dtype) for value, var in pairs]


class Walk:
  """One pass over a jaxpr and everything it calls.

  Args:
    casts_round: whether a known number that is cast to another precision may be what it was or
      what it is rounded to, or is what it was, as over the reals.
  """

  def __init__(self, casts_round: bool = True):
    self._casts_round = casts_round
    self._order = 0
    self._done: dict[Any, tuple[Any, list[Value | Known]]] = {}

  def run(self, jaxpr, consts, arguments, place: Place, written=True) -> list[Value | Known]:
    """The outputs of `jaxpr` for these inputs; `place` is where it was called, or `written`."""
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))

    def read(var):
      if not isinstance(var, jex.Literal):
        return env[var]
      aval: Any = var.aval
      return number(var.val, aval.dtype)

    for eqn in needed(jaxpr):
      inputs = [read(v) for v in eqn.invars]
      outputs = self._equation(eqn, inputs, place_of(eqn, place) if written else place)
      env.update(zip(eqn.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars]

  def _equation(self, eqn, inputs, place: Place) -> list[Value | Known]:
    name = eqn.primitive.name
    known = all(isinstance(x, Known) for x in inputs)
    called, other = layouts.called(eqn, inputs), composed(eqn, inputs)
    if called is not None:
      return self._inner(*called, place)
    if other is not None:
      return self._compute(other, eqn.invars, inputs, place)
    if name in ("scan", "while"):
      unrolled = (self._scan if name == "scan" else self._while)(eqn, inputs, place)
      if unrolled is not None:
        return unrolled
    if name == "cond":
      return self._cond(eqn, *inputs, place=place)
    if name in SAME or (is_rounding(eqn) and not (known and self._casts_round)):
      return inputs
    if known:
      try:
        return list(fold(eqn, inputs))
      except Unknown:
        if any(x.varies for x in inputs):
          raise
        return self._values(eqn, inputs, place)
    if name in ("eq", "ne") and choices.is_same(*inputs):
      return [Known.exactly(np.full(eqn.outvars[0].aval.shape, name == "eq"))]
    if name == "select_n":
      if all(x is inputs[1] for x in inputs[2:]):
        return inputs[1:2]
      inputs = [_condition(inputs[0]), *inputs[1:]]
      if isinstance(inputs[0], Value):
        inputs[1:] = self._settled(*inputs)
        plain = choices.unguarded(*inputs)
        if plain is not None:
          return [plain]
    key = _key(eqn, inputs)
    if key is None:
      return self._values(eqn, inputs, place)
    if key not in self._done:  # The inputs are kept, so that no other has the `id` of one.
      self._done[key] = inputs, self._values(eqn, inputs, place)
    return self._done[key][1]

  def _settled(self, test: Value, *cases) -> list[Value | Known]:
    """The cases of a choice, in which the same condition is known."""

    def compute(op, inputs):
      return self._equation(op.eqn, inputs, op.place)[0]

    return [choices.settled(test, i, x, compute) for i, x in enumerate(cases)]

  def _values(self, eqn, inputs, place: Place) -> list[Value | Known]:
    self._order += 1
    name = eqn.primitive.name
    op = Operation(name, eqn, tuple(inputs), place, self._order)
    reals = [is_float(v.aval.dtype) for v in eqn.outvars]
    known = all(isinstance(x, Known) for x in inputs)  # It cannot be enclosed, nor looked through.
    if known:
      op = dataclasses.replace(op, primitive="unknown")
    is_one_real = len(eqn.outvars) == 1 and all(reals) and all(map(_is_real, inputs[1:]))
    if known or not is_one_real or (is_step(eqn) and name not in linear.MOVES):
      if name == "split" and not known:
        return _split(eqn, inputs[0], op)
      nothing = [uniform(True, v.aval.shape) for v in eqn.outvars]
      return [Value(no, no, op, real) for no, real in zip(nothing, reals, strict=True)]
    if name == "select_n" and (case := log_sum_exp.settled(inputs[0])) is not None:
      return [inputs[1 + case]]
    masks = rules.RULES.get(name, linear.lost)(op, *inputs)
    masks = tidy(masks[0], op.shape), tidy(masks[1], op.shape)
    if overlap(masks) and linear.is_defined(name, inputs):
      masks, op = self._second_look(op, masks)
    return [Value(*masks, op)]

  def _second_look(self, op: Operation, masks: Masks) -> tuple[Masks, Operation]:
    """Masks and operation, better where several operations together show a curvature."""
    if op.primitive in log_sum_exp.ENDS:
      found, op = log_sum_exp.look(op)
      masks = both(masks, found, op.shape)
    if op.primitive in activations.ENDS and overlap(masks):
      found, op = activations.look(op, masks)
      masks = both(masks, found, op.shape)
    if op.primitive in joint.ENDS and overlap(masks):
      found = joint.curvature(Value(*masks, op))
      if found is not None:
        masks = both(masks, found, op.shape)
    if op.primitive in quadratic.PRIMITIVES and overlap(masks):
      found = quadratic.curvature(Value(*masks, op))
      if found is not None:
        masks = both(masks, found, op.shape)
    return masks, op

  def _scan(self, eqn, inputs, place: Place) -> list[Value | Known] | None:
    """The outputs of a `scan`, unrolled; None where it is too long."""
    body, length, reverse, fixed, carried = layouts.scan_of(eqn)
    if not 0 < length <= LOOP_LIMIT:
      return None
    consts, carry = inputs[:fixed], inputs[fixed : fixed + carried]
    columns = inputs[fixed + carried :]
    rows: list[list[Value | Known]] = []
    for i in range(length):
      at = length - 1 - i if reverse else i
      row = [_row(column, at, place) for column in columns]
      outputs = self._inner(body, [*consts, *carry, *row], place)
      carry = outputs[:carried]
      rows.append(outputs[carried:])
    if reverse:
      rows.reverse()
    return [*carry, *(_stack(column, place) for column in zip(*rows, strict=True))]

  def _while(self, eqn, inputs, place: Place) -> list[Value | Known] | None:
    """The outputs of a `while` whose test is known, unrolled; None where it is too long.

    Under `vmap` it may test several rows, of which those whose test fails stay as they are.
    """
    test, body, tested, fixed = layouts.while_of(eqn)
    outer, consts, carry = inputs[:tested], inputs[tested:][:fixed], inputs[tested + fixed :]
    for _ in range(LOOP_LIMIT):
      (more,) = self._inner(test, [*outer, *carry], place)
      if not isinstance(more, Known) or not more.is_exact:
        return None
      if not more.low.any():
        return list(carry)
      moved = self._inner(body, [*consts, *carry], place)
      if not more.low.all():
        choose = functools.partial(_where, more.low)
        moved = [
          self._compute(choose, (v, v), [new, old], place)[0]
          for v, new, old in zip(eqn.outvars, moved, carry, strict=True)
        ]
      carry = moved
    return None

  def _cond(self, eqn, index, *inputs, place: Place) -> list[Value | Known]:
    """The outputs of a `cond`: those of one branch, or of all, and a choice among them."""
    branches = layouts.branches_of(eqn)
    if isinstance(index, Known) and index.is_exact:
      return self._inner(branches[int(np.clip(index.low, 0, len(branches) - 1))], inputs, place)
    outputs = []
    for out, *cases in zip(
      eqn.outvars, *(self._inner(b, inputs, place) for b in branches), strict=True
    ):
      variables = [eqn.invars[0], *(out for _ in cases)]
      outputs += self._compute(lambda *xs: [lax.select_n(*xs)], variables, [index, *cases], place)
    return outputs

  def _compute(self, function, variables, inputs, place: Place) -> list[Value | Known]:
    """The outputs of a function of `lax`, in place of an equation."""
    like = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in variables]
    closed = jax.make_jaxpr(function)(*like)
    return self.run(closed.jaxpr, _consts(closed), inputs, place, written=False)

  def _inner(self, jaxpr, inputs, place: Place) -> list[Value | Known]:
    """The outputs of a jaxpr inside another."""
    jaxpr, consts = layouts.parts_of(jaxpr)
    known = [number(x, v.aval.dtype) for x, v in zip(consts, jaxpr.constvars, strict=True)]
    return self.run(jaxpr, known, inputs, place)


def _where(rows: np.ndarray, new, old) -> list[Any]:
  """The rows of `new` where that is true, of `old` elsewhere."""
  return [lax.select(lax.broadcast_in_dim(rows, old.shape, range(rows.ndim)), new, old)]


def _condition(x: Value | Known) -> Value | Known:
  """A condition, or what it was before it was made 0 or 1."""
  op = x.made_by if isinstance(x, Value) else None
  if op is None or op.eqn is None or op.primitive != "convert_element_type":
    return x
  return op.inputs[0] if op.eqn.invars[0].aval.dtype == np.bool_ else x


def _key(eqn, inputs: Sequence[Value | Known]) -> Any:
  """What is equal of two equations that compute the same; None if that cannot be told.

  What a program writes twice, as in relu(x) * relu(x), is one value, so that it can be seen.
  """
  avals = tuple((v.aval.shape, v.aval.dtype) for v in (*eqn.invars, *eqn.outvars))
  numbers = tuple(map(_content, inputs))
  key = eqn.primitive, tuple(sorted(eqn.params.items())), avals, numbers
  try:
    hash(key)
  except TypeError:
    return None
  return key if is_pure(eqn) else None


def _content(x: Value | Known) -> Any:
  if isinstance(x, Known) and isinstance(x.low, np.ndarray | np.generic) and x.low.size <= SMALL:
    return x.low.tobytes(), x.high.tobytes(), tuple(x.origins)
  return id(x)


def _split(eqn, x: Value, op: Operation) -> list[Value | Known]:
  cuts = np.cumsum(eqn.params["sizes"])[:-1]
  parts = [np.split(mask, cuts, eqn.params["axis"]) for mask in x.masks]
  return [
    Value(tidy(nc, nc.shape), tidy(nk, nk.shape), dataclasses.replace(op, index=i), x.is_real)
    for i, (nc, nk) in enumerate(zip(*parts, strict=True))
  ]


def _row(x: Value | Known, i: int, place: Place) -> Value | Known:
  if isinstance(x, Known):
    low = x.low[i]
    return Known(low, low if x.low is x.high else x.high[i], x.origins, x.varies)
  return _moved([x], x.not_convex[i], x.not_concave[i], place, i)


def _stack(rows: Sequence[Value | Known], place: Place) -> Value | Known:
  known = [r for r in rows if isinstance(r, Known)]
  if len(known) == len(rows):
    stack: Any = np.stack if isinstance(known[0].low, np.ndarray | np.generic) else jnp.stack
    low = stack([r.low for r in known])
    high = low if all(r.low is r.high for r in known) else stack([r.high for r in known])
    return Known(low, high, {}, any(r.varies for r in known))
  masks = [r.masks if isinstance(r, Value) else (~is_finite(r),) * 2 for r in rows]
  not_convex, not_concave = (np.stack(column) for column in zip(*masks, strict=True))
  return _moved(rows, not_convex, not_concave, place)


def _moved(
  inputs: Sequence[Any], not_convex, not_concave, place: Place, row: int | None = None
) -> Value:
  """A value at the border of a loop, through which no second look goes."""
  values = [x for x in inputs if isinstance(x, Value)]
  order = max((v.made_by.order for v in values if v.made_by), default=0)
  op = Operation("scan", None, tuple(inputs), place, order, row)
  shape, is_real = not_convex.shape, all(v.is_real for v in values)
  return Value(tidy(not_convex, shape), tidy(not_concave, shape), op, is_real)


def _is_real(x: Value | Known) -> bool:
  return isinstance(x, Known) or x.is_real


def is_rounding(eqn) -> bool:
  """Whether an equation is a change of precision whose rounding is left out of account."""
  if eqn.primitive.name == "convert_element_type":
    source, target = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
    return is_float(source) and is_half_or_more(target)
  return keeps_precision(eqn)


def needed(jaxpr) -> Iterator[Any]:
  """The equations that the outputs depend on, in order."""
  wanted = {v for v in jaxpr.outvars if not isinstance(v, jex.Literal)}
  kept = []
  for eqn in reversed(jaxpr.eqns):
    if any(v in wanted for v in eqn.outvars):
      wanted |= {v for v in eqn.invars if not isinstance(v, jex.Literal)}
      kept.append(eqn)
  return reversed(kept)
