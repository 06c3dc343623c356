"""A workdir's config.json: whose run it is, whether another command may go on with it.

It holds the config and what `run.load` needs of the data, so that a run can be read without
them; keys that are younger than a run get what that run meant.
"""

import contextlib
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import jax
from ml_collections import ConfigDict, FrozenConfigDict

from convex_jax import files
from convex_jax.config_files import flatten
from convex_jax.runs import metrics_file
from convex_jax.training.schema import mistakes
from convex_jax.errors import UserError, Unsaved

FORMAT = 1  # Of a workdir; rises when an older `load` could not read it.
ADDED = (  # Keys younger than some runs, and what those mean.
  ("data", "classes", []),
  ("", "fsdp", 1),
  ("", "batch_norm", "global"),
  ("", "mixup", 0.0),
  ("", "cutmix", 0.0),
  ("data", "whiten", False),
  ("data", "jitter", 0.0),
  ("data", "erasing", 0.0),
  ("data", "randaugment", [0, 9.0]),
  ("data", "repeats", 1),
  ("data", "cache_size", 0),
  ("data", "crop_area", [0.08, 1.0]),
  ("data", "eval_share", 0.875),
  ("data", "workers", -1),
  ("data", "max_unreadable", 0.001),
  ("model", "one_logit", False),
  ("model", "log_normal_init", True),
  ("model", "branch_scales", True),
  ("model", "norm", "twin"),
  ("", "max_skipped", 10),
  ("", "skip_spikes", 0.0),
  ("", "time_limit", 0.0),
  ("checkpoint", "must_save", True),
  ("checkpoint", "patience", 600.0),
)
# Between two commands of one run.
FREE_TO_CHANGE = ("log.", "fsdp", "data.dir", "data.workers", "data.max_unreadable", "max_skipped")
FREE_TO_CHANGE += ("time_limit", "checkpoint.keep", "checkpoint.must_save", "checkpoint.patience")


def write(
  config: Any,
  workdir: str,
  class_names: tuple[str, ...],
  image_shape: tuple[int, ...],
  statistics: tuple[tuple[float, ...], tuple[float, ...]],
) -> None:
  """Writes config.json: the config, and what `load` needs of the data; versions."""
  mean, std = statistics
  content = {
    "format": FORMAT,
    "config": json.loads(config.to_json_best_effort()),
    "data": {"class_names": class_names, "image_shape": image_shape, "mean": mean, "std": std},
    "versions": {name: metadata.version(name) for name in ("convex_jax", "jax", "flax", "optax")},
    "hardware": f"{jax.device_count()} x {_device_kind()}",
  }
  files.write_json(os.path.join(workdir, "config.json"), content)


def _device_kind() -> str:
  kind = jax.devices()[0].device_kind
  if kind != "cpu":
    return kind
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
  return f"{platform.machine()} CPU, {cores} core{'s' if cores != 1 else ''}"


def essential(config: Any) -> dict[str, Any]:
  """The keys of a config that decide what is trained, by path ("data.name").

  Keys that are free to change are left out, and so is a key younger than some runs where it
  means what those runs meant: a result stays its config's when keys are added.
  """
  content = config if isinstance(config, dict) else json.loads(config.to_json_best_effort())
  values = dict(flatten(content))
  for section, key, meant in ADDED:
    path = f"{section}.{key}".lstrip(".")
    if values.get(path) == meant:
      del values[path]
  if values.get("data.loader") != "stream":  # Where small images are stored does not matter.
    values["data.loader"] = "auto"
  return {
    key: value
    for key, value in values.items()
    if value is not None and not key.startswith(FREE_TO_CHANGE)  # None: the size's own.
  }


def digest(config: Any) -> str:
  """Twelve hex digits that two configs share when they describe the same run."""
  text = json.dumps(essential(config), sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:12]


@contextlib.contextmanager
def claim(config: Any, workdir: str) -> Iterator[None]:
  """Within, the workdir is this run's alone, on one host.

  Raises `UserError` where it holds a run of another config, or cannot be written, or another
  process is running in it.
  """
  _refuse_unfit(config, workdir)
  path, is_new = os.path.join(workdir, ".lock"), not os.path.exists(workdir)
  lead = jax.process_index() == 0
  try:
    os.makedirs(workdir, exist_ok=True)
    words = f"{workdir} is in use by another run"
    with files.exclusive_lock(path, words) if lead else contextlib.nullcontext():
      try:
        yield
      finally:
        if lead and is_new and os.listdir(workdir) == [".lock"]:  # Refused before it began.
          shutil.rmtree(workdir)
  except OSError as error:
    inside = os.path.abspath(workdir) + os.sep
    if not os.path.abspath(str(error.filename or "")).startswith(inside):
      raise
    raise Unsaved(f"{error.filename}: {error.strerror}") from error


