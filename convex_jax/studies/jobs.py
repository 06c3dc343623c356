"""The jobs of a sweep, from its file of data: what is run, where, and what names its result."""

import dataclasses
import importlib.util
import math
import os
import re
import shlex
from collections.abc import Mapping
from typing import Any

from convex_jax import config_files
from convex_jax.errors import UserError
from convex_jax.runs import workdir as describe
from convex_jax.studies import results
from convex_jax.training.schema import mistakes

# What a claim compares: the free network, the convex one of its source, and ours.
TWINS: dict[str, dict[str, Any]] = {
  "base": {"model.parts": "base"},
  "paper": {"model.parts": "paper", "model.constraint": "exponentiate"},
  "ioc": {"model.parts": "ioc"},
}


@dataclasses.dataclass(frozen=True)
class Job:
  """One run of a sweep: a config file, what is changed in it, a seed."""

  panel: str  # What is compared in one picture.
  variant: str  # Within it.
  config: str  # configs/mlp.py:cifar10
  overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # {"model.parts": "ioc"}
  seed: int = 0
  source: tuple[float, float] = (math.nan, math.nan)  # Train and test accuracy found elsewhere.

  def arguments(self) -> list[str]:
    """Of `python -m convex_jax.main`."""
    changed = {**self.overrides, "seed": self.seed}
    return [f"--config={self.config}", *(f"--config.{key}={v}" for key, v in changed.items())]


@dataclasses.dataclass(frozen=True)
class Task:
  """A job, and what names its result."""

  job: Job
  schedule: str
  workdir: str
  digest: str  # `describe.digest` of the job's config.
  total: float  # Epochs or steps, as the config counts.
  unit: str  # epoch, step.

  @property
  def key(self) -> tuple[str, str, str, int]:
    return self.job.panel, self.job.variant, self.schedule, self.job.seed

  @property
  def name(self) -> str:
    return f"{self.job.panel}, {self.job.variant}, seed {self.job.seed}"


def read_sweep(folder: str) -> Any:
  """A sweep's module; raises `UserError` where there is none."""
  path = os.path.join(folder, "sweep.py")
  if not os.path.exists(path):
    raise UserError(f"there is no {path}; give the folder of a sweep, such as experiments/mlp")
  spec = importlib.util.spec_from_file_location("sweep", path)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except Exception as error:
    raise UserError(f"{path} cannot be read: {error!r}") from error
  if missing := [n for n in ("TITLE", "SCHEDULES", "get_sweep") if not hasattr(module, n)]:
    raise UserError(f"{path} is no sweep: it does not define {', '.join(missing)}")
  return module


def tasks_of(module: Any, schedule: str, folder: str) -> list[Task]:
  """The tasks of a schedule, with workdirs below `folder`.

  Raises `UserError` for jobs that could not be run, all at once.
  """
  if schedule not in module.SCHEDULES:
    raise UserError(f"--schedule={schedule} is none; allowed: {', '.join(module.SCHEDULES)}")
  tasks, lines = [], []
  for job in module.get_sweep(schedule):
    words = (schedule, job.panel, job.variant, f"seed {job.seed}")
    workdir = os.path.join(folder, *(re.sub(r"\W+", "_", w).strip("_").lower() for w in words))
    try:
      config = config_files.load(job.arguments())
    except Exception as error:  # Whatever a config's code, or a value that does not fit, raises.
      lines.append(f"{workdir}: {shlex.join(job.arguments())}: {error}")
      continue
    lines += [f"{workdir}: {line}" for line in mistakes(config)]
    total, unit = (config.steps, "step") if config.steps else (config.epochs, "epoch")
    tasks.append(Task(job, schedule, workdir, describe.digest(config), total, unit))
  workdirs = [task.workdir for task in tasks]
  lines += [
    f"{w} is two jobs; name them apart" for w in {w for w in workdirs if workdirs.count(w) > 1}
  ]
  if lines:
    raise UserError("\n".join(lines))
  return tasks


def refuse_other_configs(tasks: list[Task], before: results.Results) -> None:
  """Raises `UserError` where a result or a workdir of a task's name is of another config."""
  there = {row.key: row.digest for row in before.rows}
  lines = []
  for task in tasks:
    if there.get(task.key, task.digest) != task.digest:
      lines.append(f"results.csv has {task.key} of another config ({there[task.key]})")
    if os.path.exists(os.path.join(task.workdir, "config.json")):
      found = describe.digest(describe.Workdir(task.workdir).description()["config"])
      if found != task.digest:
        lines.append(f"{task.workdir} holds a run of another config ({found})")
  if lines:
    cure = "  give another --out, or name the variant anew; or delete what is no longer wanted"
    raise UserError("\n".join([*lines, cure]))


def in_order(found: results.Results, module: Any) -> results.Results:
  """The results as a sweep's jobs stand in its file; others last."""
  keys = [
    (job.panel, job.variant, schedule, job.seed)
    for schedule in module.SCHEDULES
    for job in module.get_sweep(schedule)
  ]
  place = {key: i for i, key in enumerate(keys)}
  ordered = sorted(found.rows, key=lambda row: place.get(row.key, len(place)))
  return dataclasses.replace(found, rows=tuple(ordered))
