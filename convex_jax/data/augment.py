"""Random augmentation of training images, on the device, inside the jitted step.

Every example has its own key, so that its augmentation depends neither on its place in the
batch nor on the number of devices.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from convex_jax.data.randaugment import randaugment


def flip(key: jax.Array, image_HxWxC: jax.Array) -> jax.Array:
  """Mirrors the image left to right with probability 1/2."""
  return jnp.where(jax.random.bernoulli(key), image_HxWxC[:, ::-1], image_HxWxC)


def pad_and_crop(key: jax.Array, image_HxWxC: jax.Array, padding: int) -> jax.Array:
  """Shifts the image by up to `padding` px in each axis, filling with black (Lee et al. 2015)."""
  padded = jnp.pad(image_HxWxC, ((padding, padding), (padding, padding), (0, 0)))
  return random_crop(key, padded, image_HxWxC.shape)


def random_crop(key: jax.Array, image_HxWxC: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """A random window of this shape (H, W, C)."""
  most = jnp.array(image_HxWxC.shape[:2]) - jnp.array(shape[:2])
  top, left = jax.random.randint(key, (2,), 0, most + 1)
  return jax.lax.dynamic_slice(image_HxWxC, (top, left, 0), shape)


def jitter(key: jax.Array, image_HxWxC: jax.Array, strength: float) -> jax.Array:
  """Scales brightness, contrast and saturation, in this order, of an image in 0..255.

  Each by its own factor, uniform in [1 - strength, 1 + strength]; saturation only in colour.
  """
  factors = jax.random.uniform(key, (3,), minval=max(0.0, 1 - strength), maxval=1 + strength)
  x = brightness(image_HxWxC.astype(jnp.float32), factors[0])
  return saturation(contrast(x, factors[1]), factors[2])


_LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601-2, as torchvision rounds it.


def _grey(image_HxWxC: jax.Array) -> jax.Array:
  if image_HxWxC.shape[-1] != 3:
    return image_HxWxC
  luma = jnp.array(_LUMA)  # "highest": a TPU would round it to bfloat16.
  return jnp.matmul(image_HxWxC, luma, precision="highest")[..., None]


def brightness(image_HxWxC: jax.Array, factor: Any) -> jax.Array:
  """Moves the image towards black (factor < 1) or away from it; clipped to 0..255."""
  return jnp.clip(factor * image_HxWxC, 0, 255)


def contrast(image_HxWxC: jax.Array, factor: Any) -> jax.Array:
  """Moves the image towards its mean grey (factor < 1) or away from it; clipped to 0..255."""
  mean = _grey(image_HxWxC).mean()
  return jnp.clip(mean + factor * (image_HxWxC - mean), 0, 255)


def saturation(image_HxWxC: jax.Array, factor: Any) -> jax.Array:
  """Moves the image towards its grey version (factor < 1) or away from it; in 0..255."""
  grey = _grey(image_HxWxC)
  return jnp.clip(grey + factor * (image_HxWxC - grey), 0, 255)


def erase(key: jax.Array, image_HxWxC: jax.Array, probability: float) -> jax.Array:
  """Replaces a random rectangle of a normalised image by noise N(0, 1) (Zhong et al. 2020).

  timm's `RandomErasing` in mode "pixel": the rectangle covers a fraction of the area uniform
  in [0.02, 1/3] with an aspect ratio log-uniform in [0.3, 1/0.3], cut to fit. For whitened
  images, with a standard deviation of about 0.5 on CIFAR-10, the noise is strong.
  """
  height, width, _ = image_HxWxC.shape
  keys = jax.random.split(key, 6)
  area = jax.random.uniform(keys[0], minval=0.02, maxval=1 / 3) * height * width
  ratio = jnp.exp(jax.random.uniform(keys[1], minval=jnp.log(0.3), maxval=-jnp.log(0.3)))
  h = jnp.minimum(jnp.round(jnp.sqrt(area * ratio)), height)
  w = jnp.minimum(jnp.round(jnp.sqrt(area / ratio)), width)
  top = jnp.floor(jax.random.uniform(keys[2]) * (height - h + 1))
  left = jnp.floor(jax.random.uniform(keys[3]) * (width - w + 1))
  y, x = jnp.arange(height)[:, None, None], jnp.arange(width)[None, :, None]
  inside = (y >= top) & (y < top + h) & (x >= left) & (x < left + w)
  inside &= jax.random.bernoulli(keys[4], probability)
  noise = jax.random.normal(keys[5], image_HxWxC.shape, image_HxWxC.dtype)
  return jnp.where(inside, noise, image_HxWxC)


def make_mix(
  mixup: float, cutmix: float, partner: int = 1
) -> Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]] | None:
  """A function that applies mixup or CutMix, with these alphas, to a batch; None if both are 0.

  Maps (key, images (B, H, W, C), targets (B, K)) to mixed images and targets. Each image is
  mixed with the one `partner` places later in the batch (beyond its own repetitions), with
  one lambda ~ Beta(alpha, alpha) per batch: mixup blends (Zhang et al. 2018), CutMix copies a
  rectangle of 1 - lambda of the area (Yun et al. 2019). If both alphas are positive, each
  method is chosen with probability 1/2.
  """
  if not mixup and not cutmix:
    return None

  def mix(key, image_BxHxWxC, target_BxK):
    which, share, place = jax.random.split(key, 3)
    both = mixup > 0 and cutmix > 0
    cuts = jax.random.bernoulli(which) if both else jnp.bool_(cutmix > 0)
    alpha = jnp.where(cuts, cutmix, mixup)
    kept = jax.random.beta(share, alpha, alpha)
    inside = _rectangle(place, image_BxHxWxC.shape[1:3], 1 - kept)
    kept = jnp.where(cuts, 1 - inside.mean(), kept)
    other = jnp.roll(image_BxHxWxC, -partner, axis=0)
    weight_HxWx1 = jnp.where(cuts, 1.0 - inside[..., None], kept).astype(image_BxHxWxC.dtype)
    image_BxHxWxC = other + weight_HxWx1 * (image_BxHxWxC - other)
    return image_BxHxWxC, kept * target_BxK + (1 - kept) * jnp.roll(target_BxK, -partner, axis=0)

  return mix


def _rectangle(key: jax.Array, shape: tuple[int, ...], area: jax.Array) -> jax.Array:
  """Mask (H, W) of a rectangle with this fraction of the area, cut at the image's border."""
  sides = jnp.floor(jnp.sqrt(area) * jnp.array(shape))
  centre = jnp.floor(jax.random.uniform(key, (2,)) * jnp.array(shape))
  low, high = centre - sides // 2, centre - sides // 2 + sides
  y, x = jnp.arange(shape[0])[:, None], jnp.arange(shape[1])[None]
  return (y >= low[0]) & (y < high[0]) & (x >= low[1]) & (x < high[1])


