"""What convexity costs trained networks: free ones, made convex by a common term, and twins.

    python -m experiments.price.run [FOLDER] --schedule=SCHEDULE --workdir=RUNS [--data_dir=DATA]

For each finished run of a sweep (FOLDER: that of its sweep.py, by default this one) whose network
is free: the test accuracy of its logits g; that of g + t, all logits of which are convex, evaluated
in float32 and in float64; the sizes of t and g; whether the convexity of g + t is proved; and the
test accuracies of the convex twins `paper` and `ioc` of the same panel, schedule and seed, from RUNS
or, where they were trained elsewhere with the same config, from the sweep's results.csv. Writes a
row for each into price.csv in --out (by default next to this file), which keeps all other rows.
"""

import argparse
import csv
import math
import pathlib
import statistics
import sys
import time

from ml_collections import ConfigDict

from convex_jax import command_line, files
from convex_jax.data import datasets
from convex_jax.errors import UserError
from convex_jax.models import catalog
from convex_jax.runs import convexify_command
from convex_jax.runs.run import Run, load
from convex_jax.runs.workdir import Workdir
from convex_jax.studies import jobs, results, tables
from convex_jax.studies.jobs import Task

FOLDER = pathlib.Path(__file__).parent
KEY = ("panel", "variant", "schedule", "seed")
TWINS = ("paper", "ioc")
FIELDS = (*KEY, "depth", "width", "digest", "examples", "accuracy", "float32", "float64")
FIELDS += ("logits", "common", "digits_lost", "verdict", "reason", *TWINS, "seconds")


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("folder", nargs="?", default=str(FOLDER), help="of a sweep.py")
  parser.add_argument("--schedule", required=True)
  parser.add_argument("--workdir", required=True, help="of the sweep")
  parser.add_argument("--data_dir", default="")
  parser.add_argument("--examples", type=int, default=0, help="test images; 0: all")
  parser.add_argument("--out", type=pathlib.Path, default=FOLDER)
  args = parser.parse_args()
  tasks = jobs.tasks_of(jobs.read_sweep(args.folder), args.schedule, args.workdir)
  jobs.refuse_other_configs(tasks, results.Results())
  finished = [task for task in tasks if final(task)]
  known = [row for row in results.read(args.folder).rows if row.outcome == "finished"]
  before = {(row.key, row.digest): row.test_accuracy for row in known}
  accuracies = {t.key: before[t.key, t.digest] for t in tasks if (t.key, t.digest) in before}
  accuracies |= {task.key: final(task)["test_accuracy"] for task in finished}
  rows = read(args.out)
  for task in finished:
    if load(task.workdir).config.model.parts == "base":
      row = row_of(task, args.examples, args.data_dir) | twins_of(task, accuracies)
      rows[tuple(row[key] for key in KEY)] = {key: text(row.get(key, "")) for key in FIELDS}
      write(args.out, rows)
  print(table(list(rows.values())))


def final(task: Task) -> dict:
  """The last row of a run's metrics; empty if it has not ended."""
  workdir = Workdir(task.workdir)
  return next(iter(workdir.rows("final")), {}) if workdir.exists() else {}


def row_of(task: Task, examples: int, data_dir: str) -> dict:
  """What a free run shows, and what its network becomes."""
  run, start = load(task.workdir), time.perf_counter()
  row = dict(zip(KEY, map(str, task.key), strict=True)) | {"digest": task.digest}
  if run.config.model.name == "mlp":
    sizes = catalog.fields_of(run.config.model)
    row |= {"depth": sizes["depth"], "width": sizes["width"]}
  try:
    certificate = run.convexify().certificate
  except UserError as error:  # A product or a quotient of values.
    reason = str(error).removeprefix(f"{run.workdir}: ")
    return row | {"accuracy": final(task)["test_accuracy"], "verdict": "none", "reason": reason}
  row |= {"verdict": certificate.verdict, "reason": certificate.reason or ""}
  test = images_of(run, examples, data_dir)
  found = convexify_command.measure(run, test.images, test.labels)
  row |= {"examples": found.examples, "accuracy": found.accuracy, **found.convex_accuracy}
  row |= {"logits": found.logits, "common": found.common, "digits_lost": found.digits_lost}
  return row | {"seconds": time.perf_counter() - start}


def images_of(run: Run, examples: int, data_dir: str):
  config = ConfigDict(run.config.data.to_dict())
  config.dir = data_dir or config.dir
  test = datasets.load_test(config, progress=False)
  return test.first(examples or len(test))


def twins_of(task: Task, accuracies: dict[tuple, float]) -> dict[str, float]:
  """Test accuracies of the convex twins of the same panel, schedule and seed."""
  panel, _, schedule, seed = task.key
  keys = {name: (panel, name, schedule, seed) for name in TWINS}
  return {name: accuracies[key] for name, key in keys.items() if key in accuracies}


def text(value) -> str:
  return f"{value:.6g}" if isinstance(value, float) else str(value)


def read(folder: pathlib.Path) -> dict[tuple, dict[str, str]]:
  """The rows of price.csv by their keys."""
  path = folder / "price.csv"
  if not path.exists():
    return {}
  with open(path, newline="") as file:
    return {tuple(row[key] for key in KEY): row for row in csv.DictReader(file)}


def write(folder: pathlib.Path, rows: dict[tuple, dict[str, str]]) -> None:
  with files.atomic_write(str(folder / "price.csv")) as file:
    writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows.values())


def table(rows: list[dict[str, str]]) -> str:
  """A Markdown table with a row for each network and schedule, means over seeds."""
  headings = ["network, data", "schedule (seeds)", "free: g", "convex: g + t, float32", "float64"]
  headings += ["`paper`", "`ioc`", "size of g", "size of t", "digits lost", "g + t convex?"]
  groups: dict[tuple, list[dict[str, str]]] = {}
  for row in rows:
    groups.setdefault((row["panel"], row["variant"], row["schedule"]), []).append(row)
  lines = []
  for (panel, variant, schedule), mine in groups.items():
    name = panel if variant == "base" else f"{panel}, {variant}"
    percent = [mean(mine, key) for key in ("accuracy", "float32", "float64", *TWINS)]
    sizes = [geometric(mine, key) for key in ("logits", "common")]
    lost = tables.mean_and_spread(numbers(mine, "digits_lost"), digits=1)
    verdict = ", ".join(sorted({row["verdict"].lower() for row in mine}))
    lines.append([name, f"{schedule} ({len(mine)})", *percent, *sizes, lost, verdict])
  return tables.markdown(headings, lines)


def numbers(rows: list[dict[str, str]], key: str) -> list[float]:
  return [float(row[key]) for row in rows if row[key]]


def mean(rows: list[dict[str, str]], key: str) -> str:
  return tables.mean_and_spread(numbers(rows, key), 100)


def geometric(rows: list[dict[str, str]], key: str) -> str:
  """The geometric mean: sizes of t differ by powers of ten."""
  values = numbers(rows, key)
  if not all(map(math.isfinite, values)):
    return "beyond float64"
  if 0.0 in values:  # Convex by itself.
    return "0"
  return f"{statistics.geometric_mean(values):.2g}" if values else ""


if __name__ == "__main__":
  sys.exit(command_line.exit_code(main))
