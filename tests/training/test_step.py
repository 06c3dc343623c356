"""One update: the same on 1, 2 and 8 devices, under pmap, and in one call of many steps."""

import functools
import importlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convex_jax import mesh
from convex_jax.data import augment, preprocess
from convex_jax.data.in_memory import InMemory
from convex_jax.models import catalog, constraints
from convex_jax.training import optimizer, program, step
from tests.support import of
from tests.support.running import leaves_close, run_steps

RECIPE = {
  "mixup": 0.8,
  "cutmix": 1.0,
  "data__erasing": 0.5,
  "data__jitter": 0.4,
  "data__randaugment": (2, 9.0),
  "data__repeats": 2,
}


@pytest.mark.parametrize(
  "changes",
  [
    {},
    pytest.param({"model__parts": "base"}, marks=pytest.mark.slow),
    pytest.param(RECIPE, marks=pytest.mark.slow),
  ],
  ids=["ioc", "base", "recipe"],
)
def test_world_sizes_agree(tiny_config, few_digits, changes):
  """BatchNorm sees the global batch; order, augmentation and mixing know no devices."""
  config = of(tiny_config, model__depth=2, optimizer__name="sgd", **changes)
  calls = [range(i, i + 1) for i in range(4)]
  _, want, losses = run_steps(config, few_digits, 1, calls)
  for devices in (2, 8):
    job, got, other = run_steps(config, few_digits, devices, calls)
    np.testing.assert_allclose(other, losses, rtol=1e-5)
    leaves_close(got, want, atol=1e-6)
    figures = job.evaluate(got, final=True)
    assert figures["test_accuracy"] * 50 == pytest.approx(round(figures["test_accuracy"] * 50))


def test_resident_and_sent_batches_train_to_the_same_bits(tiny_config, few_digits, usual_emitters):
  calls = [range(i, i + 1) for i in range(3)]
  (_, resident, losses), (_, sent, others) = (
    run_steps(of(tiny_config, data__loader=loader), few_digits, 2, calls)
    for loader in ("resident", "host")
  )
  assert losses == others and len(losses) == 3
  for a, b in zip(jax.tree.leaves(resident), jax.tree.leaves(sent), strict=True):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_several_steps_a_call_are_the_same_steps(tiny_config, few_digits):
  config = of(tiny_config, optimizer__name="sgd")
  _, one, losses = run_steps(config, few_digits, 1, [range(i, i + 1) for i in range(4)])
  _, four, stacked = run_steps(config, few_digits, 1, [range(0, 4)])
  np.testing.assert_allclose(stacked, losses, rtol=1e-5)
  leaves_close(four, one, atol=1e-6)
  assert int(four.step) == 4


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_the_update_is_a_branch_on_a_cpu_alone(tiny_config, few_digits, monkeypatch, platform):
  """Elsewhere gradients would be stored for it in float32."""
  monkeypatch.setattr(mesh, "target", lambda: (platform, 1))
  job = program.Program(tiny_config, few_digits, mesh.make_mesh(jax.devices()[:1]))
  plan, arrays = job.batches(range(1)), job.splits["train"].arrays
  traced = jax.make_jaxpr(job._train_call)(job.state_shapes(), arrays, plan)
  assert ("cond[" in str(traced)) == (platform == "cpu")


@pytest.mark.parametrize("devices", [1, 8])
def test_the_norm_of_gradients(devices):
  rng, few = np.random.default_rng(0), mesh.make_mesh(jax.devices()[:devices])
  shapes = [(), (5,), (4, 3), (3, 3, 2, 4)]
  grads = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
  norm = jax.jit(mesh.traced_on(few, step._norm))
  whole = np.concatenate([g.ravel() for g in grads]).astype(float)
  np.testing.assert_allclose(norm(grads), np.linalg.norm(whole), rtol=1e-6)
  for place, value in itertools.product(range(len(grads)), (np.nan, np.inf, -np.inf)):
    spoilt = [g.copy() for g in grads]
    spoilt[place].flat[-1] = value
    assert not np.isfinite(norm(spoilt))


