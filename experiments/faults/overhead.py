"""The cost of a checkpoint: the training loop's wait, the writing alongside it, the digests.

    python -m experiments.faults.overhead

Trains two networks with a checkpoint every 50 steps and without any, in turn, and times the parts
of a save separately. Writes overhead.csv next to this file.
"""

import argparse
import csv
import pathlib
import statistics
import sys
import tempfile
import time

import jax
from rich.console import Console

from convex_jax import command_line
from convex_jax.runs import manifest
from convex_jax.runs.checkpoints import Checkpoints
from convex_jax.training import runtime
from experiments.speed.cases import CASES
from experiments.speed.jax_worker import Ours

FOLDER = pathlib.Path(__file__).parent
EVERY, ROUNDS = 50, 5


def measure(name: str) -> dict[str, str]:
  """The median costs of the checkpoints of a case."""
  net = Ours(CASES[name], "ioc")
  net.train(3)
  plain, saving, waits, writings, digests = [], [], [], [], []
  with tempfile.TemporaryDirectory() as folder:
    ours = Checkpoints(folder, 2)
    for _ in range(ROUNDS):
      began = time.perf_counter()
      net.train(EVERY)
      plain.append((time.perf_counter() - began) / EVERY)
      ours.wait()
      began = time.perf_counter()
      ours.save(int(net.state.step), net.state.items(), None)
      waits.append(time.perf_counter() - began)
      net.train(EVERY)  # It is written in the meantime.
      saving.append((time.perf_counter() - began) / EVERY)
      ours.wait()
      net.train(1)
      began = time.perf_counter()
      ours.save(int(net.state.step), net.state.items(), None)
      ours.wait()
      writings.append(time.perf_counter() - began)
      step = pathlib.Path(folder) / str(int(net.state.step))
      began = time.perf_counter()
      assert manifest.fault(str(step), int(net.state.step)) is None
      digests.append(time.perf_counter() - began)
    ours.close()
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(net.state))
  step = statistics.median(plain)
  row = {
    "case": name,
    "state_MB": size / 1e6,
    "step_ms": 1e3 * step,
    "step_with_a_save_every_50_ms": 1e3 * statistics.median(saving),
    "loop_waits_ms": 1e3 * statistics.median(waits),
    "written_and_sealed_after_ms": 1e3 * statistics.median(writings),
    "digests_ms": 1e3 * statistics.median(digests),
    "digests_share_of_50_steps": statistics.median(digests) / EVERY / step,
    "saving_share_of_50_steps": statistics.median(saving) / step - 1,
  }
  return {key: value if isinstance(value, str) else f"{value:.4g}" for key, value in row.items()}


def main() -> None:
  argparse.ArgumentParser(description=__doc__.partition(":")[0] + ".").parse_args()
  runtime.tune_cpu()
  rows = [measure(name) for name in ("Mixer seed, 128", "MLP 3x800")]
  with open(FOLDER / "overhead.csv", "w", newline="") as file:
    writer = csv.DictWriter(file, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
  for row in rows:
    Console().print(row)


if __name__ == "__main__":
  sys.exit(command_line.exit_code(main))
