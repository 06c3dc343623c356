"""RandAugment (Cubuk et al. 2020) on the device, batched, in timm's "increasing" form.

Under `vmap`, where every image draws its own operation, all operations are computed for each
image. Fifteen results would be expensive; but each operation is a warp (an affine map of
coordinates), a table (256 levels to 256, per channel) or a blend (of the image with a grey or
a smoothed one), and each kind is computed once, as the identity where another was drawn.

A TPU has no instruction that reads at computed places: it takes a tile of 4 kB for each number
that is gathered, 2.6 GB for an image of 224 px. There, sums over all places take the part of each
gather and scatter, with a weight of 0 but for those that are meant: arithmetic, but no memory.

Images are (H, W, C) with pixels in 0..255, magnitudes are in 0..10. Parameters and conventions
are those of Pillow, which timm calls: pixels are read at their centres, grey from outside.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.ndimage import map_coordinates

WARPS = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
TABLES = ("autocontrast", "equalize", "invert", "posterize", "solarize", "solarize_add")
TABLES += ("contrast", "brightness")
BLENDS = ("colour", "sharpness")
OPERATIONS = (*WARPS, *TABLES, *BLENDS)
NOTHING = len(OPERATIONS)
FILL = 128.0  # Outside the image: timm's grey.
SPREAD = 0.5  # Standard deviation of the magnitude: timm's `mstd0.5`.
PROBABILITY = 0.5  # Of applying a drawn operation.
_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601-2, Pillow's.


def randaugment(key: jax.Array, image_HxWxC: jax.Array, count: int, magnitude: float) -> jax.Array:
  """Applies `count` random operations in turn, each with probability 1/2; float32.

  Count 2 and magnitude 9 are DeiT's `rand-m9-mstd0.5-inc1` (Touvron et al. 2021, table 9).
  """
  x = image_HxWxC
  for one in jax.random.split(key, count):
    which, applied, strength, sign = jax.random.split(one, 4)
    number = jax.random.randint(which, (), 0, len(OPERATIONS))
    number = jnp.where(jax.random.bernoulli(applied, PROBABILITY), number, NOTHING)
    level = jnp.clip(magnitude + SPREAD * jax.random.normal(strength), 0, 10)
    x = operate(x, number, level, jnp.where(jax.random.bernoulli(sign), 1, -1))
  return x.astype(jnp.float32)


def operate(x_HxWxC: jax.Array, number: Any, magnitude: Any, sign: Any) -> jax.Array:
  """Applies operation `number` of `OPERATIONS`, or `NOTHING`; `sign` (1, -1) is its direction."""
  m = magnitude / 10
  height, width, channels = x_HxWxC.shape
  x_HxWxC = _warp(x_HxWxC.astype(jnp.float32), _matrices(sign * m, height, width), number)
  levels_HxWxC = jnp.round(x_HxWxC).astype(jnp.uint8)
  factor = jnp.maximum(0.1, 1 + 0.9 * sign * m)
  mean = jnp.floor(_grey(levels_HxWxC).mean() + 0.5)
  rows = []
  for c in range(channels):
    all_tables = _tables(levels_HxWxC[..., c], m, factor, mean)
    table = _chosen(number, TABLES, all_tables, all_tables["nothing"])
    rows.append(_look_up(table, levels_HxWxC[..., c]))
  x_HxWxC = jnp.stack(rows, -1)
  grey_HxWxC = jnp.broadcast_to(_grey(x_HxWxC), x_HxWxC.shape)
  others = {"colour": grey_HxWxC, "sharpness": _smooth(x_HxWxC)}
  other_HxWxC = _chosen(number, BLENDS, others, x_HxWxC)
  return jnp.clip(other_HxWxC + factor * (x_HxWxC - other_HxWxC), 0, 255)


def _chosen(number: Any, kind: tuple[str, ...], values: dict[str, Any], nothing: Any) -> jax.Array:
  """The value of operation `number` if it is one of `kind`, else `nothing`."""
  drawn = [jnp.asarray(number) == OPERATIONS.index(name) for name in kind]
  return jnp.select(drawn, [values[name] for name in kind], nothing)


def _matrices(v: Any, height: int, width: int) -> dict[str, jax.Array]:
  """(a, b, c, d, e, f) of each warp: output pixel (x, y) reads (a x + b y + c, d x + e y + f)."""
  angle = jnp.deg2rad(-30 * v)
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  x, y = width / 2, height / 2
  rows = {
    "rotate": (cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y),
    "shear_x": (1, 0.3 * v, 0, 0, 1, 0),
    "shear_y": (1, 0, 0, 0.3 * v, 1, 0),
    "translate_x": (1, 0, 0.45 * v * width, 0, 1, 0),
    "translate_y": (1, 0, 0, 0, 1, 0.45 * v * height),
    "nothing": (1, 0, 0, 0, 1, 0),
  }
  return {name: jnp.array(row, jnp.float32) for name, row in rows.items()}


def _warp(x_HxWxC: jax.Array, matrices: dict[str, jax.Array], number: Any) -> jax.Array:
  """The warped image, bilinear, as by Pillow's `Image.transform(..., AFFINE)`."""
  height, width, _ = x_HxWxC.shape
  a, b, c, d, e, f = _chosen(number, WARPS, matrices, matrices["nothing"])
  i, j = jnp.arange(height)[:, None] + 0.5, jnp.arange(width)[None] + 0.5
  x, y = a * j + b * i + c, d * j + e * i + f
  inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
  at = [y - 0.5, x - 0.5]

  def read(x_HxWxC, _):
    return jax.vmap(lambda plane: map_coordinates(plane, at, 1, mode="nearest"), -1, -1)(x_HxWxC)

  row = jnp.stack([a, b, c, d, e, f])
  found_HxWxC = lax.platform_dependent(x_HxWxC, row, tpu=_read_by_sums, default=read)
  return jnp.where(inside[..., None], found_HxWxC, FILL)