def test_pmap_with_an_axis_name_gives_the_same_update(tiny_config, few_digits):
  """The card's `jax.pmap`: gradients averaged, BatchNorm over the axis. 4 devices."""
  config = of(tiny_config, optimizer__name="sgd", data__crop_padding=1)
  job, want, losses = run_steps(config, few_digits, 1, [range(0, 1), range(1, 2)])
  shape = job.image_shape
  model = catalog.build(config.model, 10, axis_name="batch")
  boxed = jax.eval_shape(lambda: step.init_variables(model, jax.random.key(0), shape))
  tx = optimizer.make_optimizer(
    config.optimizer, job.total_steps, constraints.constraints_of(boxed["params"])
  )
  prepare = preprocess.make_prepare(8, *few_digits.train.statistics())
  update = functools.partial(
    step.train_step,
    model=model,
    tx=tx,
    augment=augment.make_augment(config.data, prepare),
    key=jax.random.split(jax.random.key(config.seed))[1],
    label_smoothing=0.0,
    ema_decay=0.0,
    axis_name="batch",
  )
  devices = jax.devices()[:4]
  state = jax.tree.map(lambda a: jnp.stack([jnp.asarray(a)] * 4), jax.device_get(job.init()))
  pmapped = jax.pmap(update, axis_name="batch", devices=devices)
  feed = InMemory(few_digits.train, mesh.make_mesh(jax.devices()[:1]), resident=False)
  for i in range(2):
    plan = feed.train_plan(range(i, i + 1), 16, config.seed)
    batch = {
      name: np.asarray(column).reshape(4, 4, *column.shape[2:]) for name, column in plan.items()
    }
    state, metrics = pmapped(state, batch)
    np.testing.assert_allclose(metrics["loss"], [losses[i]] * 4, rtol=1e-5)
  leaves_close(jax.tree.map(lambda a: a[0], state), jax.device_get(want), atol=1e-6)


def test_evaluation_counts_every_example_once_whatever_the_batch(tiny_config, few_digits):
  figures = []
  for batch_size, devices in ((16, 8), (50, 1), (8, 2)):
    config = of(tiny_config, batch_size=batch_size)
    job = program.Program(config, few_digits, mesh.make_mesh(jax.devices()[:devices]))
    figures.append(job.evaluate(job.init(), final=True))
  state, model = job.init(), job.model
  prepare = preprocess.make_prepare(8, *few_digits.train.statistics())
  apply = jax.jit(functools.partial(step.apply, model))
  logits = apply(state.weights(), prepare(jnp.asarray(few_digits.test.images)))
  accuracy = float(np.mean(np.asarray(logits).argmax(-1) == few_digits.test.labels))
  for row in figures:
    assert row["test_accuracy"] == pytest.approx(accuracy, abs=1e-6)
    assert row["test_loss"] == pytest.approx(figures[0]["test_loss"], rel=1e-5)
    assert row["smallest_constrained"] >= 0 and 0 <= row["zero_share"] <= 1


def test_averaged_weights_follow_their_formula(tiny_config, few_digits):
  config = of(tiny_config, ema_decay=0.5)
  job = program.Program(config, few_digits, mesh.make_mesh(jax.devices()[:1]))
  state = job.init()
  average = jax.device_get(state.params)
  for i in range(3):
    state, _ = job.train_call(state, job.batches(range(i, i + 1)))
    decay = min(0.5, (1 + i) / (10 + i))
    new = jax.device_get(state.params)
    average = jax.tree.map(lambda a, p, d=decay: d * a + (1 - d) * p, average, new)
  leaves_close(state.ema["params"], average, atol=1e-7)
  assert state.weights() is state.ema


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters(tiny_config, few_digits):
  calls = [range(i, i + 1) for i in range(3)]  # The head starts at 0: the first loss is ln 10.
  _, state, losses = run_steps(of(tiny_config, dtype="bfloat16"), few_digits, 1, calls)
  _, _, exact = run_steps(tiny_config, few_digits, 1, calls)
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))
  assert 0 < abs(losses[2] - exact[2]) < 0.05 * exact[2]


PENALTIES = {"model__common_penalty": 0.5, "jacobian_penalty": 0.5}


