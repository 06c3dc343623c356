"""Images on the device, against numpy and Pillow."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from convex_jax import augment


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
  config = types.SimpleNamespace(flip=False, crop_padding=0, cache_size=7, image_size=5)
  prepare = augment.make_prepare(5, (0.0,), (1.0,), crop=True)
  keys = jax.random.split(jax.random.key(1), 100)
  many = jnp.broadcast_to(x, (100, *x.shape))
  got = np.asarray(augment.make_augment(config, prepare)(keys, many)) * 255
  found = {windows[image.round().astype(np.uint8).tobytes()] for image in got}
  assert found == set(windows.values())
  np.testing.assert_allclose(prepare(many[:1])[0] * 255, x[1:6, 1:6], rtol=1e-6)


@pytest.mark.parametrize("flip,padding", [(True, 2), (False, 0)])
def test_an_examples_augmentation_depends_on_its_key_alone(flip, padding):
  config = types.SimpleNamespace(flip=flip, crop_padding=padding, cache_size=0)
  f = augment.make_augment(config, augment.make_prepare(8, (0.0,), (1.0,)))
  x, keys = jnp.asarray(images((6, 8, 8, 1))), jax.random.split(jax.random.key(0), 6)
  together = f(keys, x)
  alone = jnp.concatenate([f(keys[i : i + 1], x[i : i + 1]) for i in range(6)])
  np.testing.assert_array_equal(together, alone)
  assert bool((together != f(keys[::-1], x)).any()) == flip  # Control: other keys, other images.
