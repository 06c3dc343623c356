"""Writes the tables of experiments/ into Markdown files: `python -m experiments.readme [FILES]`.

Each table goes between two comments, `<!-- NAME -->` and `<!-- /NAME -->`, of any of the files;
by default README.md, the pages of docs/ and those of experiments/.
"""

import argparse
import csv
import os
import pathlib
import statistics
import sys

from convex_jax import command_line
from convex_jax.studies import results, tables
from experiments.cats_dogs import run as cats_dogs_run
from experiments.front import run as front_run
from experiments.price import run as price_run
from experiments.scale import run as scale_run

FOLDER = pathlib.Path(__file__).parent
ROOT = FOLDER.parent
CLAIMS = ("mlp", "mixer", "cycle_mlp", "convolutions", "convex_head")
PREPARING = {"readout_rates"}  # Schedules that choose a learning rate for others.


def read(path: str) -> list[dict[str, str]]:
  with open(FOLDER / path, newline="") as file:
    return list(csv.DictReader(file))


def faults(link: str) -> str:
  """The faults injected, and what they left; `link`: the path of this folder."""
  rows = read("faults/results.csv")
  headings = {
    "fault": "fault",
    "injected": "injected",
    "survived": "survived",
    "steps redone at most": "steps redone (at most)",
    "examples lost": "examples lost",
    "examples repeated": "examples repeated",
    "seconds to resume": "seconds to resume (median)",
  }
  injected, survived = (sum(int(row[key]) for row in rows) for key in ("injected", "survived"))
  return (
    f"Faults injected on two cores ([experiments/faults]({link}/faults/README.md),\n"
    f"`python -m experiments.faults.run`): {injected} injected, {survived} survived; no example was"
    " lost or repeated, and no\nresult was silently wrong.\n\n"
    + tables.markdown(headings.values(), [[row[key] for key in headings] for row in rows])
  )


def speed(_: str) -> str:
  """Training rates relative to PyTorch's, and the cost of the constraint."""
  cases: dict[str, dict[str, dict[str, str]]] = {}
  for row in read("speed/results.csv"):
    cases.setdefault(row["case"], {})[row["way"]] = row
  headings = ["network"]
  headings += [
    f"{twin}: images/s, ours / PyTorch's (higher is better)" for twin in ("base", "`ioc`")
  ]
  headings += ["step time, `ioc` / base with the same norm (lower is better)"]
  rows = [
    [
      name,
      *(f"{float(ways[way]['train_ratio']):.2f}" for way in ("base", "ioc")),
      f"{float(ways['ioc']['cost_of_ioc']):.2f}",
    ]
    for name, ways in cases.items()
  ]
  return tables.markdown(headings, rows)


def median_seconds(rows: list[results.Result]) -> float:
  known = [row.seconds for row in rows if row.outcome == "finished"]
  return statistics.median(known) if known else results.UNKNOWN


def train_and_test(rows: list[results.Result]) -> str:
  """Mean train and test accuracy, %, the latter with its standard deviation over seeds."""
  if not rows:
    return ""
  train = f"{100 * statistics.fmean(row.train_accuracy for row in rows):.1f}"
  return f"{train} / {tables.mean_and_spread((row.test_accuracy for row in rows), 100, 1)}"


def claims(link: str) -> str:
  """Accuracies reported by the sources, and ours: a row for each panel and schedule.

  But for the schedules in `PREPARING`, which their own pages show.
  """
  headings = ["network, data", "schedule (seeds)", "source: base", "source: convex"]
  headings += [
    "ours: base",
    "ours: `paper`",
    "ours: `ioc`",
    "`ioc` convex?",
    "seconds per `ioc` run",
  ]
  panels: dict[tuple[str, str, str], dict[str, list[results.Result]]] = {}
  for claim in CLAIMS:
    for row in results.read(str(FOLDER / claim)).rows:
      where = panels.setdefault((claim, row.panel, row.schedule), {})
      where.setdefault(row.variant, []).append(row)
  rows = []
  for (claim, panel, schedule), variants in panels.items():
    base, paper, ioc = (variants.get(twin, []) for twin in ("base", "paper", "ioc"))
    fair = variants.get("base, BatchNorm", [])  # With the norm of `ioc`: the fair baseline.
    of_base = train_and_test(base) or (f"{train_and_test(fair)}, with BatchNorm" if fair else "")
    if ioc and schedule not in PREPARING:
      rows.append(
        [
          f"[{panel}]({link}/{claim}/README.md)",
          f"{schedule} ({len(ioc)})",
          tables.source(base) if base else "",
          tables.source(ioc) or (tables.source(paper) if paper else ""),
          of_base,
          *map(train_and_test, (paper, ioc)),
          tables.verdict(ioc),
          f"{median_seconds(ioc):,.0f}",
        ]
      )
  caption = "Train / test accuracy in %; mean ± standard deviation over seeds."
  return f"{caption}\n\n{tables.markdown(headings, rows)}"


def price(_: str) -> str:
  """What convexity costs trained networks."""
  return price_run.table(read("price/price.csv"))


def cats_dogs(_: str) -> str:
  """Certified accuracies of three binary tasks."""
  return cats_dogs_run.table(read("cats_dogs/protocol.csv"))


def memorised(_: str) -> str:
  """Errors of one convex logit on the images that it was trained on."""
  return cats_dogs_run.memorised_table(read("cats_dogs/memorised.csv"))


def front(schedule: str) -> str:
  """Certified accuracies between free weights and weights >= 0, of one schedule."""
  return front_run.table([row for row in read("front/radii.csv") if row["schedule"] == schedule])


def pods(_: str) -> str:
  """What each published recipe takes on a pod, by the TPU's compiler."""
  return scale_run.table(read("scale/compiled.csv"))


def pods_overview(_: str) -> str:
  """The same, in short."""
  return scale_run.overview(read("scale/compiled.csv"))


def native(_: str) -> str:
  """What the forms that suit a TPU change, by the same."""
  return scale_run.changes(read("scale/compiled.csv"))


TABLES = {"faults": faults, "speed": speed, "claims": claims, "price": price}
TABLES |= {"pods": pods, "pods_overview": pods_overview, "native": native}
TABLES |= {"cats_dogs": cats_dogs, "memorised": memorised}
TABLES |= {"front": lambda _: front("quick"), "front_radius": lambda _: front("radius")}
TABLES |= {"front_price": lambda _: front("mlp")}


def fill(path: pathlib.Path) -> list[str]:
  """Writes the tables that a file has marks for; returns their names."""
  text, found = path.read_text(), []
  for mark, make in TABLES.items():
    link = pathlib.Path(os.path.relpath(FOLDER, path.resolve().parent)).as_posix()
    before, opened, rest = text.partition(f"<!-- {mark} -->\n")
    _, closed, after = rest.partition(f"<!-- /{mark} -->")
    if opened and closed:
      text = before + opened + make(link).rstrip("\n") + "\n" + closed + after
      found.append(mark)
  if found:
    path.write_text(text)
  return found


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition(":")[0] + ".")
  default = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]  # Its folders are built.
  default += sorted(FOLDER.glob("*/README.md"))
  parser.add_argument("files", nargs="*", type=pathlib.Path, default=default)
  paths = parser.parse_args().files
  for path in paths:
    if marks := fill(path):
      print(f"{path}: {', '.join(marks)}")


if __name__ == "__main__":
  sys.exit(command_line.exit_code(main))