def _read_by_sums(x_HxWxC: jax.Array, row: jax.Array) -> jax.Array:
  """`map_coordinates` at the places of an affine map, without a gather; for e > 2/3 alone.

  Bilinear interpolation is sum_i h(Y - i) sum_j h(X - j) x_ij with h(t) = max(0, 1 - |t|), where
  the output pixel (y, x) reads at row Y and column X. The inner sum depends on i, x and y; but for
  each i and x, Y is within 1 of i for at most three y, that follow each other.
  """
  height, width, _ = x_HxWxC.shape
  a, b, c, d, e, f = row
  i, j = jnp.arange(height, dtype=jnp.float32)[:, None], jnp.arange(width, dtype=jnp.float32)
  planes = [x_HxWxC[:, None, :, channel] for channel in range(x_HxWxC.shape[-1])]
  start_W = d * (j + 0.5) + 0.5 * e + f - 0.5  # Y at y = 0.
  first_HxW = jnp.floor((i - 1 - start_W) / e) + 1  # The first y with Y > i - 1.
  total = [0.0] * len(planes)
  for y_HxW in (first_HxW, first_HxW + 1, first_HxW + 2):
    at = jnp.clip(a * (j + 0.5) + b * (y_HxW + 0.5) + c - 0.5, 0, width - 1)
    outer_HxW = _hat(jnp.clip(start_W + e * y_HxW, 0, height - 1) - i)
    weight = outer_HxW[..., None] * _hat(at[..., None] - j)
    inner = _sums([weight * plane for plane in planes], 2)  # (H, W) each.
    here = _hat(i[..., None] - y_HxW)  # 1 at the row y, 0 elsewhere: (H, H, W).
    total = [t + here * s for t, s in zip(total, inner, strict=True)]
  return jnp.stack(_sums(total, 1), -1)


