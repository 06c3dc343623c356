"""Proof that a function is convex, or the first operation that breaks it.

`certify` takes any JAX function of an array, walks its jaxpr (`interpreter`) and says for
each output whether it is proved convex. Where it is not, the first operation that breaks it
is named, and a search for two points whose midpoint lies too high may refute it. What is
certified is the function with the numbers it is given, over the reals: rounding is not part
of it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from convex_jax.proof import interpreter
from convex_jax.proof.counterexample import Counterexample, search
from convex_jax.proof.rules import RULES, Known, Operation, Value

KINDS: dict[str, Callable[[Value], np.ndarray]] = {  # Where a value is not proved to be so.
  "convex": lambda v: v.not_convex,
  "concave": lambda v: v.not_concave,
  "affine": lambda v: v.not_convex | v.not_concave,
}


@dataclasses.dataclass(frozen=True)
class Certificate:
  """What is proved of each output, flat; `reason` where something is not."""

  kind: str
  proved: np.ndarray
  reason: str | None = None
  operation: Operation | None = dataclasses.field(default=None, repr=False)
  counterexample: Counterexample | None = dataclasses.field(default=None, repr=False)

  @property
  def verdicts(self) -> list[str]:
    """PROVED, REFUTED or UNKNOWN, one for each output."""
    words = ["PROVED" if proved else "UNKNOWN" for proved in self.proved]
    if self.counterexample is not None:
      words[self.counterexample.output] = "REFUTED"
    return words

  @property
  def verdict(self) -> str:
    """The worst of them."""
    return max(self.verdicts, key=("PROVED", "UNKNOWN", "REFUTED").index)

  def __bool__(self) -> bool:
    return bool(self.proved.all())


def certify(
  f: Callable[..., Any],
  *args: Any,
  argnums: int = -1,
  kind: str = "convex",
  box: tuple[float, float] = (-1.0, 1.0),
  search_function: Callable[..., Any] | None = None,
  search_steps: int = 200,
  seed: int = 0,
) -> Certificate:
  """Whether every output of `f(*args)` is convex in one of its arguments.

  Args:
    f: any JAX function; it may as well close over its weights.
    *args: its arguments. The input is one floating-point array, or its
      `jax.ShapeDtypeStruct`: only shape and dtype matter. The others are known: any trees of
      numbers, whose paths name them in explanations.
    argnums: which argument is the input, as in `jax.grad`; by default the last.
    kind: what to prove: "convex", "concave", "affine".
    box: least and greatest entry of the points among which a counterexample is sought.
    search_function: the same function for that search, where it must be built otherwise to
      compute in float64.
    search_steps: gradient steps of the search; 0: no search.
    seed: of the search.

  Returns:
    A certificate, true where all outputs are proved.

  Raises:
    ValueError: no such kind or argument, an input that is not one floating-point array, or a
      function that returns nothing.
  """
  if kind not in KINDS:
    raise ValueError(f"kind is {kind!r}; expected one of {', '.join(KINDS)}")
  outputs, _ = interpreter.analyse(f, *args, argnums=argnums)
  if not outputs:
    raise ValueError("the function returns nothing")
  missing = [KINDS[kind](v) if isinstance(v, Value) else _is_no_number(v.array) for v in outputs]
  proved = ~np.concatenate([np.ravel(m) for m in missing])
  if proved.all():
    return Certificate(kind, proved)
  worst = next(v for v, m in zip(outputs, missing, strict=True) if m.any())
  operation = interpreter.culprit(worst, KINDS[kind]) if isinstance(worst, Value) else None
  counterexample = None
  if search_steps:
    counterexample = search(
      search_function or f,
      *args,
      argnums=argnums,
      open_outputs=~proved,
      kind=kind,
      box=box,
      steps=search_steps,
      seed=seed,
    )
  return Certificate(kind, proved, explain(operation, kind), operation, counterexample)


def _is_no_number(known: Any) -> np.ndarray:
  if not isinstance(known, np.ndarray):  # A random key.
    return np.ones(np.shape(known), bool)
  return ~np.isfinite(known)


def explain(operation: Operation | None, kind: str) -> str:
  """One sentence on the first operation that breaks the curvature."""
  if operation is None:
    return "an output that is no finite real number"
  what = _what(operation, kind)
  return f"{what}, in {operation.place}"


def _what(op: Operation, kind: str) -> str:
  name, known = op.primitive, [x for x in op.inputs if isinstance(x, Known)]
  values = [x for x in op.inputs if isinstance(x, Value)]
  if op.note:
    return f"an activation that is neither convex nor concave: {op.note}"
  if name in ("dot_general", "conv_general_dilated", "mul", "div") and len(values) == 2:
    verb = "quotient" if name == "div" else "product"
    return f"{name}: a {verb} of two values that both depend on the input"
  if name in ("dot_general", "conv_general_dilated", "mul", "div") and known:
    return f"{name}: {_wrong_signs(known[0])}, and multiply what is not affine"
  if name == "div":
    return "div: a quotient by a value that depends on the input"
  if name in ("sub", "add"):
    return f"{name}: the {'difference' if name == 'sub' else 'sum'} of {_curved(values, name)}"
  if name == "neg":
    return "neg: the negative of " + _shape_of(values[0])
  if name not in RULES:
    return f"{name} of a value that depends on the input, for which there is no rule"
  return f"{name} of {' and '.join(map(_shape_of, values))}, which is not {kind}"


def _shape_of(value: Value) -> str:
  if value.is_affine:
    return "an affine value"
  if not value.not_convex.any():
    return "a convex value"
  return "a concave value" if not value.not_concave.any() else "a value of mixed curvature"


def _curved(values: Sequence[Value], name: str) -> str:
  words = [_shape_of(v) for v in values]
  if name == "sub" and len(words) == 2 and words[0] == words[1]:
    return f"two {words[0].split()[1]} values"
  return f" {'minus' if name == 'sub' else 'and'} ".join(words)


def _wrong_signs(known: Known) -> str:
  """How many entries of which weights are negative."""
  for name, array in known.origins.items():
    if (array < 0).any():
      return f"{(array < 0).sum():,} of {array.size:,} entries of {name} are negative"
  count = f"{(known.array < 0).sum():,} of {known.array.size:,} entries"
  made = " and ".join(known.origins)
  return f"{count} of a constant{f' made of {made}' if made else ''} are negative"
