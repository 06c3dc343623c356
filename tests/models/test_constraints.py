"""The constraint: exactly non-negative, after every update, under every optimizer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from convex_jax.models import catalog, constraints
from convex_jax.models.variables import init_variables
from convex_jax.training import optimizer, step
from tests.support import draws


def adversarial_pairs(n=100_000):
  """Parameters >= 0 and updates that cancel them to within three units in the last place."""
  rng = np.random.default_rng(0)
  p = np.abs(rng.standard_normal(n)).astype(np.float32) * 10.0 ** rng.integers(-8, 3, n)
  p = p.astype(np.float32)
  nudge = rng.integers(-3, 4, n).astype(np.float32)
  near = -(p + nudge * np.spacing(p))
  far = rng.standard_normal(n).astype(np.float32)
  p[:100] = 0
  return np.concatenate([p, p]), np.concatenate([near, far]).astype(np.float32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_keep_agrees_with_optax_bitwise_where_optax_has_the_link(dtype):
  p, u = (jnp.asarray(a, dtype) for a in adversarial_pairs())
  oracle = optax.keep_params_nonnegative()
  ours = constraints.keep(optax.projections.projection_non_negative)

  @jax.jit
  def both(u, p):
    results = [tx.update(u, tx.init(p), p)[0] for tx in (oracle, ours)]
    return [optax.apply_updates(p, result) for result in results]

  want, got = both(u, p)
  np.testing.assert_array_equal(want, got)
  assert (got >= 0).all()  # Exact: no tolerance.
  assert float(jnp.mean(got == 0)) > 0.01  # The projection was needed.


@pytest.mark.parametrize("name", ["clamp", "exponentiate", "shift"])
def test_every_link_applies_its_projection(name):
  p, u = adversarial_pairs(9_000)
  p, u = p.reshape(-1, 10), u.reshape(-1, 10)
  link = constraints.LINKS[name]
  updates, _ = link.update(u, link.init(p), p)
  got = optax.apply_updates(p, updates)
  assert (got >= 0).all()
  want = constraints.PROJECTIONS[name](p.astype(np.float64) + u)
  np.testing.assert_allclose(got, want, rtol=1e-6, atol=2e-6 * max(1.0, np.abs(want).max()))


@pytest.fixture
def optimized():
  """The compiler as users have it, with the optimisations that tests turn off."""
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", True)


@pytest.mark.usefixtures("usual_emitters")
@pytest.mark.parametrize("name", ["clamp", "exponentiate", "shift"])
def test_a_link_holds_in_the_program_that_the_compiler_makes_of_a_whole_step(name, optimized):
  """With Adam's products fused in: a head once ended a run at -1.5e-11."""
  tx = optax.chain(
    optax.scale_by_adam(), optax.scale_by_learning_rate(1e-3), constraints.LINKS[name]
  )
  start = 0.01 * jnp.abs(jax.random.normal(jax.random.key(0), (128, 10)))

  def body(carry, i):
    params, state = carry
    noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), i), params.shape)
    updates, state = tx.update(noise, state, params)
    params = optax.apply_updates(params, updates)
    return (params, state), params.min()

  step = jax.jit(body)
  carry, smallest = (start, tx.init(start)), []
  for i in range(500):
    carry, low = step(carry, i)
    smallest.append(low)
  assert min(map(float, smallest)) >= 0  # Exact: no tolerance.
  assert carry[0].max() < 1


def test_exponentiate_is_the_map_of_the_2021_paper():
  w = np.array([-2.0, -1e-4, 0.0, 0.3], np.float32)
  want = [np.exp(-7.0), np.exp(-5.0001), 0.0, 0.3]
  np.testing.assert_allclose(constraints.exponentiate(w), want, rtol=1e-6)


