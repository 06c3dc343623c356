"""Several small runs on one device: in turn, as simultaneous processes, or under `vmap`.

    python -m experiments.speed.population [--runs=4]

Decides what `python -m convex_jax sweep --at_once` should do. Training images/s over all runs
together: one process with the whole device (runs in turn); a process for each run, sharing the
device (on the CPU each with its own cores, as the sweep starts them); and one program for all runs,
the states stacked and the step under `jax.vmap`, each run with its own batch. Medians of rounds in
turn. Writes population.csv next to this file.
"""

import argparse
import csv
import functools
import os
import pathlib
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from convex_jax import command_line
from convex_jax.data import augment, preprocess
from convex_jax.training import runtime, step
from experiments.speed.cases import CASES, Case
from experiments.speed.jax_worker import Ours

FOLDER = pathlib.Path(__file__).parent
SMALL = {  # Networks that do not fill a device.
  "MLP 3x800, batch 128": CASES["MLP 3x800"],
  "MLP 3x200 at 8 px, batch 64": Case("mlp", {"width": 200}, "mlp", 64, 8),
  "seed Mixer at 8 px, batch 32": Case("mixer", {"size": "seed", "patch": 2}, "mixer seed", 32, 8),
}
SECONDS, ROUNDS = 4.0, 5


class Stacked:
  """Several runs as one program, under `vmap`."""

  def __init__(self, case: Case, runs: int):
    one, config = Ours(case, "ioc"), Ours(case, "ioc").program.config
    prepare = preprocess.make_prepare(config.data.image_size, *one.program.examples.statistics)
    update = functools.partial(
      step.train_step,
      model=one.program.model,
      tx=one.program.tx,
      augment=augment.make_augment(config.data, prepare),
      key=jax.random.key(0),
      label_smoothing=0.0,
      ema_decay=0.0,
    )
    rng, shape = np.random.default_rng(0), (runs, case.batch, case.px, case.px, 3)
    self.batch = {
      "image": jnp.asarray(rng.integers(0, 256, shape, np.uint8)),
      "label": jnp.asarray(rng.integers(0, 10, shape[:2]).astype(np.int32)),
      "position": jnp.arange(runs * case.batch).reshape(shape[:2]),
    }
    self.states = jax.tree.map(lambda leaf: jnp.stack([leaf] * runs), one.state)
    self.update = jax.jit(jax.vmap(update), donate_argnums=0)

  def train(self, steps: int) -> None:
    for _ in range(steps):
      self.states, metrics = self.update(self.states, self.batch)
    jax.block_until_ready(metrics)


def rate(net, images: int) -> float:
  """Images/s of a network whose steps have so many images."""
  net.train(1)
  steps, start = 0, time.perf_counter()
  while time.perf_counter() - start < SECONDS:
    net.train(5)
    steps += 5
  return steps * images / (time.perf_counter() - start)


def in_processes(name: str, way: str, runs: int) -> float:
  """The sum of the processes' rates; each waits for a line before it measures."""
  cores, processes = sorted(os.sched_getaffinity(0)), []
  for i in range(runs):
    command = [sys.executable, "-m", "experiments.speed.population", f"--worker={name}"]
    process = subprocess.Popen(
      [*command, f"--way={way}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    if 1 < runs <= len(cores):
      os.sched_setaffinity(process.pid, cores[i::runs])
    processes.append(process)
  for process in processes:
    process.stdout.readline()
  for process in processes:
    process.stdin.write("go\n")
    process.stdin.flush()
  return sum(float(process.communicate()[0].split()[-1]) for process in processes)


def work(name: str, way: str) -> None:
  runtime.tune_cpu()
  case = SMALL[name]
  runs = int(way.removeprefix("vmap")) if way.startswith("vmap") else 1
  net = Stacked(case, runs) if way.startswith("vmap") else Ours(case, "ioc")
  net.train(1)
  print("ready", flush=True)
  sys.stdin.readline()
  print(rate(net, runs * case.batch), flush=True)


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--runs", type=int, default=4)
  parser.add_argument("--worker", default="")
  parser.add_argument("--way", default="")
  args = parser.parse_args()
  if args.worker:
    return work(args.worker, args.way)
  together = (
    min(args.runs, len(os.sched_getaffinity(0))) if jax.default_backend() == "cpu" else args.runs
  )
  ways = {
    "in turn": ("one", 1),
    f"{together} processes": ("one", together),
    f"{args.runs} by vmap": (f"vmap{args.runs}", 1),
  }
  rows = []
  for name in SMALL:
    rates = {way: [] for way in ways}
    for _ in track(range(ROUNDS), name):
      for way, (kind, processes) in ways.items():
        rates[way].append(in_processes(name, kind, processes))
    first = statistics.median(rates["in turn"])
    for way, values in rates.items():
      median = statistics.median(values)
      rows.append([name, way, f"{median:.4g}", f"{median / first:.2f}"])
      print(*rows[-1], flush=True)
  with open(FOLDER / "population.csv", "w", newline="") as file:
    table = csv.writer(file, lineterminator="\n")
    table.writerow(["network", "way", "images_per_second", "of_in_turn"])
    table.writerows(rows)
  return None


if __name__ == "__main__":
  sys.exit(command_line.exit_code(main))
