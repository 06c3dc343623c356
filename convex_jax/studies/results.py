"""The results of runs as tables that outlive them: results.csv and, for the curves, curves.csv."""

import csv
import dataclasses
import math
import os
import typing
from collections.abc import Iterable
from typing import Any

import optax

from convex_jax import files
from convex_jax.config_files import flatten
from convex_jax.errors import UserError
from convex_jax.runs.run import load
from convex_jax.runs.workdir import Workdir, digest, essential

UNKNOWN = math.nan


@dataclasses.dataclass(frozen=True)
class _Keyed:
  """What has a key, that of a result; the same key with another digest is of another config."""

  panel: str  # The runs compared in one figure: an architecture on a data set, say.
  variant: str  # Within the panel: base, ioc.
  schedule: str  # Of a sweep: "full" is its source's; others are shorter, as sweep.py says.
  seed: int

  @property
  def key(self) -> tuple[str, str, str, int]:
    return self.panel, self.variant, self.schedule, self.seed


@dataclasses.dataclass(frozen=True)
class Result(_Keyed):
  """The figures of a run: accuracies and fractions 0..1, losses in nats; inference, all examples.

  A loss is without label smoothing; calibration: `metrics.CalibrationError`. `nan`: unknown.
  """

  digest: str  # `workdir.digest` of the config.
  outcome: str  # finished, diverged.
  parameters: int
  epochs: float  # Completed.
  batch_size: int
  train_accuracy: float = UNKNOWN
  test_accuracy: float = UNKNOWN
  gap: float = UNKNOWN  # Train accuracy minus test accuracy.
  train_loss: float = UNKNOWN
  test_loss: float = UNKNOWN
  train_calibration_error: float = UNKNOWN
  test_calibration_error: float = UNKNOWN
  peak_test_accuracy: float = UNKNOWN  # The best of all evaluations: chosen on the test split.
  peak_train_accuracy: float = UNKNOWN  # At that evaluation, on `eval.train_examples`.
  peak_epoch: float = UNKNOWN
  zero_share: float = UNKNOWN  # Fraction of the constrained weights that are exactly 0.
  certificate: str = ""  # PROVED, REFUTED or UNKNOWN; "": not certified.
  broken_by: str = ""  # The first operation that breaks the proof.
  seconds: float = UNKNOWN  # Of training steps, without compilation and evaluation.
  hardware: str = ""
  versions: str = ""
  source_train_accuracy: float = UNKNOWN  # Reported by the source of the claim.
  source_test_accuracy: float = UNKNOWN


@dataclasses.dataclass(frozen=True)
class Point(_Keyed):
  """An evaluation during training: a row of curves.csv."""

  epoch: float
  train_accuracy: float
  test_accuracy: float
  train_loss: float
  test_loss: float


@dataclasses.dataclass(frozen=True)
class Results:
  """Results and the points of their curves."""

  rows: tuple[Result, ...] = ()
  points: tuple[Point, ...] = ()

  def __add__(self, other: "Results") -> "Results":
    """Both; where a key is in both, the other's."""
    new = {row.key for row in other.rows}
    return Results(
      tuple(row for row in self.rows if row.key not in new) + other.rows,
      tuple(point for point in self.points if point.key not in new) + other.points,
    )


def of_workdir(
  path: str,
  panel: str,
  variant: str,
  schedule: str = "",
  source: tuple[float, float] = (UNKNOWN, UNKNOWN),
  outcome: str = "finished",
) -> Results:
  """The result of a run that has ended; `source`: train and test accuracy to compare it with.

  Raises `UserError` where the run is not finished, unless its `outcome` says so.
  """
  workdir = Workdir(path)
  description, every = workdir.description(), workdir.rows()
  final = next((row for row in every if row["kind"] == "final"), None)
  if final is None and outcome == "finished":
    raise UserError(
      f"{path} is not finished, or diverged: {workdir.metrics_file} has no final row\n"
      "  Run the command that trained it again to resume it."
    )
  config, names = description["config"], {field.name for field in dataclasses.fields(Result)}
  evals = [row for row in every if row["kind"] == "eval"]
  figures = {name: value for name, value in (final or {}).items() if name in names}
  if evals:
    best = max(evals, key=lambda row: row["test_accuracy"])
    figures |= {f"peak_{name}": best[name] for name in ("test_accuracy", "train_accuracy", "epoch")}
  certificate = workdir.final_certificate()
  result = Result(
    panel=panel,
    variant=variant,
    schedule=schedule,
    seed=config["seed"],
    digest=digest(config),
    outcome=outcome,
    # A run that predates their count in config.json has to be loaded.
    parameters=description.get("parameters") or optax.tree.size(load(path).params),
    epochs=_rounded(every[-1]["epoch"]) if every else 0.0,
    batch_size=config["batch_size"],
    certificate=certificate["verdict"] if certificate else "",
    broken_by=(certificate["reason"] or "") if certificate else "",
    seconds=round(training_seconds(every, config["batch_size"]), 1),
    hardware=description.get("hardware", ""),
    versions="; ".join(f"{name} {version}" for name, version in description["versions"].items()),
    source_train_accuracy=source[0],
    source_test_accuracy=source[1],
    **{name: _rounded(value) for name, value in figures.items()},  # pyright: ignore[reportArgumentType]
  )
  fields = [field.name for field in dataclasses.fields(Point)][4:]
  points = tuple(Point(*result.key, *(_rounded(row[name]) for name in fields)) for row in evals)
  return Results((result,), points)


