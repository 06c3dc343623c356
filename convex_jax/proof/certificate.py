"""The certificate of a function: proved, refuted, or unknown, and why."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from convex_jax.proof import interpreter
from convex_jax.proof.counterexample import Counterexample, search
from convex_jax.proof.explanation import KINDS, culprit, explain
from convex_jax.proof.values import Operation, Value, is_finite


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Certificate:
  """What is proved of each output of a function; true where all outputs are proved.

  Attributes:
    kind: what was to be proved: "convex", "concave", "affine".
    proved: whether each output is, bool, flat in C order.
    reason: if some output is not, the first operation that breaks it, in words.
    operation: that operation.
    counterexample: two points that refute one output, if the search found any.
    stopped: what stopped the search, if it did not run to its end.
  """

  kind: str
  proved: np.ndarray
  reason: str | None = None
  operation: Operation | None = None
  counterexample: Counterexample | None = None
  stopped: str | None = None

  @property
  def verdicts(self) -> list[str]:
    """PROVED, REFUTED or UNKNOWN, for each output."""
    words = ["PROVED" if proved else "UNKNOWN" for proved in self.proved]
    if self.counterexample is not None:
      words[self.counterexample.output] = "REFUTED"
    return words

  @property
  def verdict(self) -> str:
    """The worst of the verdicts."""
    return max(self.verdicts, key=("PROVED", "UNKNOWN", "REFUTED").index, default="PROVED")

  def __bool__(self) -> bool:
    return bool(self.proved.all())

  def __repr__(self) -> str:
    lines = [f"{self.verdict}: {self.proved.sum()} of {self.proved.size} outputs are {self.kind}"]
    if self.reason:
      lines.append(f"first broken by {self.reason}")
    if self.counterexample:
      lines.append(str(self.counterexample))
    if self.stopped:
      lines.append(f"the search for a counterexample stopped: {self.stopped}")
    return "\n".join(lines)


def certify(
  f: Callable[..., Any],
  *args: Any,
  argnums: int = -1,
  kind: str = "convex",
  box: tuple[float, float] = (-1.0, 1.0),
  search_steps: int = 200,
  seed: int = 0,
) -> Certificate:
  """Proves that every output of `f(*args)` is convex in one of its arguments, or says why not.

  Args:
    f: any JAX function.
    *args: its arguments. The input is one floating-point array, or its `jax.ShapeDtypeStruct`:
      only shape and dtype matter. The others are known, as are numbers that `f` closes over:
      any trees of arrays, whose paths name them in explanations.
    argnums: which argument is the input, as in `jax.grad`; by default the last.
    kind: what to prove: "convex", "concave", "affine".
    box: least and greatest entry of the points among which to search for a counterexample first.
      If none is found, the box is widened about its centre, up to 256 times.
    search_steps: gradient steps of the search; 0: no search.
    seed: of the search.

  Returns:
    A certificate, true where all outputs are proved. It holds for the function over the reals,
    with the numbers it was given; rounding is not part of it.

  Raises:
    ValueError: an unknown kind or argument, an input that is not one floating-point array, or a
      function that returns nothing.
  """
  if not (isinstance(kind, str) and kind in KINDS):
    raise ValueError(f"kind is {kind!r}; expected one of {', '.join(KINDS)}")
  numbers = isinstance(box, Sequence) and all(
    isinstance(end, int | float | np.number) for end in box
  )
  if not (numbers and len(box) == 2 and -math.inf < box[0] < box[1] < math.inf):
    raise ValueError(f"box is {box!r}; expected two finite numbers, the lesser first")
  for name, number in (("search_steps", search_steps), ("seed", seed)):
    if not (isinstance(number, int | np.integer) and number >= 0):
      raise ValueError(f"{name} is {number!r}; expected an integer >= 0")
  jaxpr, _ = interpreter.trace(f, *args, argnums=argnums)
  outputs = interpreter.values_of(jaxpr, f, args, argnums)
  if not outputs:
    raise ValueError("the function returns nothing; expected at least one array")
  missing = [KINDS[kind](v) if isinstance(v, Value) else ~is_finite(v) for v in outputs]
  proved = ~np.concatenate([np.ravel(m) for m in missing])
  if proved.all():
    return Certificate(kind, proved)
  worst = next(v for v, m in zip(outputs, missing, strict=True) if m.any())
  operation = culprit(worst, kind)
  counterexample = stopped = None
  if search_steps:
    at = len(jax.tree.leaves(args[: argnums % len(args)]))
    inputs = jax.tree.leaves(args)
    counterexample, stopped = search(jaxpr, inputs, at, ~proved, kind, box, search_steps, seed)
  return Certificate(kind, proved, explain(operation, kind), operation, counterexample, stopped)


class NotProved(ValueError):
  """A function is not proved convex, so what rests on a proof fails; the message says why."""


def proved(f: Callable[..., Any], *args: Any, argnums: int = -1) -> Value:
  """The one output of `f(*args)` as a value of the input; arguments as for `certify`.

  Raises:
    NotProved: it is not proved convex, or does not depend on the input.
    ValueError: as `certify`; or the function returns several arrays.
  """
  outputs, _ = interpreter.analyse(f, *args, argnums=argnums)
  if len(outputs) != 1:
    raise ValueError(f"the function returns {len(outputs)} arrays; expected one")
  (output,) = outputs
  if not isinstance(output, Value):
    raise NotProved("the output does not depend on the input")
  if output.not_convex.any():
    raise NotProved(explain(culprit(output, "convex"), "convex"))
  return output
