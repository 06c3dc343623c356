"""Every architecture, every twin: counts, tags, gradients, and convexity in float64."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convex_jax.models import catalog, layers, overview
from convex_jax.models.constraints import FREE, PENALISED, constraints_of
from convex_jax.models.parts import TWINS, Parts
from convex_jax.models.variables import apply, init_variables
from tests.support import draws
from tests.support.midpoints import midpoint_gaps

EVERY_TWIN = [(name, twin) for name in catalog.names() for twin in TWINS]


FEWER = {"efficientnet": {"stages": 2}}  # Of three: the last differs by its 5 x 5 kernels alone.


def tiny(name, twin="base", classes=3, **changes):
  return catalog.create_model(name, "tiny", twin, classes, **FEWER.get(name, {}) | changes)


@functools.cache
def abstract(model, px=8, channels=3):
  """The shapes of a network's variables, in their boxes."""
  return jax.eval_shape(lambda: init_variables(model, jax.random.key(0), (px, px, channels)))


def tags(model):
  """The constraint of each parameter by its path."""
  leaves = jax.tree_util.tree_flatten_with_path(constraints_of(abstract(model)["params"]))[0]
  return {"/".join(key.key for key in path): kind for path, kind in leaves}


def feasible(model, seed=0, px=8, channels=1):
  """(weights, tags): free weights of either sign, tagged ones >= 0, averages not trivial."""
  boxed, rng = abstract(model, px, channels), np.random.default_rng(seed)
  kinds = constraints_of(boxed["params"])

  def draw(leaf, kind):
    value = rng.standard_normal(leaf.shape) / np.sqrt(max(1, leaf.size / leaf.shape[-1]))
    return jnp.asarray(value if kind == FREE else np.abs(value))

  params = jax.tree.map(draw, nn.meta.unbox(boxed["params"]), kinds)
  stats = jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.3, 2, leaf.shape)), boxed["stats"])
  return {"params": params, "stats": stats}, kinds


@functools.cache
def network(model):
  """Logits as a jitted function of weights and images: mutants share one program."""
  return jax.jit(functools.partial(apply, model))


def worst_gap(f, weights, seed=0, pairs=200, shape=(8, 8, 1)):
  """The largest midpoint gap over pairs and logits: <= 0 where convex."""
  return midpoint_gaps(functools.partial(f, weights), shape, pairs=pairs, seed=seed).max()


def training_pass(model, weights, images, key):
  variables = {"params": weights["params"], "batch_stats": weights["stats"]}
  rngs = {"dropout": key}
  return model.apply(variables, images, train=True, mutable=["batch_stats"], rngs=rngs)[0]


@pytest.fixture
def float64():
  """64-bit JAX: rounding must neither hide nor fake a small violation."""
  with jax.enable_x64(True):
    yield


