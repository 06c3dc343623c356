"""Curvature of any JAX function of one array, element by element, from its jaxpr.

The jaxpr is walked once, by the rules of `rules`; calls, rematerialised parts and scans are
entered. What does not depend on the input is a known number, folded in float64. An
activation is judged by what it computes, whatever its name: `piecewise` looks at the scalar
function on either side of its kink. What has no rule is not proved, never guessed. The
verdicts hold for the function over the reals, on all of R^n.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from convex_jax.proof import activations, rules
from convex_jax.proof.constants import SAME, fold, real
from convex_jax.proof.rules import Known, Masks, Operation, Value
from convex_jax.proof.source import Place

LOOP_LIMIT = 1000  # Iterations of a `scan` that are unrolled; above, no rule.


def analyse(
  f: Callable[..., Any], *args: Any, argnums: int = -1
) -> tuple[list[Value | Known], Any]:
  """The outputs of `f(*args)`, flat, as values of one argument, and the tree they make.

  Args:
    f: a JAX function.
    *args: its arguments: the input, an array or its `jax.ShapeDtypeStruct`, of which only
      shape and dtype matter; the others known trees of numbers, whose paths name them in
      explanations.
    argnums: which argument is the input.

  Raises:
    ValueError: there is no such argument, or it is not one floating-point array.
  """
  at = input_position(args, argnums)
  jaxpr, shape = jax.make_jaxpr(f, return_shape=True)(*args)
  inputs: list[Value | Known] = []
  for i, argument in enumerate(args):
    if i == at:
      size = tuple(argument.shape)
      inputs.append(Value(rules.uniform(False, size), rules.uniform(False, size)))
      continue
    for path, leaf in jax.tree_util.tree_leaves_with_path(argument):
      inputs.append(Known(real(leaf), {_name(path): real(leaf)}))
  consts = [Known(real(c)) for c in jaxpr.consts]
  outputs = Walk().run(jaxpr.jaxpr, consts, inputs, Place())
  return outputs, jax.tree.structure(shape)


def input_position(args: Sequence[Any], argnums: int) -> int:
  """The position of the input among the arguments; raises `ValueError` where it is unfit."""
  if not -len(args) <= argnums < len(args):
    raise ValueError(f"argnums is {argnums} and the function was given {len(args)} arguments")
  example = args[argnums]
  if not hasattr(example, "shape") or not hasattr(example, "dtype"):
    raise ValueError(
      f"the input is a {type(example).__name__}; expected one array, or its jax.ShapeDtypeStruct"
    )
  if not jnp.issubdtype(example.dtype, jnp.floating):
    raise ValueError(f"the input is {example.dtype}; convexity needs floating-point numbers")
  return argnums % len(args)


def _name(path) -> str:
  return "/".join(str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)


def culprit(output: Value, not_mask: Callable[[Value], np.ndarray]) -> Operation | None:
  """The first operation that leaves `output` without the curvature asked for.

  The earliest operation on the way to `output` that makes something neither convex nor
  concave of what was one of them; or, where its own inputs already lack the curvature
  (`not_mask`), or nothing is lost so far, the earliest that turned the curvature round.
  """

  def lacks(value):
    return bool(not_mask(value).any())

  lost = _earliest([output], lambda v: v.is_lost)
  if lost is not None and lost.note:
    return lost
  turned = _earliest(lost.inputs if lost else [output], lacks)
  return turned or lost


def _earliest(outputs: Sequence[Any], is_bad: Callable[[Value], bool]) -> Operation | None:
  """The earliest operation that makes a bad value of good ones, on the bad ways to `outputs`."""
  found, seen, todo = [], set(), list(outputs)
  while todo:
    value = todo.pop()
    if not isinstance(value, Value) or not value.is_real or id(value) in seen or not is_bad(value):
      continue
    seen.add(id(value))
    if value.made_by is None:
      continue
    above = [v for v in value.made_by.inputs if isinstance(v, Value) and v.is_real and is_bad(v)]
    if above and not value.made_by.note:
      todo += above
    else:
      found.append(value.made_by)
  return min(found, key=lambda op: op.order, default=None)


CALLS = {  # Primitives that run the jaxpr under this parameter.
  "jit": "jaxpr",
  "pjit": "jaxpr",
  "closed_call": "call_jaxpr",
  "core_call": "call_jaxpr",
  "custom_jvp_call": "call_jaxpr",
  "custom_vjp_call": "call_jaxpr",
  "checkpoint": "jaxpr",
  "remat": "jaxpr",
  "remat2": "jaxpr",
}


class Walk:
  """One pass over a jaxpr and all it calls."""

  def __init__(self):
    self._order = 0

  def run(self, jaxpr, consts, arguments, place: Place) -> list[Value | Known]:
    """The outputs of `jaxpr` for these inputs; `place`: where the call to it stands."""
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))

    def read(var):
      if not isinstance(var, jex.Literal):
        return env[var]
      aval: Any = var.aval
      return Known(real(np.asarray(var.val, aval.dtype)))

    for eqn in _needed(jaxpr):
      inputs = [read(v) for v in eqn.invars]
      outputs = self._equation(eqn, inputs, place.within(eqn))
      env.update(zip(eqn.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars]

  def _equation(self, eqn, inputs, place: Place) -> list[Value | Known]:
    name, params = eqn.primitive.name, eqn.params
    if name in CALLS and not (name == "custom_jvp_call" and _is_logaddexp(eqn)):
      inner = params[CALLS[name]]
      closed = isinstance(inner, jex.ClosedJaxpr)
      jaxpr, consts = (inner.jaxpr, inner.consts) if closed else (inner, [])
      return self.run(jaxpr, [Known(real(c)) for c in consts], inputs, place)
    if name == "scan" and not all(isinstance(x, Known) for x in inputs):
      unrolled = self._scan(params, inputs, place)
      if unrolled is not None:
        return unrolled
    if name == "cond" and isinstance(inputs[0], Known):
      branch = params["branches"][int(np.clip(inputs[0].array, 0, len(params["branches"]) - 1))]
      return self.run(branch.jaxpr, [Known(real(c)) for c in branch.consts], inputs[1:], place)
    if all(isinstance(x, Known) for x in inputs):
      origins = {n: a for x in inputs for n, a in x.origins.items()}
      return [Known(real(a), origins) for a in fold(eqn, [x.array for x in inputs])]
    if name in SAME or (name == "convert_element_type" and _stays_real(eqn)):
      return inputs
    return self._values(eqn, inputs, place)

  def _values(self, eqn, inputs, place: Place) -> list[Value | Known]:
    self._order += 1
    name = eqn.primitive.name
    op = Operation(name, eqn, tuple(inputs), place, self._order)
    reals = [jnp.issubdtype(v.aval.dtype, jnp.floating) for v in eqn.outvars]
    if len(eqn.outvars) > 1 or not all(reals) or not all(_is_real(x) for x in inputs[1:]):
      if name == "split":
        return _split(eqn, inputs[0], op)
      nothing = [rules.uniform(True, v.aval.shape) for v in eqn.outvars]
      return [Value(no, no, op, real) for no, real in zip(nothing, reals, strict=True)]
    e = rules.Equation(eqn)
    if name == "custom_jvp_call":
      masks = rules.maximum(e, *inputs)  # logaddexp: convex and non-decreasing in both.
    else:
      masks = rules.RULES.get(name, rules.lost)(e, *inputs)
    if not _is_defined(name, inputs):
      return [Value(*rules.lost(e), op)]
    masks = (
      rules.tidy(np.broadcast_to(masks[0], e.shape)),
      rules.tidy(np.broadcast_to(masks[1], e.shape)),
    )
    if (masks[0] & masks[1]).any():
      masks, op = self._second_look(e, op, masks)
    return [Value(*masks, op)]

  def _second_look(self, e: rules.Equation, op: Operation, masks: Masks) -> tuple[Masks, Operation]:
    """What no single operation shows: a sum that is a log-sum-exp, a scalar function."""
    found = rules.shifted_log_of_sum(e, *op.inputs) if op.primitive == "add" else None
    if found is None and op.primitive in activations.ELEMENTWISE:
      seen = activations.properties(Value(*masks, op), Value)
      if seen is not None:
        root, shape = seen
        found = rules.composed(root, shape.convex, shape.concave, shape.rising, shape.falling)
        op = dataclasses.replace(op, scalar=(root, shape))
        if not np.all(shape.convex | shape.concave) and op.primitive in ("select_n", "add"):
          op = dataclasses.replace(op, note=str(shape))
    if found is None:
      return masks, op
    better = [
      rules.tidy(np.broadcast_to(m & f, e.shape)) for m, f in zip(masks, found, strict=True)
    ]
    return (better[0], better[1]), op

  def _scan(self, params, inputs, place: Place) -> list[Value | Known] | None:
    """A `scan`, unrolled; None where it is too long."""
    length, body = params["length"], params["jaxpr"]
    fixed, carried = params["num_consts"], params["num_carry"]
    if not 0 < length <= LOOP_LIMIT:
      return None
    consts, carry, columns = (
      inputs[:fixed],
      list(inputs[fixed : fixed + carried]),
      inputs[fixed + carried :],
    )
    rows: list[list[Value | Known]] = []
    for i in range(length):
      at = length - 1 - i if params["reverse"] else i
      outputs = self.run(
        body.jaxpr,
        [Known(real(c)) for c in body.consts],
        [*consts, *carry, *(_row(c, at, place) for c in columns)],
        place,
      )
      carry = outputs[:carried]
      rows.append(outputs[carried:])
    if params["reverse"]:
      rows.reverse()
    return [*carry, *(_stack(column, place) for column in zip(*rows, strict=True))]


def _split(eqn, x: Value, op: Operation) -> list[Value | Known]:
  cuts = np.cumsum(eqn.params["sizes"])[:-1]
  parts = [np.split(mask, cuts, eqn.params["axis"]) for mask in x.masks]
  return [
    Value(rules.tidy(nc), rules.tidy(nk), op, x.is_real) for nc, nk in zip(*parts, strict=True)
  ]


def _row(x: Value | Known, i: int, place: Place) -> Value | Known:
  if isinstance(x, Known):
    return Known(x.array[i], x.origins)
  return _moved([x], x.not_convex[i], x.not_concave[i], place)


def _stack(rows: Sequence[Value | Known], place: Place) -> Value | Known:
  if all(isinstance(r, Known) for r in rows):
    arrays: list[Any] = [r.array for r in rows]  # pyright: ignore[reportAttributeAccessIssue]
    stack: Any = np.stack if isinstance(arrays[0], np.ndarray) else jnp.stack
    return Known(stack(arrays))
  masks = [r.masks if isinstance(r, Value) else (~np.isfinite(r.array),) * 2 for r in rows]
  not_convex, not_concave = (np.stack(column) for column in zip(*masks, strict=True))
  return _moved(rows, not_convex, not_concave, place)


def _moved(inputs: Sequence[Any], not_convex, not_concave, place: Place) -> Value:
  """A value at a loop's border: nothing is looked through it."""
  values = [x for x in inputs if isinstance(x, Value)]
  order = max((v.made_by.order for v in values if v.made_by), default=0)
  op = Operation("scan", None, tuple(inputs), place, order)
  is_real = all(v.is_real for v in values)
  return Value(rules.tidy(not_convex), rules.tidy(not_concave), op, is_real)