def _hat(t: jax.Array) -> jax.Array:
  return jnp.maximum(0, 1 - jnp.abs(t))


def _sums(arrays: list[jax.Array], axis: int) -> list[jax.Array]:
  """The sums of several arrays, in one loop: what they share is computed once, and not stored."""
  zeros = [jnp.zeros((), x.dtype) for x in arrays]
  return lax.reduce(arrays, zeros, lambda a, b: [x + y for x, y in zip(a, b, strict=True)], (axis,))


def _look_up(table: jax.Array, levels_HxW: jax.Array) -> jax.Array:
  """table[levels], for levels 0..255."""

  def by_sum(table, levels_HxW):
    return jnp.where(levels_HxW[..., None] == jnp.arange(256), table, 0).sum(-1)

  def read(table, levels_HxW):
    return table[levels_HxW]

  return lax.platform_dependent(table, levels_HxW, tpu=by_sum, default=read)


def _histogram(levels_HxW: jax.Array) -> jax.Array:
  """How many pixels have each of the levels 0..255."""

  def by_sums(levels_HxW):
    return (levels_HxW[..., None] == jnp.arange(256)).sum((0, 1), jnp.int32)

  def count(levels_HxW):
    return jnp.bincount(levels_HxW.ravel(), length=256)

  return lax.platform_dependent(levels_HxW, tpu=by_sums, default=count)


def _tables(levels_HxW: jax.Array, m: Any, factor: Any, mean: Any) -> dict[str, jax.Array]:
  """The table of each operation for the levels 0..255 of one channel."""
  i = jnp.arange(256)
  low, high = levels_HxW.min().astype(jnp.float32), levels_HxW.max().astype(jnp.float32)
  stretched = jnp.floor((i - low) * 255 / jnp.maximum(high - low, 1))
  step = 2.0 ** (4 + jnp.floor(4 * m))
  threshold = 256 - jnp.floor(256 * m)
  tables = {
    "autocontrast": jnp.where(high > low, stretched, i),
    "equalize": _equalized(levels_HxW),
    "invert": 255 - i,
    "posterize": i - i % step,
    "solarize": jnp.where(i < threshold, i, 255 - i),
    "solarize_add": jnp.where(i < 128, i + jnp.floor(110 * m), i),
    "contrast": jnp.floor(mean + factor * (i - mean)),
    "brightness": jnp.floor(factor * i),
    "nothing": i,
  }
  return {name: jnp.clip(table, 0, 255).astype(jnp.float32) for name, table in tables.items()}


def _equalized(levels_HxW: jax.Array) -> jax.Array:
  """The table that flattens the histogram (Pillow's `ImageOps.equalize`, in integers)."""
  count = _histogram(levels_HxW)
  last = jnp.where(jnp.arange(256) == levels_HxW.max(), count, 0).sum()  # Of the highest level.
  step = (levels_HxW.size - last) // 255
  before = jnp.cumsum(count) - count
  return jnp.where(step > 0, (step // 2 + before) // jnp.maximum(step, 1), jnp.arange(256))


def _grey(x_HxWxC: jax.Array) -> jax.Array:
  if x_HxWxC.shape[-1] != 3:
    return x_HxWxC.astype(jnp.float32)
  luma = jnp.array(_LUMA)  # "highest": a TPU would round it to bfloat16.
  return jnp.round(jnp.matmul(x_HxWxC.astype(jnp.float32), luma, precision="highest"))[..., None]


def _smooth(x_HxWxC: jax.Array) -> jax.Array:
  """The 3 x 3 mean in which the centre counts five times; the border is unchanged."""
  height, width, _ = x_HxWxC.shape
  if min(height, width) < 3:
    return x_HxWxC
  windows = [x_HxWxC[i : height - 2 + i, j : width - 2 + j] for i in range(3) for j in range(3)]
  inner = jnp.round((sum(windows) + 4 * windows[4]) / 13)
  return x_HxWxC.at[1:-1, 1:-1].set(inner)
