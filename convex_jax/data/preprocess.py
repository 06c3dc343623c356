"""The preprocessing of every image, in training and at inference: normalise, whiten, resize.

It runs on the device, inside the jitted step, and is affine in the pixels: logits that are
convex in its result are convex in the image. So are means of them over several views of it.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def make_prepare(
  image_size: int,
  mean: tuple[float, ...],
  std: tuple[float, ...],
  dtype: Any = jnp.float32,
  *,
  crop: bool = False,
  whiten: bool = False,
) -> Callable[[jax.Array], jax.Array]:
  """A function that normalises, whitens and resizes: (x / 255 - mean) / std for each channel.

  Maps uint8 (B, H, W, C) to `dtype` (B, image_size, image_size, C). Images of another size are
  resized bilinearly or, with `crop`, cut to their centre. `whiten` applies `whitener`.
  """

  def prepare(image_BxHxWxC):
    if crop:
      top, left = ((n - image_size) // 2 for n in image_BxHxWxC.shape[1:3])
      assert top >= 0 and left >= 0, "the crop is larger than the image"
      image_BxHxWxC = image_BxHxWxC[:, top : top + image_size, left : left + image_size]
    mean_C, std_C = jnp.asarray(mean, dtype), jnp.asarray(std, dtype)
    x_BxHxWxC = (image_BxHxWxC.astype(dtype) / 255 - mean_C) / std_C
    batch, height, width, channels = x_BxHxWxC.shape
    if whiten:
      kernel = jnp.asarray(whitener(channels), dtype)
      axes = ("NHWC", "HWIO", "NHWC")
      x_BxHxWxC = jax.lax.conv_general_dilated(
        x_BxHxWxC, kernel, (1, 1), "SAME", dimension_numbers=axes
      )
    if (height, width) == (image_size, image_size):
      return x_BxHxWxC
    shape = (batch, image_size, image_size, channels)
    return jax.image.resize(x_BxHxWxC, shape, "bilinear")

  return prepare


def preparation(
  config: Any, mean: tuple[float, ...], std: tuple[float, ...], dtype: Any = jnp.float32
) -> Callable[[jax.Array], jax.Array]:
  """`make_prepare` with the settings of a `config.data`."""
  crop, whiten = config.cache_size > 0, config.whiten
  return make_prepare(config.image_size, mean, std, dtype, crop=crop, whiten=whiten)


def inference(
  config: Any, mean: tuple[float, ...], std: tuple[float, ...], dtype: Any = jnp.float32
) -> Callable[[jax.Array], jax.Array]:
  """`preparation` of what a network sees of an image at inference.

  With other `eval_shifts` than (0,), or `eval_flip`, of V views of it: maps (B, H, W, C) to
  (B, V, image_size, image_size, C), of which `models.variables.apply` computes mean logits.
  """
  prepare = preparation(config, mean, std, dtype)
  shifts = tuple(config.eval_shifts)
  if shifts == (0,) and not config.eval_flip:
    return prepare

  def prepared(image_BxHxWxC):
    seen_BxVxHxWxC = views(image_BxHxWxC, shifts, config.eval_flip)
    x_NxHxWxC = prepare(seen_BxVxHxWxC.reshape(-1, *image_BxHxWxC.shape[1:]))
    return x_NxHxWxC.reshape(*seen_BxVxHxWxC.shape[:2], *x_NxHxWxC.shape[1:])

  return prepared


def views(image_BxHxWxC: jax.Array, shifts: tuple[int, ...], mirror: bool) -> jax.Array:
  """The images moved by every pair of `shifts` (px down, px right), filled with black.

  With `mirror`, each mirrored left to right as well. (B, V, H, W, C), V = shifts^2 or twice that.
  """
  most = max(map(abs, shifts))
  height, width = image_BxHxWxC.shape[1:3]
  padded = jnp.pad(image_BxHxWxC, ((0, 0), (most, most), (most, most), (0, 0)))
  seen = []
  for down, right in itertools.product(shifts, repeat=2):
    top, left = most - down, most - right
    seen.append(padded[:, top : top + height, left : left + width])
  if mirror:
    seen += [x_BxHxWxC[:, :, ::-1] for x_BxHxWxC in seen]
  return jnp.stack(seen, 1)


def whitener(
  channels: int, side: int = 7, reach: float = 10.0, colour: float = 0.9, noise: float = 0.1
) -> np.ndarray:
  """The filter (side, side, C, C) that decorrelates pixels and colours of natural images.

  ZCA whitening (Bell and Sejnowski 1997): the columns of (S + noise I)^(-1/2) that yield the
  centre pixel of a window (`side` is odd). S is a model, so that no statistics of a data set
  have to be stored: pixels have variance 1 and correlation exp(-d / reach) at a distance of
  d px, times `colour` between two colours. The defaults suit small photographs. On CIFAR-10,
  this filter and that of the measured S (windows of 9 px) have a cosine of 0.993, and
  correlations fall from 0.90 to 0.46 between neighbours, from 0.75 to 0.04 between pixels
  2 px apart, and from 0.92 to 0.68 between colours.
  """
  at = np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"), -1).reshape(-1, 2)
  of_pixels = np.exp(-np.linalg.norm(at[:, None] - at[None], axis=-1) / reach)
  of_colours = colour + (1 - colour) * np.eye(channels)
  values, vectors = np.linalg.eigh(np.kron(of_pixels, of_colours))
  whole = (vectors / np.sqrt(values + noise)) @ vectors.T
  centre = side * side // 2 * channels
  kernel = whole[:, centre : centre + channels].reshape(side, side, channels, channels)
  return kernel.round(6)  # The same on every host, whatever its LAPACK.
