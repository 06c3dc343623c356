"""Public weights on the test split of a data set, without training."""

import functools
from typing import Any

import jax

from convex_jax import mesh as meshes
from convex_jax.data import preprocess
from convex_jax.data.batches import batch_of, batches_of
from convex_jax.data.datasets import Data
from convex_jax.errors import UserError
from convex_jax.models.public.importer import Public
from convex_jax.progress import track
from convex_jax.training import metrics, pretrained, step


def evaluate(config: Any, public: Public, examples: Data) -> dict[str, float]:
  """Loss (nats), accuracy, top5_accuracy and calibration_error (0..1) on the test split.

  Args:
    config: of the network and the data; its weights and scaling are those of the next two.
    public: weights.
    examples: data, scaled for these weights: see `pretrained.start`.

  Raises:
    UserError: some of the weights are initial ones.
  """
  if public.fresh:
    raise UserError(
      f"{config.init_from} lacks weights of this network, and without training the new ones say"
      f" nothing: {', '.join(public.fresh)}"
    )
  mesh = meshes.make_mesh(fsdp=config.fsdp)
  meshes.check_divisible(jax.device_count(), config.batch_size, config.fsdp)
  model, _ = pretrained.network_of(config, examples)
  prepare = preprocess.inference(config.data, *examples.statistics)
  measure = functools.partial(
    step.eval_step, model=model, prepare=prepare, evaluation=metrics.WithTopFive
  )

  def add(weights, arrays, plan, total):
    return total.merge(measure(weights, batch_of(arrays, plan, mesh)))

  add = jax.jit(meshes.traced_on(mesh, add))
  weights, everywhere = public.weights, meshes.replicated(mesh)
  weights, total = jax.device_put((weights, metrics.WithTopFive.empty()), everywhere)
  split = batches_of(examples.test, mesh, config.data)
  batches = -(-len(examples.test) // config.batch_size)
  try:
    for plan in track(split.eval_plans(config.batch_size, 0), "evaluating", batches):
      total = jax.block_until_ready(add(weights, split.arrays, plan, total))
  finally:
    split.close()
  return {name: float(value) for name, value in total.compute().items()}
