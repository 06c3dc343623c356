"""The host's story of a run, top to bottom."""

import collections
import contextlib
import functools
import math
import os
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from ml_collections import FrozenConfigDict

from convex_jax import mesh as meshes
from convex_jax.data import augment, datasets, preprocess
from convex_jax.data import batches as feeds
from convex_jax.errors import Diverged, Lost, Stopped
from convex_jax.models import catalog, constraints
from convex_jax.models.public.importer import load_public
from convex_jax.runs import certified, manifest
from convex_jax.runs import workdir as describe
from convex_jax.runs.checkpoints import Checkpoints
from convex_jax.runs.run import Run
from convex_jax.training import metrics, optimizer, step
from convex_jax.training.console import Watch, parameter_table
from convex_jax.training.schema import check
from convex_jax.training.stopping import Stopping

MAX_IN_FLIGHT = 16  # Calls ahead of the device. CPU collectives deadlock far ahead: jax 0.10.


def run(config: Any, workdir: str) -> dict[str, float]:
  """Trains, or goes on training, what `config` describes; returns the final figures.

  Raises `UserError` for a config, a data set or a workdir that does not fit, `Diverged` when
  updates cannot be made, `Unsaved` when the storage takes no checkpoint, `Lost` when another
  process is gone, `Stopped` after SIGTERM, SIGINT or `time_limit` once all is saved.
  """
  check(config)
  with describe.claim(config, workdir):
    return _run(config, workdir)


def _run(config: Any, workdir: str) -> dict[str, float]:
  began = time.monotonic()
  lead = jax.process_index() == 0
  examples = datasets.load(config.data, config.seed, progress=lead)
  meshes.check_equal_hosts([device.process_index for device in jax.devices()])
  meshes.check_divisible(jax.device_count(), config.batch_size, config.fsdp)
  mesh = meshes.make_mesh(fsdp=config.fsdp)
  job = Job(config, examples, mesh)
  folder = os.path.join(workdir, "checkpoints")
  public = None
  if config.init_from and not manifest.steps_in(folder):  # Refused before anything is written.
    path = os.path.expanduser(config.init_from)
    public = load_public(job.model, path, job.image_shape, config.seed)
  set_aside = manifest.quarantine_damaged(folder)
  if lead:
    shape, names = examples.train.image_shape, examples.class_names
    describe.write(config, workdir, names, shape, examples.statistics)
  with contextlib.ExitStack() as stack:
    limit = config.time_limit and max(60 * config.time_limit - (time.monotonic() - began), 1e-3)
    stopping = stack.enter_context(Stopping(limit))  # Left last: no signal hurts what is saved.
    stack.callback(job.close)
    checkpoints = Checkpoints(
      folder,
      config.checkpoint.keep,
      tell=lambda text: watch.say(text),
      go_on=not config.checkpoint.must_save,
      patience=config.checkpoint.patience,
    )
    stack.callback(checkpoints.close)
    resumed = checkpoints.latest_step()
    state = job.init()
    if resumed is not None:
      state = checkpoints.restore(state)
    elif public is not None:
      weights = {"params": state.params, "stats": state.stats}
      state = step.start_from(state, meshes.put_like(weights, public.weights))
    watch = Watch(workdir, resumed or 0, job.total_steps, job.epochs, config, lead)
    stack.callback(watch.close)
    for line in set_aside:
      watch.say(line)
    if resumed is None:
      watch.say(parameter_table(state.params, job.constraints))
      if public is not None:
        watch.say(f"weights from {config.init_from}: {public}")
    else:
      watch.say(f"resumed {workdir} at step {resumed} of {job.total_steps}")
    try:
      state = train(job, state, checkpoints, watch, stopping, workdir)
      figures = job.evaluate(state, final=True)
    except Exception as error:
      if jax.process_count() == 1 or not meshes.is_collective_error(error):
        raise
      checkpoints.abandon()
      raise Lost(
        f"another process is gone, or cannot be reached: {str(error).splitlines()[0][:200]}\n"
        "  start the same command on every host: it goes on from the newest checkpoint"
      ) from error
    watch.evaluated("final", int(state.step), figures)
  watch.report(figures)
  if config.model.parts == "ioc":
    weights = job.gathered(state.weights())  # In which all hosts take part.
    if lead:
      of_run = finished(config, workdir, examples, state.step, weights)
      watch.say(certified.summary(certified.certify_and_write(of_run)))
  watch.say(f'the run lies in {workdir}: convex_jax.load("{workdir}")')
  return figures


