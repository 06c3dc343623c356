"""What a run showed, as a row that outlives it: results.csv and, of its course, curves.csv."""

import csv
import dataclasses
import math
import os
import typing
from collections.abc import Iterable
from typing import Any

import jax
from ml_collections import ConfigDict

from convex_jax import files
from convex_jax.config_files import flatten
from convex_jax.errors import UserError
from convex_jax.models import catalog
from convex_jax.runs import workdir as describe
from convex_jax.training import step

UNKNOWN = math.nan


@dataclasses.dataclass(frozen=True)
class Result:
  """A run's figures: accuracies and shares 0..1, losses in nats; inference mode, all examples.

  A loss is the mean negative log-likelihood, without label smoothing; the calibration error
  weights its bins by their counts (`metrics.CalibrationError`). `nan`: not known.
  """

  panel: str  # What is compared in one picture: an architecture on a data set, say.
  variant: str  # Within it: base, ioc.
  schedule: str  # Of a sweep: "full" is its source's; others are shorter, as its file says.
  seed: int
  digest: str  # `describe.digest` of the config.
  outcome: str  # finished, diverged.
  parameters: int
  epochs: float  # That were run.
  batch_size: int
  train_accuracy: float = UNKNOWN
  test_accuracy: float = UNKNOWN
  gap: float = UNKNOWN  # Train accuracy less test accuracy.
  train_loss: float = UNKNOWN
  test_loss: float = UNKNOWN
  train_calibration_error: float = UNKNOWN
  test_calibration_error: float = UNKNOWN
  peak_test_accuracy: float = UNKNOWN  # The best of all evaluations: chosen on the test split.
  peak_train_accuracy: float = UNKNOWN  # At that evaluation, on `eval.train_examples`.
  peak_epoch: float = UNKNOWN
  zero_share: float = UNKNOWN  # Of the constrained weights, exactly 0.
  certificate: str = ""  # PROVED, REFUTED or UNKNOWN; "": not asked.
  broken_by: str = ""  # The first operation that breaks the proof.
  seconds: float = UNKNOWN  # Of training steps; no compilation, no evaluation.
  hardware: str = ""
  versions: str = ""
  source_train_accuracy: float = UNKNOWN  # What the claim's source reports.
  source_test_accuracy: float = UNKNOWN

  @property
  def key(self) -> tuple[str, str, str, int]:
    """What names a result: the same key with another digest is another config's."""
    return self.panel, self.variant, self.schedule, self.seed


@dataclasses.dataclass(frozen=True)
class Point:
  """An evaluation on the way: a row of curves.csv."""

  panel: str
  variant: str
  schedule: str
  seed: int
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
    """Both; of a key in both, the other's."""
    new = {row.key for row in other.rows}
    return Results(
      tuple(row for row in self.rows if row.key not in new) + other.rows,
      tuple(p for p in self.points if _key(p) not in new) + other.points,
    )


def _key(point: Point) -> tuple[str, str, str, int]:
  return point.panel, point.variant, point.schedule, point.seed


def of_workdir(
  workdir: str,
  panel: str,
  variant: str,
  schedule: str = "",
  source: tuple[float, float] = (UNKNOWN, UNKNOWN),
  outcome: str = "finished",
) -> Results:
  """The result of a run that has ended; `source`: train and test accuracy to compare it with.

  Raises `UserError` where the run is not finished, unless its `outcome` says so.
  """
  description, every = _read(workdir)
  final = next((row for row in every if row["kind"] == "final"), None)
  if final is None and outcome == "finished":
    raise UserError(
      f"{workdir} is not finished, or diverged: its metrics.jsonl has no final row\n"
      "  give the command that trained it again: it goes on"
    )
  config, names = description["config"], {field.name for field in dataclasses.fields(Result)}
  evals = [row for row in every if row["kind"] == "eval"]
  figures = {name: value for name, value in (final or {}).items() if name in names}
  if evals:
    best = max(evals, key=lambda row: row["test_accuracy"])
    figures["peak_test_accuracy"] = best["test_accuracy"]
    figures["peak_train_accuracy"] = best["train_accuracy"]
    figures["peak_epoch"] = best["epoch"]
  known: dict[str, Any] = {name: _short(value) for name, value in figures.items()}
  known |= _certificate(workdir)
  versions = "; ".join(f"{name} {version}" for name, version in description["versions"].items())
  result = Result(
    panel,
    variant,
    schedule,
    config["seed"],
    describe.digest(config),
    outcome,
    _parameters(description),
    _short(every[-1]["epoch"]) if every else 0.0,
    config["batch_size"],
    **known,
    seconds=_seconds(every, config["batch_size"]),
    hardware=description.get("hardware", ""),
    versions=versions,
    source_train_accuracy=source[0],
    source_test_accuracy=source[1],
  )
  fields = [field.name for field in dataclasses.fields(Point)][4:]
  points = tuple(Point(*result.key, *(_short(row[name]) for name in fields)) for row in evals)
  return Results((result,), points)


