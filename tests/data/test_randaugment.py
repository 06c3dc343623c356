"""RandAugment, operation by operation, against Pillow as timm calls it."""

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import PIL.ImageEnhance
import PIL.ImageFilter
import PIL.ImageOps
import pytest

from convex_jax.data import randaugment
from convex_jax.data.randaugment import OPERATIONS

AFFINE, BILINEAR = PIL.Image.Transform.AFFINE, PIL.Image.Resampling.BILINEAR
GREY = (128, 128, 128)


def photo(seed=0, height=23, width=31):
  """Smooth, of few levels, so that tables and histograms matter."""
  rng = np.random.default_rng(seed)
  small = PIL.Image.fromarray(rng.integers(20, 230, (5, 6, 3), np.uint8))
  return small.resize((width, height), BILINEAR)


def warped(image, *row):
  return image.transform(image.size, AFFINE, row, BILINEAR, fillcolor=GREY)


def solarize_add(image, add):
  return image.point([min(255, i + add) if i < 128 else i for i in range(256)] * 3)


def pillow(image, name, m, sign):
  """What timm does: magnitude m in 0..10."""
  v, factor = sign * m / 10, max(0.1, 1 + 0.9 * sign * m / 10)
  width, height = image.size
  enhance = PIL.ImageEnhance
  return {
    "rotate": lambda: image.rotate(30 * v, BILINEAR, fillcolor=GREY),
    "shear_x": lambda: warped(image, 1, 0.3 * v, 0, 0, 1, 0),
    "shear_y": lambda: warped(image, 1, 0, 0, 0.3 * v, 1, 0),
    "translate_x": lambda: warped(image, 1, 0, 0.45 * v * width, 0, 1, 0),
    "translate_y": lambda: warped(image, 1, 0, 0, 0, 1, 0.45 * v * height),
    "autocontrast": lambda: PIL.ImageOps.autocontrast(image),
    "equalize": lambda: PIL.ImageOps.equalize(image),
    "invert": lambda: PIL.ImageOps.invert(image),
    "posterize": lambda: PIL.ImageOps.posterize(image, 4 - int(0.4 * m)),
    "solarize": lambda: PIL.ImageOps.solarize(image, 256 - int(25.6 * m)),
    "solarize_add": lambda: solarize_add(image, int(11 * m)),
    "contrast": lambda: enhance.Contrast(image).enhance(factor),
    "brightness": lambda: enhance.Brightness(image).enhance(factor),
    "colour": lambda: enhance.Color(image).enhance(factor),
    "sharpness": lambda: enhance.Sharpness(image).enhance(factor),
  }[name]()


def as_on_a_tpu(function):
  """`function`, traced in the form that a TPU gets."""

  def traced(*xs):
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(randaugment.lax, "platform_dependent", lambda *ys, tpu, default: tpu(*ys))
      return function(*xs)

  return traced


@pytest.fixture(scope="module", params=[lambda f: f, as_on_a_tpu], ids=["gathers", "sums"])
def operate(request):
  return jax.jit(request.param(randaugment.operate))


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_pillows(name, operate):
  changed = False
  for seed, m, sign in ((0, 3.0, 1), (1, 9.0, -1), (2, 9.0, 1)):
    image = photo(seed)
    got = np.asarray(operate(jnp.asarray(image), OPERATIONS.index(name), m, sign))
    want = np.asarray(pillow(image, name, m, sign), np.float32)
    off = np.abs(got - want)
    assert off.max() < 2, name  # Pillow rounds at each step, and a mean of levels may tip.
    assert off.mean() < 0.6, name
    changed |= np.abs(want - np.asarray(image)).max() > 4
  assert changed  # The comparison would be none otherwise.


def test_a_tpu_gets_the_numbers_of_a_cpu_without_reading_at_computed_places():
  keys = jax.random.split(jax.random.key(1), 32)
  image = jnp.broadcast_to(jnp.asarray(photo(0, 13, 11)), (32, 13, 11, 3))

  def augment(key, x):
    return randaugment.randaugment(key, x, 1, 9.0)

  want, got = (jax.jit(jax.vmap(f)) for f in (augment, as_on_a_tpu(augment)))
  programs = [str(f.trace(keys, image).jaxpr) for f in (want, got)]
  reads = [" gather[" in program for program in programs]
  assert reads == [True, False]
  off = np.abs(np.asarray(got(keys, image) - want(keys, image)))
  assert (off > 1e-2).mean() < 1e-3  # A level that rounding tips.


def test_a_flat_and_a_grey_image_stay_what_they_are(operate):
  flat = jnp.full((23, 31, 3), 77.0)
  for name in ("autocontrast", "equalize"):
    np.testing.assert_array_equal(operate(flat, OPERATIONS.index(name), 9.0, 1), flat)
  grey = jnp.asarray(photo().convert("L"))[..., None]
  np.testing.assert_array_equal(operate(grey, OPERATIONS.index("colour"), 9.0, 1), grey)


def test_nothing_drawn_is_nothing_done(operate):
  image = jnp.asarray(photo())
  np.testing.assert_array_equal(operate(image, randaugment.NOTHING, 9.0, 1), image)


def test_a_batch_draws_an_operation_for_each_image():
  image = jnp.broadcast_to(jnp.asarray(photo()), (64, 23, 31, 3))
  keys = jax.random.split(jax.random.key(0), 64)
  batched = jax.jit(jax.vmap(lambda key, x: randaugment.randaugment(key, x, 2, 9.0)))
  got = batched(keys, image)
  same = np.asarray((got == image).all((1, 2, 3)))
  assert 5 < same.sum() < 30  # Neither of two applied: a quarter.
  assert len({np.asarray(x).tobytes() for x in got[~same]}) > 30
  assert float(got.min()) >= 0 and float(got.max()) <= 255
  alike = np.asarray(batched(keys[jnp.full(64, 3)], image))
  np.testing.assert_array_equal(alike, np.broadcast_to(got[3], alike.shape))
