"""Writes report.md and speed.png from results.csv: `python -m experiments.speed.report`."""

import argparse
import csv
import pathlib
import sys

import matplotlib.pyplot as plt

from convex_jax import command_line
from experiments.speed.cases import CASES

FOLDER = pathlib.Path(__file__).parent
COLUMNS = {  # Heading: column of results.csv.
  "way": "way",
  "training (images/s)": "train_images_per_second",
  "ours / PyTorch's best": "train_ratio",
  "inference (images/s)": "infer_images_per_second",
  "ratio to PyTorch's best": "infer_ratio",
  "fraction of peak": "share_of_peak",
  "memory (MB)": "memory_MB",
  "memory / that of PyTorch's best": "memory_ratio",
  "memory to the first step (MB)": "start_MB",
  "compilation (s)": "compile_s",
  "to the first step (s)": "to_first_step_s",
}


def read() -> dict[str, list[dict[str, str]]]:
  """The rows of results.csv by case."""
  with open(FOLDER / "results.csv", newline="") as file:
    rows = list(csv.DictReader(file))
  return {name: found for name in CASES if (found := [r for r in rows if r["case"] == name])}


def table(rows: list[dict[str, str]]) -> list[str]:
  lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
  for row in rows:
    way = (
      row["way"] if row["way"] in ("base", "ioc", "base, norm of ioc") else f"torch {row['way']}"
    )
    cells = [way, *(row.get(column, "") for column in list(COLUMNS.values())[1:])]
    lines.append("| " + " | ".join(cells) + " |")
  return lines


def summary(cases: dict[str, list[dict[str, str]]]) -> list[str]:
  """A line for each case, with the ratios that the goals are about."""
  lines = [
    "| network | batch, px | base (higher is better) | ioc (higher is better) |"
    " step time, ioc / base with the same norm (lower is better) |",
    "|---|---|---|---|---|",
  ]
  for name, rows in cases.items():
    ways = {row["way"]: row for row in rows}
    base, ioc = ways["base"], ways["ioc"]
    cells = [name, f"{base['batch']}, {base['px']}", base["train_ratio"], ioc["train_ratio"]]
    lines.append("| " + " | ".join([*cells, ioc["cost_of_ioc"]]) + " |")
  return lines


def draw(cases: dict[str, list[dict[str, str]]]) -> None:
  """Draws the ratios of training rates to PyTorch's best."""
  figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
  names = list(cases)[::-1]
  for offset, way, colour in ((0.2, "base", "0.35"), (-0.2, "ioc", "tab:blue")):
    values = [
      float(next(row["train_ratio"] for row in cases[name] if row["way"] == way)) for name in names
    ]
    places = [i + offset for i in range(len(names))]
    bars = axes.barh(places, values, height=0.38, color=colour, label=way)
    axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
  axes.axvline(1, color="black", linewidth=0.8)
  axes.set_yticks(range(len(names)), names, fontsize=8)
  axes.set_xlabel("Training images/s, ours / PyTorch's best")
  figure.legend(loc="outside upper right", ncols=2, fontsize=8)
  figure.savefig(FOLDER / "speed.png", dpi=120)


def main() -> None:
  argparse.ArgumentParser(description="Writes report.md and speed.png.").parse_args()
  cases = read()
  some = next(iter(cases.values()))[0]
  versions = sorted({row["versions"] for rows in cases.values() for row in rows})
  dates = [row["date"] for rows in cases.values() for row in rows]
  when = " to ".join(sorted({min(dates), max(dates)}))
  lines = [
    "# Speed, compared with PyTorch",
    "",
    f"`python -m experiments.speed.run` on {some['machine']}, {when}; {'; '.join(versions)}.",
    "Written by `python -m experiments.speed.report`; [README.md](README.md) explains the columns.",
    "",
    "Training images/s, divided by those of PyTorch's fastest way:",
    "",
    *summary(cases),
    "",
    "![Training rates, ours / PyTorch's best](speed.png)",
  ]
  for name, rows in cases.items():
    first = rows[0]
    peak = max(float(row["peak_gflops"]) for row in rows)
    lines += ["", f"## {name}", ""]
    lines += [
      f"Batch {first['batch']}, {first['px']} px, {int(first['parameters']):,} weights,"
      f" {float(first['flops_an_image']) / 1e9:.3g} GFLOP per image in training; peak"
      f" {peak:.0f} GFLOP/s, {first['rounds']} rounds.",
      "",
    ]
    lines += table(rows)
  (FOLDER / "report.md").write_text("\n".join(lines) + "\n")
  draw(cases)


if __name__ == "__main__":
  sys.exit(command_line.exit_code(main))
