"""Scalar functions as differences of convex ones, against values, mpmath and the best slopes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convex_jax.proof import interpreter, splitting
from convex_jax.proof.values import Value

SPLIT = {  # name: (function, least falling + rising that any split has: variation of the slope)
  "relu": (jax.nn.relu, 1.0),
  "leaky relu": (jax.nn.leaky_relu, 1.0),
  "steep leaky relu": (lambda z: jax.nn.leaky_relu(z, 2.0), 2.0),
  "abs": (jnp.abs, 2.0),
  "clip": (lambda z: jnp.clip(z, -1, 2), 1.0),
  "relu6": (jax.nn.relu6, 1.0),
  "hat": (lambda z: jnp.maximum(0, 1 - jnp.abs(z)), 2.0),
  "soft shrinkage": (lambda z: z - jnp.clip(z, -0.5, 0.5), 2.0),
  "hard tanh": (jax.nn.hard_tanh, 1.0),
  "hard sigmoid": (jax.nn.hard_sigmoid, 1 / 6),
  "hard swish": (jax.nn.hard_swish, 2.0),
  "elu": (jax.nn.elu, 1.0),
  "steep elu": (lambda z: jax.nn.elu(z, 2.0), 2.0),
  "celu": (lambda z: jax.nn.celu(z, 2.0), 1.0),
  "selu": (jax.nn.selu, 1.7581),
  "softplus": (jax.nn.softplus, 1.0),
  "log sigmoid": (jax.nn.log_sigmoid, 1.0),
  "sparse plus": (jax.nn.sparse_plus, 1.0),
  "tanh": (jnp.tanh, 1.0),
  "sigmoid": (jax.nn.sigmoid, 0.25),
  "erf": (jax.lax.erf, 2 / np.sqrt(np.pi)),
  "gelu": (jax.nn.gelu, 1.2580),
  "exact gelu": (lambda z: jax.nn.gelu(z, approximate=False), 1.2578),
  "silu": (jax.nn.silu, 1.1997),
  "quick gelu": (lambda z: z * jax.nn.sigmoid(1.702 * z), 1.1997),
  "negative gelu": (lambda z: -jax.nn.gelu(z), 1.2580),
  "z - tanh z": (lambda z: z - jnp.tanh(z), 2.0),
  "gauss": (lambda z: jnp.exp(-z * z), 1.7156),
}
REFUSED = {  # name: (function, what is said)
  "square": (jnp.square, "slope is not bounded"),
  "cube": (lambda z: z**3, "slope is not bounded"),
  "squared relu": (lambda z: jax.nn.relu(z) ** 2, "slope is not bounded"),
  "exp": (jnp.exp, "slope is not bounded"),
  "step": (lambda z: jnp.where(z > 0, 1.0, 0.0), "not continuous"),
  "jump": (lambda z: jnp.where(z > 1, z, 0.0), "not continuous"),
  "sine": (jnp.sin, "cannot be read"),
  "root of |z|": (lambda z: jnp.sqrt(jnp.abs(z)), "cannot be read|not known"),
}


def split_of(phi, shape=()):
  (value,), _ = interpreter.analyse(phi, jax.ShapeDtypeStruct(shape, jnp.float32))
  root = value
  while root.made_by is not None:
    root = next(x for x in root.made_by.inputs if isinstance(x, Value))
  return splitting.split(phi, value, root)


@pytest.mark.parametrize("name", SPLIT)
def test_a_scalar_function_is_split_exactly_and_at_the_least_slopes(name):
  phi, least = SPLIT[name]
  found = split_of(phi)
  with jax.enable_x64(True):
    z = jnp.concatenate([jnp.linspace(-30, 30, 20_001), jnp.linspace(-2, 2, 4_001)])
    z = jnp.unique(jnp.asarray(z, jnp.float64).round(9))
    convex, other = (jnp.zeros_like(z) if g is None else g(z) for g in (found.convex, found.other))
    np.testing.assert_allclose(convex - other, phi(z), rtol=1e-14, atol=2e-13)
    for part in (convex, other):
      slopes = np.diff(part) / np.diff(z)
      assert (np.diff(slopes) >= -1e-9).all(), "not convex"
      assert slopes.min() >= -found.falling - 1e-9, "it falls faster than said"
      assert slopes.max() <= found.rising + 1e-9, "it rises faster than said"
  assert least - 1e-3 <= found.falling + found.rising <= least + 1e-3


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_such_difference_is_refused(name):
  phi, said = REFUSED[name]
  with pytest.raises(splitting.NoSplitError, match=said):
    split_of(phi)


def test_slopes_may_differ_between_elements():
  slopes = jnp.array([0.1, 1.0, 1.5, -0.5])
  found = split_of(lambda z: jnp.where(z > 0, z, slopes * z), (4,))
  z = jnp.linspace(-3, 3, 101)[:, None] * jnp.ones(4)
  np.testing.assert_allclose(
    found.convex(z) - found.other(z), jnp.where(z > 0, z, slopes * z), rtol=1e-6, atol=1e-6
  )


def test_kinks_may_not_differ_between_elements():
  kinks = jnp.array([0.0, 1.0, 2.0])
  with pytest.raises(splitting.NoSplitError, match="kinks are not the same"):
    split_of(lambda z: jnp.clip(z, kinks - 3, kinks), (3,))


def test_a_split_that_is_not_convex_is_refused(monkeypatch):
  """The parts are proved, not trusted: here phi_1 leaves out the parabola around the inflection."""
  monkeypatch.setattr(splitting, "_gaps", lambda cells: [])
  with pytest.raises(splitting.NoSplitError, match="not known closely enough"):
    split_of(lambda z: z * jax.nn.sigmoid(0.9 * z))
