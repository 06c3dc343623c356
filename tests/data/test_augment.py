"""Random augmentation, against numpy and Pillow."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import PIL.ImageEnhance
import pytest

from convex_jax.data import augment, preprocess

OFF = {
  "flip": False,
  "crop_padding": 0,
  "cache_size": 0,
  "randaugment": (0, 9.0),
  "jitter": 0.0,
  "erasing": 0.0,
}


def images(shape, seed=0):
  return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def test_flip_mirrors_half_of_the_images_and_changes_nothing_else():
  x = jnp.asarray(images((400, 4, 5, 3)))
  got = jax.jit(jax.vmap(augment.flip))(jax.random.split(jax.random.key(0), 400), x)
  same, mirrored = (got == x).all((1, 2, 3)), (got == x[:, :, ::-1]).all((1, 2, 3))
  assert (same | mirrored).all()
  assert 150 < int(mirrored.sum()) < 250


def test_pad_and_crop_is_a_shift_with_black_and_every_shift_occurs():
  x = images((5, 5, 1)) // 2 + 1  # No black of its own.
  padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
  windows = {padded[i : i + 5, j : j + 5].tobytes(): (i, j) for i in range(3) for j in range(3)}
  keys = jax.random.split(jax.random.key(1), 200)
  got = jax.jit(jax.vmap(lambda key: augment.pad_and_crop(key, jnp.asarray(x), 1)))(keys)
  assert {windows[np.asarray(image).tobytes()] for image in got} == set(windows.values())


def test_cached_images_are_cropped_anywhere_in_training_and_at_the_centre_after():
  x = np.arange(49, dtype=np.uint8).reshape(7, 7, 1)
  windows = {x[i : i + 5, j : j + 5].tobytes(): (i, j) for i in range(3) for j in range(3)}
  config = types.SimpleNamespace(**OFF | {"cache_size": 7, "image_size": 5})
  prepare = preprocess.make_prepare(5, (0.0,), (1.0,), crop=True)
  keys = jax.random.split(jax.random.key(1), 100)
  many = jnp.broadcast_to(x, (100, *x.shape))
  got = np.asarray(jax.jit(augment.make_augment(config, prepare))(keys, many)) * 255
  found = {windows[image.round().astype(np.uint8).tobytes()] for image in got}
  assert found == set(windows.values())
  np.testing.assert_allclose(prepare(many[:1])[0] * 255, x[1:6, 1:6], rtol=1e-6)


@pytest.mark.parametrize(
  "flip,padding,operations", [(True, 2, (0, 9.0)), (False, 0, (0, 9.0)), (True, 0, (2, 9.0))]
)
def test_an_examples_augmentation_depends_on_its_key_alone(flip, padding, operations):
  config = types.SimpleNamespace(
    **OFF | {"flip": flip, "crop_padding": padding, "randaugment": operations}
  )
  f = jax.jit(augment.make_augment(config, preprocess.make_prepare(8, (0.0,), (1.0,))))
  x, keys = jnp.asarray(images((6, 8, 8, 1))), jax.random.split(jax.random.key(0), 6)
  together = np.asarray(f(keys, x))
  for i in range(6):  # At another place, among other images.
    moved = f(jnp.roll(keys, 1 - i), jnp.full_like(x, i).at[1].set(x[i]))
    np.testing.assert_array_equal(moved[1], together[i])
  assert (together != f(keys[::-1], x)).any() == flip  # Control: other keys, other images.


def test_colours_are_blended_as_pillow_does():
  x = images((9, 7, 3))
  for ours, theirs in (
    (augment.brightness, PIL.ImageEnhance.Brightness),
    (augment.contrast, PIL.ImageEnhance.Contrast),
    (augment.saturation, PIL.ImageEnhance.Color),
  ):
    for factor in (0.3, 1.0, 1.7):
      want = np.asarray(theirs(PIL.Image.fromarray(x)).enhance(factor), float)
      got = ours(jnp.asarray(x, jnp.float32), factor)
      np.testing.assert_allclose(got, want, atol=2.1)  # Pillow rounds grey, mean and result.


def test_jitter_stays_within_its_strength_and_leaves_nothing_out():
  x = np.full((2000, 1, 2, 3), 100, np.uint8)  # Grey of one value: brightness alone is seen.
  keys = jax.random.split(jax.random.key(0), 2000)
  jitter = jax.jit(jax.vmap(lambda k, i: augment.jitter(k, i, 0.4)))
  got = np.asarray(jitter(keys, jnp.asarray(x)))
  assert 60 <= got.min() < 62 and 138 < got.max() <= 140.01
  colour = jnp.asarray(images((1, 4, 4, 3)))
  many = np.asarray(jitter(keys[:50], jnp.broadcast_to(colour[0], (50, 4, 4, 3))))
  assert len({image.tobytes() for image in many}) == 50
  np.testing.assert_array_equal(augment.jitter(keys[0], colour[0], 0.0), colour[0])


def test_erased_rectangles_have_the_stated_areas():
  keys = jax.random.split(jax.random.key(0), 600)
  x = jnp.full((40, 50, 3), 7.0)
  got = np.asarray(jax.jit(jax.vmap(lambda k: augment.erase(k, x, 0.25)))(keys))
  erased = (got != 7).any(-1)
  hit = erased.any((1, 2))
  assert abs(hit.mean() - 0.25) < 0.06
  for mask in erased[hit]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    block = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    assert block.all() and 0.01 < mask.mean() < 0.36
  noise = got[erased]
  assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


def test_mixup_and_cutmix_share_targets_as_they_share_pixels():
  """Images that are all 0 but one, all 1: what an image shows is its target's share."""
  x = jnp.zeros((4, 8, 10, 1)).at[2].set(1.0)
  target = jax.nn.one_hot(jnp.arange(4), 4)
  for mixup, cutmix in ((0.8, 0.0), (0.0, 1.0), (0.8, 1.0)):
    mix = jax.jit(augment.make_mix(mixup, cutmix))
    blended = 0
    for seed in range(40):
      images, targets = map(np.asarray, mix(jax.random.key(seed), x, target))
      np.testing.assert_allclose(targets.sum(1), 1, rtol=1e-6)
      np.testing.assert_allclose(images.mean((1, 2, 3)), targets[:, 2], atol=1e-6)
      np.testing.assert_allclose(images[0], 0)  # Its partner is the next, and that is 0 too.
      blended += bool(((images[2] > 0) & (images[2] < 1)).any())
    share = {(0.8, 0.0): (38, 40), (0.0, 1.0): (0, 0), (0.8, 1.0): (8, 32)}[mixup, cutmix]
    assert share[0] <= blended <= share[1]
  assert augment.make_mix(0.0, 0.0) is None


def test_repetitions_of_an_image_are_mixed_with_another_image():
  x = jnp.repeat(jnp.eye(3), 2, axis=0).reshape(6, 1, 1, 3)  # Each of three twice in a row.
  _, targets = jax.jit(augment.make_mix(1.0, 0.0, 2))(
    jax.random.key(0), x, jnp.repeat(jnp.eye(3), 2, 0)
  )
  assert ((targets > 0).sum(1) == 2).all()


def test_the_fraction_that_cutmix_keeps_is_uniform_for_alpha_1():
  mix = jax.jit(augment.make_mix(0.0, 1.0))
  x = jnp.zeros((2, 32, 32, 1)).at[1].set(1.0)
  kept = [float(mix(jax.random.key(i), x, jnp.eye(2))[1][0, 0]) for i in range(300)]
  # Rectangles are cut at the border, so that more is kept than Beta(1, 1) says: on average 0.5
  # and the part that is outside.
  assert 0.5 < np.mean(kept) < 0.75 and min(kept) < 0.2 and max(kept) > 0.95
