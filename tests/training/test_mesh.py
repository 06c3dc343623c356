"""Weights split over devices: the same training; constraints, tags and checkpoints survive."""

import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import mixer_ioc, mlp
from convex_jax import mesh
from convex_jax.data import augment, preprocess
from convex_jax.data.in_memory import InMemory
from convex_jax.errors import UserError
from convex_jax.models import catalog, constraints, fast_forms
from convex_jax.runs.checkpoints import Checkpoints
from convex_jax.training import loop, optimizer, program, step
from convex_jax.training.schema import mistakes
from tests.support import of
from tests.support.running import leaves_close, run_steps

CALLS = [range(i, i + 1) for i in range(4)]


def bytes_of(tree):
  return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(tree))


def test_the_largest_mixer_fits_in_a_quarter_on_each_of_2_by_4_devices():
  config = mixer_ioc.get_config("imagenet2012,B/16")
  config.model.size = "H/14"
  model = catalog.build(config.model, 1000)
  boxed = jax.eval_shape(lambda: step.init_variables(model, jax.random.key(0), (224, 224, 3)))
  tags = constraints.constraints_of(boxed["params"])
  tx = optimizer.make_optimizer(config.optimizer, 100, tags)
  state = jax.eval_shape(
    lambda: step.init_state(model, tx, jax.random.key(0), (224, 224, 3), average=True)
  )
  over = mesh.make_mesh(jax.devices(), fsdp=4)
  assert over.devices.shape == (2, 4)
  layout = mesh.layout(over, state)
  here = jax.tree.map(
    lambda a, s: jax.ShapeDtypeStruct(s.shard_shape(a.shape), a.dtype), state, layout
  )
  assert bytes_of(state) > 6e9  # 430 million parameters, thrice for Adam, once more averaged.
  assert bytes_of(here) / bytes_of(state) == pytest.approx(1 / 4, rel=0.01)
  # A weight, its average and its moments lie alike, so that an update moves nothing.
  of_params = jax.tree.leaves(layout.params)
  assert jax.tree.leaves(layout.ema["params"]) == of_params
  moments = [s for s in jax.tree.leaves(layout.opt_state) if s.spec != jax.P()]
  assert len(moments) == 2 * len([s for s in of_params if s.spec != jax.P()])
  assert jax.tree.structure(tags) == jax.tree.structure(state.params)
  assert {"clamp", "shift", "free"} == set(jax.tree.leaves(tags))


@pytest.fixture
def split_all(monkeypatch):
  monkeypatch.setattr(mesh, "LEAST", 1)


def split_state(config, examples):
  job = program.Program(config, examples, mesh.make_mesh(jax.devices(), fsdp=4))
  state = job.init()
  for steps in CALLS:
    state, _ = job.train_call(state, job.batches(steps))
  return job, state


@pytest.mark.usefixtures("split_all")
def test_training_with_split_weights_is_the_same_training(tiny_config, few_digits):
  config = of(tiny_config, optimizer__name="sgd", optimizer__learning_rate=0.3, ema_decay=0.9)
  config.model.depth = 2  # The second block has a passthrough.
  _, want, _ = run_steps(config, few_digits, 1, CALLS)
  job, got = split_state(config, few_digits)
  split = [a for a in jax.tree.leaves(got.params) if not a.sharding.is_fully_replicated]
  assert len(split) > len(jax.tree.leaves(got.params)) / 2
  assert all(a.addressable_shards[0].data.size * 4 == a.size for a in split)
  leaves_close(got, want, atol=2e-6)
  figures = job.evaluate(got, final=True)
  assert figures["smallest_constrained"] >= 0
  assert figures["zero_share"] > 0  # Some met the constraint, so that it was enforced.
  leaves_close(job.gathered(got.weights()), want.weights(), atol=2e-6)


@pytest.mark.usefixtures("split_all")
def test_a_checkpoint_of_split_weights_is_restored_on_one_device_and_back(
  tiny_config, few_digits, tmp_path
):
  _, state = split_state(tiny_config, few_digits)
  saved = Checkpoints(str(tmp_path), 2)
  saved.save(int(state.step), state.items(), 0.5)
  saved.close()
  for devices, fsdp in ((1, 1), (2, 2), (8, 2)):
    over = mesh.make_mesh(jax.devices()[:devices], fsdp)
    job = program.Program(tiny_config, few_digits, over)
    again = Checkpoints(str(tmp_path), 2)
    restored = step.State.of(again.restore(job.state_shapes().items()))
    again.close()
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
      np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
      assert len(a.sharding.device_set) == devices


