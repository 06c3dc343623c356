"""`python -m convex_jax radii`: certified radii of a run's test images."""

import argparse
import csv
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import track
from rich.table import Table

from convex_jax import command_line, files
from convex_jax.data import datasets
from convex_jax.errors import UserError
from convex_jax.proof.radii import NORMS, Radius
from convex_jax.runs import certified
from convex_jax.runs.run import Run, load
from convex_jax.runs.workdir import Workdir


def norms_of(text: str) -> tuple[str, ...]:
  """The norms in a list such as "l1,linf"; raises `UserError` for an unknown one."""
  names = tuple(filter(None, text.split(",")))
  if not set(names) <= set(NORMS):
    raise UserError(f"--norms={text}; expected some of {','.join(NORMS)}")
  return names


@dataclasses.dataclass(frozen=True, eq=False)
class Measured:
  """Certified radii of test images, pixels in 0..1, with the labels of the images."""

  labels: np.ndarray
  radii: list[Radius]

  def certified_accuracy(self, norm: str, radius: float) -> float:
    """Fraction of the images that are classified correctly, and provably so within `radius`."""
    return float(np.mean(self.right & (self.of(norm) >= radius)))

  @property
  def right(self) -> np.ndarray:
    """Which images are classified correctly, bool (N,)."""
    return np.array([r.predicted for r in self.radii]) == self.labels

  def of(self, norm: str) -> np.ndarray:
    """The radii in one norm, (N,)."""
    return np.array([r.radii[norm] for r in self.radii])


def measure(run: Run, norms: Sequence[str], examples: int, data_dir: str = "") -> Measured:
  """The certified radii of the first test images, with a progress bar."""
  config: Any = ConfigDict(run.config.data.to_dict())
  config.dir = data_dir or config.dir
  test = datasets.load(config, seed=0, progress=False).test.first(examples)
  certifier = certified.certifier(run)
  radii = [certifier.radius(x, tuple(norms)) for x in track(test.images, "certified radii")]
  return Measured(test.labels, radii)


def write(run: Run, measured: Measured, norms: Sequence[str]) -> None:
  """Writes radii.csv and radii.png into the run's folder, each as a whole or not at all.

  Raises `Unsaved` where the storage does not take them.
  """
  with files.atomic_write(Workdir(run.workdir).radii_table) as file:
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(["example", "label", "predicted", *norms])
    for i, (label, r) in enumerate(zip(measured.labels, measured.radii, strict=True)):
      rows.writerow([i, int(label), r.predicted, *(f"{r.radii[n]:.6g}" for n in norms)])
  _draw(run, measured, norms)


def table_of(measured: Measured, norms: Sequence[str]) -> Table:
  """Median radii and certified accuracies, to print."""
  n = len(measured.labels)
  multiples = {"1/4": 0.25, "1/2": 0.5, "1": 1.0, "2": 2.0}
  table = Table("norm", "median radius", *(f"at {q} x median" for q in multiples))
  for norm in norms:
    median = float(np.median(measured.of(norm)))
    accuracies = [100 * measured.certified_accuracy(norm, q * median) for q in multiples.values()]
    table.add_row(norm, f"{median:.4g}", *(f"{value:.1f} %" for value in accuracies))
  accuracy = 100 * measured.certified_accuracy(norms[0], 0.0)
  table.title = f"Certified accuracy of {n} test images (accuracy: {accuracy:.1f} %)"
  table.caption = (
    "Radii for pixels in 0..1. An image counts as certified at a radius if it is classified"
    " correctly and no change of that size, measured in that norm, can alter its class: by"
    " proof, not by attempted attacks."
  )
  return table


def _draw(run: Run, measured: Measured, norms: Sequence[str]) -> None:
  """Draws certified accuracy against radius, a panel for each norm."""
  try:
    from matplotlib.figure import Figure
  except ImportError:  # An optional dependency; the table holds the same figures.
    return
  figure = Figure(figsize=(3.4 * len(norms), 3), layout="constrained")
  for axes, norm in zip(figure.subplots(1, len(norms), squeeze=False)[0], norms, strict=True):
    steps = np.sort([0.0, *measured.of(norm)[measured.right]])
    accuracies = [100 * measured.certified_accuracy(norm, radius) for radius in steps]
    axes.step(steps, accuracies, where="pre", color="black")
    axes.set(xlabel=f"Radius in {norm} (pixels in 0..1)", ylim=(0, 100), xlim=(0, None))
    axes.grid(alpha=0.3)
  figure.axes[0].set_ylabel("Certified accuracy (%)")
  model = run.config.model
  figure.suptitle(f"{model.name} {model.size} {model.parts}, {run.config.data.name}")
  with files.atomic_write(Workdir(run.workdir).radii_figure, "wb") as file:
    figure.savefig(file, format="png", dpi=120)


def main(argv: list[str] | None = None) -> int:
  """Measures the radii of a run; returns 0, or 2 for invalid input or a network not proved."""
  parser = command_line.parser(
    "radii",
    "Certified radii of the first test images of a proved network: within the radius, measured\n"
    "in that norm, no change of the image alters its class (of the network over the reals).\n"
    "Prints a table and writes radii.csv and radii.png into the run's folder; where that is\n"
    "read-only, the table is printed alone.",
    "python -m convex_jax radii --workdir=runs/mixer_ioc_digits --norms=l1,l2 --examples=100",
  )
  command_line.add_run_options(parser)
  parser.add_argument("--norms", default=",".join(NORMS), help="default: %(default)s")
  parser.add_argument(
    "--examples", type=command_line.integer(1), default=200, help="test images (default: 200)"
  )
  parser.add_argument(
    "--data_dir", type=command_line.path, default="", help="folder of the data (default: the run's)"
  )
  return command_line.exit_code(_report, parser.parse_args(argv))


def _report(args: argparse.Namespace) -> int:
  norms = norms_of(args.norms) or NORMS
  run = load(args.workdir, args.step)
  measured = measure(run, norms, args.examples, args.data_dir)
  Console().print(table_of(measured, norms))
  files.try_to_write(write, run, measured, norms)
  return 0
