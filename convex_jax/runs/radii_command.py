"""`python -m convex_jax radii`: certified radii of a run's test images."""

import argparse
import csv
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from convex_jax import command_line, files
from convex_jax.data import datasets
from convex_jax.errors import UserError
from convex_jax.progress import track
from convex_jax.proof.arithmetic import ARITHMETICS
from convex_jax.proof.radii import NORMS, Radius
from convex_jax.runs import certified
from convex_jax.runs.certified import REALS
from convex_jax.runs.run import Run, load
from convex_jax.runs.workdir import Workdir


def norms_of(text: str, option: str = "--norms") -> tuple[str, ...]:
  """The norms in a list such as "l1,linf", each once; raises `UserError` for an unknown one."""
  names = tuple(dict.fromkeys(text.split(",")))
  if not set(names) <= set(NORMS):
    raise UserError(f"{option}={text or repr(text)}; expected some of {','.join(NORMS)}")
  return names


@dataclasses.dataclass(frozen=True, eq=False)
class Measured:
  """Certified radii of test images, pixels in 0..1, with the labels of the images."""

  labels: np.ndarray
  radii: list[Radius]
  arithmetic: str = REALS  # Of what they are radii: see `certified.certifier`.

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


def measure(
  run: Run,
  norms: Sequence[str],
  examples: int,
  data_dir: str | None = None,
  arithmetic: str = REALS,
  convexified: bool = False,
) -> Measured:
  """The certified radii of the first test images, with a progress bar."""
  config: Any = ConfigDict(run.config.data.to_dict())
  config.dir = data_dir or config.dir
  test = datasets.load_test(config, progress=False).first(examples)
  certifier = certified.certifier(run, arithmetic, convexified)
  found = certifier.radii(test.images, tuple(norms))
  radii = list(track(found, "certified radii", total=len(test.labels)))
  return Measured(test.labels, radii, arithmetic)


def write(run: Run, measured: Measured, norms: Sequence[str]) -> None:
  """Writes radii.csv and radii.png into the run's folder, each as a whole or not at all.

  Raises `Unsaved` where the storage does not take them.
  """
  with files.atomic_write(Workdir(run.workdir).radii_table) as file:
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(["example", "label", "predicted", *norms, "arithmetic", "step"])
    for i, (label, r) in enumerate(zip(measured.labels, measured.radii, strict=True)):
      radii = (f"{r.radii[n]:.6g}" for n in norms)
      rows.writerow([i, int(label), r.predicted, *radii, measured.arithmetic, run.step])
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
    f"Radii of {_of(measured.arithmetic)}, for pixels in 0..1. An image counts as certified at a radius if it is classified"
    " correctly and no change of that size, measured in that norm, can alter its class: by"
    " proof, not by attempted attacks."
  )
  return table


def _of(arithmetic: str) -> str:
  if arithmetic == REALS:
    return "the network over the reals"
  return f"the program that is deployed, in {arithmetic}"


def _draw(run: Run, measured: Measured, norms: Sequence[str]) -> None:
  """Draws certified accuracy against radius, a panel for each norm."""
  try:
    from matplotlib.figure import Figure
  except ImportError:  # An optional dependency; the table holds the same figures.
    print("radii.png is not drawn: pip install 'convex_jax[report]'", file=sys.stderr)
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
  name = f"{model.name} {model.size} {model.parts}, {run.config.data.name}"
  figure.suptitle(f"{name}: {_of(measured.arithmetic)}")
  with files.atomic_write(Workdir(run.workdir).radii_figure, "wb") as file:
    figure.savefig(file, format="png", dpi=120)


def main(argv: list[str] | None = None) -> int:
  """Measures the radii of a run; returns 0, or 2 for invalid input or a network not proved."""
  parser = command_line.parser(
    "radii",
    "Certified radii of the first test images of a proved network: within the radius, measured\n"
    "in that norm, no change of the image alters its class: of the network over the reals or,\n"
    "with --arithmetic, of the program that is deployed.\n"
    "Prints a table and writes radii.csv and radii.png into the run's folder; where that is\n"
    "read-only, the table is printed alone.",
    "python -m convex_jax radii --workdir=runs/mixer_ioc_digits --norms=l1,l2 --examples=100",
  )
  command_line.add_run_options(parser)
  parser.add_argument("--norms", default=",".join(NORMS), help="default: %(default)s")
  parser.add_argument(
    "--convexified",
    action="store_true",
    help="of a network that is not convex, by the proof of its convexified logits (see `convexify`)",
  )
  add_options(parser)
  return command_line.exit_code(_report, parser.parse_args(argv))


def add_options(parser: argparse.ArgumentParser) -> None:
  """Adds --arithmetic, --examples and --data_dir: of what, and of which images, radii are."""
  parser.add_argument(
    "--arithmetic",
    default=REALS,
    choices=[REALS, *ARITHMETICS],
    help="what the radii are valid for: the network over the reals, or the program in this arithmetic,"
    " whose radii are smaller by a bound on its rounding errors (default: reals)",
  )
  parser.add_argument(
    "--examples", type=command_line.integer(1), default=200, help="test images (default: 200)"
  )
  parser.add_argument(
    "--data_dir", type=command_line.path, help="folder of the data (default: the run's)"
  )


def _report(args: argparse.Namespace) -> int:
  norms = norms_of(args.norms)
  report(load(args.workdir, args.step), norms, args, args.convexified)
  return 0


def report(
  run: Run, norms: Sequence[str], options: argparse.Namespace, convexified: bool = False
) -> None:
  """Measures the radii of a run, prints and writes them; `options` are those of `add_options`."""
  o = options
  measured = measure(run, norms, o.examples, o.data_dir, o.arithmetic, convexified)
  Console().print(table_of(measured, norms))
  files.try_to_write(write, run, measured, norms)
