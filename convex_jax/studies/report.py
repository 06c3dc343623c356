"""`python -m convex_jax report`: runs compared in tables, figures and one HTML page."""

import argparse
import base64
import html
import itertools
import os
import re
import urllib.parse
from collections.abc import Iterable

import jax
from markdown_it import MarkdownIt

from convex_jax import command_line, files
from convex_jax.errors import UserError
from convex_jax.runs.workdir import Workdir
from convex_jax.studies import figures, jobs, results, tables
from convex_jax.studies.results import Point, Result, Results

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 70rem; margin: 2rem auto;
  padding: 0 1rem; }}
h1, h2 {{ line-height: 1.2; }}
h2 {{ margin-top: 2.5rem; }}
img {{ max-width: 100%; height: auto; }}
.wide {{ overflow-x: auto; margin: 1rem 0; }}
table {{ border-collapse: collapse; font-size: 0.875rem; line-height: 1.35;
  font-variant-numeric: tabular-nums; }}
th, td {{ padding: 0.3rem 0.6rem; border-bottom: 1px solid #ddd; text-align: left;
  vertical-align: bottom; }}
th {{ border-bottom: 2px solid #888; font-weight: 600; min-width: 3.5rem; }}
th:first-child, td:first-child {{ padding-left: 0; }}
td {{ white-space: nowrap; }}
td:first-child {{ white-space: normal; min-width: 8rem; }}
code {{ background: #f3f3f3; padding: 0 0.2em; }}
</style></head><body>
{body}
</body></html>
"""


def write_report(found: Results, out: str, title: str, words: str = "") -> str:
  """Writes report.md, report.html, figures, results.csv and curves.csv into `out`.

  Returns the path of the page; `words`: Markdown that goes first. Raises `UserError` where
  there are no results, or matplotlib is not installed.
  """
  if not found.rows:
    raise UserError(f"No results to report in {out}: no run is finished")
  out = files.expand(out)
  os.makedirs(out, exist_ok=True)
  results.write(found, out)
  every = tables.panels_of(found)
  pictures = _pictures(every)
  panels = [_panel(name, v, found, out, pictures[name]) for name, v in every.items()]
  text = "\n\n".join(filter(None, [f"# {title}", words, *panels, _notes(found)])) + "\n"
  with files.atomic_write(os.path.join(out, "report.md")) as file:
    file.write(text)
  path = os.path.join(out, "report.html")
  with files.atomic_write(path) as file:
    file.write(page(text, title, out))
  return path


def _pictures(panels: Iterable[str]) -> dict[str, str]:
  """The file of each panel's figure; names that differ only in punctuation do not share one."""
  found: dict[str, str] = {}
  for name in panels:
    stem = jobs.file_name(name) or "panel"
    several = (f"{stem}_{i}.png" for i in itertools.count(2))
    found[name] = next(
      f for f in itertools.chain([f"{stem}.png"], several) if f not in found.values()
    )
  return found


def _panel(
  name: str, variants: dict[str, list[Result]], found: Results, out: str, picture: str
) -> str:
  """A panel's section, as Markdown; draws its figure."""
  points: dict[str, list[Point]] = {}
  for variant, rows in variants.items():
    keys = {row.key for row in rows if row.outcome == "finished"}
    if course := [point for point in found.points if point.key in keys]:
      points[variant] = course
  if points and len(variants) <= len(figures.STYLES):
    figures.draw_curves(name, points, os.path.join(out, picture))
    caption = "Accuracy and loss by epoch: mean over seeds, band from the lowest to the highest."
  else:
    figures.draw_finals(name, variants, os.path.join(out, picture))
    caption = "Final accuracy of each run."
  baseline = points.get(next(iter(variants)), [])
  broken = {variant: tables.broken_by(rows) for variant, rows in variants.items()}
  lines = [f"## {name}", f"![{caption}]({picture})"]
  lines += [tables.table(cells, variants, baseline) for cells in (tables.RESULTS, tables.DETAILS)]
  lines += [f"`{v}`: convexity is first broken by {by}." for v, by in broken.items() if by]
  return "\n\n".join(lines)


def _notes(found: Results) -> str:
  """How to read the tables, and what produced them."""
  hardware = sorted({row.hardware for row in found.rows if row.hardware})
  versions = sorted({row.versions for row in found.rows})
  return (
    "Accuracy, loss (mean negative log-likelihood) and expected calibration error (test split,"
    " 15 bins weighted by count) are measured in inference mode, in the tables on all examples."
    " Mean ± standard deviation over seeds; a difference ± its standard error. The baseline is"
    " the first row. Gap: train minus test accuracy. Zero weights: fraction of the constrained"
    " weights. Best test accuracy: over all evaluations, chosen on the test split (its epoch: mean over seeds). Early-stopped:"
    " the baseline where its train accuracy (linear between evaluations on `eval.train_examples`)"
    " first reaches that of the row. Seconds: training steps only, on"
    f" {' and '.join(hardware) or 'unknown hardware'}. {' | '.join(versions)}."
  )


def page(text: str, title: str, folder: str) -> str:
  """The Markdown `text` as a self-contained HTML page, with the figures in `folder` embedded."""
  body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
  body = body.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")

  def embed(match: re.Match) -> str:
    with open(os.path.join(folder, urllib.parse.unquote(match[1])), "rb") as file:
      return f'src="data:image/png;base64,{base64.b64encode(file.read()).decode()}"'

  return PAGE.format(title=html.escape(title), body=re.sub(r'src="([^":]+\.png)"', embed, body))


def gather(paths: Iterable[str]) -> Results:
  """The results in folders of runs and in folders with a results.csv."""
  found, workdirs = Results(), []
  for path in map(files.expand, paths):
    if Workdir(path).exists():
      workdirs.append(path)
    elif (new := results.read(path)).rows:
      digests = {row.key: row.digest for row in found.rows}
      if other := [r.key for r in new.rows if digests.get(r.key, r.digest) != r.digest]:
        raise UserError(f"{path} has {other[0]} of another config than a folder before it")
      found += new
    else:
      raise UserError(f"{path} holds no run (config.json) and no results (results.csv)")
  return found + results.of_workdirs(workdirs)


def refuse_to_lose(found: Results, out: str) -> None:
  """Raises `UserError` where `out` holds results of a sweep that are not among these."""
  kept = {(row.key, row.digest) for row in found.rows}
  lost = [r for r in results.read(out).rows if r.schedule and (r.key, r.digest) not in kept]
  if lost:
    raise UserError(f"{out} holds results of a sweep, such as {lost[0].key}; pass another --out")


def main(argv: list[str] | None = None) -> int:
  """Writes the report; returns 0, or 2 for invalid input."""
  parser = command_line.parser(
    "report",
    "Compare finished runs in tables and figures: accuracy, loss, generalisation gap and\n"
    "certificate of each. Writes report.html (one self-contained page), report.md, the figures,\n"
    "results.csv and curves.csv.",
    "python -m convex_jax report runs/mixer_digits runs/mixer_ioc_digits --out=report",
  )
  parser.add_argument(
    "runs", type=command_line.path, nargs="+", help="folders of runs, or with a results.csv"
  )
  output = parser.add_argument_group("output")
  output.add_argument(
    "--out", type=command_line.path, default="report", help="folder of the report (default: report)"
  )
  output.add_argument("--title", help="heading (default: that of the sweep, where one is given)")
  return command_line.exit_code(_report, parser.parse_args(argv))


def _report(args: argparse.Namespace) -> int:
  files.refuse_unwritable("--out", args.out)
  jax.config.update("jax_platforms", "cpu")  # Leave the accelerator to others.
  found, title, words = gather(args.runs), "Comparison of runs", ""
  if len(args.runs) == 1 and os.path.exists(os.path.join(args.runs[0], "sweep.py")):
    module = jobs.read_sweep(args.runs[0])
    title, words = module.TITLE, jobs.introduction(found, module)
  refuse_to_lose(found, args.out)
  print(write_report(found, args.out, args.title or title, words))
  return 0
