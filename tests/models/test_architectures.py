"""Every architecture, every twin: counts, tags, gradients, and convexity in float64."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convex_jax.models import catalog, layers, overview
from convex_jax.models.constraints import FREE, constraints_of
from convex_jax.training import step

TWINS = [(name, parts) for name in catalog.names() for parts in layers.PARTS]


def config_of(name, size="tiny", parts="base", **changes):
  return catalog.model_config(name, size, parts, **changes)


def abstract(config, classes, px, channels=3):
  model = catalog.build(config, classes)
  shape = (px, px, channels)
  return jax.eval_shape(lambda: step.init_variables(model, jax.random.key(0), shape))


def init(model, shape, seed=1):
  """As `step.init_variables`, in one program instead of one an operation."""
  return jax.jit(lambda: step.init_variables(model, jax.random.key(seed), shape))()


def count(boxed):
  return sum(np.prod(leaf.shape, dtype=int) for leaf in jax.tree.leaves(boxed["params"]))


PUBLISHED = [  # Instantiated public implementations: parameters, and 10^9 multiply-accumulates.
  ("mixer", "S/32", 1000, 224, 19_104_624, 1.002),
  ("mixer", "S/16", 1000, 224, 18_528_264, 3.777),
  ("mixer", "B/32", 1000, 224, 60_293_428, 3.238),
  ("mixer", "B/16", 1000, 224, 59_880_472, 12.602),
  ("mixer", "L/32", 1000, 224, 206_939_264, 11.253),
  ("mixer", "L/16", 1000, 224, 208_196_168, 44.548),
  ("mixer", "H/14", 1000, 224, 432_350_952, 120.990),
  ("mixer", "seed", 10, 72, 200_202, 0.0146),
  ("mixer", "seed", 100, 72, 211_812, 0.0146),
  ("mlp", "800x3", 10, 32, 3_752_810, 0.003745),
  ("mlp", "800x3", 100, 32, 3_824_900, 0.003817),
  ("cycle_mlp", "B1", 1000, 224, 15_155_400, 2.12),
  ("cycle_mlp", "B2", 1000, 224, 26_802_504, 3.88),
  ("cycle_mlp", "B3", 1000, 224, 38_385_720, 6.83),
  ("cycle_mlp", "B4", 1000, 224, 51_796_552, 10.03),
  ("cycle_mlp", "B5", 1000, 224, 75_747_280, 12.23),
  ("cycle_mlp", "B1", 10, 32, 14_647_530, 0.044),
  ("densenet", "121", 1000, 224, 7_978_856, 2.834),
  ("densenet", "169", 1000, 224, 14_149_480, 3.360),
  ("densenet", "201", 1000, 224, 20_013_928, 4.291),
  ("densenet", "161", 1000, 224, 28_681_000, 7.728),
  ("densenet", "40-12", 10, 32, 1_019_722, 0.265),
  ("densenet", "100-12", 10, 32, 6_979_642, 1.770),
  ("densenet", "100-24", 10, 32, 27_249_082, 6.889),
  ("densenet", "BC-100-12", 10, 32, 769_162, 0.288),
  ("densenet", "BC-100-12", 100, 32, 800_032, 0.288),
  ("densenet", "BC-250-24", 10, 32, 15_324_406, 5.419),
  ("densenet", "BC-190-40", 10, 32, 25_624_430, 9.302),
  ("all_cnn", "a", 10, 32, 1_254_250, 0.181),
  ("all_cnn", "b", 10, 32, 1_300_618, 0.200),
  ("all_cnn", "c", 10, 32, 1_369_738, 0.271),
  ("all_cnn", "c", 100, 32, 1_387_108, 0.271),
  ("efficientnet", "B0", 1000, 224, 5_288_548, 0.386),
  ("efficientnet", "B1", 1000, 240, 7_794_184, 0.687),
  ("efficientnet", "B2", 1000, 260, 9_109_994, 0.994),
  ("efficientnet", "B3", 1000, 300, 12_233_232, 1.827),
  ("efficientnet", "B4", 1000, 380, 19_341_616, 4.394),
  ("efficientnet", "B5", 1000, 456, 30_389_784, 10.27),
  ("efficientnet", "B6", 1000, 528, 43_040_704, 19.07),
  ("efficientnet", "B7", 1000, 600, 66_347_960, 37.75),
]


@pytest.mark.parametrize("name,size,classes,px,parameters,giga", PUBLISHED)
def test_parameters_and_work_equal_the_published(name, size, classes, px, parameters, giga):
  count, work = overview.describe(name, size, "base", classes, px)
  assert count == parameters
  assert work / 1e9 == pytest.approx(giga, rel=0.01 if giga > 0.1 else 0.02)


@pytest.mark.parametrize("name", catalog.names())
def test_the_papers_twin_has_the_bases_weights(name):
  _, size, classes, px, parameters, _ = next(row for row in PUBLISHED if row[0] == name)
  assert overview.describe(name, size, "paper", classes, px)[0] == parameters


@pytest.mark.parametrize("parts", ["base", "ioc"])
def test_densenets_transitions_may_pool_first(parts):
  """As published, with dropout, they pool last: the same at inference, and to the gradients."""
  config = config_of("densenet", "tiny", parts)
  variables = nn.meta.unbox(init(catalog.build(config, 10), (16, 16, 3)))
  x = jax.random.normal(jax.random.key(0), (4, 16, 16, 3))

  def loss(params, x, dropout):
    model = catalog.build({**config, "dropout": dropout}, 10)
    logits = step.apply(model, {**variables, "params": params}, x)
    return jnp.sum(jnp.sin(logits)), logits

  (first, last) = (
    jax.jit(jax.grad(functools.partial(loss, dropout=dropout), (0, 1), has_aux=True))(
      variables["params"], x
    )
    for dropout in (0.0, 0.5)
  )
  for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(last), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_the_2021_papers_all_cnn_twin_doubles_the_first_convolution():
  """Sivaprasad et al. 2021: more units in the one layer whose signs are free."""
  boxed = {p: abstract(config_of("all_cnn", "ioc_paper", p), 10, 32) for p in layers.PARTS}
  widths = {p: nn.meta.unbox(b)["params"]["conv_0"]["kernel"].shape[-1] for p, b in boxed.items()}
  assert widths == {"base": 96, "ioc": 96, "paper": 192}


GOLDEN = [
  ("mlp", "800x3", 10, 32, 3_906_410),
  ("mixer", "seed", 10, 72, 201_162),
]


@pytest.mark.parametrize("name,size,classes,px,want", GOLDEN)
def test_parameter_counts_of_the_convex_twins_are_known(name, size, classes, px, want):
  """Golden: a change here is a change of the architecture, to be told in the changelog.

  MLP: 3,752,810 + 3 x 64 x 800 passthrough. Mixer: 200,202 + 4 (64 + 128) scales of
  branches + 3 x 64 scales of the passthrough.
  """
  assert overview.describe(name, size, "ioc", classes, px)[0] == want


FIRST_AFFINE_PARTS = {  # What may have either sign in `ioc`, read off the architecture by hand.
  "all_cnn": {"conv_0/kernel"},
  "cycle_mlp": {"stem/kernel"}
  | {f"stage_0_block_0/{p}" for p in ("norm_0/scale", "norm_1/scale", "dense_0/kernel")}
  | {f"stage_0_block_0/mix/along_{p}/kernel" for p in ("width", "height", "channels")}
  | {"stage_0_block_0/mix/proj/kernel"},
  "densenet": {"stem/kernel"},
  "efficientnet": {"stem/conv/kernel"},
  "mixer": {"stem/kernel", "block_0/norm_0/scale", "block_0/token_mixing/dense_0/kernel"},
  "mlp": {"dense_0/kernel"},
}
OWN_BATCH_NORM = {"densenet", "efficientnet", "mlp"}


@pytest.mark.parametrize("name", catalog.names())
def test_ioc_tags_all_but_biases_the_first_affine_part_and_passthrough(name):
  boxed = abstract(config_of(name, parts="ioc"), 3, 8)
  kinds = nn.meta.unbox(constraints_of(boxed["params"]))
  paths = {
    "/".join(key.key for key in path): kind
    for path, kind in jax.tree_util.tree_flatten_with_path(kinds)[0]
  }
  free = {p for p, kind in paths.items() if kind == FREE and not p.endswith("bias")}
  assert {p for p in free if "passthrough" not in p} == FIRST_AFFINE_PARTS[name]
  # All-CNN's class map meets an activation: a common term would not stay one.
  assert paths["head/kernel"] == ("clamp" if name == "all_cnn" else "shift")
  assert any("passthrough" in p for p in free)


@pytest.mark.parametrize("name", catalog.names())
def test_base_is_untagged_and_paper_keeps_its_norm(name):
  base, paper = (abstract(config_of(name, parts=p), 3, 8) for p in ("base", "paper"))
  assert set(jax.tree.leaves(constraints_of(base["params"]))) == {FREE}
  assert "clamp" in jax.tree.leaves(constraints_of(paper["params"]))
  assert bool(paper["stats"]) == (name in OWN_BATCH_NORM)
  exact = abstract(config_of(name, parts="paper", constraint="exponentiate"), 3, 8)
  assert "exponentiate" in jax.tree.leaves(constraints_of(exact["params"]))


@pytest.mark.parametrize("name", catalog.names())
@pytest.mark.parametrize("parts", ["base", "paper"])
def test_passthrough_acts_in_ioc_alone(name, parts):
  counts = {count(abstract(config_of(name, parts=parts, passthrough=p), 3, 8)) for p in (0, 1)}
  assert len(counts) == 1


@pytest.mark.parametrize("name,parts", TWINS)
def test_shapes_and_finite_gradients_everywhere(name, parts):
  model = catalog.build(config_of(name, parts=parts), 3)
  images = jax.random.normal(jax.random.key(0), (4, 8, 8, 2))
  weights = nn.meta.unbox(init(model, (8, 8, 2)))

  def loss(params):
    variables = {"params": params, "batch_stats": weights["stats"]}
    rngs = {"dropout": jax.random.key(2)}
    logits, _ = model.apply(variables, images, train=True, mutable=["batch_stats"], rngs=rngs)
    return (logits * jnp.arange(12.0).reshape(4, 3)).sum()

  assert network(model)(weights, images).shape == (4, 3)
  grads = jax.jit(jax.grad(loss))(weights["params"])
  assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("name,parts", TWINS)
def test_dropout_is_off_in_evaluation(name, parts):
  """Two evaluations agree, with and without a key; two training passes differ."""
  drops = {"all_cnn": {"dropout": 0.5}, "densenet": {"dropout": 0.5}, "mlp": {}}
  fields = drops.get(name, {"drop_path": 0.5})
  model = catalog.build(config_of(name, parts=parts, **fields), 3)
  images = jax.random.normal(jax.random.key(0), (4, 8, 8, 2))
  weights = nn.meta.unbox(init(model, (8, 8, 2)))
  # Heads that start at 0 would hide a difference.
  rng = np.random.default_rng(0)
  weights["params"] = jax.tree.map(
    lambda w: w + jnp.asarray(0.1 * rng.standard_normal(w.shape), w.dtype), weights["params"]
  )
  variables = {"params": weights["params"], "batch_stats": weights["stats"]}

  @functools.partial(jax.jit, static_argnums=0)
  def run(train, seed):
    rngs = {"dropout": jax.random.key(seed)}
    return model.apply(variables, images, train=train, mutable=["batch_stats"], rngs=rngs)[0]

  np.testing.assert_allclose(run(False, 0), network(model)(weights, images), rtol=1e-4, atol=1e-6)
  np.testing.assert_array_equal(run(False, 0), run(False, 1))
  assert bool(jnp.any(run(True, 0) != run(True, 1))) == bool(fields)


REMATERIALISED = [
  name if name in ("mixer", "densenet") else pytest.param(name, marks=pytest.mark.slow)
  for name in catalog.names()
]


@pytest.mark.parametrize("name", REMATERIALISED)
def test_rematerialisation_changes_nothing(name):
  images = jax.random.normal(jax.random.key(0), (4, 8, 8, 2))
  results = []
  for remat in (False, True):
    model = catalog.build(config_of(name, parts="ioc", remat=remat), 3)
    weights = nn.meta.unbox(init(model, (8, 8, 2)))

    def loss(params, model=model, stats=weights["stats"]):
      variables = {"params": params, "batch_stats": stats}
      rngs = {"dropout": jax.random.key(2)}
      logits, _ = model.apply(variables, images, train=True, mutable=["batch_stats"], rngs=rngs)
      return (logits**2).sum()

    results.append(jax.jit(jax.value_and_grad(loss))(weights["params"]))
  leaves = [jax.tree.leaves(result) for result in results]
  # What cancels before a norm is 0 but for rounding, of the size of the other gradients.
  scale = max(float(abs(leaf).max()) for leaf in leaves[0])
  for plain, again in zip(*leaves, strict=True):
    np.testing.assert_allclose(plain, again, rtol=1e-4, atol=3e-6 * scale)


def test_densenet_at_inference_does_not_hold_all_its_growing_maps():
  layers, batch, px = 16, 16, 16
  config = config_of("densenet", size="BC-100-12", blocks=(layers,))
  model = catalog.build(config, 10)
  weights = jax.eval_shape(lambda: nn.meta.unbox(init(model, (px, px, 3))))
  images = jax.ShapeDtypeStruct((batch, px, px, 3), jnp.float32)

  def temporaries(function):
    compiled = jax.jit(function).lower(weights, images).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  maps = sum(24 + 12 * i for i in range(layers)) * batch * px * px * 4  # Bytes of all of them.
  assert temporaries(network(model)) < maps / 2
  loss = jax.grad(lambda w, x: network(model)(w, x).sum())
  assert temporaries(loss) > maps  # The control: a backward pass needs them.


def random_feasible(config, seed):
  """A float64 network at inference: free weights of either sign, tagged ones >= 0."""
  model = catalog.build(config, 5, dtype=jnp.float64)
  boxed = init(model, (8, 8, 1), seed)
  kinds = constraints_of(boxed["params"])
  rng = np.random.default_rng(seed)

  def draw(leaf, kind):
    value = rng.standard_normal(leaf.shape) / np.sqrt(max(1, leaf.size / leaf.shape[-1]))
    return jnp.asarray(value if kind == FREE else np.abs(value))

  params = jax.tree.map(draw, nn.meta.unbox(boxed["params"]), kinds)
  stats = jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.3, 2, leaf.shape)), boxed["stats"])
  return model, {"params": params, "stats": stats}, kinds


@functools.cache
def network(model):
  """Logits as a jitted function of weights and images: mutants share one program."""
  return jax.jit(lambda weights, x: step.apply(model, weights, x))


def worst_midpoint_gap(f, weights, seed, pairs=500, shape=(8, 8, 1)):
  """min over pairs and logits of (f(a) + f(b)) / 2 - f((a + b) / 2): >= 0 when convex."""
  rng = np.random.default_rng(seed)
  sizes = (pairs, *(1 for _ in shape))
  a = rng.standard_normal((pairs, *shape)) * rng.choice([0.3, 3, 10], sizes)
  b = a + rng.standard_normal(a.shape) * rng.choice([0.1, 1, 5], sizes)
  fa, fb, middle = (np.asarray(f(weights, jnp.asarray(x)), np.float64) for x in (a, b, (a + b) / 2))
  scale = 1 + np.abs(fa) + np.abs(fb)
  return float(((fa + fb) / 2 - middle).min()), float((((fa + fb) / 2 - middle) / scale).min())


@pytest.fixture
def float64():
  """64-bit JAX: rounding must not hide, or fake, a small violation."""
  with jax.enable_x64(True):
    yield


@pytest.mark.parametrize("name", catalog.names())
def test_ioc_is_convex_whatever_the_free_weights(name, float64):
  for seed in range(2):
    model, weights, _ = random_feasible(config_of(name, parts="ioc"), seed)
    logits = jax.eval_shape(network(model), weights, jnp.zeros((1, 8, 8, 1)))
    assert logits.dtype == jnp.float64
    assert worst_midpoint_gap(network(model), weights, seed)[1] >= -1e-12


FORMS = [  # What the tiny sizes leave out.
  ("densenet", dict(stem="imagenet")),
  ("densenet", dict(bottleneck=False, pool="2x2")),
  ("all_cnn", dict(form="ioc_paper")),
  ("efficientnet", dict(variant="torch", stages=4)),
  ("cycle_mlp", dict(passthrough=False)),
  ("mixer", dict(remat=True, constraint="exponentiate")),
  ("mixer", dict(parallel=True, cells=2, dense_readout=True, overlap=1)),
  ("cycle_mlp", dict(cells=2, dense_readout=True)),
  ("mlp", dict(dense_readout=True)),
]


@pytest.mark.parametrize("name,fields", FORMS, ids=str)
def test_other_forms_are_convex_too(name, fields, float64):
  model, weights, _ = random_feasible(config_of(name, parts="ioc", **fields), 0)
  assert worst_midpoint_gap(network(model), weights, 0, pairs=200)[1] >= -1e-12


NOT_CONVEX = [(name, "base") for name in catalog.names()]
NOT_CONVEX += [(name, "paper") for name in ("mixer", "cycle_mlp")]  # Sampling misses SE gates.


@pytest.mark.parametrize("name,parts", NOT_CONVEX)
def test_the_falsifier_sees_networks_that_are_not_convex(name, parts, float64):
  """The negative control: a norm or a gate made of features, or weights of either sign."""
  model, weights, _ = random_feasible(config_of(name, parts=parts), 0)
  assert worst_midpoint_gap(network(model), weights, 0)[1] < -1e-6
  assert parts == "base" or catalog.module_of(name).PAPER_BREAKS


@pytest.mark.parametrize("name", catalog.names())
def test_the_falsifier_sees_tagged_weights_turned_negative(name, float64):
  """Tags are needed: a constrained matrix of the wrong sign is found out.

  Each one in the shallow networks; in the deep ones strongly convex paths beside it hide
  some from sampling.
  """
  model, weights, kinds = random_feasible(config_of(name, parts="ioc"), 0)
  f, (leaves, tree) = network(model), jax.tree.flatten(weights["params"])
  found, total = 0, 0
  for i, kind in enumerate(jax.tree.leaves(kinds)):
    if kind == FREE:
      continue
    wrong = [-leaf if j == i else leaf for j, leaf in enumerate(leaves)]
    mutant = {**weights, "params": jax.tree.unflatten(tree, wrong)}
    total += 1
    found += worst_midpoint_gap(f, mutant, 0, pairs=200)[1] < -1e-9
  # MLP: the first BatchNorm acts on what is affine, where a sign is free.
  missed = {"mlp": 1, "mixer": 0}.get(name, total // 2)
  assert found >= total - missed and total >= 4


@pytest.mark.parametrize("name", catalog.names())
@pytest.mark.parametrize("parts", ["ioc", "paper"])
def test_partly_convex_networks_are_convex_in_their_features(name, parts, float64):
  """A free trunk; a tagged head, whose logits are convex in the features and not in the image."""
  config = config_of(name, parts=parts, convex_from="head", head_depth=2, head_width=7)
  model, weights, kinds = random_feasible(config, seed=0)
  tagged = {k for k, v in kinds.items() if set(jax.tree.leaves(v)) != {FREE}}
  assert tagged == {"head"}
  head = catalog.build_head(config, 5, dtype=jnp.float64)
  params = {"params": weights["params"]["head"], "stats": weights["stats"]["head"]}
  width = weights["params"]["head"]["dense_0"]["kernel"].shape[0]
  assert worst_midpoint_gap(network(head), params, 0, shape=(width,))[1] >= -1e-12
  assert worst_midpoint_gap(network(model), weights, 0)[1] < -1e-6
  # The control: the same head without the constraint.
  free = {**params, "params": jax.tree.map(lambda w: w - w.mean(), params["params"])}
  assert worst_midpoint_gap(network(head), free, 0, shape=(width,))[1] < -1e-6


@pytest.mark.parametrize("name", catalog.names())
def test_a_deeper_head_keeps_the_whole_convex(name, float64):
  config = config_of(name, parts="ioc", head_depth=1, head_width=7)
  model, weights, _ = random_feasible(config, seed=0)
  assert worst_midpoint_gap(network(model), weights, 0)[1] >= -1e-12


@pytest.mark.parametrize("size,axis", [((5, 7), 1), ((4, 1), 2), ((6, 3), 2), ((1, 1), 1)])
def test_cycle_agrees_with_a_slow_loop_from_the_formula(size, axis):
  """out[.., c] at position p reads p + shift(c), shift(c) = (c + 1) mod 3 - 1; 0 outside."""
  x = np.random.default_rng(0).standard_normal((2, *size, 8)).astype(np.float32)
  want = np.zeros_like(x)
  for b, i, j, c in np.ndindex(x.shape):
    at = [i, j]
    at[axis - 1] += (c + 1) % 3 - 1
    if 0 <= at[0] < size[0] and 0 <= at[1] < size[1]:
      want[b, i, j, c] = x[b, at[0], at[1], c]
  np.testing.assert_array_equal(catalog.module_of("cycle_mlp").cycle(x, axis), want)


@pytest.mark.slow
def test_the_overview_lists_every_model_and_size():
  table = overview.table()
  assert table.row_count == sum(len(catalog.module_of(n).SIZES) - 1 for n in catalog.names())


@pytest.mark.parametrize(
  "name,fields,px,words",
  [
    ("cycle_mlp", dict(depths=(1, 1), widths=(4,), ratios=(2, 2)), 8, "the same number in each"),
    ("densenet", dict(blocks=(1,) * 5, growth=4, stem_width=8), 32, "leave nothing of"),
    ("densenet", dict(blocks=(1, 1), growth=4, stem_width=8, compression=0.01), 32, "compression"),
    ("cycle_mlp", dict(depths=(1,), widths=(4,), ratios=(2,)), 2, "from 3"),
    ("efficientnet", dict(stages=9), 32, "1 to 7"),
    ("all_cnn", dict(kernels=(3,)), 8, "padding='same'"),
  ],
)
def test_sizes_that_clash_are_told(name, fields, px, words):
  assert words in catalog.module_of(name).check(fields, px)[0]


def test_a_size_that_patches_do_not_tile_is_told():
  check = catalog.module_of("mixer").check
  assert check(dict(patch=9), 72) == [] == check(dict(patch=9, cells=4), 72)
  assert "multiples of 9" in check(dict(patch=9), 32)[0]
  assert "divisors of 8" in check(dict(patch=9, cells=3), 72)[0]


@pytest.mark.parametrize("cells,n,m", [(3, 3, 1), (4, 2, 4), (2, 2, 2), (1, 1, 1)])
def test_cells_are_means_over_parts_of_the_map(cells, n, m):
  """Of 6 x 4 positions; where `cells` do not share a side out, the largest factor does."""
  x = np.random.default_rng(0).normal(size=(2, 6, 4, 5))
  got = np.asarray(layers.cell_means(jnp.asarray(x), cells)).reshape(2, n, m, 5)
  for row, column in np.ndindex(n, m):
    part = x[:, row * 6 // n : (row + 1) * 6 // n, column * 4 // m : (column + 1) * 4 // m]
    np.testing.assert_allclose(got[:, row, column], part.mean((1, 2)), atol=1e-6)


@pytest.mark.parametrize("px,side", [(32, 1), (224, 7)])
def test_cells_that_no_map_of_a_cycle_mlp_has_are_refused(px, side):
  module = catalog.module_of("cycle_mlp")
  fields = module.SIZES["B1"] | dict(cells=2)
  assert f"({side}); allowed: 1" in module.check(fields, px)[0]
  assert module.check(fields | dict(dense_readout=True), px) == []


def test_cells_of_a_mixer_are_parts_of_its_grid_of_tokens():
  tokens = np.random.default_rng(0).normal(size=(36, 2, 5)).astype(np.float32)
  got = catalog.build(config_of("mixer", cells=3), classes=5)._pool(jnp.asarray(tokens))
  grid = tokens.reshape(6, 6, 2, 5).transpose(2, 0, 1, 3)
  np.testing.assert_allclose(got, layers.cell_means(jnp.asarray(grid), 3), rtol=1e-6)


@pytest.mark.parametrize("name,hidden", [("mlp", 16), ("mixer", 124), ("cycle_mlp", 52)])
def test_a_dense_readout_shows_the_head_every_hidden_unit(name, hidden, float64):
  """MLP: 2 x 8 units; Mixer: 8 features, 2 x (6 x 8 + 10) units; CycleMLP: 12, 2 x (8 + 12)."""
  model, weights, kinds = random_feasible(config_of(name, parts="ioc", dense_readout=True), 0)
  kernel = weights["params"]["head"]["kernel"]
  assert kernel.shape[0] == hidden and kinds["head"]["kernel"] == "shift"
  x = jnp.asarray(np.random.default_rng(0).uniform(0, 1, (3, 8, 8, 1)), jnp.float32)
  gradient = jax.grad(lambda w: (network(model)(w, x) ** 2).sum())(weights)
  assert (np.abs(gradient["params"]["head"]["kernel"]).max(1) > 0).all()


class Readout(nn.Module):
  """`dense_readout` alone, of a base."""

  @nn.compact
  def __call__(self, x_BxD, hidden_BxF):
    return layers.base().dense_readout(x_BxD, hidden_BxF, train=False, width=6)


def test_a_dense_readout_is_as_long_as_what_it_replaces(float64):
  """x and the normed units, all times sqrt(6 / 24): of mean square 1 a unit, 6 in the sum."""
  rng = np.random.default_rng(0)
  x, hidden = rng.normal(size=(4, 6)), [rng.normal(3, 5, size=(4, n)) for n in (8, 10)]
  got, _ = Readout().init_with_output(jax.random.key(0), x, hidden)
  units = np.concatenate(hidden, axis=1)
  units = (units - units.mean(1, keepdims=True)) / units.std(1, keepdims=True)  # LayerNorm.
  np.testing.assert_allclose(got, np.concatenate([x, units], axis=1) / 2, atol=1e-5)
  np.testing.assert_allclose((np.asarray(got[:, 6:]) ** 2).sum(1), 18 / 4, rtol=1e-5)


def test_patches_that_overlap_see_their_surroundings(float64):
  """Pixel (5, 5) lies in patch (1, 1), and in the window of patch (0, 0) as its last."""
  model, weights, _ = random_feasible(config_of("mixer", parts="ioc", overlap=2), 0)
  _, seen = model.apply(
    {"params": weights["params"], "batch_stats": weights["stats"]},
    jnp.zeros((1, 8, 8, 1)).at[0, 5, 5].set(1.0),
    capture_intermediates=lambda module, _: module.name == "stem",
  )
  stem, found = weights["params"]["stem"], seen["intermediates"]["stem"]["__call__"][0][0]
  assert stem["kernel"].shape[:2] == (8, 8)
  np.testing.assert_allclose(found[0, 0], stem["kernel"][7, 7, 0] + stem["bias"])
  np.testing.assert_allclose(found[1, 1], stem["kernel"][3, 3, 0] + stem["bias"])


def test_in_a_parallel_first_block_both_first_matrices_are_free(float64):
  *_, kinds = random_feasible(config_of("mixer", parts="ioc", parallel=True), 0)
  free = [kinds[f"block_{i}"]["channel_mixing"]["dense_0"]["kernel"] == "free" for i in (0, 1)]
  assert free == [True, False] and kinds["block_0"]["channel_mixing"]["dense_1"]["kernel"] != "free"
  assert kinds["block_0"]["norm_1"]["scale"] == "free" != kinds["block_1"]["norm_1"]["scale"]
