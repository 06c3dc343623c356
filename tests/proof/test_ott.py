"""The input-convex network of OTT-JAX (Cuturi et al. 2022), certified in every setting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from convex_jax.proof import certify

icnn = pytest.importorskip("ott.neural.networks.icnn")

DIM = 3
RANKS = (0, 2, (1, 2, 0, 1))
FUNCTIONS = (nn.relu, nn.softplus, nn.elu)
RECTIFIERS = (nn.relu, nn.softplus, jnp.square)


def network(**settings):
  model = icnn.ICNN(dim_data=DIM, dim_hidden=[4, 5], **settings)
  return model, model.init(jax.random.key(0), jnp.ones(DIM))


def map_weights(change, weights):
  """`change` of the kernels between hidden layers, which have to be non-negative."""

  def one(path, leaf):
    return change(leaf) if "w_zs" in jax.tree_util.keystr(path) else leaf

  return jax.tree_util.tree_map_with_path(one, weights)


@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize("act_fn", FUNCTIONS, ids=lambda f: f.__name__)
def test_positive_weights_by_a_rectifier(ranks, act_fn):
  for rectifier in RECTIFIERS:
    model, weights = network(ranks=ranks, act_fn=act_fn, pos_weights=True, rectifier_fn=rectifier)
    assert certify(model.apply, weights, jnp.ones(DIM), search_steps=0), rectifier


@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize("act_fn", FUNCTIONS, ids=lambda f: f.__name__)
def test_weights_as_they_are(ranks, act_fn):
  """They are proved if they are non-negative, as clipping makes them, and not if one is not."""
  model, weights = network(ranks=ranks, act_fn=act_fn, pos_weights=False)
  positive = map_weights(jnp.abs, weights)
  assert certify(model.apply, positive, jnp.ones(DIM), search_steps=0)
  negative = map_weights(lambda w: w.at[0, 0].set(-1e-6), positive)
  assert not certify(model.apply, negative, jnp.ones(DIM), search_steps=0)


@pytest.mark.parametrize("pos_weights", [True, False])
def test_initialised_from_samples(pos_weights):
  rng = np.random.default_rng(0)
  samples = tuple(jnp.asarray(rng.standard_normal((20, DIM)) + shift) for shift in (0, 1))
  model, weights = network(pos_weights=pos_weights, gaussian_map_samples=samples)
  weights = map_weights(jnp.abs, weights)
  assert certify(model.apply, weights, jnp.ones(DIM), search_steps=0)


def test_a_batch_by_vmap_and_an_activation_that_is_not_convex():
  model, weights = network(pos_weights=True)
  x = jax.ShapeDtypeStruct((2, DIM), jnp.float32)
  batched = lambda w, x: jax.vmap(lambda row: model.apply(w, row))(x)  # noqa: E731
  assert certify(batched, weights, x, search_steps=0).verdicts == ["PROVED"] * 2
  for act in (nn.gelu, nn.tanh, lambda z: nn.leaky_relu(z, 1.5)):
    model, weights = network(pos_weights=True, act_fn=act)
    assert not certify(model.apply, weights, jnp.ones(DIM), search_steps=0)