PUBLISHED = [  # Parameters and 10^9 multiply-accumulates of public implementations.
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


LARGE = [("densenet", "161"), ("densenet", "169"), ("densenet", "201"), ("densenet", "100-12")]
LARGE += [("densenet", size) for size in ("100-24", "BC-250-24", "BC-190-40")]
LARGE += [("cycle_mlp", "B4"), ("cycle_mlp", "B5")]
LARGE += [("efficientnet", f"B{i}") for i in (2, 4, 5, 6, 7)]


@pytest.mark.parametrize(
  "name,size,classes,px,parameters,giga",
  [pytest.param(*row, marks=[pytest.mark.slow] * (row[:2] in LARGE)) for row in PUBLISHED],
)
def test_parameters_and_work_equal_the_published(name, size, classes, px, parameters, giga):
  count, work = overview.describe(name, size, "base", classes, px)
  assert count == parameters
  assert work / 1e9 == pytest.approx(giga, rel=0.01 if giga > 0.1 else 0.02)


@pytest.mark.parametrize("name", catalog.names())
def test_the_paper_twin_has_the_parameters_of_the_base(name):
  _, size, classes, px, parameters, _ = next(row for row in PUBLISHED if row[0] == name)
  assert overview.describe(name, size, "paper", classes, px)[0] == parameters


@pytest.mark.parametrize("twin", ["base", "ioc"])
def test_densenets_transitions_may_pool_first(twin):
  """As published, with dropout, they pool last: the same at inference, including gradients."""
  weights, _ = feasible(tiny("densenet", twin), px=16, channels=3)
  x = jax.random.normal(jax.random.key(0), (4, 16, 16, 3))

  def loss(params, x, dropout):
    model = tiny("densenet", twin, dropout=dropout)
    logits = apply(model, {**weights, "params": params}, x)
    return jnp.sum(jnp.sin(logits)), logits

  (first, last) = (
    jax.jit(jax.grad(functools.partial(loss, dropout=dropout), (0, 1), has_aux=True))(
      weights["params"], x
    )
    for dropout in (0.0, 0.5)
  )
  for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(last), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_the_2021_papers_all_cnn_twin_doubles_the_first_convolution():
  """Sivaprasad et al. 2021: more units in the one layer whose signs are free."""
  models = {t: catalog.create_model("all_cnn", "ioc_paper", t, 10) for t in TWINS}
  params = {t: nn.meta.unbox(abstract(m, 32)["params"]) for t, m in models.items()}
  widths = {t: p["conv_0"]["kernel"].shape[-1] for t, p in params.items()}
  assert widths == {"base": 96, "ioc": 96, "paper": 192}


GOLDEN = [
  ("mlp", "800x3", 10, 32, 3_906_410),
  ("mixer", "seed", 10, 72, 201_162),
]


@pytest.mark.parametrize("name,size,classes,px,want", GOLDEN)
def test_parameter_counts_of_the_convex_twins_are_known(name, size, classes, px, want):
  """Golden: a change here changes the architecture and belongs into the changelog.

  MLP: 3,752,810 + 3 x 64 x 800 passthrough. Mixer: 200,202 + 4 (64 + 128) scales of
  branches + 3 x 64 scales of the passthrough.
  """
  assert overview.describe(name, size, "ioc", classes, px)[0] == want


FIRST_AFFINE_PARTS = {  # Weights that may have either sign in `ioc`, by reading the architecture.
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
  kinds = tags(tiny(name, "ioc"))
  free = {p for p, kind in kinds.items() if kind == FREE and not p.endswith("bias")}
  assert {p for p in free if "passthrough" not in p} == FIRST_AFFINE_PARTS[name]
  # The class map of All-CNN is followed by an activation: a common term would not stay one.
  assert kinds["head/kernel"] == ("clamp" if name == "all_cnn" else "shift")
  assert any("passthrough" in p for p in free)


@pytest.mark.parametrize("name", catalog.names())
def test_what_is_penalised_in_base_is_what_is_clamped_in_ioc(name):
  alike = {"norm": "batch", "gates": "static"}
  base, ioc = tags(tiny(name, common_penalty=0.1, **alike)), tags(tiny(name, "ioc", **alike))
  penalised = {path for path, kind in base.items() if kind == PENALISED}
  assert penalised == {path for path, kind in ioc.items() if kind == "clamp" and path in base}
  assert penalised and {base[path] for path in base.keys() - penalised} == {FREE}
  assert base == tags(tiny(name, "base", common_penalty=9.0, **alike))
  assert PENALISED not in tags(tiny(name, "ioc", common_penalty=0.1)).values()
  # In ioc's own architecture: all that is clamped there, and its head as it is.
  free = tags(tiny(name, "ioc", constraint="penalised", **alike))
  assert free == {path: kind.replace("clamp", PENALISED) for path, kind in ioc.items()}


@pytest.mark.parametrize("name", catalog.names())
def test_base_is_untagged_and_paper_keeps_its_norm(name):
  assert set(tags(tiny(name)).values()) == {FREE}
  assert "clamp" in tags(tiny(name, "paper")).values()
  assert bool(abstract(tiny(name, "paper"))["stats"]) == (name in OWN_BATCH_NORM)
  assert "exponentiate" in tags(tiny(name, "paper", constraint="exponentiate")).values()


@pytest.mark.parametrize("name", catalog.names())
@pytest.mark.parametrize("twin", ["base", "paper"])
def test_passthrough_acts_in_ioc_alone(name, twin):
  with_it, without = (tags(tiny(name, twin, passthrough=p)).keys() for p in (True, False))
  assert with_it == without
  assert tags(tiny(name, "ioc")).keys() > tags(tiny(name, "ioc", passthrough=False)).keys()


@pytest.mark.parametrize("name,twin", EVERY_TWIN)
def test_shapes_and_finite_gradients_everywhere(name, twin):
  whole = {"stages": 3} if (name, twin) == ("efficientnet", "base") else {}
  model, images = tiny(name, twin, **whole), jax.random.normal(jax.random.key(0), (4, 8, 8, 2))

  @jax.jit
  def gradient(key):
    weights = nn.meta.unbox(init_variables(model, key, (8, 8, 2)))

    def loss(params):
      logits = training_pass(model, {**weights, "params": params}, images, draws.key(2))
      return (logits * jnp.arange(12.0).reshape(4, 3)).sum()

    return weights, jax.grad(loss)(weights["params"])

  weights, grads = gradient(draws.key(1))
  assert jax.eval_shape(network(model), weights, images).shape == (4, 3)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("name", catalog.names())
def test_dropout_is_off_in_evaluation(name):
  """Evaluation needs no key and ignores one; two training passes differ."""
  drops = {"all_cnn": {"dropout": 0.5}, "densenet": {"dropout": 0.5}, "mlp": {}}
  fields = drops.get(name, {"drop_path": 0.5})
  model, images = tiny(name, "ioc", **fields), jax.random.normal(jax.random.key(0), (4, 8, 8, 1))
  weights, _ = feasible(model)

  @jax.jit
  def keyed(weights, x):
    variables = {"params": weights["params"], "batch_stats": weights["stats"]}
    return model.apply(variables, x, rngs={"dropout": jax.random.key(0)})

  # Two programs: their sums may be rounded in another order.
  np.testing.assert_allclose(keyed(weights, images), network(model)(weights, images), rtol=1e-5)
  train = jax.jit(lambda key: training_pass(model, weights, images, key))
  assert bool(jnp.any(train(draws.key(0)) != train(draws.key(1)))) == bool(fields)


REMATERIALISED = [
  name if name in ("mixer", "densenet") else pytest.param(name, marks=pytest.mark.slow)
  for name in catalog.names()
]


@pytest.mark.parametrize("name", REMATERIALISED)
def test_rematerialisation_changes_nothing(name):
  images = jax.random.normal(jax.random.key(0), (4, 8, 8, 1))
  weights, _ = feasible(tiny(name, "ioc"))
  results = []
  for remat in (False, True):
    model = tiny(name, "ioc", remat=remat)

    def loss(params, model=model):
      return (training_pass(model, {**weights, "params": params}, images, draws.key(2)) ** 2).sum()

    results.append(jax.jit(jax.value_and_grad(loss))(weights["params"]))
  leaves = [jax.tree.leaves(result) for result in results]
  # What cancels before a norm is 0 but for rounding, of the size of the other gradients.
  scale = max(float(abs(leaf).max()) for leaf in leaves[0])
  for plain, again in zip(*leaves, strict=True):
    np.testing.assert_allclose(plain, again, rtol=1e-4, atol=3e-6 * scale)


def test_densenet_at_inference_does_not_hold_all_its_growing_maps():
  layers, batch, px = 16, 16, 16
  model = catalog.create_model("densenet", "BC-100-12", classes=10, blocks=(layers,))
  weights = nn.meta.unbox(abstract(model, px))
  images = jax.ShapeDtypeStruct((batch, px, px, 3), jnp.float32)

  def temporaries(function):
    compiled = jax.jit(function).lower(weights, images).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  maps = sum(24 + 12 * i for i in range(layers)) * batch * px * px * 4  # Bytes of all of them.
  assert temporaries(network(model)) < maps / 2
  loss = jax.grad(lambda w, x: network(model)(w, x).sum())
  assert temporaries(loss) > maps  # The control: a backward pass needs them.


def tiny64(name, twin="ioc", **changes):
  return tiny(name, twin, classes=5, dtype=jnp.float64, **changes)


@pytest.mark.parametrize("name", catalog.names())
def test_ioc_is_convex_whatever_the_free_weights(name, float64):
  model = tiny64(name)
  logits = jax.eval_shape(network(model), feasible(model)[0], jnp.zeros((1, 8, 8, 1)))
  assert logits.dtype == jnp.float64
  for seed in range(2):
    assert worst_gap(network(model), feasible(model, seed)[0], seed) <= 1e-12


FORMS = [  # That the tiny sizes do not cover.
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
  model = tiny64(name, **fields)
  assert worst_gap(network(model), feasible(model)[0]) <= 1e-12


LEAST = [  # Where a part that later layers use has none.
  ("mlp", dict(depth=1)),
  ("mixer", dict(depth=1)),
  ("cycle_mlp", dict(depths=(1,), widths=(8,), ratios=(2,))),
  ("densenet", dict(blocks=(1,))),
  ("efficientnet", dict(stages=1)),
]


@pytest.mark.parametrize("name,fields", LEAST, ids=str)
def test_every_weight_has_an_effect(name, fields):
  model = tiny(name, "ioc", **fields)
  weights, _ = feasible(model)
  images = jax.random.normal(jax.random.key(0), (4, 8, 8, 1))
  slopes = jax.jit(jax.grad(lambda weights: (network(model)(weights, images) ** 2).sum()))(weights)
  for path, leaf in jax.tree_util.tree_leaves_with_path(slopes):
    assert leaf.any(), jax.tree_util.keystr(path)


NOT_CONVEX = [(name, "base") for name in catalog.names()]
NOT_CONVEX += [(name, "paper") for name in ("mixer", "cycle_mlp")]  # Sampling misses SE gates.


@pytest.mark.parametrize("name,twin", NOT_CONVEX)
def test_the_falsifier_sees_networks_that_are_not_convex(name, twin, float64):
  """The negative control: a norm or a gate made of features, or weights of either sign."""
  model = tiny64(name, twin)
  assert worst_gap(network(model), feasible(model)[0]) > 1e-6
  assert twin == "base" or catalog.module_of(name).PAPER_BREAKS


@pytest.mark.parametrize("name", catalog.names())
def test_the_falsifier_sees_tagged_weights_turned_negative(name, float64):
  """Tags are needed: sampling finds a constrained matrix of the wrong sign.

  Each one in the shallow networks; in the deep ones strongly convex paths in parallel to it hide
  some.
  """
  model = tiny64(name)
  weights, kinds = feasible(model)
  leaves, tree = jax.tree.flatten(weights["params"])
  found, total, pairs = 0, 0, 50 if name == "densenet" else 200  # The slowest finds many.
  for i, kind in enumerate(jax.tree.leaves(kinds)):
    if kind == FREE:
      continue
    wrong = [-leaf if j == i else leaf for j, leaf in enumerate(leaves)]
    mutant = {**weights, "params": jax.tree.unflatten(tree, wrong)}
    total += 1
    found += worst_gap(network(model), mutant, pairs=pairs) > 1e-9
  # MLP: the first BatchNorm acts on an affine map of the image, where a sign is free.
  missed = {"mlp": 1, "mixer": 0}.get(name, total // 2)
  assert found >= total - missed and total >= 4


@pytest.mark.parametrize("name", catalog.names())
@pytest.mark.parametrize("twin", ["ioc", "paper"])
def test_partly_convex_networks_are_convex_in_their_features(name, twin, float64):
  """A free trunk and a tagged head: logits convex in the features and not in the image."""
  config = catalog.model_config(name, "tiny", twin, convex_from="head", head_depth=2, head_width=7)
  model = catalog.build(config, 5, dtype=jnp.float64)
  weights, kinds = feasible(model)
  tagged = {k for k, v in kinds.items() if set(jax.tree.leaves(v)) != {FREE}}
  assert tagged == {"head"}
  head = catalog.build_head(config, 5, dtype=jnp.float64)
  params = {"params": weights["params"]["head"], "stats": weights["stats"]["head"]}
  width = weights["params"]["head"]["dense_0"]["kernel"].shape[0]
  assert worst_gap(network(head), params, shape=(width,)) <= 1e-12
  assert worst_gap(network(model), weights) > 1e-6
  # The control: the same head without the constraint.
  free = {**params, "params": jax.tree.map(lambda w: w - w.mean(), params["params"])}
  assert worst_gap(network(head), free, shape=(width,)) > 1e-6


@pytest.mark.parametrize("name", catalog.names())
def test_a_deeper_head_keeps_the_whole_convex(name, float64):
  model = tiny64(name, head_depth=1, head_width=7)
  assert worst_gap(network(model), feasible(model)[0]) <= 1e-12


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


@pytest.mark.parametrize("cells,n,m", [(3, 3, 1), (4, 2, 4), (2, 2, 2), (1, 1, 1)])
def test_cells_are_means_over_parts_of_the_map(cells, n, m):
  """Of 6 x 4 positions; where `cells` does not divide a side, their largest common factor does."""
  x = np.random.default_rng(0).normal(size=(2, 6, 4, 5))
  got = np.asarray(layers.cell_means(jnp.asarray(x), cells)).reshape(2, n, m, 5)
  for row, column in np.ndindex(n, m):
    part = x[:, row * 6 // n : (row + 1) * 6 // n, column * 4 // m : (column + 1) * 4 // m]
    np.testing.assert_allclose(got[:, row, column], part.mean((1, 2)), atol=1e-6)


def calls(model, weights, x):
  """(first argument, result) of each of a network's own layers, by name."""
  seen = {}

  def record(call, args, kwargs, context):
    out = call(*args, **kwargs)
    if len(context.module.path) == 1 and context.method_name == "__call__":
      seen[context.module.name] = args[0], out
    return out

  with nn.intercept_methods(record):
    apply(model, weights, x)
  return seen


def test_cells_of_a_mixer_are_parts_of_its_grid_of_tokens():
  """Of 4 x 4 patches, in 2 x 2 cells."""
  model = tiny("mixer", patch=2, cells=2)
  x = jax.random.normal(jax.random.key(0), (3, 8, 8, 1))
  seen = calls(model, feasible(model)[0], x)
  tokens_SxBxD = seen["norm"][1]
  grid = tokens_SxBxD.reshape(4, 4, *tokens_SxBxD.shape[1:]).transpose(2, 0, 1, 3)
  np.testing.assert_allclose(seen["head"][0], layers.cell_means(grid, 2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name,hidden", [("mlp", 16), ("mixer", 124), ("cycle_mlp", 52)])
def test_a_dense_readout_shows_the_head_every_hidden_unit(name, hidden, float64):
  """MLP: 2 x 8 units; Mixer: 8 features, 2 x (6 x 8 + 10) units; CycleMLP: 12, 2 x (8 + 12)."""
  model = tiny64(name, dense_readout=True)
  weights, kinds = feasible(model)
  kernel = weights["params"]["head"]["kernel"]
  assert kernel.shape[0] == hidden and kinds["head"]["kernel"] == "shift"
  x = jnp.asarray(np.random.default_rng(0).uniform(0, 1, (3, 8, 8, 1)), jnp.float32)

  def squares(head):
    params = {**weights["params"], "head": head}
    return (apply(model, {**weights, "params": params}, x) ** 2).sum()

  gradient = jax.jit(jax.grad(squares))(weights["params"]["head"])["kernel"]
  assert (np.abs(gradient).max(1) > 0).all()


class Readout(nn.Module):
  """`dense_readout` alone, in a base."""

  @nn.compact
  def __call__(self, x_BxD, hidden_BxF):
    return Parts().dense_readout(x_BxD, hidden_BxF, train=False, width=6)


def test_a_dense_readout_is_as_long_as_what_it_replaces(float64):
  """x and the normed units, times sqrt(6 / 24): mean square 1 per unit, 6 in the sum."""
  rng = np.random.default_rng(0)
  x, hidden = rng.normal(size=(4, 6)), [rng.normal(3, 5, size=(4, n)) for n in (8, 10)]
  got, _ = Readout().init_with_output(jax.random.key(0), x, hidden)
  units = np.concatenate(hidden, axis=1)
  units = (units - units.mean(1, keepdims=True)) / units.std(1, keepdims=True)  # LayerNorm.
  np.testing.assert_allclose(got, np.concatenate([x, units], axis=1) / 2, atol=1e-5)
  np.testing.assert_allclose((np.asarray(got[:, 6:]) ** 2).sum(1), 18 / 4, rtol=1e-5)


def test_patches_that_overlap_see_their_surroundings(float64):
  """Pixel (5, 5) is in patch (1, 1), and is the last of the window of patch (0, 0)."""
  model = tiny64("mixer", overlap=2)
  weights, _ = feasible(model)
  found = calls(model, weights, jnp.zeros((1, 8, 8, 1)).at[0, 5, 5].set(1.0))["stem"][1][0]
  stem = weights["params"]["stem"]
  assert stem["kernel"].shape[:2] == (8, 8)
  np.testing.assert_allclose(found[0, 0], stem["kernel"][7, 7, 0] + stem["bias"])
  np.testing.assert_allclose(found[1, 1], stem["kernel"][3, 3, 0] + stem["bias"])


def test_in_a_parallel_first_block_both_first_matrices_are_free():
  kinds = tags(tiny("mixer", "ioc", parallel=True))
  free = {path for path, kind in kinds.items() if kind == FREE}
  assert {"block_0/channel_mixing/dense_0/kernel", "block_0/norm_1/scale"} <= free
  constrained = {f"block_1/{path}" for path in ("channel_mixing/dense_0/kernel", "norm_1/scale")}
  assert not free & {*constrained, "block_0/channel_mixing/dense_1/kernel"}