def test_shift_changes_no_softmax_beyond_rounding():
  rng = np.random.default_rng(0)
  h, w = rng.standard_normal((64, 128)), rng.standard_normal((128, 10))
  with jax.enable_x64(True):
    shifted, clamped = (np.asarray(constraints.PROJECTIONS[k](w)) for k in ("shift", "clamp"))
    before, after, control = (
      np.asarray(jax.nn.softmax(h @ kernel)) for kernel in (w, shifted, clamped)
    )
  assert (shifted >= 0).all()
  np.testing.assert_allclose(before, after, atol=1e-13)
  assert np.abs(control - before).max() > 0.1  # A clamp does change it.


def test_shift_leaves_a_feasible_head_alone():
  w = jnp.asarray([[0.1, 2.0], [0.0, 1.0]])
  np.testing.assert_array_equal(constraints.shift(w), w)


WEIGHTS = {
  "kernel": jnp.asarray([[1.0, -2.0, 0.0], [3.0, 6.0, 0.0]]),  # Shares 0, 1/4; a unit without.
  "scale": jnp.asarray([1.0, -3.0]),  # One share, 3/4.
  "bias": jnp.asarray([-5.0]),
}
PENALISED = {"kernel": "penalised", "scale": "penalised", "bias": "free"}


@pytest.mark.parametrize("size", [1.0, 1e-3, jnp.asarray([1.0, 100.0, 7.0])])
def test_the_negative_shares_are_those_of_each_unit_whatever_its_size(size):
  weights = {**WEIGHTS, "kernel": WEIGHTS["kernel"] * size}
  got = constraints.negative_shares(weights, PENALISED)
  np.testing.assert_allclose(got, (0 + 1 / 4 + 0) / 3 + 3 / 4, rtol=1e-6)
  assert constraints.summary(weights, PENALISED) == {"negative_shares": got}


def test_only_what_is_negative_and_penalised_counts():
  free = dict.fromkeys(WEIGHTS, "free")
  assert (
    constraints.negative_shares(WEIGHTS, free) == 0 and constraints.summary(WEIGHTS, free) == {}
  )
  gradient = jax.grad(constraints.negative_shares)
  signs = jax.tree.map(jnp.sign, gradient(WEIGHTS, PENALISED))
  # Down from what is negative; up for what is positive beside it. A unit of one sign is left alone.
  np.testing.assert_array_equal(signs["kernel"], [[0, -1, 0], [0, -1, 0]])
  np.testing.assert_array_equal(signs["scale"], [-1, -1])
  np.testing.assert_array_equal(signs["bias"], [0])
  assert not any(map(jnp.any, jax.tree.leaves(gradient(jax.tree.map(abs, WEIGHTS), PENALISED))))


def test_a_penalised_weight_is_kept_as_it_is_by_a_state_like_that_of_free_ones():
  links = [constraints.enforce(kinds) for kinds in (PENALISED, dict.fromkeys(WEIGHTS, "free"))]
  states = [link.init(WEIGHTS) for link in links]
  assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])  # Also in a checkpoint.
  updates, _ = links[0].update(jax.tree.map(lambda w: -w - 1, WEIGHTS), states[0], WEIGHTS)
  for leaf in jax.tree.leaves(optax.apply_updates(WEIGHTS, updates)):
    np.testing.assert_array_equal(leaf, -1)


def test_a_tag_follows_the_weight_and_not_its_name():
  class Odd(nn.Module):
    @nn.compact
    def __call__(self, x):
      init = constraints.constrained(nn.initializers.normal(), "clamp")
      return x @ self.param("any_name_at_all", init, (3, 4)) + self.param(
        "kernel", nn.initializers.normal(), (4,)
      )

  boxed = Odd().init(jax.random.key(0), jnp.ones((1, 3)))["params"]
  assert constraints.constraints_of(boxed) == {"any_name_at_all": "clamp", "kernel": "free"}
  assert (nn.meta.unbox(boxed)["any_name_at_all"] >= 0).all()  # Feasible from the start.


def test_an_unknown_constraint_is_refused_where_the_layer_is_written():
  with pytest.raises(ValueError, match=r"Unknown constraint 'clmp'; expected one of free, .*clamp"):
    constraints.constrained(nn.initializers.ones, "clmp")