def finished(
  config: Any, workdir: str, examples: datasets.Data, at: jax.Array, weights: dict[str, Any]
) -> Run:
  """The run as `load` would give it, without the reading, in which all hosts would take part."""
  mean, std = examples.statistics
  return Run(
    workdir,
    FrozenConfigDict(config),
    int(at),
    weights["params"],
    weights["stats"],
    examples.class_names,
    examples.train.image_shape,
    mean,
    std,
  )


def train(
  job: "Job",
  state: step.State,
  checkpoints: Checkpoints,
  watch: Watch,
  stopping: Stopping,
  workdir: str,
) -> step.State:
  """The loop: calls of a few steps each, logs, evaluations, checkpoints."""
  in_flight = collections.deque()

  def take_in(limit):
    while len(in_flight) > limit or (in_flight and in_flight[0][1]["loss"].is_ready()):
      watch.train(*in_flight.popleft())

  first = int(state.step)
  watch.restart_clock()
  for steps in job.calls(first):
    watch.profile(steps)
    began = time.monotonic()
    plan = job.batches(steps)
    if not in_flight or in_flight[-1][1]["loss"].is_ready():
      watch.waited(time.monotonic() - began)
    state, measured = job.train_call(state, plan)
    if steps.start == first:  # Compiling, and starting workers, is no rate.
      watch.restart_clock()
    in_flight.append((steps.stop, measured))
    take_in(MAX_IN_FLIGHT)
    checkpoints.check()
    evaluates, saves = job.evaluates_at(steps.stop), job.saves_at(steps.stop)
    stops = stopping.should_stop(steps.stop)
    if evaluates or saves or stops:
      take_in(0)  # Updates that cannot be made end the run before it is saved.
      job.refuse_not_finite(state)
      watch.flush()
      figures = job.evaluate(state, final=False) if evaluates else None
      if figures is not None:
        watch.evaluated("eval", steps.stop, figures)
      watch.sync()
      checkpoints.save(state, figures[job.decides] if figures else None)
      watch.restart_clock()
    if stops:
      raise Stopped(f"stopped at step {steps.stop}, saved in {workdir}; the same command resumes")
  return state


