"""Certified l1 accuracy of every run of a sweep, by its convexified logits.

    python -m convex_jax sweep experiments/front --schedule=short [--data_dir=FOLDER]
    python -m experiments.front.run WORKDIR --schedule=short [--examples=1000] [--data_dir=FOLDER]

WORKDIR is where the sweep trained, --sweep=FOLDER the folder of its sweep.py if not this one, whose
schedules must have other names. Adds a row to
radii.csv, next to this file, for each run that has none yet, and draws SCHEDULE_PANEL.png: clean
accuracy against certified accuracy at l1 = 1 and 4.
"""

import argparse
import csv
import pathlib
import sys
import time
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from rich.progress import track

import convex_jax
from convex_jax import command_line, files
from convex_jax.data import datasets
from convex_jax.runs import certified
from convex_jax.runs.workdir import Workdir
from convex_jax.studies import jobs, tables

FOLDER = pathlib.Path(__file__).parent
RADII = (0.5, 1.0, 2.0, 3.0, 4.0, 6.06)  # l1, pixels in 0..1.
KEYS = ["schedule", "panel", "variant", "seed"]
FIELDS = [*KEYS, "digest", "images", "accuracy", *(f"l1 {r:g}" for r in RADII)]
FIELDS += ["median", "largest", "CPU seconds"]
# Certified accuracy of Levine and Feizi 2021 (arXiv 2103.10834) on CIFAR-10 at two radii, %: from their
# stored radii of all test images, with the best noise for each.
DSSN = {1.0: 63.1, 4.0: 36.5}


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("workdir")
  parser.add_argument("--sweep", default=str(FOLDER), help="folder of its sweep.py")
  parser.add_argument("--schedule", required=True)
  parser.add_argument("--only", default="", help="only runs whose panel and variant contain this")
  parser.add_argument("--examples", type=int, default=1000)
  parser.add_argument("--data_dir", default="")
  parser.add_argument("--out", type=pathlib.Path, default=FOLDER)
  args = parser.parse_args()
  every = jobs.tasks_of(jobs.read_sweep(args.sweep), args.schedule, args.workdir)
  tasks = [task for task in every if args.only in f"{task.job.panel}, {task.job.variant}"]
  path = args.out / "radii.csv"
  rows = read(path)
  there = {(row["digest"], row["images"]) for row in rows}
  for task in tasks:
    done = Workdir(task.workdir).exists() and Workdir(task.workdir).rows("final")
    if not done or (task.digest, str(args.examples)) in there:
      continue
    rows.append(measure(task, args.examples, args.data_dir))
    with files.atomic_write(str(path)) as file:
      table = csv.DictWriter(file, FIELDS, lineterminator="\n")
      table.writeheader()
      table.writerows(rows)
  drawn = jobs.read_sweep(str(FOLDER)).SCHEDULES  # Of other sweeps a table says as much.
  for schedule, panel in dict.fromkeys((row["schedule"], row["panel"]) for row in rows):
    if schedule not in drawn:
      continue
    own = [row for row in rows if (row["schedule"], row["panel"]) == (schedule, panel)]
    draw(args.out / f"{jobs.file_name(f'{schedule} {panel}')}.png", panel, own)


def read(path: pathlib.Path) -> list[dict[str, str]]:
  if not path.exists():
    return []
  with open(path, newline="") as file:
    return list(csv.DictReader(file))


def measure(task: jobs.Task, examples: int, data_dir: str) -> dict[str, str]:
  """The row of one run. `ioc` too is convexified, so that all are measured alike.

  A certified image is a right one, so that no others need a radius.
  """
  start = time.process_time()
  run = convex_jax.load(task.workdir)
  config: Any = ConfigDict(run.config.data.to_dict())
  config.dir = data_dir or config.dir
  test = datasets.load_test(config, progress=False).first(examples)
  images = test.images[run.predict(test.images) == test.labels]
  certifier = certified.certifier(run, convexified=True)
  found = [r.radii["l1"] for r in track(certifier.radii(images, ("l1",)), total=len(images))]
  radii = np.zeros(len(test.labels))
  radii[: len(found)] = found  # 0 for all that are wrong.
  row = dict(
    zip(KEYS, (task.schedule, task.job.panel, task.job.variant, task.job.seed), strict=True)
  )
  row |= {"digest": task.digest, "images": examples, "accuracy": f"{len(found) / examples:.4f}"}
  row |= {f"l1 {r:g}": f"{np.mean(radii >= r):.4f}" for r in RADII}
  row |= {"median": f"{np.median(radii):.4g}", "largest": f"{radii.max():.4g}"}
  row |= {"CPU seconds": f"{time.process_time() - start:.0f}"}
  print(row, flush=True)
  return {key: str(value) for key, value in row.items()}


def table(rows: list[dict[str, str]]) -> str:
  """A table for each data set, as Markdown: % of images, means over seeds."""
  keys = ["accuracy", *(f"l1 {r:g}" for r in RADII)]
  headings = [
    "variant",
    "seeds",
    "images",
    "accuracy",
    "l1 0.5",
    *(f"{r:g}" for r in RADII[1:]),
    "largest",
  ]
  parts = []
  for panel in dict.fromkeys(row["panel"] for row in rows):
    lines = []
    kinds = [(row["variant"], int(row["images"])) for row in rows if row["panel"] == panel]
    for variant, images in dict.fromkeys(kinds):
      wanted = panel, variant, str(images)
      own = [row for row in rows if (row["panel"], row["variant"], row["images"]) == wanted]
      means = [f"{100 * np.mean([float(row[key]) for row in own]):.1f}" for key in keys]
      largest = max(float(row["largest"]) for row in own)
      lines.append([variant, str(len(own)), f"{images:,}", *means, f"{largest:.1f}"])
    parts.append(f"**{panel}**\n\n{tables.markdown(headings, lines)}")
  return "\n\n".join(parts)


def draw(path: pathlib.Path, panel: str, rows: list[dict[str, str]]) -> None:
  """Clean accuracy against certified accuracy at two radii: each run, and the mean of each variant."""
  most = {row["digest"]: row for row in sorted(rows, key=lambda row: int(row["images"]))}
  rows = [row for row in rows if row is most[row["digest"]]]
  variants = list(dict.fromkeys(row["variant"] for row in rows))
  colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(variants)))
  figure = Figure(figsize=(8, 3.2), layout="constrained")
  for axes, radius in zip(figure.subplots(1, len(DSSN)), DSSN, strict=True):
    for variant, colour in zip(variants, colours, strict=True):
      own = [row for row in rows if row["variant"] == variant]
      x, y = (
        np.array([100 * float(row[key]) for row in own]) for key in ("accuracy", f"l1 {radius:g}")
      )
      marker = "D" if variant == "ioc" else "o"
      axes.plot(x, y, ".", color=colour, markersize=3)
      axes.plot(x.mean(), y.mean(), marker, color=colour, markersize=6, label=variant)
    if panel.endswith("CIFAR-10"):
      axes.axhline(
        DSSN[radius], color="tab:red", linestyle="--", linewidth=0.8, label="DSSN, best noise"
      )
    axes.set(xlabel="Accuracy (%)", ylabel=f"Certified at l1 = {radius:g} (%)")
    axes.grid(alpha=0.3)
  figure.legend(
    *figure.axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small"
  )
  figure.suptitle(panel)
  figure.savefig(path, dpi=100)


if __name__ == "__main__":
  sys.exit(command_line.exit_code(main))