def test_a_link_without_parameters_is_refused():
  link = constraints.keep(constraints.shift)
  with pytest.raises(ValueError, match="needs `params`"):
    link.update(jnp.ones((2, 2)), link.init(jnp.ones((2, 2))))


def make_run(config, constraint="clamp", dtype=jnp.float32, average=True, enforce=True):
  """A tiny Mixer's jitted train_step and its first state, with batches of noise."""
  model = catalog.create_model("mixer", "tiny", "ioc", 3, dtype, constraint=constraint, depth=1)
  shape = (8, 8, 1)
  boxed = jax.eval_shape(lambda: init_variables(model, jax.random.key(0), shape))["params"]
  kinds = constraints.constraints_of(boxed)
  tx = optimizer.make_optimizer(
    config, 100, kinds if enforce else jax.tree.map(lambda _: "free", kinds)
  )
  state = jax.jit(lambda: step.init_state(model, tx, draws.key(0), shape, average))()

  @jax.jit
  def update(state, key):
    batch = {
      "image": jax.random.normal(key, (16, *shape)),
      "label": jax.random.randint(key, (16,), 0, 3),
      "position": jnp.arange(16),
    }
    return step.train_step(
      state,
      batch,
      model=model,
      tx=tx,
      augment=lambda _, image: image,
      key=key,
      label_smoothing=0.1,
      ema_decay=0.9,
      tagged=kinds,
    )[0]

  return update, state, kinds


def tagged(tree, kinds):
  pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(kinds), strict=True)
  return [leaf for leaf, kind in pairs if kind != "free"]


EVERY_STEP = [(name, "clamp", 1, "float32") for name in optimizer.OPTIMIZERS]
EVERY_STEP += [("adam", "exponentiate", 1, "float32"), ("sgd", "exponentiate", 3, "bfloat16")]
EVERY_STEP += [("adamw", "clamp", 3, "float32"), ("lion", "clamp", 1, "bfloat16")]


@pytest.mark.parametrize("name,constraint,accumulate,dtype", EVERY_STEP)
def test_every_tagged_value_is_feasible_after_every_step(name, constraint, accumulate, dtype):
  config = base.get_config().optimizer
  config.update(name=name, accumulate=accumulate, learning_rate=0.3)
  config.weight_decay = 0.0 if name == "adam" else 0.1
  update, state, kinds = make_run(config, constraint, jnp.dtype(dtype))
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))
  for i in range(6):
    state = update(state, draws.key(i))
    leaves = tagged(state.params, kinds) + tagged(state.ema["params"], kinds)
    assert len(leaves) > 15
    assert all((leaf >= 0).all() for leaf in leaves)  # Exact: no tolerance.


def test_without_the_last_link_weights_turn_negative():
  """The control: the steps above are large enough for the constraint to matter."""
  config = base.get_config().optimizer
  config.learning_rate = 0.3
  update, state, kinds = make_run(config, enforce=False)
  for i in range(6):
    state = update(state, draws.key(i))
  assert min(leaf.min() for leaf in tagged(state.params, kinds)) < -0.1


def test_a_projection_that_is_not_last_does_not_hold():
  """Why `enforce` is the last link: one after it can undo it."""
  params = {"w": jnp.array([0.0, 0.2])}
  early = optax.chain(constraints.enforce({"w": "clamp"}), optax.scale(2.0))
  updates, _ = early.update({"w": jnp.array([-1.0, -1.0])}, early.init(params), params)
  assert (optax.apply_updates(params, updates)["w"] < 0).any()


def test_summary_counts_constrained_weights_alone():
  params = {"a": jnp.array([0.0, 0.0, 3.0, 1.0]), "b": jnp.array([-5.0, 0.0])}
  got = constraints.summary(params, {"a": "clamp", "b": "free"})
  assert got == {"smallest_constrained": 0.0, "zero_share": 0.5}
  assert constraints.summary(params, {"a": "free", "b": "free"}) == {}
