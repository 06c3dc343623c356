"""Every architecture, every twin: counts, tags, gradients, and convexity in float64."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convex_jax import layers, models, step
from convex_jax.constraints import FREE, constraints_of

TWINS = [(name, parts) for name in models.names() for parts in layers.PARTS]


def config_of(name, size="tiny", parts="base", passthrough=True, constraint="clamp"):
  return dict(name=name, size=size, parts=parts, passthrough=passthrough, constraint=constraint)


def abstract(config, classes, px, channels=3):
  model = models.build(config, classes)
  shape = (px, px, channels)
  return jax.eval_shape(lambda: step.init_variables(model, jax.random.key(0), shape))


def count(boxed):
  return sum(np.prod(leaf.shape, dtype=int) for leaf in jax.tree.leaves(boxed["params"]))


PUBLISHED = [  # Instantiated public implementations: Mixer, and the 2021 paper's MLP.
  ("mixer", "S/32", 1000, 224, 19_104_624),
  ("mixer", "S/16", 1000, 224, 18_528_264),
  ("mixer", "B/32", 1000, 224, 60_293_428),
  ("mixer", "B/16", 1000, 224, 59_880_472),
  ("mixer", "L/32", 1000, 224, 206_939_264),
  ("mixer", "L/16", 1000, 224, 208_196_168),
  ("mixer", "H/14", 1000, 224, 432_350_952),
  ("mixer", "seed", 10, 72, 200_202),
  ("mixer", "seed", 100, 72, 211_812),
  ("mlp", "800x3", 10, 32, 3_752_810),
  ("mlp", "800x3", 100, 32, 3_824_900),
]


@pytest.mark.parametrize("parts", ["base", "paper"])
@pytest.mark.parametrize("name,size,classes,px,want", PUBLISHED)
def test_parameter_counts_equal_the_published(name, size, classes, px, want, parts):
  assert count(abstract(config_of(name, size, parts), classes, px)) == want


@pytest.mark.parametrize("name,px,want", [("mlp", 32, 5_040_810), ("mixer", 72, 214_538)])
def test_parameter_counts_of_the_convex_twins_are_known(name, px, want):
  """Golden: a change here is a change of the architecture, to be told in the changelog.

  Mixer: 200,202 + 4 (64 + 128) scales + 3 64 64 passthrough + 1,280 to the head.
  """
  size = {"mlp": "800x3", "mixer": "seed"}[name]
  assert count(abstract(config_of(name, size, "ioc"), 10, px)) == want


def first_affine_parts(name):
  """What may have either sign in `ioc`, besides biases: read off the architecture by hand."""
  if name == "mlp":
    return {"dense_0/kernel"}
  return {"stem/kernel", "block_0/norm_0/scale", "block_0/token_mixing/dense_0/kernel"}


@pytest.mark.parametrize("name", models.names())
def test_ioc_tags_all_but_biases_the_first_affine_part_and_passthrough(name):
  boxed = abstract(config_of(name, parts="ioc"), 3, 8)
  kinds = nn.meta.unbox(constraints_of(boxed["params"]))
  paths = {
    "/".join(key.key for key in path): kind
    for path, kind in jax.tree_util.tree_flatten_with_path(kinds)[0]
  }
  free = {p for p, kind in paths.items() if kind == FREE and not p.endswith("bias")}
  assert {p for p in free if "passthrough" not in p} == first_affine_parts(name)
  assert paths["head/kernel"] == "shift"
  assert any("passthrough" in p for p in free)


@pytest.mark.parametrize("name", models.names())
def test_base_is_untagged_and_paper_keeps_its_norm(name):
  base, paper = (abstract(config_of(name, parts=p), 3, 8) for p in ("base", "paper"))
  assert set(jax.tree.leaves(constraints_of(base["params"]))) == {FREE}
  assert "clamp" in jax.tree.leaves(constraints_of(paper["params"]))
  assert ("stats" in paper and bool(paper["stats"])) == (name == "mlp")  # Mixer: LayerNorm.
  exact = abstract(config_of(name, parts="paper", constraint="exponentiate"), 3, 8)
  assert "exponentiate" in jax.tree.leaves(constraints_of(exact["params"]))


@pytest.mark.parametrize("name", models.names())
@pytest.mark.parametrize("parts", ["base", "paper"])
def test_passthrough_acts_in_ioc_alone(name, parts):
  counts = {count(abstract(config_of(name, parts=parts, passthrough=p), 3, 8)) for p in (0, 1)}
  assert len(counts) == 1


@pytest.mark.parametrize("name,parts", TWINS)
def test_shapes_and_finite_gradients_everywhere(name, parts):
  model = models.build(config_of(name, parts=parts), 3)
  images = jax.random.normal(jax.random.key(0), (4, 8, 8, 2))
  weights = nn.meta.unbox(step.init_variables(model, jax.random.key(1), (8, 8, 2)))

  def loss(params):
    variables = {"params": params, "batch_stats": weights["stats"]}
    logits, _ = model.apply(variables, images, train=True, mutable=["batch_stats"])
    return (logits * jnp.arange(12.0).reshape(4, 3)).sum()

  assert step.apply(model, weights, images).shape == (4, 3)
  grads = jax.grad(loss)(weights["params"])
  assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
  dead = [p for p, g in jax.tree_util.tree_flatten_with_path(grads)[0] if not g.any()]
  heads_start_at_zero = name == "mixer"  # So that their inputs get no gradient yet.
  assert heads_start_at_zero or all("bias" in str(path) for path in dead)


def random_feasible(name, parts, seed):
  """A float64 network at inference: free weights of either sign, tagged ones >= 0."""
  model = models.build(config_of(name, parts=parts), 5, dtype=jnp.float64)
  boxed = step.init_variables(model, jax.random.key(seed), (8, 8, 1))
  kinds = constraints_of(boxed["params"])
  rng = np.random.default_rng(seed)

  def draw(leaf, kind):
    value = rng.standard_normal(leaf.shape) / np.sqrt(max(1, leaf.size / leaf.shape[-1]))
    return jnp.asarray(value if kind == FREE else np.abs(value))

  params = jax.tree.map(draw, nn.meta.unbox(boxed["params"]), kinds)
  stats = jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.3, 2, leaf.shape)), boxed["stats"])
  return model, {"params": params, "stats": stats}, kinds


def worst_midpoint_gap(model, weights, seed, pairs=2000):
  """min over pairs and logits of (f(a) + f(b)) / 2 - f((a + b) / 2): >= 0 when convex."""
  rng = np.random.default_rng(seed)
  a = rng.standard_normal((pairs, 8, 8, 1)) * rng.choice([0.3, 3, 10], (pairs, 1, 1, 1))
  b = a + rng.standard_normal(a.shape) * rng.choice([0.1, 1, 5], (pairs, 1, 1, 1))
  f = jax.jit(lambda x: step.apply(model, weights, x))
  fa, fb, middle = (np.asarray(f(jnp.asarray(x)), np.float64) for x in (a, b, (a + b) / 2))
  scale = 1 + np.abs(fa) + np.abs(fb)
  return float(((fa + fb) / 2 - middle).min()), float((((fa + fb) / 2 - middle) / scale).min())


@pytest.fixture
def float64():
  """64-bit JAX: rounding must not hide, or fake, a small violation."""
  with jax.enable_x64(True):
    yield


@pytest.mark.parametrize("name", models.names())
def test_ioc_is_convex_whatever_the_free_weights(name, float64):
  for seed in range(3):
    model, weights, _ = random_feasible(name, "ioc", seed)
    assert step.apply(model, weights, jnp.zeros((1, 8, 8, 1))).dtype == jnp.float64
    assert worst_midpoint_gap(model, weights, seed)[1] >= -1e-12


@pytest.mark.parametrize("name,parts", [("mlp", "base"), ("mixer", "base"), ("mixer", "paper")])
def test_the_falsifier_sees_networks_that_are_not_convex(name, parts, float64):
  """The negative control: LayerNorm, or weights of either sign, break convexity."""
  model, weights, _ = random_feasible(name, parts, 0)
  assert worst_midpoint_gap(model, weights, 0)[0] < -1e-3


@pytest.mark.parametrize("name", models.names())
def test_the_falsifier_sees_each_tagged_matrix_turned_negative(name, float64):
  """Every tag is needed: one constrained matrix of the wrong sign is found out."""
  model, weights, kinds = random_feasible(name, "ioc", 0)
  leaves, tree = jax.tree.flatten(weights["params"])
  found, total = 0, 0
  for i, kind in enumerate(jax.tree.leaves(kinds)):
    if kind == FREE:
      continue
    wrong = [-leaf if j == i else leaf for j, leaf in enumerate(leaves)]
    mutant = {**weights, "params": jax.tree.unflatten(tree, wrong)}
    total += 1
    found += worst_midpoint_gap(model, mutant, 0, pairs=500)[0] < -1e-9
  # MLP: the first BatchNorm acts on what is affine, where a sign is free.
  assert found >= total - (name == "mlp") and total >= 4


def test_a_size_that_patches_do_not_tile_is_told():
  check = models.module_of("mixer").check
  assert check(dict(patch=9), 72) == []
  assert "multiples of 9" in check(dict(patch=9), 32)[0]
