"""Search for two points that refute convexity: f at the midpoint exceeds the mean of f there.

The search runs the very program, in float64 (`wide`). What it finds may be rounding, and is
reported only where enclosures of the three values by interval arithmetic show that the inequality
is broken over the reals.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import numpy as np

from convex_jax.proof import interpreter
from convex_jax.proof.constants import number
from convex_jax.proof.equations import Unknown, is_float
from convex_jax.proof.float64 import float64, plain
from convex_jax.proof.values import Known
from convex_jax.proof.wide import Impure, widened

GROWTH, BOXES = 4.0, 5  # Each box is GROWTH times as wide as the one before it.
HALF = 8  # A line of 2 HALF + 1 points holds HALF^2 pairs and their midpoints.
NOISE = 2.0**-46  # Relative to the values: a gap that is not worth a check.
CHECKS = 4  # Pairs that may fail the check before the search ends.


@dataclasses.dataclass(frozen=True, eq=False)
class Counterexample:
  """Two points between which an output breaks the inequality of its curvature.

  Attributes:
    a: one point, in float64.
    b: the other. Their midpoint (a + b) / 2 is a float64 array too, without rounding.
    output: the output's position among the flat outputs.
    gap: a positive lower bound, over the reals, on f((a + b) / 2) - (f(a) + f(b)) / 2 for "convex",
      on its negative for "concave", on its magnitude for "affine".
  """

  a: np.ndarray
  b: np.ndarray
  output: int
  gap: float

  def __str__(self) -> str:
    return (
      f"refuted by two points: at their midpoint output {self.output} violates the inequality by"
      f" {self.gap:.3g}"
    )


class _Stopped(Exception):
  """The search ends, and why."""


def search(
  jaxpr: jex.ClosedJaxpr,
  inputs: Sequence[Any],
  at: int,
  open_outputs: np.ndarray,
  kind: str,
  box: tuple[float, float],
  steps: int,
  seed: int = 0,
) -> tuple[Counterexample | None, str | None]:
  """A counterexample to the curvature `kind` of an open output, or None; and what stopped it.

  In the box, then in BOXES - 1 wider ones around the same centre: lines of evenly spaced points,
  of which all pairs with their midpoints are looked at, then gradient ascent on the gap from the
  best pair. Raises nothing.

  Args:
    jaxpr: the program.
    inputs: its inputs, flat. Of the one that varies only the shape counts.
    at: the position of that one.
    open_outputs: for each of the flat outputs, whether it is to be refuted.
    kind: the curvature to refute.
    box: least and greatest entry of the first points.
    steps: of the ascent, in all boxes together.
    seed: of the random numbers.
  """
  try:
    with contextlib.ExitStack() as settings:
      settings.enter_context(interpreter.fresh())
      settings.enter_context(plain())
      settings.enter_context(np.errstate(all="ignore"))
      return _Search(jaxpr, inputs, at, open_outputs, kind).run(box, steps, seed), None
  except (_Stopped, Impure) as reason:
    return None, str(reason)
  except Exception as error:  # Of the function, the compiler or the machine.
    return None, ": ".join([type(error).__name__, *str(error).splitlines()[:1]])


class _Search:
  """One search: the program, and what its rounding was seen to hide."""

  def __init__(self, jaxpr, inputs, at, open_outputs, kind):
    self._program = _Program(jaxpr, inputs, at, open_outputs)
    self._shape, self._kind = jaxpr.in_avals[at].shape, kind
    # Of each output, the gap relative to its values above which a pair is worth a check.
    self._threshold = np.full(self._program.chosen.size, NOISE)
    self._failed, self._why = 0, ""

  def run(self, box, steps, seed) -> Counterexample | None:
    if not math.prod(self._shape):
      return None
    rng = np.random.default_rng(seed)
    middle, half = (box[0] + box[1]) / 2, (box[1] - box[0]) / 2
    for i in range(BOXES):
      wider = half * GROWTH**i
      bounds = (middle - wider, middle + wider) if i else box
      share = steps // 2 if i == 0 else steps // (2 * BOXES - 2)
      found = self._in_box(rng, bounds, max(8, steps // 20), share)
      if found is not None:
        return found
    if self._failed:
      raise _Stopped(f"pairs of points seem to refute it, but {self._why}")
    return None

  def _in_box(self, rng, box, lines: int, steps: int) -> Counterexample | None:
    pairs = []  # The best of each line.
    for a, b in _lines(rng, self._shape, box, lines):
      points = _grid(a, b)
      values = np.stack([self._program.values(x) for x in points])
      of_line = (
        self._best(
          (values[: -2 * h], values[2 * h :], values[h:-h]), (points[: -2 * h], points[2 * h :])
        )
        for h in range(1, HALF + 1)
      )
      pairs.append(max(of_line, key=lambda pair: pair.score))
    pairs.sort(key=lambda pair: -pair.score)
    for pair in pairs:
      if (found := self._checked(pair)) is not None:
        return found
    return self._climb(pairs[0], box, steps) if pairs[0].score > -np.inf else None

  def _climb(self, start: "_Pair", box, steps: int) -> Counterexample | None:
    """Projected gradient ascent on the gap, by Adam (Kingma and Ba 2015, algorithm 1)."""
    rate, b1, b2 = 0.02 * (box[1] - box[0]), 0.9, 0.999
    pair, k = np.stack([start.a, start.b]), start.output
    mean = square = np.zeros_like(pair)
    for t in range(1, steps + 1):
      a, b, middle = (self._program.slope(x, k) for x in (*pair, pair.mean(0)))
      if a is None or b is None or middle is None:
        return None
      here = self._best([x[0][None] for x in (a, b, middle)], pair[:, None])
      if (found := self._checked(here)) is not None:
        return found
      excess = middle[0][k] - (a[0][k] + b[0][k]) / 2
      g = _gap(self._kind, excess, 1.0) * np.stack([middle[1] - a[1], middle[1] - b[1]]) / 2
      g = np.nan_to_num(g, posinf=0.0, neginf=0.0)
      mean, square = b1 * mean + (1 - b1) * g, b2 * square + (1 - b2) * g**2
      moved = rate * (mean / (1 - b1**t)) / (np.sqrt(square / (1 - b2**t)) + 1e-8)
      pair = np.clip(pair + moved, *box)
    return None

  def _best(self, values, points) -> "_Pair":
    """The best of some pairs, by the values (n, outputs) at a, at b and between, and by a and b.

    That is the one of the largest gap, of those whose gap is worth a check; else the nearest.
    """
    a, b, middle = values
    excess = middle - (a + b) / 2
    gap = _gap(self._kind, excess, excess)
    relative = gap / (np.abs(a) + np.abs(b) + np.abs(middle))  # In -1 .. 1.
    relative = np.where(np.isfinite(relative), relative, -np.inf)
    scores = np.where(relative > self._threshold, gap, relative - 1)
    row, k = np.unravel_index(np.argmax(scores), scores.shape)
    ends = points[0][row], points[1][row]
    return _Pair(*ends, int(k), float(scores[row, k]), float(relative[row, k]))

  def _checked(self, pair: "_Pair") -> Counterexample | None:
    """The pair, if enclosures of its values over the reals show that it refutes an output."""
    if not pair.relative > self._threshold[pair.output]:
      return None
    a, middle, b = _grid(pair.a, pair.b, 2)
    which, outputs = self._program.together_with(pair.output)
    try:
      of_a, of_b, of_m = (self._program.enclosed(x, which) for x in (a, b, middle))
    except Unknown as reason:
      self._fail(f"what rounding makes of them is not known: {reason}")
      return None
    low = _down(of_m[0] - _up((of_a[1] + of_b[1]) / 2))
    high = _up(of_m[1] - _down((of_a[0] + of_b[0]) / 2))
    gap = {"convex": low, "concave": -high, "affine": np.maximum(low, -high)}[self._kind]
    gap = np.where(np.isfinite(gap), gap, -np.inf)
    k = int(np.argmax(gap))
    if gap[k] > 0:
      return Counterexample(a, b, int(self._program.chosen[outputs[k]]), float(gap[k]))
    size = sum(np.abs(x).max(0) for x in (of_a, of_b, of_m))
    error = np.nan_to_num((high - low) / size, nan=0.0, posinf=0.0)  # At other points, less.
    self._threshold[outputs] = np.maximum(self._threshold[outputs], error)
    self._fail("rounding may explain them")
    return None

  def _fail(self, why: str) -> None:
    self._failed, self._why = self._failed + 1, why
    if self._failed == CHECKS:
      raise _Stopped(f"pairs of points seem to refute it, but {why}")


@dataclasses.dataclass(frozen=True, eq=False)
class _Pair:
  """Two points that may refute an output."""

  a: np.ndarray
  b: np.ndarray
  output: int  # Among the open ones.
  score: float
  relative: float  # The gap, over the size of the values.


def _gap(kind: str, excess, value):
  """The value, with the sign that makes the excess a gap."""
  sign = {"convex": 1.0, "concave": -1.0, "affine": np.where(excess < 0, -1.0, 1.0)}[kind]
  return sign * value


class _Program:
  """The open outputs of a program, flat, at points in float64."""

  def __init__(self, jaxpr, inputs, at, open_outputs):
    avals = [v.aval for v in jaxpr.jaxpr.outvars]
    ends = np.cumsum([0, *(aval.size for aval in avals)])
    # The output arrays with open elements, and these. Only floats can be convex.
    self._arrays = [
      i
      for i, aval in enumerate(avals)
      if is_float(aval.dtype) and open_outputs[ends[i] : ends[i + 1]].any()
    ]
    self._open = [np.flatnonzero(open_outputs[ends[i] : ends[i + 1]]) for i in self._arrays]
    if not self._arrays:
      raise _Stopped("no output in question is a floating-point number")
    self.chosen = np.concatenate(
      [ends[i] + k for i, k in zip(self._arrays, self._open, strict=True)]
    )
    self._ends = np.cumsum([0, *map(len, self._open)])  # Of each array, among the open outputs.
    self._has_slope = True
    self._jaxpr, self._at = jaxpr, at
    consts = zip(jaxpr.consts, jaxpr.jaxpr.constvars, strict=True)
    self._consts = [number(value, var.aval.dtype).low for value, var in consts]
    self._known = [
      None if i == at else number(value, aval.dtype)
      for i, (value, aval) in enumerate(zip(inputs, jaxpr.in_avals, strict=True))
    ]
    self._inputs = [known and known.low for known in self._known]

    def outputs(x, consts, inputs):
      flat = widened(jaxpr.jaxpr, consts)(*inputs[:at], x, *inputs[at + 1 :])
      return [flat[i] for i in self._arrays]

    def slope(x, weights, consts, inputs):
      flat, pull_back = jax.vjp(lambda x: outputs(x, consts, inputs), x)
      return flat, *pull_back(weights)

    self._values, self._slope = jax.jit(outputs), jax.jit(slope)

  def values(self, x: np.ndarray) -> np.ndarray:
    """The open outputs at x."""
    with float64():
      return self._flat(self._values(x, self._consts, self._inputs))

  def slope(self, x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray] | None:
    """The open outputs and the gradient of the k-th; None where JAX knows none."""
    if not self._has_slope:
      return None
    weights = [np.zeros(self._jaxpr.out_avals[i].shape) for i in self._arrays]
    which, outputs = self.together_with(k)
    weights[which].flat[self._open[which][k - outputs[0]]] = 1.0
    with float64():
      try:
        flat, gradient = self._slope(x, weights, self._consts, self._inputs)
      except Exception:  # Of a `while` loop, say.
        self._has_slope = False
        return None
      return self._flat(flat), np.asarray(gradient)

  def _flat(self, outputs) -> np.ndarray:
    parts = [np.ravel(out)[k] for out, k in zip(outputs, self._open, strict=True)]
    return np.concatenate(parts)

  def together_with(self, k: int) -> tuple[int, np.ndarray]:
    """The array that holds the k-th open output, and the positions of all that it holds."""
    which = int(np.searchsorted(self._ends, k, side="right")) - 1
    return which, np.arange(self._ends[which], self._ends[which + 1])

  def enclosed(self, x: np.ndarray, which: int) -> np.ndarray:
    """The ends (2, n) of the open elements of an output array over the reals."""
    whole = self._jaxpr.jaxpr
    part = jex.Jaxpr(
      whole.constvars, whole.invars, [whole.outvars[self._arrays[which]]], whole.eqns
    )
    inputs = [Known(x, x, varies=True) if known is None else known for known in self._known]
    outputs = interpreter.evaluate(jex.ClosedJaxpr(part, self._jaxpr.consts), inputs)
    if not outputs:
      raise Unknown("a number that does not depend on the input cannot be enclosed")
    return np.stack([np.ravel(end)[self._open[which]] for end in (outputs[0].low, outputs[0].high)])


def _down(x: np.ndarray) -> np.ndarray:
  return np.nextafter(x, -np.inf)


def _up(x: np.ndarray) -> np.ndarray:
  return np.nextafter(x, np.inf)


def _grid(a: np.ndarray, b: np.ndarray, parts: int = 2 * HALF) -> list[np.ndarray]:
  """Evenly spaced points from a to b, or nearly so: their sums are exact in float64.

  All are multiples of one power of 2, none by a factor of more than 2^42.
  """
  largest = np.max(np.abs([a, b]), initial=1e-280)
  unit = 2.0 ** (np.floor(np.log2(largest)) - 40)
  start = np.rint(a / unit) * unit
  step = np.trunc((b - start) / unit / parts) * unit
  return [start + i * step for i in range(parts + 1)]


def _lines(rng, shape, box, count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Ends of lines in the box, of several kinds in turn."""
  low, high = box
  middle, half = (low + high) / 2, (high - low) / 2
  for i in range(count):
    a, b = rng.uniform(low, high, (2, *shape))
    scale = 10.0 ** -rng.uniform(0.3, 4)
    match i % 5:
      case 1:  # Near.
        b = a + scale * half * rng.standard_normal(shape)
      case 2:  # Along one coordinate, if there is any.
        b = a.copy()
        a.flat[k := rng.integers(a.size)], b.flat[k] = low, high
      case 3:  # Through the centre.
        a = middle + scale * (a - middle)
        b = 2 * middle - a
      case 4:  # Each coordinate at a scale of its own.
        scales = 10.0 ** -rng.uniform(0, 6, (2, *shape))
        a, b = middle + scales * (np.stack([a, b]) - middle)
    yield np.clip(a, low, high), np.clip(b, low, high)
