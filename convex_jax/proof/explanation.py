"""Why a value is not proved: the first operation that breaks it, in a sentence."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from convex_jax.proof.equations import is_step
from convex_jax.proof.interpreter import LOOP_LIMIT
from convex_jax.proof.linear import MOVES, is_defined
from convex_jax.proof.rules import RULES
from convex_jax.proof.values import Known, Operation, Value

KINDS: dict[str, Callable[[Value], np.ndarray]] = {  # Where a value is not proved to be so.
  "convex": lambda v: v.not_convex,
  "concave": lambda v: v.not_concave,
  "affine": lambda v: v.not_convex | v.not_concave,
}


def culprit(output: Value | Known, kind: str) -> Operation | None:
  """The first operation that leaves `output` without the curvature `kind`.

  That is the earliest operation on the way to `output` that makes a value neither convex nor
  concave of values that were one of them. If its inputs already lack the curvature, or no
  value is neither, it is the earliest operation that turned the curvature into another.
  """

  def lacks(value):
    return bool(KINDS[kind](value).any())

  lost = _earliest([output], lambda v: v.is_lost)
  if lost is not None and lost.note:
    return lost
  turned = _earliest(lost.inputs if lost else [output], lacks)
  return turned or lost


def _earliest(outputs: Sequence[Any], is_bad: Callable[[Value], bool]) -> Operation | None:
  """The earliest operation to make a bad value of good ones, on the bad paths to `outputs`."""
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


def explain(op: Operation | None, kind: str) -> str:
  """Says what is wrong with a `culprit`, and where it is in the source code."""
  if op is None:
    return "an output that is not a finite real number"
  return f"{_fault(op, kind)}, in {op.place}"


def _fault(op: Operation, kind: str) -> str:
  name, known = op.primitive, [x for x in op.inputs if isinstance(x, Known)]
  values = [_curvature(x) for x in op.inputs if isinstance(x, Value) and x.is_real]
  if not any(isinstance(x, Value) for x in op.inputs):
    return f"{op.eqn.primitive.name}, whose result is not known exactly enough"
  if op.eqn and is_step(op.eqn) and name not in MOVES:
    return f"{name} in {op.eqn.outvars[0].aval.dtype}, a step function"
  if op.note:
    return f"an activation that is neither convex nor concave: {op.note}"
  if not is_defined(name, op.inputs):
    bad = next(x for x in known if not is_defined(name, [x]))
    finite = np.isfinite(bad.low) & np.isfinite(bad.high)
    doubt = "not finite" if bad.is_exact else "not known to be finite"
    return f"{name}: {_count(bad, ~finite, lambda a: ~np.isfinite(a))} {doubt}"
  if name in ("dot_general", "conv_general_dilated", "mul", "div"):
    if not known:
      noun = "quotient" if name == "div" else "product"
      return f"{name}: a {noun} of two values that both depend on the input"
    if isinstance(op.inputs[-1], Value) and name == "div":
      return "div: a quotient by a value that depends on the input"
    surely, perhaps = known[0].high < 0, ~(known[0].low >= 0)
    entries = _count(known[0], surely if surely.any() else perhaps, lambda a: a < 0)
    doubt = "negative" if surely.any() else "not known to be >= 0"
    return f"{name}: {entries} {doubt} and multiply a value not affine"
  if name in ("add", "sub"):
    return f"{name}: the {'sum' if name == 'add' else 'difference'} of {_list(values)}"
  if name == "select_n" and isinstance(op.inputs[0], Value):
    return "select_n by a condition that depends on the input"
  if name in ("scan", "while"):
    return f"{name}: a loop of more than {LOOP_LIMIT:,} steps, or whose length depends on the input"
  if name not in RULES:
    return f"{name} of a value that depends on the input, for which there is no rule"
  if not values:
    return f"{name}: a condition, an index or a complex number depends on the input"
  return f"{name} of {_list(values)}, which is not {kind}"


def _curvature(value: Value) -> str:
  """The adjective for a value's curvature."""
  if value.is_affine:
    return "affine"
  if not value.not_convex.any():
    return "convex"
  return "mixed" if value.not_concave.any() else "concave"


def _list(values: Sequence[str]) -> str:
  """Values by their adjectives: "two convex values", "an affine and a mixed value"."""
  if len(values) == 2 and values[0] == values[1]:
    return f"two {values[0]} values"
  return " and ".join(f"{'an' if v == 'affine' else 'a'} {v}" for v in values) + " value"


def _count(known: Known, bad: np.ndarray, is_bad: Callable[[np.ndarray], np.ndarray]) -> str:
  """How many entries of which weights are bad, ending in a verb.

  Where several weights went into the number, one is blamed if it alone has the same fraction of
  bad entries.
  """
  count, size = int(np.sum(bad)), known.low.size
  found = {name: (int(is_bad(array).sum()), array.size) for name, array in known.origins.items()}
  blamed = [name for name, (n, whole) in found.items() if n and n * size == count * whole]
  if len(blamed) == 1:
    n, whole = found[blamed[0]]
    return f"{n:,} of {whole:,} entries of {blamed[0]} are"
  made = f" made of {' and '.join(found)}" if found else ""
  return f"{count:,} of {size:,} entries of a constant{made} are"