@pytest.fixture
def free_config(tiny_config):
  """Of a tiny network as published, on digits, trained like `tiny_config`."""

  def make(name="mlp", **changes):
    config = importlib.import_module(f"configs.{name}").get_config("digits")
    own = {key: None for key, value in config.model.items() if key in catalog.fields(name)}
    config.model.update(own | {"size": "tiny"} | ({"patch": 4} if name == "mixer" else {}))
    config.data.dir = tiny_config.data.dir
    common = {"batch_size": 16, "steps": 6}
    common |= {"optimizer__name": "sgd", "optimizer__warmup_steps": 0}
    return of(config, **common | changes)

  return make


@pytest.mark.slow
@pytest.mark.parametrize(
  "changes",
  [
    {"optimizer__accumulate": 2},
    {"name": "mixer", "model__remat": True, "model__norm": "batch"},
    RECIPE,
  ],
  ids=["accumulate", "remat", "recipe"],
)
def test_world_sizes_agree_on_the_penalties(free_config, few_digits, changes):
  config = free_config(**PENALTIES | changes)
  calls = [range(i, i + 1) for i in range(4)]
  _, want, losses = run_steps(config, few_digits, 1, calls)
  _, got, other = run_steps(config, few_digits, 4, calls)
  np.testing.assert_allclose(other, losses, rtol=1e-5)
  # The gradients of biases before a norm are rounding errors alone, of either program.
  leaves_close(got, want, atol=5e-6)
  _, _, free = run_steps(free_config(**changes), few_digits, 1, calls[:1])
  assert losses[0] > free[0] + 0.1


def test_the_penalty_is_a_term_of_the_loss_and_lowers_the_negative_shares(free_config, few_digits):
  config = free_config(model__common_penalty=3.0, optimizer__learning_rate=0.1)
  job, state, losses = run_steps(config, few_digits, 1, [range(i, i + 1) for i in range(6)])
  start, end = (
    constraints.summary(params, job.constraints)["negative_shares"]
    for params in (job.init().params, state.params)
  )
  assert 0 < losses[0] - 3 * float(start) < 2 * np.log(10)  # The cross-entropy.
  assert 0.4 < start < 0.6 and end < 0.9 * start


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=[] if name in ("mixer", "mlp") else [pytest.mark.slow])
    for name in catalog.names()
  ],
)
def test_the_jacobian_term_is_unbiased(free_config, few_digits, name, monkeypatch):
  """With a basis for directions, its mean is half the sum of the squares of the whole Jacobian."""
  config = free_config(name)
  job = program.Program(config, few_digits, mesh.make_mesh(jax.devices()[:1]))
  state = job.init()
  batch = {
    "image": jnp.asarray(few_digits.train.images[:4]),
    "label": jnp.asarray(few_digits.train.labels[:4]),
    "position": jnp.arange(4),
  }
  prepare = preprocess.make_prepare(8, *few_digits.train.statistics())

  @functools.partial(jax.jit, static_argnames="penalty")
  def loss(direction_K, penalty):
    monkeypatch.setattr(
      step, "directions", lambda keys, classes: jnp.broadcast_to(direction_K, (len(keys), classes))
    )
    _, metrics = step.train_step(
      state,
      batch,
      model=job.model,
      tx=job.tx,
      augment=lambda keys, images: prepare(images),
      key=jax.random.key(0),
      label_smoothing=0.0,
      ema_decay=0.0,
      jacobian_penalty=penalty,
    )
    return metrics["loss"]

  basis = np.sqrt(10) * np.eye(10, dtype=np.float32)
  got = np.mean([loss(v, 0.3) for v in basis]) - loss(basis[0], 0.0)

  def summed(image):
    variables = {"params": state.params, "batch_stats": state.stats}
    rngs = {"dropout": jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 2**32 - 1), 0)}
    return job.model.apply(variables, image, train=True, mutable=["batch_stats"], rngs=rngs)[0].sum(
      0
    )

  jacobian = jax.jit(jax.jacrev(summed))(prepare(batch["image"]))
  assert got == pytest.approx(0.3 / 2 * float(jnp.sum(jacobian**2)) / 4, rel=1e-3)


def test_directions_are_uniform_on_a_sphere():
  v_BxK = step.directions(jax.random.split(jax.random.key(0), 4000), 3)
  np.testing.assert_allclose(jnp.linalg.norm(v_BxK, axis=-1), np.sqrt(3), rtol=1e-5)
  np.testing.assert_allclose(v_BxK.T @ v_BxK / 4000, np.eye(3), atol=0.06)
