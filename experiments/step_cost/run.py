"""What the constraint costs: training steps of twins, interleaved in one process.

    python -m experiments.step_cost.run [--rounds=40]

Every variant takes a few steps in turn, round after round, so that a machine that drifts
drifts for all; a ratio is the median over rounds of (variant / reference) of that round.
The projection is timed apart, on the real parameters, against the step it belongs to: the
difference of two whole steps is far smaller than the noise. Writes results.csv beside this file.
"""

import argparse
import csv
import dataclasses
import os
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from configs import mixer_ioc, mlp_ioc
from convex_jax import constraints, data, layers, mesh, models, train

STEPS = 3  # A round.
VARIANTS = {  # name: (config, parts, passthrough, norm of the reference)
  "mlp base": (mlp_ioc, "base", False, None),
  "mlp ioc without passthrough": (mlp_ioc, "ioc", False, None),
  "mlp ioc": (mlp_ioc, "ioc", True, None),
  "mixer base": (mixer_ioc, "base", False, None),
  "mixer base with BatchNorm": (mixer_ioc, "base", False, "batch"),
  "mixer ioc without passthrough": (mixer_ioc, "ioc", False, None),
  "mixer ioc": (mixer_ioc, "ioc", True, None),
}
REFERENCE = {"mlp": "mlp base", "mixer": "mixer base with BatchNorm"}


def make_job(config_module, parts, passthrough, norm, batch_size):
  """A job on random images of CIFAR-10's shape, resident on the device."""
  config = config_module.get_config()
  config.batch_size = batch_size
  config.model.parts, config.model.passthrough = parts, passthrough
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (4096, 32, 32, 3), np.uint8)
  split = data.Split(images, rng.integers(0, 10, 4096).astype(np.int32))
  make_parts = layers.make_parts
  models.make_parts = lambda *a, **k: dataclasses.replace(
    make_parts(*a, **k), norm_kind=norm or make_parts(*a, **k).norm_kind
  )
  try:
    return train.Job(config, data.Data(split, None, split, tuple("0123456789")), mesh.make_mesh())
  finally:
    models.make_parts = make_parts


def projection_seconds(job, state) -> float:
  """What the last link adds to applying an update, both jitted, on this job's parameters.

  Median over pairs timed in turn: applying alone already reads and writes every parameter,
  and a step without the constraint pays for that too.
  """
  link = constraints.enforce(job.constraints)
  updates = jax.tree.map(lambda p: -1e-3 * jnp.ones_like(p), state.params)
  opt_state = link.init(state.params)

  def project(updates, params):
    return optax.apply_updates(params, link.update(updates, opt_state, params)[0])

  def free(updates, params):
    return optax.apply_updates(params, updates)

  def seconds(function) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function(updates, state.params))
    return time.perf_counter() - start

  project, free = jax.jit(project), jax.jit(free)
  pairs = [seconds(project) - seconds(free) for _ in range(105)]
  return statistics.median(pairs[5:])  # The first compile.


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--rounds", type=int, default=40)
  parser.add_argument("--batch_size", type=int, default=128)
  args = parser.parse_args()
  jobs = {name: make_job(*variant, args.batch_size) for name, variant in VARIANTS.items()}
  states = {name: job.init() for name, job in jobs.items()}
  seconds = {name: [] for name in jobs}
  for i in range(args.rounds + 1):
    names = list(jobs)
    for name in names[i % len(names) :] + names[: i % len(names)]:  # Each follows each other.
      job, start = jobs[name], time.perf_counter()
      for step in range(i * STEPS, (i + 1) * STEPS):
        states[name], metrics = job.train_call(states[name], job.batches(range(step, step + 1)))
      jax.block_until_ready(metrics)
      seconds[name].append((time.perf_counter() - start) / STEPS)
  with open(pathlib.Path(__file__).parent / "results.csv", "w", newline="") as file:
    table = csv.writer(file)
    table.writerow(
      ["variant", "milliseconds_a_step", "images_per_second", "ratio", "of", "projection_share"]
    )
    for name, job in jobs.items():
      mine = seconds[name][1:]  # The first round compiles.
      reference = REFERENCE[name.split()[0]]
      ratios = [a / b for a, b in zip(mine, seconds[reference][1:], strict=True)]
      median = statistics.median(mine)
      bound = job.config.model.parts != "base"
      share = f"{projection_seconds(job, states[name]) / median:.4f}" if bound else ""
      row = [name, f"{1e3 * median:.1f}", f"{args.batch_size / median:.0f}"]
      row += [f"{statistics.median(ratios):.3f}", reference, share]
      table.writerow(row)
      print(", ".join(row))
  print(f"{os.cpu_count()} cores, jax {jax.__version__}, {jax.default_backend()}")


if __name__ == "__main__":
  main()