def of_workdirs(workdirs: Iterable[str]) -> Results:
  """The results of runs, each named by what distinguishes it from the others.

  The panel is the architecture on its data; the variant its parts, and every key of the
  config (but the seed) in which the runs of a panel differ.
  """
  paths = [files.expand(path) for path in workdirs]
  configs = [dict(flatten(Workdir(path).description()["config"])) for path in paths]
  panels = [f"{c['model.name']} {c['model.size']} on {c['data.name']}" for c in configs]
  found = Results()
  for path, values, panel in zip(paths, configs, panels, strict=True):
    others = [essential(c) for c, p in zip(configs, panels, strict=True) if p == panel]
    keys = sorted(set().union(*others) - {"seed", "model.parts"})
    differing = [key for key in keys if len({repr(other.get(key)) for other in others}) > 1]
    words = [f"{key.rpartition('.')[2]} {values.get(key)}" for key in differing]
    new = of_workdir(path, panel, ", ".join([values["model.parts"], *words]))
    if any(row.key == new.rows[0].key for row in found.rows):
      raise UserError(f"{path} has the same config and seed as a run before it; pass only one")
    found += new
  return found


def _rounded(value: float) -> float:
  """The value as it will be read back from a table."""
  return float(f"{value:.6g}")


def training_seconds(every: list[dict[str, Any]], batch_size: int) -> float:
  """From each row's rate, since a run that was stopped and resumed has no other clock."""
  total, before = 0.0, 0
  for row in every:
    if row["kind"] == "train":
      total += (row["step"] - before) * batch_size / row["images_per_second"]
      before = row["step"]
  return total


def write(results: Results, folder: str) -> None:
  """Writes results.csv and curves.csv, each as a whole or not at all."""
  tables = ("curves.csv", Point, results.points), ("results.csv", Result, results.rows)
  for name, kind, items in tables:  # Curves first: a result in the table has its curve.
    with files.atomic_write(os.path.join(folder, name)) as file:
      table = csv.writer(file, lineterminator="\n")
      table.writerow(field.name for field in dataclasses.fields(kind))
      table.writerows([_text(value) for value in dataclasses.astuple(item)] for item in items)


def _text(value: Any) -> str:
  text = f"{value:.6g}" if isinstance(value, float) else str(value)
  return "" if value != value else text  # Of nan.


def read(folder: str) -> Results:
  """The results that `write` wrote; none where there is no results.csv.

  Raises `UserError` where a file is not of that form.
  """
  return Results(
    tuple(_read_csv(os.path.join(folder, "results.csv"), Result)),
    tuple(_read_csv(os.path.join(folder, "curves.csv"), Point)),
  )


def _read_csv(path: str, kind: type) -> list[Any]:
  """The items of a table; columns that are newer than the table are unknown."""
  if not os.path.exists(path):  # Nor in a bucket, where only runs are.
    return []
  types, items, number = typing.get_type_hints(kind), [], 1
  try:
    with open(path, newline="", encoding="utf-8") as file:
      table = csv.DictReader(file, strict=True)
      names = [name for name in types if name in (table.fieldnames or ())]
      for number, row in enumerate(table, 2):  # noqa: B007
        if None in row or None in row.values():
          raise ValueError("it has too few or too many cells")
        text = {name: row[name] or ("nan" if types[name] is float else "") for name in names}
        items.append(kind(**{name: types[name](value) for name, value in text.items()}))
  except (TypeError, ValueError, csv.Error) as error:
    raise UserError(
      f"{path}, line {number} is not a valid row: {error}\n  Fix the line, or move the file aside."
    ) from error
  return items
