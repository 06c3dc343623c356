"""The figures of a report: curves of a few variants, final accuracies of many."""

import importlib.util
import itertools
import math
from typing import Any

import numpy as np

from convex_jax.errors import UserError
from convex_jax.studies.results import Point, Result

# Colour and marker; also distinguishable in greyscale.
STYLES = (("0.55", "s"), ("tab:red", "o"), ("navy", "^"), ("goldenrod", "D"))
LINES = {"train": "--", "test": "-"}
MARKERS = 12  # Per curve: one at every evaluation would hide it.


def draw_curves(name: str, variants: dict[str, list[Point]], path: str) -> None:
  """Draws accuracy and loss by epoch, train and test: mean over seeds, band from least to most."""
  figure = _figure(9, 4.2)
  panels = figure.subplots(1, 2)
  for axes, field, scale in ((panels[0], "accuracy", 100), (panels[1], "loss", 1)):
    for (variant, points), (colour, marker) in zip(variants.items(), STYLES, strict=False):
      for split, line in LINES.items():
        x, low, mean, high = band(points, f"{split}_{field}", scale)
        every, label = max(1, math.ceil(len(x) / MARKERS)), variant if split == "test" else None
        marks = dict(marker=marker, markersize=3.5, markevery=every)
        axes.plot(x, mean, line, color=colour, label=label, **marks)
        axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.set_xlabel("Epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    _simplify(axes)
  panels[0].set_ylabel("Accuracy (%)")
  panels[1].set_ylabel("Loss (nats)")
  figure.suptitle(name)
  for split, line in LINES.items():
    panels[0].plot([], [], line, color="black", label=f"{split} split")
  handles, labels = panels[0].get_legend_handles_labels()
  figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
  figure.savefig(path, dpi=110)


def band(points: list[Point], field: str, scale: float = 1.0) -> tuple[list[float], Any, Any, Any]:
  """(epochs that every seed has, least, mean and greatest value over the seeds at each)."""
  seeds: dict[int, dict[float, float]] = {}
  for point in points:
    seeds.setdefault(point.seed, {})[point.epoch] = scale * getattr(point, field)
  epochs = sorted(set.intersection(*(set(values) for values in seeds.values())))
  values = np.array([[of_seed[epoch] for epoch in epochs] for of_seed in seeds.values()])
  return epochs, values.min(0), values.mean(0), values.max(0)


def draw_finals(name: str, variants: dict[str, list[Result]], path: str) -> None:
  """Draws the final train and test accuracy of each run, a row for each variant."""
  figure = _figure(9, 1.4 + 0.28 * len(variants))
  axes = figure.subplots()
  for split, (colour, marker) in zip(("train", "test"), STYLES, strict=False):
    places = [place for place, rows in enumerate(variants.values()) for _ in rows]
    every = itertools.chain(*variants.values())
    values = [100 * getattr(row, f"{split}_accuracy") for row in every]
    axes.plot(values, places, marker, color=colour, alpha=0.7, label=f"{split} split")
  axes.set_yticks(range(len(variants)), list(variants))
  axes.set_ylim(len(variants) - 0.4, -0.6)
  axes.set_xlabel("Final accuracy (%), one marker per run")
  _simplify(axes)
  axes.set_title(name)
  figure.legend(loc="outside lower center", ncols=2, frameon=False)
  figure.savefig(path, dpi=110)


def _simplify(axes: Any) -> None:
  axes.grid(alpha=0.3)
  axes.spines[["top", "right"]].set_visible(False)


def require_matplotlib() -> None:
  """Raises `UserError` where it is not installed: an optional dependency."""
  if importlib.util.find_spec("matplotlib") is None:
    raise UserError(
      "figures need matplotlib, which is not installed\n"
      "  pip install 'convex_jax[report]' (in a clone: pip install -e '.[report]')"
    )


def _figure(width: float, height: float) -> Any:
  require_matplotlib()
  from matplotlib.figure import Figure

  return Figure(figsize=(width, height), layout="constrained")
