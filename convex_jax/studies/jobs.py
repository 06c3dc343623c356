"""The jobs of a sweep, read from its sweep.py: what to train, where, and how results are named."""

import dataclasses
import math
import os
import re
import runpy
import shlex
import types
from collections.abc import Mapping
from typing import Any

from convex_jax import config_files, files
from convex_jax.errors import UserError
from convex_jax.runs import workdir
from convex_jax.runs.workdir import Workdir
from convex_jax.studies.results import Results
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
    changed = {**self.overrides, "seed": self.seed}
    return [f"--config={self.config}", *(f"--config.{key}={v}" for key, v in changed.items())]


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
  return module


def tasks_of(module: Any, schedule: str, folder: str) -> list[Task]:
  """The tasks of a schedule, with workdirs below `folder`.

  Raises `UserError` with everything that is wrong with the jobs, one line each.
  """
  if schedule not in module.SCHEDULES:
    raise UserError(f"Unknown --schedule={schedule}; expected {' or '.join(module.SCHEDULES)}")
  tasks, lines = [], []
  for job in module.get_sweep(schedule):
    words = (schedule, job.panel, job.variant, f"seed {job.seed}")
    path = os.path.join(folder, *map(file_name, words))
    try:
      config = config_files.load(job.arguments())
    except Exception as error:  # Anything that a config's code or an ill-fitting value raises.
      lines.append(f"{path}: {shlex.join(job.arguments())}: {error}")
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
  every = ((job, schedule) for schedule in module.SCHEDULES for job in module.get_sweep(schedule))
  place = {(j.panel, j.variant, name, j.seed): i for i, (j, name) in enumerate(every)}
  ordered = sorted(found.rows, key=lambda row: place.get(row.key, len(place)))
  return dataclasses.replace(found, rows=tuple(ordered))


def introduction(found: Results, module: Any) -> str:
  """What the schedules of these results are, as Markdown."""
  ran = {row.schedule for row in found.rows}
  words = [f"Schedule `{name}`: {what}" for name, what in module.SCHEDULES.items() if name in ran]
  return "\n\n".join(words)
