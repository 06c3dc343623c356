"""Image to image on the device, jitted with the step: augment, normalise, resize.

Randomness comes in as one key an example, so that what happens to an example depends
neither on its place in a batch nor on the number of devices.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convex_jax.data.randaugment import randaugment


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


def jitter(key: jax.Array, image_HxWxC: jax.Array, strength: float) -> jax.Array:
  """Brightness, contrast, saturation, each by a factor uniform in 1 - s .. 1 + s; 0..255.

  In this order; what is no colour image has no saturation.
  """
  factors = jax.random.uniform(key, (3,), minval=max(0.0, 1 - strength), maxval=1 + strength)
  x = brightness(image_HxWxC.astype(jnp.float32), factors[0])
  return saturation(contrast(x, factors[1]), factors[2])


_LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601-2, as in torchvision and Pillow.


def _grey(image_HxWxC: jax.Array) -> jax.Array:
  if image_HxWxC.shape[-1] != 3:
    return image_HxWxC
  return (image_HxWxC @ jnp.array(_LUMA))[..., None]


def brightness(image_HxWxC: jax.Array, factor: Any) -> jax.Array:
  """Towards black (factor below 1) or away from it; cut to 0..255."""
  return jnp.clip(factor * image_HxWxC, 0, 255)


def contrast(image_HxWxC: jax.Array, factor: Any) -> jax.Array:
  """Towards the image's mean grey, or away from it; cut to 0..255."""
  mean = _grey(image_HxWxC).mean()
  return jnp.clip(mean + factor * (image_HxWxC - mean), 0, 255)


def saturation(image_HxWxC: jax.Array, factor: Any) -> jax.Array:
  """Towards the grey image, or away from it; cut to 0..255."""
  grey = _grey(image_HxWxC)
  return jnp.clip(grey + factor * (image_HxWxC - grey), 0, 255)


def erase(key: jax.Array, image_HxWxC: jax.Array, probability: float) -> jax.Array:
  """A rectangle of a normalised image becomes noise N(0, 1) (Zhong et al. 2020), sometimes.

  Of a whitened image, whose deviation is about a half on CIFAR-10, strong noise.

  A share of the area uniform in 0.02 .. 1/3, a log-uniform aspect ratio in 0.3 .. 1/0.3, cut
  to what fits, anywhere inside: timm's `RandomErasing` in its mode "pixel".
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
  """Mixup or CutMix of a batch, each with its alpha; of both, either with probability 1/2.

  (key, images (B, H, W, C), targets (B, K)) to mixed ones. Each image is mixed with the
  one `partner` places on in the batch (past its own repetitions), by one share lambda ~
  Beta(alpha, alpha) a batch (Zhang et al. 2018; Yun et al. 2019, where a rectangle of
  1 - lambda of the area is taken over). None where both are 0.
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
  """Where a rectangle of this share of the area lies, its centre anywhere, cut at the border."""
  sides = jnp.floor(jnp.sqrt(area) * jnp.array(shape))
  centre = jnp.floor(jax.random.uniform(key, (2,)) * jnp.array(shape))
  low, high = centre - sides // 2, centre - sides // 2 + sides
  y, x = jnp.arange(shape[0])[:, None], jnp.arange(shape[1])[None]
  return (y >= low[0]) & (y < high[0]) & (x >= low[1]) & (x < high[1])


def make_prepare(
  image_size: int,
  mean: tuple[float, ...],
  std: tuple[float, ...],
  dtype: Any = jnp.float32,
  *,
  crop: bool = False,
  whiten: bool = False,
) -> Callable[[jax.Array], jax.Array]:
  """What every image meets: (x / 255 - mean) / std per channel, `whitener`, bilinear resize.

  uint8 (B, H, W, C) to `dtype` (B, image_size, image_size, C); with `crop` a larger image is
  cut to its centre instead of resized. Affine in the pixels: logits that are convex in its
  result are convex in the image.
  """

  def prepare(image_BxHxWxC):
    if crop:
      top, left = ((n - image_size) // 2 for n in image_BxHxWxC.shape[1:3])
      assert top >= 0 and left >= 0, "a crop larger than the image"
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
  """`make_prepare` as a `config.data` has it."""
  crop, whiten = config.cache_size > 0, config.whiten
  return make_prepare(config.image_size, mean, std, dtype, crop=crop, whiten=whiten)


def whitener(
  channels: int, side: int = 7, reach: float = 10.0, colour: float = 0.9, noise: float = 0.1
) -> np.ndarray:
  """The filter (side, side, C, C) that decorrelates pixels and colours of a natural image.

  The columns of (S + noise I)^(-1/2), ZCA whitening (Bell and Sejnowski 1997), that make the
  centre of a window (`side` odd). S is a model, so that no data set's statistics have to be kept: of
  pixels of variance 1, exp(-d / reach) at a distance of d px, times `colour` between colours.
  The defaults suit small photographs: S as CIFAR-10's images have it (windows of 9 px) gives
  a filter of cosine 0.993 with this one, and between neighbours there the correlation falls
  from 0.90 to 0.46, between pixels 2 px apart from 0.75 to 0.04, between colours from
  0.92 to 0.68.
  """
  at = np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"), -1).reshape(-1, 2)
  of_pixels = np.exp(-np.linalg.norm(at[:, None] - at[None], axis=-1) / reach)
  of_colours = colour + (1 - colour) * np.eye(channels)
  values, vectors = np.linalg.eigh(np.kron(of_pixels, of_colours))
  whole = (vectors / np.sqrt(values + noise)) @ vectors.T
  centre = side * side // 2 * channels
  kernel = whole[:, centre : centre + channels].reshape(side, side, channels, channels)
  return kernel.round(6)  # The same on every host, whatever its LAPACK.


def make_augment(
  config: Any, prepare: Callable[[jax.Array], jax.Array]
) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """What training images meet, as `config` says and in this order.

  Flip, crop, RandAugment, jitter, `prepare`, erasing.
  """
  operations, magnitude = config.randaugment

  def one(key, image_HxWxC):
    flip_key, crop_key = jax.random.split(key)
    if config.flip:
      image_HxWxC = flip(flip_key, image_HxWxC)
    if config.cache_size:
      image_HxWxC = random_crop(jax.random.fold_in(key, 4), image_HxWxC, config.image_size)
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