def make_augment(
  config: Any, prepare: Callable[[jax.Array], jax.Array]
) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """A function (keys (B,), images (B, H, W, C)) that augments and prepares a training batch.

  Applies, in this order and as `config.data` says: flip, crop, RandAugment, jitter, `prepare`,
  erasing.
  """
  operations, magnitude = config.randaugment

  def one(key, image_HxWxC):
    flip_key, crop_key = jax.random.split(key)
    if config.flip:
      image_HxWxC = flip(flip_key, image_HxWxC)
    if config.cache_size:
      shape = (config.image_size, config.image_size, image_HxWxC.shape[-1])
      image_HxWxC = random_crop(jax.random.fold_in(key, 4), image_HxWxC, shape)
    if config.crop_padding:
      image_HxWxC = pad_and_crop(crop_key, image_HxWxC, config.crop_padding)
    if operations:
      image_HxWxC = randaugment(jax.random.fold_in(key, 5), image_HxWxC, operations, magnitude)
    if config.jitter:
      image_HxWxC = jitter(jax.random.fold_in(key, 2), image_HxWxC, config.jitter)
    return image_HxWxC

  def last(key, x_HxWxC):
    return erase(jax.random.fold_in(key, 3), x_HxWxC, config.erasing)

  def augment(keys_B, image_BxHxWxC):
    x_BxHxWxC = prepare(jax.vmap(one)(keys_B, image_BxHxWxC))
    return jax.vmap(last)(keys_B, x_BxHxWxC) if config.erasing else x_BxHxWxC

  return augment