def _is_real(x: Value | Known) -> bool:
  return isinstance(x, Known) or x.is_real


def _is_defined(name: str, inputs: Sequence[Value | Known]) -> bool:
  """Whether no known number is infinite or NaN, but for a bound that does not bind."""
  floats = [x.array for x in inputs if isinstance(x, Known) and x.array.dtype == np.float64]
  if name == "max":
    return not any(np.isnan(a).any() or np.isposinf(a).any() for a in floats)
  if name == "min":
    return not any(np.isnan(a).any() or np.isneginf(a).any() for a in floats)
  if name == "clamp":
    return not any(np.isnan(a).any() for a in floats)
  return all(np.isfinite(a).all() for a in floats)


def _stays_real(eqn) -> bool:
  both = (eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype)
  return all(jnp.issubdtype(d, jnp.floating) for d in both)


def _needed(jaxpr) -> Iterator[Any]:
  """The equations that the outputs depend on, in order."""
  wanted = {v for v in jaxpr.outvars if not isinstance(v, jex.Literal)}
  kept = []
  for eqn in reversed(jaxpr.eqns):
    if any(v in wanted for v in eqn.outvars):
      wanted |= {v for v in eqn.invars if not isinstance(v, jex.Literal)}
      kept.append(eqn)
  return reversed(kept)


@functools.cache
def _logaddexp_text(shapes) -> str:
  jaxpr = jax.make_jaxpr(jnp.logaddexp)(*(jax.ShapeDtypeStruct(s, d) for s, d in shapes))
  calls = [e for e in jaxpr.eqns if e.primitive.name == "custom_jvp_call"]
  return str(calls[0].params["call_jaxpr"]) if calls else ""


def _is_logaddexp(eqn) -> bool:
  """Whether a custom function computes, step by step, what `jnp.logaddexp` does."""
  if len(eqn.invars) != 2 or eqn.params.get("num_consts"):
    return False
  shapes = tuple((v.aval.shape, str(v.aval.dtype)) for v in eqn.invars)
  return str(eqn.params["call_jaxpr"]) == _logaddexp_text(shapes)
