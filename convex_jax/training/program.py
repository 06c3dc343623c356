"""What a config and its data make on a mesh: sizes, and the compiled programs of a run."""

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from convex_jax import mesh as meshes
from convex_jax.data import augment, batches, preprocess
from convex_jax.data.datasets import Data
from convex_jax.errors import Diverged, UserError
from convex_jax.models import constraints
from convex_jax.models.variables import init_variables
from convex_jax.training import metrics, optimizer, pretrained, step

MAX_IN_FLIGHT = 16  # Calls dispatched ahead; with more, CPU collectives deadlock (jax 0.10).


class Computation:
  """What the devices of a mesh compute in a run: sizes, and the programs, not yet compiled.

  Of the data only sizes, shapes and statistics matter, and no device is used: the mesh may be of
  devices that are elsewhere (`compile_ahead`).
  """

  def __init__(self, config: Any, examples: Data, mesh: jax.sharding.Mesh):
    self.config, self.examples, self.mesh = config, examples, mesh
    self.total_steps = config.steps or self._whole_calls(config.epochs)
    if self.total_steps >= 2**31:
      raise UserError(
        f"config.epochs is {config.epochs}, which makes {self.total_steps:,} steps; expected fewer"
        " than 2**31"
      )
    if few := optimizer.too_few_updates(config.optimizer, self.total_steps):
      raise UserError(few)
    # Never before the end, where that is more epochs than a run has.
    self._eval_every = self._whole_calls(min(config.eval.every_epochs, 2**31))
    self.epochs = self.total_steps * config.batch_size / len(examples.train)
    self.decides = "valid_accuracy" if examples.valid else "test_accuracy"
    self.model, self.image_shape = pretrained.network_of(config, examples)
    boxed = jax.eval_shape(lambda: init_variables(self.model, jax.random.key(0), self.image_shape))
    self.parameters = optax.tree.size(boxed["params"])
    self.constraints = constraints.constraints_of(boxed["params"])
    self.tx = optimizer.make_optimizer(config.optimizer, self.total_steps, self.constraints)
    self._define()

  def _whole_calls(self, epochs: float) -> int:
    """Steps of so many epochs, rounded up to whole calls: a shorter call compiles anew."""
    per_call = self.config.steps_per_call
    steps = epochs * len(self.examples.train) / self.config.batch_size
    return math.ceil(steps / per_call) * per_call

  def _define(self) -> None:
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
      penalty=self._penalty if config.model.common_penalty else None,
      jacobian_penalty=config.jacobian_penalty,
      skip_spikes=config.skip_spikes,
      ema_decay=config.ema_decay,
      tagged=self.constraints,
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
        return one_step(state, batches.batch_of(arrays, plan, self.mesh))

      if len(plan["position"]) > 1:
        return jax.lax.scan(body, state, plan)
      # XLA's CPU backend runs a loop's large operations on one thread: 3 times slower.
      return body(state, jax.tree.map(lambda column: column[0], plan))

    seen = preprocess.inference(config.data, *self.examples.statistics)

    def eval_call(weights, arrays, plan, total):
      batch = batches.batch_of(arrays, plan, self.mesh)
      return total.merge(step.eval_step(weights, batch, model=self.model, prepare=seen))

    def init():
      return step.init_state(
        self.model, self.tx, init_key, self.image_shape, average=config.ema_decay > 0
      )

    def is_finite(state):
      return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(state)]))

    layout = meshes.layout(self.mesh, jax.eval_shape(init))
    # It runs once: on a CPU most of its time goes into making fast code, of the same bits.
    is_on_cpu = self.mesh.devices.flat[0].platform == "cpu"
    is_cheap = jax.config.read("jax_disable_most_optimizations")  # Less effort still.
    options = {"xla_backend_optimization_level": 1} if is_on_cpu and not is_cheap else None
    self.init = jax.jit(init, out_shardings=layout, compiler_options=options)
    on_mesh = functools.partial(meshes.traced_on, self.mesh)
    self._train_call = jax.jit(
      on_mesh(train_call), donate_argnums=0, out_shardings=(layout, everywhere)
    )
    self._gather = jax.jit(lambda weights: weights, out_shardings=everywhere)
    self._eval_call = jax.jit(on_mesh(eval_call), out_shardings=everywhere)
    self._nothing = jax.jit(metrics.Evaluation.empty, out_shardings=everywhere)
    self._is_finite = jax.jit(is_finite, out_shardings=everywhere)
    self._mean = jax.jit(metrics.Evaluation.compute, out_shardings=everywhere)
    self._summary = jax.jit(
      lambda params: constraints.summary(params, self.constraints), out_shardings=everywhere
    )

  def _penalty(self, params: Any) -> jax.Array:
    """On what makes the term that all logits of a convexified network share."""
    shares = constraints.negative_shares(params, self.constraints)
    return self.config.model.common_penalty * shares

  def state_shapes(self) -> step.State:
    """The shapes, types and shardings of a state."""
    shapes = jax.eval_shape(self.init)
    return jax.tree.map(_laid_out, shapes, meshes.layout(self.mesh, shapes))

  def lower_train(self, arrays: Any, plan: Any) -> jax.stages.Lowered:
    """The program of a training call, for arrays and a plan given as shapes."""
    return self._train_call.lower(self.state_shapes(), arrays, plan)

  def lower_eval(self, arrays: Any, plan: Any) -> jax.stages.Lowered:
    """The program that evaluates a batch, for arrays and a plan given as shapes."""
    everywhere = functools.partial(_laid_out, sharding=meshes.replicated(self.mesh))
    total = jax.tree.map(everywhere, jax.eval_shape(self._nothing))
    return self._eval_call.lower(self.state_shapes().weights(), arrays, plan, total)


