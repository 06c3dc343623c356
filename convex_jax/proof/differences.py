"""Values as differences of convex functions, and what operations that are not affine make of them.

z = u + a - b, with u affine and a and b convex: `Parts(u, a, b)`. Of logits, also less a c that is
the same for all classes and of any curvature: `Parts(u, a, b, c)`. See `convexified`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convex_jax.proof.splitting import Split
from convex_jax.proof.values import Operation


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
  """A value as affine + convex - other - common; None is 0."""

  affine: Any = None
  convex: Any = None
  other: Any = None
  common: Any = None  # The same along the last axis, of any curvature.

  @property
  def above(self) -> Any:
    """What is added."""
    return total(self.affine, self.convex)

  @property
  def below(self) -> Any:
    """What is subtracted."""
    return total(self.other, self.common)

  @property
  def value(self) -> jax.Array:
    above, below = self.above, self.below
    return above if below is None else -below if above is None else above - below

  def __neg__(self) -> "Parts":
    affine = None if self.affine is None else -self.affine
    return Parts(affine, self.other, self.convex)

  def map(self, f: Callable[[jax.Array], jax.Array]) -> "Parts":
    parts = (self.affine, self.convex, self.other, self.common)
    return Parts(*(None if x is None else f(x) for x in parts))


def total(*parts: Any) -> Any:
  """The sum of those that are not None; None of none."""
  return (
    functools.reduce(jnp.add, present) if (present := [p for p in parts if p is not None]) else None
  )


def scalar(z: Parts, found: Split) -> Parts:
  """phi_1(z) + alpha a + beta b and phi_2(z) + alpha a + beta b."""
  value = z.value
  shared = total(_scaled(z.convex, found.falling), _scaled(z.other, found.rising))
  convex, other = (None if g is None else g(value) for g in (found.convex, found.other))
  return Parts(None, total(convex, shared), total(other, shared))


def _scaled(x: Any, factor: Any) -> Any:
  if x is None or not np.any(factor):
    return None
  return x if np.all(np.equal(factor, 1)) else x * jnp.asarray(factor, x.dtype)


def extreme(x: Parts, y: Parts, sign: int = 1, soft: bool = False) -> Parts:
  """The larger of two values (sign 1), or the smaller (-1); softly, log(e^x + e^y)."""
  if sign < 0:
    return -extreme(-x, -y)
  larger = jnp.logaddexp if soft else jnp.maximum
  convex = larger(*(_with(a.above, b.other) for a, b in ((x, y), (y, x))))
  return Parts(None, convex, total(x.other, y.other))


def bounded(x: Parts, bound: np.ndarray, sign: int) -> Parts:
  """The larger of a value and a known number (sign 1), or the smaller (-1); infinite, none."""
  free = bound == -sign * np.inf
  if free.all():
    return x
  known = np.where(free, 0.0, bound).astype(x.value.dtype)
  both = extreme(x, Parts(jnp.asarray(known) if known.any() else None), sign=sign)
  if not free.any():
    return both

  def chosen(a, b):
    if a is None and b is None:
      return None
    return jnp.where(free, 0.0 if a is None else a, 0.0 if b is None else b)

  return Parts(None, chosen(x.above, both.above), chosen(x.other, both.other))


def _with(above: Any, other: Any) -> Any:
  both = total(above, other)
  return 0.0 if both is None else both


def folded(x: Parts, axes: Sequence[int], pair: Callable[[Parts, Parts], Parts]) -> Parts:
  """All entries along some axes, combined in pairs, by halves; the axes keep length 1."""
  shape = next(a for a in (x.affine, x.convex, x.other) if a is not None).shape
  for axis in axes:
    size = shape[axis]
    while size > 1:
      half = size // 2

      def cut(low, high, axis=axis, x=x):
        return x.map(lambda a: jax.lax.slice_in_dim(a, low, high, axis=axis))

      both = pair(cut(0, half), cut(half, 2 * half))
      x = _joined(both, cut(2 * half, size), axis) if size % 2 else both
      size -= half
  return x


def _joined(x: Parts, y: Parts, axis: int) -> Parts:
  """Both, one after the other along an axis."""

  def join(a, b):
    if a is None and b is None:
      return None
    pairs = ((a, x.value), (b, y.value))
    whole = [jnp.zeros_like(value) if part is None else part for part, value in pairs]
    return jnp.concatenate(whole, axis)

  return Parts(None, join(x.above, y.above), join(x.other, y.other))


def pooled(x: Parts, op: Operation, sign: int) -> Parts:
  """The largest entry of each window, axis by axis."""
  names = ("window_dimensions", "window_strides", "padding", "window_dilation")
  pair = functools.partial(extreme, sign=sign)
  for axis, (size, stride, padding, dilation) in enumerate(
    zip(*(op.params[n] for n in names), strict=True)
  ):
    if (size, stride, tuple(padding)) == (1, 1, (0, 0)):
      continue
    members = _members(op.inputs[0].shape[axis], op.shape[axis], size, stride, padding[0], dilation)
    taken = [x.map(lambda a, m=m, axis=axis: jnp.take(a, m, axis)) for m in members]
    while len(taken) > 1:
      pairs = [pair(*two) for two in zip(taken[::2], taken[1::2], strict=False)]
      taken = pairs + taken[len(pairs) * 2 :]
    (x,) = taken
  return x


def _members(length: int, windows: int, size: int, stride: int, before: int, dilation: int):
  """Of each place in a window, the index in every window; one of the window's own past the edges."""
  index = np.arange(windows)[:, None] * stride - before + np.arange(size) * dilation
  inside = (index >= 0) & (index < length)
  if not inside.any(1).all():
    raise ValueError("a maximum over nothing but padding")
  first = index[np.arange(windows), inside.argmax(1)]
  return np.where(inside, index, first[:, None]).T


def divided(x: Parts, divisor: np.ndarray, shape: Sequence[int], dtype: Any) -> Parts:
  """By known numbers, of either sign, with a result of this shape."""
  size, sign = jnp.asarray(np.abs(divisor), dtype), np.sign(divisor)
  scaled = x.map(lambda a: jnp.broadcast_to(a / size, shape))
  if (sign > 0).all():
    return scaled
  turned = -scaled
  if (sign < 0).all():
    return turned
  plus, minus = jnp.asarray(sign > 0, dtype), jnp.asarray(sign < 0, dtype)

  def chosen(a, b):
    return total(None if a is None else a * plus, None if b is None else b * minus)

  kinds = ("affine", "convex", "other")
  return Parts(*(chosen(getattr(scaled, k), getattr(turned, k)) for k in kinds))
