"""The jobs of a sweep, read from its sweep.py: what to train, where, and how results are named."""

import dataclasses
import math
import numbers
import os
import re
import runpy
import types
from collections.abc import Iterator, Mapping
from typing import Any

from convex_jax import files
from convex_jax.errors import UserError
from convex_jax.runs import workdir
from convex_jax.runs.workdir import Workdir
from convex_jax.studies.results import Results
from convex_jax.training import loading
from convex_jax.training.schema import mistakes

# What most sweeps compare: the free network, the convex twin of its source, and ours.
TWINS: dict[str, dict[str, Any]] = {
  "base": {"model.parts": "base"},
  "paper": {"model.parts": "paper", "model.constraint": "exponentiate"},
  "ioc": {"model.parts": "ioc"},
}


@dataclasses.dataclass(frozen=True)
class Job:
  """One run of a sweep: a config file, overrides of its keys, a seed."""

  panel: str  # The runs compared in one figure: an architecture on a data set, say.
  variant: str  # Within the panel: base, ioc.
  config: str  # configs/mlp.py:cifar10
  overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # {"model.parts": "ioc"}
  seed: int = 0
  source: tuple[float, float] = (math.nan, math.nan)  # Train and test accuracy reported elsewhere.

  def arguments(self) -> list[str]:
    """The arguments of `python -m convex_jax train`."""
    return [f"--config={self.config}", *self.changes()]

  def changes(self) -> list[str]:
    """Those that change keys of the config."""
    changed = {**self.overrides, "seed": self.seed}
    return [f"--config.{key}={value}" for key, value in changed.items()]


@dataclasses.dataclass(frozen=True)
class Task:
  """A job under one schedule, with the names of its result."""

  job: Job
  schedule: str
  workdir: str
  digest: str  # `workdir.digest` of the job's config.
  total: float  # Epochs or steps, whichever the config counts.
  unit: str  # epoch, step.

  @property
  def key(self) -> tuple[str, str, str, int]:
    return self.job.panel, self.job.variant, self.schedule, self.job.seed

  @property
  def name(self) -> str:
    return f"{self.job.panel}, {self.job.variant}, seed {self.job.seed}"


def read_sweep(folder: str) -> Any:
  """The module of a sweep; raises `UserError` where there is none."""
  path = os.path.join(files.expand(folder), "sweep.py")
  if not os.path.exists(path):
    raise UserError(f"{path} not found; expected the folder of a sweep, such as experiments/mlp")
  try:
    module = types.SimpleNamespace(**runpy.run_path(path))
  except Exception as error:
    raise UserError(f"{path} cannot be read: {error!r}") from error
  if missing := [n for n in ("TITLE", "SCHEDULES", "get_sweep") if not hasattr(module, n)]:
    raise UserError(f"{path} is not a sweep: it does not define {', '.join(missing)}")
  expected = {
    "TITLE": ("text", isinstance(module.TITLE, str)),
    "SCHEDULES": ("a dict of each schedule's name and what it is", _is_of_text(module.SCHEDULES)),
    "get_sweep": ("a function of a schedule's name", callable(module.get_sweep)),
  }
  if lines := [
    f"{path}: {name} is {getattr(module, name)!r}; expected {what}"
    for name, (what, is_right) in expected.items()
    if not is_right
  ]:
    raise UserError("\n".join(lines))
  for schedule in module.SCHEDULES:  # The results of one stand among those of all, in order.
    jobs_of(module, schedule)
  return module


def _is_of_text(schedules: Any) -> bool:
  return (
    isinstance(schedules, Mapping)
    and len(schedules) > 0
    and all(isinstance(text, str) for pair in schedules.items() for text in pair)
  )


def jobs_of(module: Any, schedule: str) -> list[Job]:
  """The jobs of a schedule; raises `UserError` with everything that is wrong with their fields."""
  try:
    every = list(module.get_sweep(schedule))
  except Exception as error:  # Anything that its code raises.
    raise UserError(f"get_sweep({schedule!r}) of {module.__file__}: {error!r}") from error
  lines = [f"{module.__file__}: {line}" for job in every for line in _mistakes(job)]
  if lines:
    raise UserError("\n".join(lines))
  return every