class Job:
  """What a config and its data make on a mesh: sizes, and the compiled programs."""

  def __init__(self, config: Any, examples: datasets.Data, mesh: jax.sharding.Mesh):
    self.config, self.examples, self.mesh = config, examples, mesh
    shape = examples.train.image_shape
    self.image_shape = (config.data.image_size, config.data.image_size, shape[-1])
    self.total_steps = config.steps or self._whole_calls(config.epochs)
    self._eval_every = self._whole_calls(config.eval.every_epochs)
    self.epochs = self.total_steps * config.batch_size / len(examples.train)
    self.decides = "valid_accuracy" if examples.valid else "test_accuracy"
    self.model = catalog.build(
      config.model, classes=len(examples.class_names), dtype=jnp.dtype(config.dtype)
    )
    boxed = jax.eval_shape(
      lambda: step.init_variables(self.model, jax.random.key(0), self.image_shape)
    )
    self.constraints = constraints.constraints_of(boxed["params"])
    self.tx = optimizer.make_optimizer(config.optimizer, self.total_steps, self.constraints)
    self._feeds = {
      name: feeds.batches_of(split, mesh, config.data) for name, split in examples.splits().items()
    }
    self._compile()

  def _whole_calls(self, epochs: float) -> int:
    """Steps of so many epochs, rounded up to whole calls: a shorter call compiles anew."""
    per_call = self.config.steps_per_call
    steps = epochs * len(self.examples.train) / self.config.batch_size
    return math.ceil(steps / per_call) * per_call

  def _compile(self) -> None:
    config, everywhere = self.config, meshes.replicated(self.mesh)
    prepare = preprocess.preparation(config.data, *self.examples.statistics)
    init_key, train_key = jax.random.split(jax.random.key(config.seed))
    one_step = functools.partial(
      step.train_step,
      model=self.model,
      tx=self.tx,
      augment=augment.make_augment(config.data, prepare),
      mix=augment.make_mix(config.mixup, config.cutmix, config.data.repeats),
      key=train_key,
      label_smoothing=config.label_smoothing,
      skip_spikes=config.skip_spikes,
      ema_decay=config.ema_decay,
    )
    if config.batch_norm == "device":
      alike, apart = P(), P(meshes.AXES)
      one_step = jax.shard_map(
        functools.partial(one_step, axis_name=meshes.AXES),
        mesh=self.mesh,
        in_specs=(alike, apart),
        out_specs=alike,
        check_vma=False,  # Averages over the devices are alike, which it does not see.
      )

    def train_call(state, arrays, plan):
      def body(state, plan):
        return one_step(state, feeds.batch_of(arrays, plan, self.mesh))

      if len(plan["position"]) > 1:
        return jax.lax.scan(body, state, plan)
      # XLA's CPU backend runs a loop's large operations on one thread: 3 times slower.
      return body(state, jax.tree.map(lambda column: column[0], plan))

    def eval_call(weights, arrays, plan, total):
      batch = feeds.batch_of(arrays, plan, self.mesh)
      return total.merge(step.eval_step(weights, batch, model=self.model, prepare=prepare))

    def init():
      return step.init_state(
        self.model, self.tx, init_key, self.image_shape, average=config.ema_decay > 0
      )

    layout = meshes.layout(self.mesh, jax.eval_shape(init))
    self.init = jax.jit(init, out_shardings=layout)
    self._train_call = jax.jit(train_call, donate_argnums=0, out_shardings=(layout, everywhere))
    self._gather = jax.jit(lambda weights: weights, out_shardings=everywhere)
    self._eval_call = jax.jit(eval_call, out_shardings=everywhere)
    self._nothing = jax.jit(metrics.Evaluation.empty, out_shardings=everywhere)
    self._is_finite = jax.jit(_is_finite, out_shardings=everywhere)
    self._mean = jax.jit(metrics.Evaluation.compute, out_shardings=everywhere)
    self._summary = jax.jit(
      lambda params: constraints.summary(params, self.constraints), out_shardings=everywhere
    )

  def calls(self, start: int) -> Iterator[range]:
    """The steps of each call to come.

    A function of the step alone: a resumed run makes the very calls of an unbroken one.
    """
    while start < self.total_steps:
      every = [self.config.steps_per_call, self._eval_every, self.config.checkpoint.every_steps]
      stop = min(start + n - start % n for n in every if n)
      yield range(start, min(stop, self.total_steps))
      start = stop

  def evaluates_at(self, at: int) -> bool:
    """Whether an evaluation, and a checkpoint, are due after this many steps."""
    return at % self._eval_every == 0 or at == self.total_steps

  def saves_at(self, at: int) -> bool:
    """Whether a checkpoint is due in between."""
    every = self.config.checkpoint.every_steps
    return every > 0 and at % every == 0

  def batches(self, steps: range) -> Any:
    """What the batches of these steps are made of, on the devices."""
    return self._feeds["train"].train_plan(steps, self.config.batch_size, self.config.seed)

  def train_call(self, state: step.State, plan: Any) -> tuple[step.State, dict[str, jax.Array]]:
    """Several updates in one dispatch; metrics are stacked over the steps."""
    return self._train_call(state, self._feeds["train"].arrays, plan)

  def evaluate(self, state: step.State, final: bool) -> dict[str, float]:
    """Every split at inference, images not augmented; all training images if `final`."""
    weights, row = state.weights(), {}
    for name, feed in self._feeds.items():
      limit = self.config.eval.train_examples if name == "train" and not final else 0
      total = self._nothing()
      for i, plan in enumerate(feed.eval_plans(self.config.batch_size, limit), 1):
        total = self._eval_call(weights, feed.arrays, plan, total)
        if i % MAX_IN_FLIGHT == 0:
          jax.block_until_ready(total)
      row |= {f"{name}_{key}": float(value) for key, value in self._mean(total).items()}
    row["gap"] = row["train_accuracy"] - row["test_accuracy"]
    return row | {key: float(v) for key, v in self._summary(weights["params"]).items()}

  def refuse_not_finite(self, state: step.State) -> None:
    """Raises `Diverged` where weights, averages or optimizer state overflowed."""
    if not self._is_finite(state):
      raise Diverged(
        f"after step {int(state.step)} some weights are no finite numbers, and are not saved; the"
        " newest checkpoint is from before. A smaller optimizer.learning_rate may help"
      )

  def gathered(self, weights: Any) -> Any:
    """Weights as host arrays, whole in every process."""
    return jax.tree.map(np.asarray, self._gather(weights))

  def close(self) -> None:
    """Ends what reads data beside the run."""
    for feed in self._feeds.values():
      feed.close()


def _is_finite(state: step.State) -> jax.Array:
  return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(state)]))
