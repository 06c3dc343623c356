"""Image to image on the device, jitted with the step: augment, normalise, resize.

Randomness comes in as one key an example, so that what happens to an example depends
neither on its place in a batch nor on the number of devices.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def flip(key: jax.Array, image_HxWxC: jax.Array) -> jax.Array:
  """Mirrors left and right, with probability 1/2."""
  return jnp.where(jax.random.bernoulli(key), image_HxWxC[:, ::-1], image_HxWxC)


def pad_and_crop(key: jax.Array, image_HxWxC: jax.Array, padding: int) -> jax.Array:
  """Shifts by up to `padding` px each way; what comes in is black (Lee et al. 2015)."""
  padded = jnp.pad(image_HxWxC, ((padding, padding), (padding, padding), (0, 0)))
  top, left = jax.random.randint(key, (2,), 0, 2 * padding + 1)
  return jax.lax.dynamic_slice(padded, (top, left, 0), image_HxWxC.shape)


def random_crop(key: jax.Array, image_HxWxC: jax.Array, size: int) -> jax.Array:
  """A window of size x size px, anywhere inside."""
  height, width, channels = image_HxWxC.shape
  most = jnp.array([height - size + 1, width - size + 1])
  top, left = jax.random.randint(key, (2,), 0, most)
  return jax.lax.dynamic_slice(image_HxWxC, (top, left, 0), (size, size, channels))


def make_prepare(
  image_size: int,
  mean: tuple[float, ...],
  std: tuple[float, ...],
  dtype: Any = jnp.float32,
  *,
  crop: bool = False,
) -> Callable[[jax.Array], jax.Array]:
  """What every image meets: (x / 255 - mean) / std per channel, bilinear resize.

  uint8 (B, H, W, C) to `dtype` (B, image_size, image_size, C); with `crop` a larger image is
  cut to its centre instead of resized. Affine in the pixels: logits that are convex in its
  result are convex in the image.
  """

  def prepare(image_BxHxWxC):
    if crop:
      top, left = ((n - image_size) // 2 for n in image_BxHxWxC.shape[1:3])
      image_BxHxWxC = image_BxHxWxC[:, top : top + image_size, left : left + image_size]
    mean_C, std_C = jnp.asarray(mean, dtype), jnp.asarray(std, dtype)
    x_BxHxWxC = (image_BxHxWxC.astype(dtype) / 255 - mean_C) / std_C
    if x_BxHxWxC.shape[1:3] == (image_size, image_size):
      return x_BxHxWxC
    batch, _, _, channels = x_BxHxWxC.shape
    return jax.image.resize(x_BxHxWxC, (batch, image_size, image_size, channels), "bilinear")

  return prepare


def make_augment(
  config: Any, prepare: Callable[[jax.Array], jax.Array]
) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """What training images meet: a flip, a crop, as `config` says; then `prepare`."""

  def one(key, image_HxWxC):
    flip_key, crop_key = jax.random.split(key)
    if config.flip:
      image_HxWxC = flip(flip_key, image_HxWxC)
    if config.cache_size:
      image_HxWxC = random_crop(crop_key, image_HxWxC, config.image_size)
    if config.crop_padding:
      image_HxWxC = pad_and_crop(crop_key, image_HxWxC, config.crop_padding)
    return image_HxWxC

  return lambda keys_B, image_BxHxWxC: prepare(jax.vmap(one)(keys_B, image_BxHxWxC))
