"""Our networks, in a child process: `python -m experiments.speed.jax_worker CASE PARTS [NORM]`.

The program is that of a run (`program.Program`): uint8 images resident on the device, a gather,
normalisation, forward, backward, Adam, projection, and the metrics that a log line shows.
"""

import sys
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from convex_jax import mesh
from convex_jax.data import datasets
from convex_jax.models import catalog, variables
from convex_jax.models.parts import make_parts
from convex_jax.training import program, runtime, step
from experiments.speed import worker
from experiments.speed.cases import EVERY, Case, config_of


def with_norm(norm: str):
  """`make_parts` with one norm in every twin: the cost of the constraint alone."""
  return lambda *args, **fields: make_parts(*args, **fields | {"norm": norm})


def program_of(case: Case, parts: str, classes: int) -> program.Program:
  """The program of a run on random images."""
  rng, count = np.random.default_rng(0), worker.BATCHES * case.batch
  images = rng.integers(0, 256, (count, case.px, case.px, 3), np.uint8)
  split = datasets.Split(images, rng.integers(0, classes, count).astype(np.int32))
  names = tuple(str(i) for i in range(classes))
  return program.Program(
    config_of(case, parts), datasets.Data(split, None, split, names), mesh.make_mesh()
  )


def model_flops(case: Case, parts: str, classes: int = worker.CLASSES) -> float:
  """FLOPs per image of forward and backward pass, with XLA's own convolutions.

  Our fast forms run some of them in loops, whose iterations XLA's cost analysis does not count.
  """
  model = catalog.build(config_of(case, parts).model, classes, convolve=lax.conv_general_dilated)
  shape = (case.px, case.px, 3)
  shapes = jax.eval_shape(lambda: variables.init_variables(model, jax.random.key(0), shape))

  def loss(params, stats, images):
    logits, _ = model.apply(
      {"params": params, "batch_stats": stats}, images, train=True, mutable=["batch_stats"]
    )
    return step.cross_entropy(logits, jnp.zeros(len(images), int)).mean()

  images = jax.ShapeDtypeStruct((case.batch, *shape), jnp.float32)
  weights = nn.meta.unbox(shapes)
  lowered = jax.jit(jax.grad(loss)).lower(weights["params"], weights["stats"], images)
  return lowered.cost_analysis()["flops"] / case.batch


class Ours:
  """A twin of a case."""

  def __init__(self, case: Case, parts: str, classes: int = worker.CLASSES):
    self.case, self.parts, self.program = case, parts, program_of(case, parts, classes)
    self.state, self.done = self.program.init(), 0
    rng = np.random.default_rng(0)
    shape = (worker.BATCHES, case.batch, case.px, case.px, 3)
    self.images = [jnp.asarray(x) for x in rng.standard_normal(shape, np.float32)]
    self.apply = jax.jit(lambda weights, x: variables.apply(self.program.model, weights, x))

  def train(self, steps):
    metrics = None
    for i in range(self.done, self.done + steps):
      self.state, metrics = self.program.train_call(
        self.state, self.program.batches(range(i, i + 1))
      )
    self.done += steps
    jax.block_until_ready(metrics)

  def infer(self, steps):
    weights, logits = self.state.weights(), None
    for i in range(steps):
      logits = self.apply(weights, self.images[i % worker.BATCHES])
    jax.block_until_ready(logits)

  def after_evaluation(self):
    runtime.return_freed_memory()

  def facts(self):
    parameters = sum(leaf.size for leaf in jax.tree.leaves(self.state.params))
    return {
      "flops_an_image": model_flops(self.case, self.parts),
      "parameters": parameters,
      "version": f"jax {jax.__version__}",
      "peak_flops": matmul_rate(self.case.dtype),
      "device": jax.devices()[0].device_kind,
    }

  def device_bytes(self):
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def matmul_rate(dtype: str = "float32") -> float:
  """FLOP/s of the fastest of several products of square matrices, large for the device."""
  n = 3072 if jax.default_backend() == "cpu" else 8192
  x = jax.random.normal(jax.random.key(0), (n, n), dtype)
  product = jax.jit(lambda x: x @ x)
  product(x).block_until_ready()
  best = float("inf")
  for _ in range(6):
    start = time.perf_counter()
    product(x).block_until_ready()
    best = min(best, time.perf_counter() - start)
  return 2 * n**3 / best


if __name__ == "__main__":
  case, parts, *norm = sys.argv[1:]
  if norm:
    catalog.make_parts = with_norm(*norm)
  runtime.tune_cpu()
  worker.serve(lambda: Ours(EVERY[case], parts))
