"""Normalising, whitening and resizing, against numpy, Pillow and scipy."""

import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import scipy.linalg
import scipy.ndimage

from convex_jax.data import preprocess


def images(shape, seed=0):
  return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def test_prepare_normalises_as_numpy_does():
  x = images((3, 6, 6, 2))
  got = preprocess.make_prepare(6, (0.2, 0.4), (0.5, 2.0))(jnp.asarray(x))
  want = (x / 255.0 - [0.2, 0.4]) / [0.5, 2.0]
  np.testing.assert_allclose(got, want, atol=1e-6)
  assert got.dtype == jnp.float32


def test_resize_agrees_with_pillow_bilinear():
  x = images((2, 32, 32, 1))
  got = preprocess.make_prepare(72, (0.0,), (1.0,))(jnp.asarray(x))[..., 0] * 255
  for image, want in zip(np.asarray(got), x[..., 0], strict=True):
    pillow = PIL.Image.fromarray(want.astype(np.float32)).resize((72, 72), PIL.Image.BILINEAR)
    np.testing.assert_allclose(image, np.asarray(pillow), atol=0.01)


def test_the_whitener_is_scipys_inverse_root_of_the_stated_covariance():
  kernel = preprocess.whitener(2, side=3, reach=4.0, colour=0.8, noise=0.2)
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
  got = preprocess.preparation(config, (0.5,) * 3, (0.25,) * 3)(x)
  plain = (np.asarray(x) / 255 - 0.5) / 0.25
  padded, kernel = np.pad(plain, ((0, 0), (3, 3), (3, 3), (0, 0))), preprocess.whitener(3)
  want = np.zeros(plain.shape)
  for i, j in np.ndindex(7, 7):
    want += padded[:, i : i + 8, j : j + 8] @ kernel[i, j]
  want = jax.image.resize(jnp.asarray(want, jnp.float32), (2, 16, 16, 3), "bilinear")
  np.testing.assert_allclose(got, want, atol=1e-4)
  config.whiten = False
  assert np.abs(preprocess.preparation(config, (0.5,) * 3, (0.25,) * 3)(x) - got).max() > 0.1


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

  plain, white = (preprocess.make_prepare(32, mean, std, whiten=whiten) for whiten in (False, True))
  (pixels, colours), (pixels_then, colours_then) = alike(plain(x)), alike(white(x))
  assert pixels > 0.9 and abs(pixels_then) < 0.5  # Colours differ by less than the noise.
  assert colours > 0.9 and abs(colours_then) < colours - 0.1
  middle = white((x + x[::-1]) / 2)
  np.testing.assert_allclose(middle, (white(x) + white(x[::-1])) / 2, atol=1e-4)


@pytest.mark.parametrize("cache_size", [0, 10])
def test_views_are_shifts_and_mirror_images_of_the_pixels(cache_size):
  x = images((2, 10, 10, 3))
  side = 8 if cache_size else 10
  config = types.SimpleNamespace(
    image_size=side, cache_size=cache_size, whiten=True, eval_shifts=(-1, 2), eval_flip=True
  )
  scale = (0.5,) * 3, (0.25,) * 3
  got = preprocess.inference(config, *scale)(jnp.asarray(x))
  prepare = preprocess.preparation(config, *scale)
  assert got.shape == (2, 8, side, side, 3)
  pairs = list(itertools.product((-1, 2), repeat=2))
  for i, (mirror, shift) in enumerate(itertools.product((False, True), pairs)):
    want = scipy.ndimage.shift(x, (0, *shift, 0), order=0)  # Fills with 0.
    want = prepare(np.flip(want, 2) if mirror else want)
    np.testing.assert_allclose(got[:, i], want, atol=1e-5)


def test_without_views_inference_is_the_preparation_of_training():
  config = types.SimpleNamespace(
    image_size=8, cache_size=0, whiten=False, eval_shifts=(0,), eval_flip=False
  )
  scale, x = ((0.5,), (0.25,)), jnp.asarray(images((2, 8, 8, 1)))
  got, want = preprocess.inference(config, *scale)(x), preprocess.preparation(config, *scale)(x)
  np.testing.assert_array_equal(got, want)
  config.eval_flip = True
  got = preprocess.inference(config, *scale)(x)
  np.testing.assert_array_equal(got, np.stack([want, want[:, :, ::-1]], 1))
