"""Two points that refute convexity: f midway lies above the mean of f at the ends."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

ROUNDING = 1e4  # Machine epsilons, of the values' size: what a network's rounding may make.


@dataclasses.dataclass(frozen=True)
class Counterexample:
  """Two points and an output (of the flat output) that breaks the inequality by `gap`.

  Convex: gap = f((a + b) / 2) - (f(a) + f(b)) / 2 > 0; concave: its negative; affine:
  its magnitude. `beyond`: the gap less what rounding could make.
  """

  a: np.ndarray
  b: np.ndarray
  output: int
  gap: float
  beyond: float


def search(
  function: Callable[..., Any],
  shape: tuple[int, ...],
  weights: Any,
  open_outputs: np.ndarray,
  kind: str,
  box: tuple[float, float],
  steps: int,
  seed: int = 0,
) -> Counterexample | None:
  """A counterexample in a box to the curvature `kind` of an output not yet proved, or None.

  In float64: random pairs, far and near, then gradient ascent on the gap from the best.

  Args:
    function: of an array of `shape`, or of (weights, array) where `weights` are given.
    shape: of its input.
    weights: a tree of arrays, or None.
    open_outputs: which of the flat outputs to look at.
    kind: "convex", "concave", "affine".
    box: least and greatest entry of the points.
    steps: of the ascent; a quarter as many random pairs come first.
    seed: of the pairs.
  """
  with jax.enable_x64(True):
    call = function if weights is None else functools.partial(function, _double(weights))
    gaps = jax.jit(functools.partial(_gaps, call, np.flatnonzero(open_outputs), kind))

    def measure(pair) -> Counterexample:
      gap, beyond = map(np.asarray, gaps(pair))
      k = int(np.argmax(np.where(np.isfinite(beyond), beyond, -np.inf)))
      found = int(np.flatnonzero(open_outputs)[k])
      return Counterexample(
        np.asarray(pair[0]), np.asarray(pair[1]), found, float(gap[k]), float(beyond[k])
      )

    pairs = _pairs(np.random.default_rng(seed), shape, box, max(8, steps // 4))
    best = _best(map(measure, pairs))
    if not best.beyond > 0 and steps:
      k = int(np.searchsorted(np.flatnonzero(open_outputs), best.output))
      start = jnp.asarray(np.stack([best.a, best.b]))
      best = _best(map(measure, _climb(lambda pair: gaps(pair)[0][k], start, box, steps)))
  return best if best.beyond > 0 else None


def _double(tree: Any) -> Any:
  def one(leaf):
    return jnp.asarray(leaf, jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

  return jax.tree.map(one, tree)


def _gaps(call, chosen, kind, pair) -> tuple[jax.Array, jax.Array]:
  """Of each chosen output: the gap, and its part beyond rounding."""

  def outputs(x):
    flat = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(call(x))])[chosen]
    return flat.astype(jnp.float64), float(jnp.finfo(flat.dtype).eps)

  (fa, epsilon), (fb, _), (middle, _) = map(outputs, (pair[0], pair[1], (pair[0] + pair[1]) / 2))
  excess = middle - (fa + fb) / 2
  gap = {"convex": excess, "concave": -excess, "affine": jnp.abs(excess)}[kind]
  scale = 1 + jnp.abs(fa) + jnp.abs(fb) + jnp.abs(middle)
  return gap, gap - ROUNDING * epsilon * scale


def _best(found: Iterable[Counterexample]) -> Counterexample:
  """The first beyond rounding, or else the one that comes nearest."""
  best = None
  for one in found:
    if best is None or one.beyond > best.beyond:
      best = one
    if best.beyond > 0:
      break
  assert best is not None, "nothing was searched"
  return best


def _pairs(rng, shape, box, count: int) -> Iterator[jax.Array]:
  """Both points anywhere in the box, or one a step of a random size from the other."""
  low, high = box
  for i in range(count):
    a, b = rng.uniform(low, high, (2, *shape))
    if i % 2:
      b = a + rng.standard_normal(shape) * (high - low) * 10.0 ** -rng.uniform(0.5, 3)
    yield jnp.asarray(np.stack([a, np.clip(b, low, high)]))


def _climb(gap, pair, box, steps: int) -> Iterator[jax.Array]:
  """Projected gradient ascent on the gap (Adam)."""
  tx = optax.adam(0.02 * (box[1] - box[0]))
  state = tx.init(pair)

  @jax.jit
  def step(pair: Any, state):
    update, state = tx.update(jax.grad(lambda p: -gap(p))(pair), state)
    return jnp.clip(pair + update, *box), state

  for _ in range(steps):
    pair, state = step(pair, state)
    yield pair
