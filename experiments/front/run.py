"""Certified l1 accuracy of every run of the sweep, by its convexified logits.

    python -m convex_jax sweep experiments/front --schedule=short [--data_dir=FOLDER]
    python -m experiments.front.run WORKDIR --schedule=short [--examples=1000] [--data_dir=FOLDER]

WORKDIR is where the sweep trained. Adds a row to radii.csv, next to this file, for each run that has
none yet, and draws SCHEDULE_PANEL.png: clean accuracy against certified accuracy at l1 = 1.
"""

import argparse
import csv
import itertools
import pathlib
import time

import numpy as np
from matplotlib.figure import Figure

import convex_jax
from convex_jax.runs import radii_report
from convex_jax.runs.workdir import Workdir
from convex_jax.studies import jobs

FOLDER = pathlib.Path(__file__).parent
RADII = (0.5, 1.0, 2.0, 3.0, 4.0)  # l1, pixels in 0..1.
KEYS = ["schedule", "panel", "variant", "seed"]
FIELDS = [*KEYS, "digest", "images", "accuracy", *(f"l1 {r:g}" for r in RADII), "median", "seconds"]


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("workdir")
  parser.add_argument("--schedule", required=True)
  parser.add_argument("--examples", type=int, default=1000)
  parser.add_argument("--data_dir", default="")
  parser.add_argument("--out", type=pathlib.Path, default=FOLDER)
  args = parser.parse_args()
  tasks = jobs.tasks_of(jobs.read_sweep(str(FOLDER)), args.schedule, args.workdir)
  path = args.out / "radii.csv"
  rows = read(path)
  there = {(row["digest"], row["images"]) for row in rows}
  for task in tasks:
    done = Workdir(task.workdir).exists() and Workdir(task.workdir).rows("final")
    if not done or (task.digest, str(args.examples)) in there:
      continue
    rows.append(measure(task, args.examples, args.data_dir))
    with open(path, "w", newline="") as file:
      table = csv.DictWriter(file, FIELDS, lineterminator="\n")
      table.writeheader()
      table.writerows(rows)
  for (schedule, panel), group in itertools.groupby(
    rows, lambda row: (row["schedule"], row["panel"])
  ):
    draw(args.out / f"{jobs.file_name(f'{schedule} {panel}')}.png", panel, list(group))


def read(path: pathlib.Path) -> list[dict[str, str]]:
  if not path.exists():
    return []
  with open(path, newline="") as file:
    return list(csv.DictReader(file))


def measure(task: jobs.Task, examples: int, data_dir: str) -> dict[str, str]:
  """The row of one run. `ioc` too is convexified: its head has free signs by `shift`."""
  start = time.perf_counter()
  run = convex_jax.load(task.workdir)
  found = radii_report.measure(run, ("l1",), examples, data_dir, convexified=True)
  row = dict(
    zip(KEYS, (task.schedule, task.job.panel, task.job.variant, task.job.seed), strict=True)
  )
  row |= {"digest": task.digest, "images": examples, "accuracy": f"{found.right.mean():.4f}"}
  row |= {f"l1 {r:g}": f"{found.certified_accuracy('l1', r):.4f}" for r in RADII}
  row |= {"median": f"{np.median(found.of('l1')):.4g}"}
  row |= {"seconds": f"{(time.perf_counter() - start) / examples:.2f}"}
  print(row, flush=True)
  return {key: str(value) for key, value in row.items()}


def draw(path: pathlib.Path, panel: str, rows: list[dict[str, str]]) -> None:
  """Clean accuracy against certified accuracy at l1 = 1, the mean over seeds of each variant."""
  figure = Figure(figsize=(4.5, 3.5), layout="constrained")
  axes = figure.subplots()
  for variant in dict.fromkeys(row["variant"] for row in rows):
    own = [row for row in rows if row["variant"] == variant]
    x, y = (100 * np.mean([float(row[key]) for row in own]) for key in ("accuracy", "l1 1"))
    axes.plot(x, y, "o" if "Jacobian" in variant else "s", color="black", markersize=4)
    axes.annotate(variant, (x, y), fontsize="xx-small", xytext=(3, 3), textcoords="offset points")
  axes.set(xlabel="Accuracy (%)", ylabel="Certified accuracy at l1 = 1 (%)", title=panel)
  axes.grid(alpha=0.3)
  figure.savefig(path, dpi=120)


if __name__ == "__main__":
  main()
