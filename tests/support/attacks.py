"""Attacks on a classifier inside a ball: what a certified radius must withstand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Outcome:
  attempts: int  # Perturbed images whose class was looked at.
  changes: int  # Of them, with another class than the clean image.


def project(d_NxD, norm, radius):
  """Into the ball; l1 by scaling, which stays inside it."""
  if norm == "linf":
    return jnp.clip(d_NxD, -radius, radius)
  size = jnp.linalg.norm(d_NxD, 1 if norm == "l1" else 2, axis=-1, keepdims=True)
  return d_NxD * jnp.minimum(1.0, radius / jnp.maximum(size, 1e-30))


def ascent(g_NxD, norm, key):
  """The step that raises a linear function most; in l1, on a few of the steepest entries."""
  if norm == "linf":
    return jnp.sign(g_NxD)
  if norm == "l2":
    return g_NxD / jnp.maximum(jnp.linalg.norm(g_NxD, axis=-1, keepdims=True), 1e-30)
  noise = jax.random.uniform(key, g_NxD.shape, minval=0.5, maxval=1.5)
  rank = jnp.argsort(jnp.argsort(-jnp.abs(g_NxD) * noise, axis=-1), axis=-1)
  few = jnp.asarray(1 + np.arange(len(g_NxD)) % 4)[:, None]
  return jnp.sign(g_NxD) * (rank < few) / few


class Attacker:
  """Projected gradient ascent on the margin of a random rival, from many starts, and corners."""

  def __init__(self, logits, restarts=24, steps=20):
    """`logits`: of images (N, H, W, C)."""
    self._restarts, self._steps = restarts, steps
    self._run = jax.jit(functools.partial(self._attack, logits), static_argnames="norm")

  def _attack(self, logits, x_HxWxC, radius, key, *, norm):
    n, size = self._restarts, x_HxWxC.size
    k = logits(x_HxWxC[None])[0].argmax()

    def at(d_NxD):
      return logits(x_HxWxC + d_NxD.reshape(n, *x_HxWxC.shape))

    def margin(d_NxD, rival_N):
      y_NxK = at(d_NxD)
      return (y_NxK[jnp.arange(n), rival_N] - y_NxK[:, k]).sum()

    first, later = jax.random.split(key)
    classes = logits(x_HxWxC[None]).shape[-1]
    order = jnp.argsort(-logits(x_HxWxC[None])[0])
    rival_N = order[1 + jnp.arange(n) % min(4, classes - 1)]
    start = project(jax.random.normal(first, (n, size)) * radius, norm, radius)
    start = start * jnp.linspace(0, 1, n)[:, None]

    def step(d_NxD, key):
      g_NxD = jax.grad(margin)(d_NxD, rival_N)
      d_NxD = project(d_NxD + 0.25 * radius * ascent(g_NxD, norm, key), norm, radius)
      # On the surface of the ball too, in the steepest direction from here.
      whole = project(radius * ascent(g_NxD, norm, key), norm, radius)
      changed = (at(d_NxD).argmax(-1) != k).sum() + (at(whole).argmax(-1) != k).sum()
      return d_NxD, changed

    _, changed = jax.lax.scan(step, start, jax.random.split(later, self._steps))
    return changed.sum()

  def attack(self, x_HxWxC, norm: str, radius: float, seed: int = 0) -> Outcome:
    """On one image, pixels and radius in the units of the logits' input."""
    changes = int(self._run(jnp.asarray(x_HxWxC), radius, jax.random.key(seed), norm=norm))
    return Outcome(2 * self._restarts * self._steps, changes)

  def smallest(self, x_HxWxC, norm: str, radius: float, seed: int = 0) -> float:
    """The smallest radius at which an attack was found, by bisection; infinity if none."""
    high = radius
    for _ in range(12):
      high *= 2
      if self.attack(x_HxWxC, norm, high, seed).changes:
        break
    else:
      return np.inf
    low = high / 2
    for _ in range(6):
      middle = (low + high) / 2
      if self.attack(x_HxWxC, norm, middle, seed).changes:
        high = middle
      else:
        low = middle
    return high