def _laid_out(shape: Any, sharding: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


class Program(Computation):
  """A computation with its data, on devices that are here."""

  def __init__(self, config: Any, examples: Data, mesh: jax.sharding.Mesh):
    super().__init__(config, examples, mesh)
    self.splits = {
      name: batches.batches_of(split, mesh, config.data)
      for name, split in examples.splits().items()
    }

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
    return self.splits["train"].train_plan(steps, self.config.batch_size, self.config.seed)

  def train_call(self, state: step.State, plan: Any) -> tuple[step.State, dict[str, jax.Array]]:
    """Several updates in one dispatch; metrics are stacked over the steps."""
    return self._train_call(state, self.splits["train"].arrays, plan)

  def evaluate(self, state: step.State, final: bool) -> dict[str, float]:
    """Every split at inference, images not augmented; all training images if `final`."""
    weights, row = state.weights(), {}
    for name, split in self.splits.items():
      limit = self.config.eval.train_examples if name == "train" and not final else 0
      total = self._nothing()
      for i, plan in enumerate(split.eval_plans(self.config.batch_size, limit), 1):
        total = self._eval_call(weights, split.arrays, plan, total)
        if i % MAX_IN_FLIGHT == 0:
          jax.block_until_ready(total)
      row |= {f"{name}_{key}": float(value) for key, value in self._mean(total).items()}
    row["gap"] = row["train_accuracy"] - row["test_accuracy"]
    return row | {key: float(v) for key, v in self._summary(weights["params"]).items()}

  def refuse_not_finite(self, state: step.State) -> None:
    """Raises `Diverged` where weights, averages or optimizer state overflowed."""
    if not self._is_finite(state):
      raise Diverged(
        f"Non-finite weights after step {int(state.step)}; they were not saved. The newest"
        " checkpoint predates them. Try a smaller config.optimizer.learning_rate."
      )

  def gathered(self, weights: Any) -> Any:
    """Weights as host arrays, whole in every process."""
    return jax.tree.map(np.asarray, self._gather(weights))

  def close(self) -> None:
    """Stops the workers that read data."""
    for split in self.splits.values():
      split.close()