def test_batch_norm_of_each_device_sees_its_part_of_the_batch(few_digits, tiny_config):
  """One update is the mean of the updates on the parts: plain SGD, nothing constrained."""
  config = mlp.get_config("digits")
  config = of(
    config, optimizer__name="sgd", optimizer__momentum=0.0, optimizer__schedule="constant"
  )
  config = of(config, model__size="tiny", steps=6, batch_size=16, data__dir=tiny_config.data.dir)
  config.optimizer.warmup_steps = 0
  apart = of(config, batch_norm="device")
  job, got, losses = run_steps(apart, few_digits, 2, CALLS[:1])
  _, together, _ = run_steps(config, few_digits, 2, CALLS[:1])

  start = jax.device_get(job.init())
  prepare = preprocess.make_prepare(8, *few_digits.train.statistics())
  update = jax.jit(
    functools.partial(
      step.train_step,
      model=job.model,
      tx=job.tx,
      augment=augment.make_augment(config.data, prepare),
      key=jax.random.split(jax.random.key(0))[1],
      label_smoothing=config.label_smoothing,
      ema_decay=0.0,
    )
  )
  plan = InMemory(few_digits.train, mesh.make_mesh(jax.devices()[:1]), resident=False)
  batch = jax.tree.map(lambda a: a[0], plan.train_plan(CALLS[0], 16, config.seed))
  halves = [jax.tree.map(lambda a, at=at: a[at], batch) for at in (slice(8), slice(8, 16))]
  states, measured = zip(*(jax.device_get(update(start, half)) for half in halves), strict=True)
  for name in ("params", "stats"):
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *(getattr(state, name) for state in states))
    leaves_close(getattr(got, name), mean, atol=1e-6)
  assert losses == pytest.approx([np.mean([m["loss"] for m in measured])], rel=1e-5)
  off = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (got.stats, together.stats)))]
  assert max(off) > 1e-3  # Control: over the whole batch the variances are others.


def test_weights_that_cannot_be_split_evenly_are_refused(tiny_config, tmp_path):
  with pytest.raises(
    UserError, match=r"config\.fsdp is 3 on 8 devices; expected one of 1, 2, 4, 8"
  ):
    loop.run(of(tiny_config, fsdp=3, batch_size=24), str(tmp_path))
  assert not (tmp_path / "checkpoints").exists()
  assert any(
    "batch_norm" in line for line in mistakes(of(tiny_config, fsdp=2, batch_norm="device"))
  )


def merged(x_SxBxC, kernel):
  return (x_SxBxC.reshape(-1, x_SxBxC.shape[-1]) @ kernel).reshape(*x_SxBxC.shape[:-1], -1)


@pytest.mark.parametrize(
  "product,shape,batch,gathers",
  [
    (fast_forms.along_last, (64, 16, 4, 8), 0, False),
    (fast_forms.along_last, (4, 64, 8), 1, False),
    (lambda x, kernel: fast_forms.along_first(kernel, x), (8, 64, 4), 1, False),
    (merged, (4, 64, 8), 1, True),  # The control: the batch is inside of a merged axis.
  ],
  ids=["maps", "tokens", "token mixing", "merged tokens"],
)
def test_products_leave_the_batch_where_it_is(product, shape, batch, gathers):
  axes = [None] * len(shape)
  axes[batch] = "data"
  over = jax.make_mesh((8,), ("data",))
  shared = jax.NamedSharding(over, jax.P(*axes))
  whole = jax.NamedSharding(over, jax.P())

  def loss(x, kernel):
    return (jnp.tanh(product(x, kernel)) ** 2).sum()

  gradient = jax.jit(
    jax.grad(loss, (0, 1)), in_shardings=(shared, whole), out_shardings=(shared, whole)
  )
  program = gradient.lower(jnp.ones(shape), jnp.ones((8, 16))).compile().as_text()
  assert ("all-gather" in program) == gathers


def test_a_weight_that_would_span_slices_is_refused():
  device = types.SimpleNamespace
  devices = [device(platform="tpu", slice_index=i // 4) for i in range(8)]
  with pytest.raises(UserError, match="fsdp is 8 on 2 slices of 4 devices"):
    mesh.make_mesh(devices, fsdp=8)