def of_workdirs(workdirs: Iterable[str]) -> Results:
  """The results of runs, each named by what sets it apart from the others.

  The panel is the architecture on its data; the variant its parts, and every key of the
  config (but the seed) in which the runs of a panel differ.
  """
  dirs = [os.path.expanduser(workdir) for workdir in workdirs]
  configs = [dict(flatten(describe.Workdir(workdir).description()["config"])) for workdir in dirs]
  panels = [f"{c['model.name']} {c['model.size']} on {c['data.name']}" for c in configs]
  found = Results()
  for workdir, config, panel in zip(dirs, configs, panels, strict=True):
    beside = [c for c, p in zip(configs, panels, strict=True) if p == panel]
    apart = [
      key
      for key in sorted(config)
      if key not in ("seed", "model.parts")
      and key not in describe.FREE_KEYS
      and not key.startswith(describe.FREE_SECTIONS)
      and any(c.get(key) != config[key] for c in beside)
    ]
    words = [f"{key.rpartition('.')[2]} {config[key]}" for key in apart]
    new = of_workdir(workdir, panel, ", ".join([config["model.parts"], *words]))
    if any(row.key == new.rows[0].key for row in found.rows):
      raise UserError(f"{workdir} is a run of the same config and seed as one before it; give one")
    found += new
  return found


def _short(value: float) -> float:
  """As it will be read back from a table."""
  return float(f"{value:.6g}")


def _read(workdir: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
  path = os.path.join(workdir, "metrics.jsonl")
  description = describe.Workdir(workdir).description()
  return description, describe.read_rows(path)[0] if os.path.exists(path) else []


def is_finished(workdir: str, digest: str) -> bool:
  """Whether a workdir holds the finished run, of the config with this digest."""
  if not os.path.exists(os.path.join(workdir, "config.json")):
    return False
  description, every = _read(workdir)
  done = any(row["kind"] == "final" for row in every)
  return done and describe.digest(description["config"]) == digest


def _certificate(workdir: str) -> dict[str, str]:
  path = os.path.join(workdir, "certificate.json")
  if not os.path.exists(path):
    return {}
  try:
    content = files.read_json(path, signed=False)
  except files.Damaged as error:
    raise UserError(
      f"{path} is damaged: {error}\n  python -m convex_jax.certify --workdir={workdir} writes it anew"
    ) from error
  return {"certificate": content["verdict"], "broken_by": content["reason"] or ""}


def _parameters(description: dict[str, Any]) -> int:
  model = ConfigDict(description["config"]["model"])  # Whose lists are tuples.
  size, about = description["config"]["data"]["image_size"], description["data"]
  network = catalog.build(model, classes=len(about["class_names"]))
  shape = (size, size, about["image_shape"][-1])
  shapes = jax.eval_shape(lambda: step.init_variables(network, jax.random.key(0), shape))
  return sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))


def _seconds(every: list[dict[str, Any]], batch_size: int) -> float:
  """From each row's rate: a run that was stopped and resumed has no other clock."""
  total, before = 0.0, 0
  for row in every:
    if row["kind"] == "train":
      total += (row["step"] - before) * batch_size / row["images_per_second"]
      before = row["step"]
  return round(total, 1)


def write(results: Results, folder: str) -> None:
  """results.csv and curves.csv, each whole or as it was."""
  for name, kind, items in (  # A row that stands has its curve.
    ("curves.csv", Point, results.points),
    ("results.csv", Result, results.rows),
  ):
    with files.atomic_write(os.path.join(folder, name)) as file:
      table = csv.writer(file, lineterminator="\n")
      table.writerow(field.name for field in dataclasses.fields(kind))
      table.writerows([_text(value) for value in dataclasses.astuple(item)] for item in items)


def _text(value: Any) -> str:
  if isinstance(value, float):
    return "" if math.isnan(value) else f"{value:.6g}"
  return str(value)


def read(folder: str) -> Results:
  """What `write` wrote; nothing where there is no results.csv.

  Raises `UserError` where a file is not of that form.
  """
  return Results(
    tuple(_read_csv(os.path.join(folder, "results.csv"), Result)),
    tuple(_read_csv(os.path.join(folder, "curves.csv"), Point)),
  )


def _read_csv(path: str, kind: type) -> list[Any]:
  """Items of a table; a column that it does not have is younger than it, and not known."""
  if not os.path.exists(path):
    return []
  types, items, number = typing.get_type_hints(kind), [], 1
  try:
    with open(path, newline="", encoding="utf-8") as file:
      table = csv.DictReader(file, strict=True)
      names = [name for name in types if name in (table.fieldnames or ())]
      for number, row in enumerate(table, 2):  # noqa: B007
        if None in row or None in row.values():
          raise ValueError("it has too few or too many cells")
        items.append(kind(**{name: _value(row[name], types[name]) for name in names}))
  except (TypeError, ValueError, csv.Error) as error:
    raise UserError(
      f"{path}, line {number} is no row of ours: {error}\n  mend the line, or delete the file"
    ) from error
  return items


def _value(text: str, of: type) -> Any:
  return UNKNOWN if of is float and not text else of(text)
