"""Functions behind their affine front: the same function, moved along one coordinate by a column."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convex_jax.proof import affine_front

RNG = np.random.default_rng(0)
W, V = RNG.standard_normal((6, 4)), RNG.standard_normal((4, 3))
KERNEL = RNG.standard_normal((3, 3, 1, 2))


def conv(x):
  return jax.lax.conv_general_dilated(
    x.reshape(1, 2, 3, 1), KERNEL, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


FUNCTIONS = {  # Name: (function of six numbers, size of what it computes of them before it bends).
  "one layer": (lambda x: nn.elu((x - 1) / 2 @ W + 1) @ V, 4),
  "layers": (lambda x: nn.relu(nn.relu(x @ W) @ V + x[:3]), 4 + 3),
  "a passthrough": (lambda x: nn.relu(nn.relu(x @ W) @ V + (x @ W) @ V), 4 + 3),
  "in a jit": (lambda x: jax.jit(lambda z: nn.relu(jax.jit(jnp.dot)(z, W)))(x) @ V, 4),
  "a convolution": (lambda x: nn.relu(conv(x)).sum((1, 2)), 12),
  "moves and sums": (lambda x: jnp.exp(jnp.pad(x.reshape(2, 3)[::-1].T, 1).sum(1)), 5),
  "all affine": (lambda x: x @ W, 4),
  "no front": (lambda x: nn.relu(x) @ W, 6),
  # What looks affine and is not: their front is the input itself.
  "a square": (lambda x: x * x, 6),
  "a product of two": (lambda x: (x[:3] + 1) * (x[3:] - 1), 3 + 3),
  "a quotient": (lambda x: 1 / (x + 10), 6),
  "a floor": (lambda x: jnp.floor(x) @ W, 6),
  "an integer": (lambda x: x.astype(int) @ W, 6),
  "a choice": (lambda x: jnp.where(x > 0, x, 2 * x), 3 * 6),
  "a maximum": (lambda x: x.max(keepdims=True), 6),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_is_its_front_and_the_rest(name):
  f, size = FUNCTIONS[name]
  with jax.enable_x64(True):
    front, rest, columns = affine_front.split(f, (6,))
    assert columns.shape[0] == 6 and columns.shape[1] <= size
    starts, moves = RNG.standard_normal((5, 6)), np.concatenate([np.zeros((1, 6)), 0.7 * np.eye(6)])

    @jax.jit
    def both(x, move):
      return rest(front(x) + move @ columns), f(x + move)

    for x, move in itertools.product(starts, moves):
      np.testing.assert_allclose(*both(x, move), rtol=1e-12, atol=1e-12)


def test_a_front_that_is_too_large_is_left_out(monkeypatch):
  f, _ = FUNCTIONS["one layer"]
  monkeypatch.setattr(affine_front, "LARGEST", 6 * 4 - 1)
  with jax.enable_x64(True):
    front, rest, columns = affine_front.split(f, (6,))
    x = RNG.standard_normal(6)
    assert columns is None
    np.testing.assert_allclose(front(x), x)
    np.testing.assert_allclose(rest(front(x)), f(x))