def _mistakes(job: Any) -> Iterator[str]:
  if not isinstance(job, Job):
    yield f"get_sweep gave {job!r}; expected a convex_jax.studies.jobs.Job"
    return
  named = {"panel": job.panel, "variant": job.variant}
  for name, text in named.items():
    if not isinstance(text, str) or not file_name(text):
      yield f"{name} of {job} is {text!r}; expected text with a letter or a digit"
  if not isinstance(job.config, str):
    yield f"config of {job} is {job.config!r}; expected a file, such as 'configs/mlp.py:cifar10'"
  if not isinstance(job.overrides, Mapping):
    yield f"overrides of {job} are {job.overrides!r}; expected a dict, such as {{'model.depth': 2}}"
  elif "seed" in job.overrides:
    yield f"overrides of {job} set the seed; expected it in the field seed"
  if type(job.seed) is not int:
    yield f"seed of {job} is {job.seed!r}; expected an integer"
  pair = job.source if isinstance(job.source, tuple | list) else ()
  if len(pair) != 2 or not all(isinstance(x, numbers.Real) for x in pair):
    yield f"source of {job} is {job.source!r}; expected train and test accuracy, such as (0.98, 0.64)"


def tasks_of(module: Any, schedule: str, folder: str) -> list[Task]:
  """The tasks of a schedule, with workdirs below `folder`.

  Raises `UserError` with everything that is wrong with the jobs, one line each.
  """
  if schedule not in module.SCHEDULES:
    raise UserError(f"Unknown --schedule={schedule}; expected {' or '.join(module.SCHEDULES)}")
  tasks, lines = [], []
  for job in jobs_of(module, schedule):
    words = (schedule, job.panel, job.variant, f"seed {job.seed}")
    path = os.path.join(folder, *map(file_name, words))
    try:
      config = loading.load_config(job.config, job.changes())
    except UserError as error:
      lines += [f"{path}: {line}" for line in str(error).splitlines()]
      continue
    lines += [f"{path}: {line}" for line in mistakes(config)]
    total, unit = (config.steps, "step") if config.steps else (config.epochs, "epoch")
    tasks.append(Task(job, schedule, path, workdir.digest(config), total, unit))
  paths = [task.workdir for task in tasks]
  twice = sorted({path for path in paths if paths.count(path) > 1})
  lines += [f"Two jobs share the workdir {path}; rename one" for path in twice]
  if lines:
    raise UserError("\n".join(lines))
  return tasks


def file_name(words: str) -> str:
  """The words in lower case, with underscores between them."""
  return re.sub(r"\W+", "_", words).strip("_").lower()


def refuse_other_configs(tasks: list[Task], before: Results) -> None:
  """Raises `UserError` where a task's result or workdir exists already, of another config."""
  there = {row.key: row.digest for row in before.rows}
  lines = []
  for task in tasks:
    if there.get(task.key, task.digest) != task.digest:
      lines.append(f"results.csv has {task.key} of another config ({there[task.key]})")
    folder = Workdir(task.workdir)
    found = workdir.digest(folder.description()["config"]) if folder.exists() else task.digest
    if found != task.digest:
      lines.append(f"{task.workdir} holds a run of another config ({found})")
  if lines:
    fix = "  Pass another --out or --workdir, rename the variant, or move the old results aside."
    raise UserError("\n".join([*lines, fix]))


def in_order(found: Results, module: Any) -> Results:
  """The results in the order of a sweep's jobs; others last."""
  every = ((job, schedule) for schedule in module.SCHEDULES for job in jobs_of(module, schedule))
  place = {(j.panel, j.variant, name, j.seed): i for i, (j, name) in enumerate(every)}
  ordered = sorted(found.rows, key=lambda row: place.get(row.key, len(place)))
  return dataclasses.replace(found, rows=tuple(ordered))


def introduction(found: Results, module: Any) -> str:
  """What the schedules of these results are, as Markdown."""
  ran = {row.schedule for row in found.rows}
  words = [f"Schedule `{name}`: {what}" for name, what in module.SCHEDULES.items() if name in ran]
  return "\n\n".join(words)