def _refuse_unfit(config: Any, workdir: str) -> None:
  files.refuse_url("--workdir", workdir)
  there = os.path.abspath(workdir)
  while not os.path.exists(there):
    there = os.path.dirname(there)
  if not os.path.isdir(there) or not os.access(there, os.W_OK):
    raise UserError(f"--workdir={workdir}: {there} cannot be written; give another --workdir")
  if not os.path.exists(os.path.join(workdir, "config.json")):
    return
  before = dict(flatten(read(workdir)["config"]))
  now = dict(flatten(json.loads(config.to_json_best_effort())))
  lines = [
    f"  config.{key}: {before.get(key)!r} there, {now.get(key)!r} now"
    for key in sorted(before.keys() | now.keys())
    if before.get(key) != now.get(key)
    and not key.startswith(FREE_TO_CHANGE)
    # What is streamed shows other crops than a cache; where small images lie is the same to them.
    and not (key == "data.loader" and "stream" not in (before.get(key), now.get(key)))
  ]
  if lines:
    raise UserError(
      f"{workdir} holds a run of another config:\n" + "\n".join(lines) + "\n"
      "  go on with that run: give the same config; begin a new one: give another --workdir"
    )


def read(workdir: str) -> dict[str, Any]:
  """What `write` wrote to config.json, and what keys that are younger mean.

  Raises `UserError` where there is no such file, or it is not what we wrote.
  """
  path = os.path.join(workdir, "config.json")
  if not os.path.exists(path):
    raise UserError(f"{workdir} holds no run: there is no {path}")
  try:
    content = files.read_json(path, signed=False)
    if "hardware" in content:  # Younger than the SHA-256: it has one, or damage took it.
      content = files.read_json(path)
    if content["format"] > FORMAT:
      raise UserError(
        f"{path} is of format {content['format']}, written by convex_jax"
        f" {content['versions']['convex_jax']}; allowed: up to {FORMAT}. Install that version"
      )
    config, about = content["config"], content["data"]
    for section, key, meant in ADDED:
      (config[section] if section else config).setdefault(key, meant)
    if lines := mistakes(FrozenConfigDict(ConfigDict(config))):  # Whose lists are tuples.
      raise files.Damaged("; ".join(lines))
    _check_data(about)
  except UserError:
    raise
  except (ValueError, LookupError, TypeError, AttributeError) as error:
    raise UserError(
      f"{path} is damaged: {error}\n  delete it: the command that trained the run, given again,"
      " writes it anew"
    ) from error
  return content


def _check_data(about: dict[str, Any]) -> None:
  """Raises `Damaged` unless what is said of the data has the form that `write` gives it."""
  names, shape, mean, std = (about[key] for key in ("class_names", "image_shape", "mean", "std"))
  fine = isinstance(names, list) and all(isinstance(name, str) for name in names)
  fine &= len(shape) == 3 and all(type(size) is int and size > 0 for size in shape)
  for numbers in (mean, std):
    fine &= len(numbers) == shape[2] and all(isinstance(v, float | int) for v in numbers)
  if not fine:
    raise files.Damaged("what it says of the data is not of its form")


class Workdir:
  """The folder of a run: where its files are, and what they say."""

  def __init__(self, path: str):
    self.path = path
    self.config_file = os.path.join(path, "config.json")
    self.metrics_file = os.path.join(path, "metrics.jsonl")
    self.certificate_file = os.path.join(path, "certificate.json")
    self.checkpoints = os.path.join(path, "checkpoints")
    self.log_file = os.path.join(path, "log.txt")
    self.radii_table = os.path.join(path, "radii.csv")
    self.radii_figure = os.path.join(path, "radii.png")

  def exists(self) -> bool:
    """Whether there is a run: a config.json."""
    return os.path.exists(self.config_file)

  def description(self) -> dict[str, Any]:
    """The content of config.json; raises `UserError` where it is missing or damaged."""
    return read(self.path)

  def rows(self, kind: str | None = None) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, all or of one kind; none where there is no such file."""
    if not os.path.exists(self.metrics_file):
      return []
    every = metrics_file.read_metrics(self.metrics_file)
    return [row for row in every if kind in (None, row["kind"])]

  def certificate(self) -> dict[str, Any] | None:
    """The content of certificate.json, if there is one; raises `UserError` where it is damaged."""
    if not os.path.exists(self.certificate_file):
      return None
    try:
      return files.read_json(self.certificate_file, signed=False)
    except files.Damaged as error:
      raise UserError(
        f"{self.certificate_file} is damaged: {error}\n"
        f"  To write it again: python -m convex_jax certify --workdir={self.path}"
      ) from error
