"""What the projection adds to a training step of the convex twins.

    python -m experiments.speed.projection [--cases='MLP 3x800']

Times what the last link of the optimizer adds to applying an update, on the real parameters,
relative to the step it belongs to: the difference of two whole steps would be far smaller than
their noise. Updates the chosen cases in projection.csv next to this file.
"""

import argparse
import pathlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.progress import track

from convex_jax import command_line
from convex_jax.models import constraints
from convex_jax.training import runtime
from experiments.speed.cases import CASES, names_of
from experiments.speed.jax_worker import Ours
from experiments.speed.run import update

PAIRS, STEPS = 105, 5


def timed(function, *args) -> float:
  start = time.perf_counter()
  jax.block_until_ready(function(*args))
  return time.perf_counter() - start


def projection_seconds(net: Ours) -> float:
  """Median, over pairs timed in turn, of (apply projected update) - (apply update).

  Applying alone already reads and writes every parameter, in the step of a base as well.
  """
  params = net.state.params
  link = constraints.enforce(net.program.constraints)
  updates = jax.tree.map(lambda p: -1e-3 * jnp.ones_like(p), params)
  opt_state = link.init(params)

  @jax.jit
  def project(updates, params):
    return optax.apply_updates(params, link.update(updates, opt_state, params)[0])

  apply = jax.jit(lambda updates, params: optax.apply_updates(params, updates))
  pairs = [timed(project, updates, params) - timed(apply, updates, params) for _ in range(PAIRS)]
  return statistics.median(pairs[5:])  # The first ones compile.


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--cases", type=names_of, default=";".join(CASES), help="separated by ;")
  args = parser.parse_args()
  runtime.tune_cpu()
  console = Console()
  for name in track(args.cases, "projecting", console=console):
    net = Ours(CASES[name], "ioc")
    net.train(2)  # The first compiles.
    step = statistics.median(timed(net.train, 1) for _ in range(STEPS))
    seconds = projection_seconds(net)
    row = {
      "case": name,
      "step_ms": f"{1e3 * step:.1f}",
      "projection_ms": f"{1e3 * seconds:.3f}",
      "share": f"{seconds / step:.4f}",
    }
    update(pathlib.Path(__file__).parent / "projection.csv", [row])
    console.print(", ".join(row.values()))


if __name__ == "__main__":
  sys.exit(command_line.exit_code(main))
