"""Certified accuracy of a run: the radii of its test images, as a table, a file, a figure."""

import csv
import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from rich.progress import track
from rich.table import Table

from convex_jax import data
from convex_jax.errors import Mistake
from convex_jax.robustness import NORMS, Certifier, Radius
from convex_jax.run import Run


def norms_of(text: str) -> tuple[str, ...]:
  """The tuple of norms in "l1,linf", say; raises `Mistake` for one that there is not."""
  names = tuple(filter(None, text.split(",")))
  if not set(names) <= set(NORMS):
    raise Mistake(f"--radii={text}; allowed: some of {','.join(NORMS)}")
  return names


@dataclasses.dataclass(frozen=True)
class Measured:
  """Radii of test images, with their labels."""

  labels: np.ndarray
  radii: list[Radius]

  def certified_accuracy(self, norm: str, radius: float) -> float:
    """Share of the images that are classified right, whatever happens within `radius`."""
    return float(np.mean(self.right & (self.of(norm) >= radius)))

  @property
  def right(self) -> np.ndarray:
    """Which images are classified right."""
    return np.array([r.predicted for r in self.radii]) == self.labels

  def of(self, norm: str) -> np.ndarray:
    """The radii in one norm."""
    return np.array([r.radii[norm] for r in self.radii])


def measure(run: Run, norms: Sequence[str], examples: int, data_dir: str = "") -> Measured:
  """Certified radii of the first test images, with a progress bar."""
  config: Any = ConfigDict(run.config.data.to_dict())
  config.dir = data_dir or config.dir
  test = data.load(config, seed=0, progress=False).test.first(examples)
  certifier = Certifier(run)
  radii = [certifier.radius(x, tuple(norms)) for x in track(test.images, "certified radii")]
  return Measured(test.labels, radii)


def write_report(run: Run, measured: Measured, norms: Sequence[str]) -> Table:
  """Writes radii.csv and radii.png into the run's folder; returns a table to print."""
  with open(os.path.join(run.workdir, "radii.csv"), "w", newline="") as file:
    rows = csv.writer(file)
    rows.writerow(["example", "label", "predicted", *norms])
    for i, (label, r) in enumerate(zip(measured.labels, measured.radii, strict=True)):
      rows.writerow([i, int(label), r.predicted, *(f"{r.radii[n]:.6g}" for n in norms)])
  n = len(measured.labels)
  table = Table("norm", "median radius", *(f"{q} of it" for q in ("1/4", "1/2", "1", "2")))
  for norm in norms:
    median = float(np.median(measured.of(norm)))
    shares = [100 * measured.certified_accuracy(norm, q * median) for q in (0.25, 0.5, 1, 2)]
    table.add_row(norm, f"{median:.4g}", *(f"{share:.1f} %" for share in shares))
  accuracy = 100 * measured.certified_accuracy(norms[0], 0.0)
  table.title = f"Certified accuracy of {n} test images (plain: {accuracy:.1f} %)"
  table.caption = (
    "Pixels in 0..1. An image counts as certified at a radius when it is classified right and"
    " no change of that size, measured in that norm, can alter the class: by proof, not by"
    " trying attacks."
  )
  _draw(run, measured, norms)
  return table


def _draw(run: Run, measured: Measured, norms: Sequence[str]) -> None:
  """Certified accuracy against radius, a panel a norm."""
  try:
    from matplotlib.figure import Figure
  except ImportError:  # An extra: the table says the same.
    return
  figure = Figure(figsize=(3.4 * len(norms), 3), layout="constrained")
  for axes, norm in zip(figure.subplots(1, len(norms), squeeze=False)[0], norms, strict=True):
    steps = np.sort([0.0, *measured.of(norm)[measured.right]])
    shares = [100 * measured.certified_accuracy(norm, radius) for radius in steps]
    axes.step(steps, shares, where="pre", color="black")
    axes.set(xlabel=f"{norm} radius (pixels in 0..1)", ylim=(0, 100), xlim=(0, None))
    axes.grid(alpha=0.3)
  figure.axes[0].set_ylabel("certified accuracy (%)")
  model = run.config.model
  figure.suptitle(f"{model.name} {model.size} {model.parts}, {run.config.data.name}")
  figure.savefig(os.path.join(run.workdir, "radii.png"), dpi=120)
