"""Images on the device, against numpy and Pillow."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import PIL.ImageEnhance
import pytest
import scipy.linalg

from convex_jax.data import augment

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


def test_prepare_normalises_as_numpy_does():
  x = images((3, 6, 6, 2))
  got = augment.make_prepare(6, (0.2, 0.4), (0.5, 2.0))(jnp.asarray(x))
  want = (x / 255.0 - [0.2, 0.4]) / [0.5, 2.0]
  np.testing.assert_allclose(got, want, atol=1e-6)
  assert got.dtype == jnp.float32


def test_resize_agrees_with_pillow_bilinear():
  x = images((2, 32, 32, 1))
  got = augment.make_prepare(72, (0.0,), (1.0,))(jnp.asarray(x))[..., 0] * 255
  for image, want in zip(np.asarray(got), x[..., 0], strict=True):
    pillow = PIL.Image.fromarray(want.astype(np.float32)).resize((72, 72), PIL.Image.BILINEAR)
    np.testing.assert_allclose(image, np.asarray(pillow), atol=0.01)


def test_the_whitener_is_scipys_inverse_root_of_the_stated_covariance():
  kernel = augment.whitener(2, side=3, reach=4.0, colour=0.8, noise=0.2)
  at = [(i, j, c) for i in range(3) for j in range(3) for c in range(2)]
  covariance = [
    [np.exp(-np.hypot(i - k, j - m) / 4) * (1 if c == d else 0.8) for k, m, d in at]
    for i, j, c in at
  ]
  root = scipy.linalg.fractional_matrix_power(np.array(covariance) + 0.2 * np.eye(18), -0.5)
  np.testing.assert_allclose(kernel, root[:, 8:10].reshape(3, 3, 2, 2), atol=1e-6)


def test_a_config_whitens_before_it_enlarges():
  x = jnp.asarray(images((2, 8, 8, 3)))
  config = types.SimpleNamespace(image_size=16, cache_size=0, whiten=True)
  got = augment.preparation(config, (0.5,) * 3, (0.25,) * 3)(x)
  plain = (np.asarray(x) / 255 - 0.5) / 0.25
  padded, kernel = np.pad(plain, ((0, 0), (3, 3), (3, 3), (0, 0))), augment.whitener(3)
  want = np.zeros(plain.shape)
  for i, j in np.ndindex(7, 7):
    want += padded[:, i : i + 8, j : j + 8] @ kernel[i, j]
  want = jax.image.resize(jnp.asarray(want, jnp.float32), (2, 16, 16, 3), "bilinear")
  np.testing.assert_allclose(got, want, atol=1e-4)
  config.whiten = False
  assert np.abs(augment.preparation(config, (0.5,) * 3, (0.25,) * 3)(x) - got).max() > 0.1


def test_whitening_decorrelates_photographs_and_is_affine():
  rng, photographs = np.random.default_rng(0), []
  for _ in range(8):
    fields = np.cumsum(np.cumsum(rng.normal(size=(40, 40, 4)), 0), 1)  # Fall off as 1 / f.
    colours = (fields[..., :1] + 0.12 * fields[..., 1:])[8:, 8:]
    colours = (colours - colours.min()) / np.ptp(colours)
    photographs.append(colours + 0.01 * rng.normal(size=(32, 32, 3)))
  x = jnp.asarray(np.clip(255 * np.stack(photographs), 0, 255), jnp.float32)
  mean, std = tuple(np.mean(x / 255, (0, 1, 2))), tuple(np.std(x / 255, (0, 1, 2)))

  def alike(y):
    y = np.asarray(y)[:, 4:-4, 4:-4]
    pairs = (y[:, 1:], y[:, :-1]), (y[..., 0], y[..., 1])  # Pixels; colours.
    return [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in pairs]

  plain, white = (augment.make_prepare(32, mean, std, whiten=whiten) for whiten in (False, True))
  (pixels, colours), (pixels_then, colours_then) = alike(plain(x)), alike(white(x))
  assert pixels > 0.9 and abs(pixels_then) < 0.5  # Colours differ by less than the noise.
  assert colours > 0.9 and abs(colours_then) < colours - 0.1
  middle = white((x + x[::-1]) / 2)
  np.testing.assert_allclose(middle, (white(x) + white(x[::-1])) / 2, atol=1e-4)


def test_flip_mirrors_half_of_the_images_and_changes_nothing_else():
  x = jnp.asarray(images((400, 4, 5, 3)))
  got = jax.vmap(augment.flip)(jax.random.split(jax.random.key(0), 400), x)
  same, mirrored = (got == x).all((1, 2, 3)), (got == x[:, :, ::-1]).all((1, 2, 3))
  assert (same | mirrored).all()
  assert 150 < int(mirrored.sum()) < 250


def test_pad_and_crop_is_a_shift_with_black_and_every_shift_occurs():
  x = images((5, 5, 1)) // 2 + 1  # No black of its own.
  padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
  windows = {padded[i : i + 5, j : j + 5].tobytes(): (i, j) for i in range(3) for j in range(3)}
  keys = jax.random.split(jax.random.key(1), 200)
  got = jax.vmap(lambda key: augment.pad_and_crop(key, jnp.asarray(x), 1))(keys)
  assert {windows[np.asarray(image).tobytes()] for image in got} == set(windows.values())


def test_crops_of_cached_images_lie_anywhere_inside_in_training_and_at_the_centre_after():
  x = np.arange(49, dtype=np.uint8).reshape(7, 7, 1)
  windows = {x[i : i + 5, j : j + 5].tobytes(): (i, j) for i in range(3) for j in range(3)}
  config = types.SimpleNamespace(**OFF | {"cache_size": 7, "image_size": 5})
  prepare = augment.make_prepare(5, (0.0,), (1.0,), crop=True)
  keys = jax.random.split(jax.random.key(1), 100)
  many = jnp.broadcast_to(x, (100, *x.shape))
  got = np.asarray(augment.make_augment(config, prepare)(keys, many)) * 255
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
  f = augment.make_augment(config, augment.make_prepare(8, (0.0,), (1.0,)))
  x, keys = jnp.asarray(images((6, 8, 8, 1))), jax.random.split(jax.random.key(0), 6)
  together = f(keys, x)
  alone = jnp.concatenate([f(keys[i : i + 1], x[i : i + 1]) for i in range(6)])
  np.testing.assert_array_equal(together, alone)
  assert bool((together != f(keys[::-1], x)).any()) == flip  # Control: other keys, other images.


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
  got = np.asarray(jax.vmap(lambda k, i: augment.jitter(k, i, 0.4))(keys, jnp.asarray(x)))
  assert 60 <= got.min() < 62 and 138 < got.max() <= 140.01
  colour = jnp.asarray(images((1, 4, 4, 3)))
  many = np.asarray(jax.vmap(lambda k: augment.jitter(k, colour[0], 0.4))(keys[:50]))
  assert len({image.tobytes() for image in many}) == 50
  np.testing.assert_array_equal(augment.jitter(keys[0], colour[0], 0.0), colour[0])


def test_erased_rectangles_have_the_shares_asked_for():
  keys = jax.random.split(jax.random.key(0), 600)
  x = jnp.full((40, 50, 3), 7.0)
  got = np.asarray(jax.vmap(lambda k: augment.erase(k, x, 0.25))(keys))
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
      images, targets = mix(jax.random.key(seed), x, target)
      np.testing.assert_allclose(targets.sum(1), 1, rtol=1e-6)
      np.testing.assert_allclose(images.mean((1, 2, 3)), targets[:, 2], atol=1e-6)
      np.testing.assert_allclose(images[0], 0)  # Its partner is the next, and that is 0 too.
      blended += bool(((images[2] > 0) & (images[2] < 1)).any())
    share = {(0.8, 0.0): (38, 40), (0.0, 1.0): (0, 0), (0.8, 1.0): (8, 32)}[mixup, cutmix]
    assert share[0] <= blended <= share[1]
  assert augment.make_mix(0.0, 0.0) is None


def test_repetitions_of_an_image_are_mixed_with_another_image():
  x = jnp.repeat(jnp.eye(3), 2, axis=0).reshape(6, 1, 1, 3)  # Each of three twice in a row.
  _, targets = augment.make_mix(1.0, 0.0, 2)(jax.random.key(0), x, jnp.repeat(jnp.eye(3), 2, 0))
  assert ((targets > 0).sum(1) == 2).all()


def test_the_share_of_cutmix_is_uniform_for_alpha_1():
  mix = jax.jit(augment.make_mix(0.0, 1.0))
  x = jnp.zeros((2, 32, 32, 1)).at[1].set(1.0)
  kept = [float(mix(jax.random.key(i), x, jnp.eye(2))[1][0, 0]) for i in range(300)]
  # Rectangles are cut at the border, so that more is kept than Beta(1, 1) says: the mean of
  # 1 - area (clipped) is 0.5 + what lies outside.
  assert 0.5 < np.mean(kept) < 0.75 and min(kept) < 0.2 and max(kept) > 0.95
