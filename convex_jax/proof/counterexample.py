"""Search for two points that refute convexity: f at the midpoint exceeds the mean of f there."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ROUNDING = 1e4  # Machine epsilons of the values' size, more than a network's rounding makes.


@dataclasses.dataclass(frozen=True, eq=False)
class Counterexample:
  """Two points between which an output breaks the inequality of its curvature."""

  a: np.ndarray
  b: np.ndarray
  output: int  # Its position among the flat outputs.
  # f((a + b) / 2) - (f(a) + f(b)) / 2 > 0 for "convex"; its negative, its magnitude for the others.
  gap: float
  beyond: float  # The part of the gap that no rounding explains.

  def __str__(self) -> str:
    return (
      f"refuted by two points: at their midpoint output {self.output} violates the inequality by"
      f" {self.gap:.3g}"
    )


def search(
  f: Callable[..., Any],
  args: Sequence[Any],
  argnums: int,
  open_outputs: np.ndarray,
  kind: str,
  box: tuple[float, float],
  steps: int,
  seed: int = 0,
) -> Counterexample | None:
  """A counterexample to the curvature `kind` of one of the open outputs, or None.

  In float64: random pairs in the box, far and near, then `steps` of gradient ascent on the gap
  from the best of them. `open_outputs` tells which of the flat outputs are to be refuted; the
  other arguments are those of `certify`.
  """
  at = argnums % len(args)
  with jax.enable_x64(True):
    known = [None if i == at else in_float64(argument) for i, argument in enumerate(args)]

    def call(x):
      return f(*known[:at], x, *known[at + 1 :])

    chosen = np.flatnonzero(open_outputs)
    gaps = jax.jit(functools.partial(_gaps, call, chosen, kind))

    def measure(pair) -> Counterexample:
      (a, b), (gap, beyond) = map(np.asarray, pair), map(np.asarray, gaps(pair))
      k = int(np.argmax(np.where(np.isfinite(beyond), beyond, -np.inf)))
      return Counterexample(a, b, int(chosen[k]), float(gap[k]), float(beyond[k]))

    pairs = _pairs(np.random.default_rng(seed), args[at].shape, box, max(8, steps // 4))
    best = _best(map(measure, pairs))
    if not best.beyond > 0 and steps:
      k = int(np.searchsorted(chosen, best.output))
      start = jnp.asarray(np.stack([best.a, best.b]))
      best = _best(map(measure, _climb(lambda pair: gaps(pair)[0][k], start, box, steps)))
  return best if best.beyond > 0 else None


def in_float64(tree: Any) -> Any:
  """The tree with its floating-point arrays in float64."""

  def one(leaf):
    real = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    return jnp.asarray(leaf, jnp.float64) if real else leaf

  with jax.enable_x64(True):
    return jax.tree.map(one, tree)


def _gaps(call, chosen, kind, pair) -> tuple[jax.Array, jax.Array]:
  """The gap of each chosen output, and its part beyond rounding."""

  def outputs(x):
    flat = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(call(x))])[chosen]
    return flat.astype(jnp.float64), float(jnp.finfo(flat.dtype).eps)

  (fa, epsilon), (fb, _), (middle, _) = map(outputs, (pair[0], pair[1], (pair[0] + pair[1]) / 2))
  excess = middle - (fa + fb) / 2
  gap = {"convex": excess, "concave": -excess, "affine": jnp.abs(excess)}[kind]
  scale = 1 + jnp.abs(fa) + jnp.abs(fb) + jnp.abs(middle)
  return gap, gap - ROUNDING * epsilon * scale


def _best(found: Iterable[Counterexample]) -> Counterexample:
  """The first one beyond rounding, or else the nearest to it."""
  best = None
  for one in found:
    if best is None or one.beyond > best.beyond:
      best = one
    if best.beyond > 0:
      break
  assert best is not None, "nothing was searched"
  return best


def _pairs(rng, shape, box, count: int) -> Iterator[jax.Array]:
  """Pairs of points anywhere in the box, and in turn pairs a step of random size apart."""
  low, high = box
  for i in range(count):
    a, b = rng.uniform(low, high, (2, *shape))
    if i % 2:
      b = a + rng.standard_normal(shape) * (high - low) * 10.0 ** -rng.uniform(0.5, 3)
    yield jnp.asarray(np.stack([a, np.clip(b, low, high)]))


def _climb(gap, pair, box, steps: int) -> Iterator[jax.Array]:
  """Projected gradient ascent on the gap, by Adam (Kingma and Ba 2015, algorithm 1)."""
  rate, b1, b2 = 0.02 * (box[1] - box[0]), 0.9, 0.999
  slope = jax.grad(gap)

  @jax.jit
  def step(t, pair, mean, square):
    g = slope(pair)
    mean, square = b1 * mean + (1 - b1) * g, b2 * square + (1 - b2) * g**2
    moved = rate * (mean / (1 - b1**t)) / (jnp.sqrt(square / (1 - b2**t)) + 1e-8)
    return jnp.clip(pair + moved, *box), mean, square

  mean = square = jnp.zeros_like(pair)
  for t in range(1, steps + 1):
    pair, mean, square = step(t, pair, mean, square)
    yield pair
