"""Runs side by side: `python -m convex_jax.report RUNS... --out=DIR`.

RUNS are folders of runs, or folders with a results.csv (`python -m convex_jax.sweep`).
Writes report.md, report.html (one file, pictures inside), a picture a panel, and the
figures themselves as results.csv and curves.csv.
"""

import argparse
import base64
import html
import math
import os
import re
import sys
from collections.abc import Iterable

import jax
import numpy as np
from markdown_it import MarkdownIt

from convex_jax import files
from convex_jax.errors import UserError
from convex_jax.studies import results, tables
from convex_jax.studies.results import Point, Result, Results

# Told apart in grey by lightness and marker: colour, marker.
STYLES = (("0.62", "s"), ("tab:red", "o"), ("navy", "^"), ("gold", "D"))
MARKS = 12  # Of a curve: a marker at every evaluation hides it.
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 72rem; margin: 2rem auto;
  padding: 0 1rem; }}
h1, h2 {{ line-height: 1.2; }}
h2 {{ margin-top: 2.5rem; }}
img {{ max-width: 100%; height: auto; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 0.3rem 0.7rem; border-bottom: 1px solid #ddd; text-align: right;
  vertical-align: top; }}
th {{ border-bottom: 2px solid #888; }}
th:first-child, td:first-child, th:last-child, td:last-child {{ text-align: left; }}
code {{ background: #f3f3f3; padding: 0 0.2em; }}
</style></head><body>
{body}
</body></html>
"""


def draw_curves(name: str, variants: dict[str, list[Point]], path: str) -> None:
  """Accuracy and loss by epoch, train and test, all variants: mean and range over seeds."""
  figure, panels = _figure(1, 2)
  for axes, field, scale in ((panels[0], "accuracy", 100), (panels[1], "loss", 1)):
    for (variant, points), (colour, marker) in zip(variants.items(), STYLES, strict=False):
      for split, line in (("train", "--"), ("test", "-")):
        x, low, mean, high = _band(points, f"{split}_{field}", scale)
        axes.plot(
          x,
          mean,
          line,
          color=colour,
          marker=marker,
          markersize=3.5,
          markevery=max(1, math.ceil(len(x) / MARKS)),
          label=f"{variant}, {split}",
        )
        axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.set_xlabel("epoch")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
  panels[0].set_ylabel("accuracy (%)")
  panels[1].set_ylabel("loss (nats)")
  figure.suptitle(name)
  handles, labels = panels[0].get_legend_handles_labels()
  figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)))
  figure.savefig(path, dpi=110)


def _band(points: list[Point], field: str, scale: float):
  """Epochs that every seed has, and lowest, mean and highest value of the seeds at each."""
  seeds: dict[int, dict[float, float]] = {}
  for point in points:
    seeds.setdefault(point.seed, {})[point.epoch] = scale * getattr(point, field)
  epochs = sorted(set.intersection(*(set(values) for values in seeds.values())))
  values = np.array([[of_seed[epoch] for epoch in epochs] for of_seed in seeds.values()])
  return epochs, values.min(0), values.mean(0), values.max(0)


def draw_ends(name: str, variants: dict[str, list[Result]], path: str) -> None:
  """Train and test accuracy of each run at its end, a line a variant: for many variants."""
  figure, axes = _figure(1, 1, height=1.2 + 0.3 * len(variants))
  for place, rows in enumerate(variants.values()):
    for split, colour, marker in (("train", "0.62", "s"), ("test", "tab:red", "o")):
      values = [100 * getattr(row, f"{split}_accuracy") for row in rows]
      axes.plot(values, [place] * len(values), marker, color=colour, alpha=0.7, markersize=5)
  for split, colour, marker in (("train", "0.62", "s"), ("test", "tab:red", "o")):
    axes.plot([], [], marker, color=colour, label=split)
  axes.set_yticks(range(len(variants)), list(variants))
  axes.invert_yaxis()
  axes.set_xlabel("accuracy (%), a mark a run")
  axes.grid(alpha=0.3)
  axes.spines[["top", "right"]].set_visible(False)
  axes.legend(loc="best")
  axes.set_title(name)
  figure.savefig(path, dpi=110)


def _figure(rows: int, columns: int, height: float = 4.2):
  try:
    from matplotlib.figure import Figure
  except ModuleNotFoundError as error:
    raise UserError(
      "pictures need matplotlib, which is not installed\n"
      "  pip install 'convex_jax[report]' (in a clone: pip install -e '.[report]')"
    ) from error
  figure = Figure(figsize=(9, height), layout="constrained")
  return figure, figure.subplots(rows, columns)


def write_report(found: Results, out: str, title: str, words: str = "") -> None:
  """Writes report.md, report.html, pictures, results.csv and curves.csv into `out`.

  `words`: Markdown that goes first. Raises `UserError` for no results, or where matplotlib is
  not installed.
  """
  if not found.rows:
    raise UserError(f"no results to report in {out}: no run is finished")
  os.makedirs(out, exist_ok=True)
  results.write(found, out)
  parts = [f"# {title}", words] if words else [f"# {title}"]
  for name, variants in tables.panels_of(found).items():
    picture = re.sub(r"\W+", "_", name).strip("_").lower() + ".png"
    points: dict[str, list[Point]] = {}
    for variant, rows in variants.items():
      keys = {row.key for row in rows if row.outcome == "finished"}
      course = [p for p in found.points if (p.panel, p.variant, p.schedule, p.seed) in keys]
      if course:
        points[variant] = course
    if points and len(variants) <= len(STYLES):
      draw_curves(name, points, os.path.join(out, picture))
      what = "Accuracy and loss by epoch; bands: from the lowest to the highest seed."
    else:
      draw_ends(name, variants, os.path.join(out, picture))
      what = "Accuracy of each run at its end."
    parts += [
      f"## {name}",
      f"![{what}]({picture})",
      tables.table(variants, points.get(next(iter(variants)), [])),
    ]
  parts.append(_notes(found))
  text = "\n\n".join(parts) + "\n"
  with files.atomic_write(os.path.join(out, "report.md")) as file:
    file.write(text)
  with files.atomic_write(os.path.join(out, "report.html")) as file:
    file.write(page(text, title, out))


def _notes(found: Results) -> str:
  """How to read the tables, and what made them."""
  hardware = sorted({row.hardware for row in found.rows if row.hardware})
  versions = sorted({row.versions for row in found.rows})
  return (
    "Accuracy, loss (mean negative log-likelihood) and expected calibration error (test split,"
    " 15 bins weighted by count) are at inference, in the tables on every example. Mean ± standard deviation"
    " over seeds; a difference ± its standard error. Gap: train less test accuracy. Zero"
    " weights: of those that are constrained. Peak: the best evaluation, chosen on the test split."
    " Stopped early: where the first variant's training accuracy, as its curve has it (straight"
    " lines between evaluations on `eval.train_examples`), first reaches this row's. Seconds: of training steps, on"
    f" {' and '.join(hardware) or 'unknown hardware'}. {' | '.join(versions)}."
  )


def page(text: str, title: str, folder: str) -> str:
  """The Markdown `text` as an HTML page with its pictures, from `folder`, inside."""
  body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
  body = body.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")

  def embed(match: re.Match) -> str:
    with open(os.path.join(folder, match[1]), "rb") as file:
      return f'src="data:image/png;base64,{base64.b64encode(file.read()).decode()}"'

  return PAGE.format(title=html.escape(title), body=re.sub(r'src="([^":]+\.png)"', embed, body))


def gather(paths: Iterable[str]) -> Results:
  """The results in folders of runs and in folders with a results.csv."""
  found, workdirs = Results(), []
  for path in paths:
    if os.path.exists(os.path.join(path, "config.json")):
      workdirs.append(path)
    elif os.path.exists(os.path.join(path, "results.csv")):
      new, digests = results.read(path), {row.key: row.digest for row in found.rows}
      for row in new.rows:
        if digests.get(row.key, row.digest) != row.digest:
          raise UserError(f"{path} has {row.key} of another config than a folder before it")
      found += new
    else:
      raise UserError(f"{path} holds no run (config.json) and no results (results.csv)")
  return found + results.of_workdirs(workdirs)


def refuse_to_lose(found: Results, out: str) -> None:
  """Raises `UserError` where `out` holds results of a sweep that are not among these."""
  kept = {(row.key, row.digest) for row in found.rows}
  lost = [r for r in results.read(out).rows if r.schedule and (r.key, r.digest) not in kept]
  if lost:
    raise UserError(f"{out} holds results of a sweep, {lost[0].key} for one; give another --out")


def main(argv: list[str] | None = None) -> int:
  """Writes the report; returns 0, or 2 after a mistake."""
  parser = argparse.ArgumentParser("python -m convex_jax.report", description=main.__doc__)
  parser.add_argument("runs", nargs="+", help="folders of runs, or of results")
  parser.add_argument("--out", default="report", help="folder to write to; default: report")
  parser.add_argument("--title", default="Runs side by side")
  args = parser.parse_args(argv)
  jax.config.update("jax_platforms", "cpu")  # Nothing is computed.
  try:
    found = gather(args.runs)
    refuse_to_lose(found, args.out)
    write_report(found, args.out, args.title)
  except OSError as error:
    print(f"{error.filename or args.out}: {error.strerror}", file=sys.stderr)
    return UserError.code
  except UserError as error:
    print(error, file=sys.stderr)
    return error.code
  page_path = os.path.join(args.out, "report.html")
  print(page_path)
  return 0
