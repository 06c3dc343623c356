"""Seconds from a command to its help, and to its first training step: cold, and again.

Next to them, what no such command can be faster than: the imports of the libraries it uses.

    python -m experiments.speed.start [--rounds=5]

Starts the digits example in a fresh process each time: with an empty compilation cache, then with
the cache of the first start. The first step is over when its row is in metrics.jsonl. Writes
start.csv next to this file.
"""

import argparse
import csv
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from convex_jax import command_line

MAIN = [sys.executable, "-m", "convex_jax.main"]
CONFIG = "--config=configs/mixer_ioc.py:digits"


LIBRARIES = "jax, flax.linen, optax, orbax.checkpoint, tensorflow_datasets, ml_collections"


def seconds_of(*command: str) -> float:
  start = time.perf_counter()
  subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
  return time.perf_counter() - start


def to_first_step(folder: str, name: str) -> float:
  """Seconds until a run has logged its first step; the run is then killed."""
  workdir = os.path.join(folder, name)
  metrics = pathlib.Path(workdir) / "metrics.jsonl"
  start = time.perf_counter()
  run = subprocess.Popen(
    [*MAIN, CONFIG, f"--workdir={workdir}", "--config.log.every_steps=1"],
    stdout=subprocess.DEVNULL,
    env=os.environ | {"XDG_CACHE_HOME": folder},
  )
  while not (metrics.exists() and metrics.stat().st_size):
    if run.poll() is not None:
      raise SystemExit(f"the run ended early with exit code {run.returncode}")
    time.sleep(0.01)
  seconds = time.perf_counter() - start
  run.kill()
  run.wait()
  return seconds


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--rounds", type=int, default=5)
  rounds = parser.parse_args().rounds
  libraries = [sys.executable, "-c", f"import {LIBRARIES}"]
  seconds = {"--help": [], "libraries alone": [], "first step, cold": [], "first step, again": []}
  for _ in range(rounds):
    with tempfile.TemporaryDirectory() as folder:
      seconds["--help"].append(seconds_of(*MAIN, "--help"))
      seconds["libraries alone"].append(seconds_of(*libraries))
      seconds["first step, cold"].append(to_first_step(folder, "cold"))
      seconds["first step, again"].append(to_first_step(folder, "again"))
  with open(pathlib.Path(__file__).parent / "start.csv", "w", newline="") as file:
    table = csv.writer(file, lineterminator="\n")
    table.writerow(["what", "median_s", "least_s", "most_s", "rounds"])
    for what, mine in seconds.items():
      row = [what, *(f"{f(mine):.2f}" for f in (statistics.median, min, max)), rounds]
      table.writerow(row)
      print(*row)


if __name__ == "__main__":
  sys.exit(command_line.exit_code(main))
