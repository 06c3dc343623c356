"""Random networks of every kind of layer, made convex: what is said of them, and their values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from convex_jax.proof.convexified import convexify

relu = jax.nn.relu
ACTIVATIONS = [relu, jnp.abs, jnp.tanh, jax.nn.elu, jax.nn.gelu, lambda x: jnp.clip(x, -1, 0.5)]

ENDS = {  # Functions of logits, of which only some keep what all of them have in common.
  "turned": lambda y: -y,
  "from a number": lambda y: 2 - y,
  "a temperature": lambda y: y / 3 * 0.5,
  "shifted": lambda y: y - jnp.array([1.0, 2, 3], y.dtype),
  "with other factors": lambda y: y * jnp.array([1.0, 2, 3], y.dtype),
  "reversed": lambda y: y + y[::-1],
  "two rows": lambda y: jnp.stack([y, -y]),
  "an activation": lambda y: y - relu(y),
}


def check(f, shape):
  """The certificate; g + t less t is g, in float64, and midpoints of g + t are below its chords."""
  rng = np.random.default_rng(0)
  with jax.enable_x64(True):
    found = convexify(f, jax.ShapeDtypeStruct(shape, jnp.float64))
    parts = jax.jit(jax.vmap(lambda x: (found.convex_logits(x), found.common(x), found.logits(x))))
    x, step = jnp.asarray(rng.normal(size=(2, 100, *shape)))
    (low, *_), (total, common, logits), (high, *_) = map(parts, (x - step, x, x + step))
    size = 1 + np.abs(total) + np.abs(common)
    assert np.max(np.abs(total - common - logits) / size) < 1e-12
    assert np.max((total - (low + high) / 2) / size) < 1e-6  # Splits are exact in float32.
    assert found.certificate


@pytest.mark.parametrize("name", ENDS)
def test_whatever_the_logits_end_in(name):
  rng = np.random.default_rng(1)
  first, second = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((4, 5), (5, 3)))
  check(lambda x: ENDS[name](relu(x @ first) @ second), (4,))
  check(lambda x: ENDS[name](relu(x)), (3,))


def image_network(seed):
  """Moves, sums, pools and convolutions in some order, and a readout."""
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return rng.normal(size=shape).astype(np.float32)

  def pool(x, init, operation, padding):
    return lax.reduce_window(x, np.asarray(init, x.dtype), operation, (2, 2, 1), (1, 1, 1), padding)

  def convolution(x, kernel, groups):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
      x[None], kernel.astype(x.dtype), (1, 1), "SAME", None, None, numbers, groups
    )[0]

  phi = ACTIVATIONS[rng.integers(len(ACTIVATIONS))]
  grouped, scale, slopes = normal(2, 2, 1, 2), normal(2), normal(2)
  readout = normal(2, 3)
  steps = [
    phi,
    lambda x: x - 2 * phi(x),
    lambda x: convolution(x, grouped, 2),
    lambda x: pool(x, -np.inf, lax.max, "SAME"),
    lambda x: pool(x, np.inf, lax.min, "VALID"),
    lambda x: pool(x, 0, lax.add, "SAME") / -4,
    lambda x: x * scale,
    lambda x: jnp.where(x > 0, x, slopes * x),
    lambda x: jnp.cumsum(x, 0)[::-1],
    lambda x: jnp.concatenate([x, phi(x)], -1)[..., jnp.array([3, 0])],
    lambda x: jnp.maximum(x, x[::-1]) - x.min(0),
  ]
  chosen = [steps[i] for i in rng.permutation(len(steps))[:5]]

  def network(x):
    for step in chosen:
      x = step(x)
    return x.max((0, 1)) @ readout

  return network


@pytest.mark.parametrize("seed", [0, 1, 2, 4])
def test_random_networks(seed):
  check(image_network(seed), (3, 3, 2))


def test_slopes_of_each_channel_after_a_concave_part():
  """`a` is absent there, and the slopes are an array."""
  slopes = np.array([0.5, -0.5, 2.0], np.float32)

  def network(x):
    z = -relu(x)
    return jnp.where(z > -1, z, slopes * (z + 1) - 1)

  check(network, (3,))
