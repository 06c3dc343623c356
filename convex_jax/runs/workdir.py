"""A run's folder: the name of every file in it, whose run it is, who may write to it."""

import contextlib
import functools
import hashlib
import io
import json
import os
import platform
import shutil
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from convex_jax import buckets, config_files, files
from convex_jax.config_files import flatten
from convex_jax.data.datasets import Data
from convex_jax.errors import Unsaved, UserError
from convex_jax.models import catalog

FORMAT = 1  # Of config.json; incremented when older versions cannot read it.

# Two configs that differ in these and in `log` alone describe the same run.
_FREE = """
  fsdp max_skipped time_limit data.dir data.workers data.max_unreadable
  checkpoint.keep checkpoint.must_save checkpoint.patience
"""
# The keys of the first release. A key that is younger and has its default value is left out of
# what identifies a run, so that a result remains its config's when keys are added. This list
# never changes.
_FIRST = """
  seed epochs steps batch_size steps_per_call dtype label_smoothing init_from ema_decay
  data.name data.image_size data.flip data.crop_padding data.label_noise data.train_fraction
  data.validation_fraction data.loader
  model.name model.size model.parts model.constraint model.passthrough model.convex_from
  model.head_depth model.head_width model.remat
  optimizer.name optimizer.learning_rate optimizer.schedule optimizer.warmup_steps
  optimizer.decay_at optimizer.decay_factor optimizer.weight_decay optimizer.clip_norm
  optimizer.b1 optimizer.b2 optimizer.momentum optimizer.accumulate
  eval.every_epochs eval.train_examples checkpoint.every_steps
"""
FREE_KEYS, FIRST_KEYS = frozenset(_FREE.split()), frozenset(_FIRST.split())


def essential(config: Any) -> dict[str, Any]:
  """What identifies a run: the values of a config, by path, on which its result depends.

  Without the keys that may change between two commands of one run, those left to the size of
  the architecture (None), and those younger than the first release that have their default
  value. Where small images are kept (`data.loader`) makes no difference to a run.
  """
  values, defaults = _flat(config), _flat(config_files.defaults())
  for key, value in values.items():
    if isinstance(value, list) and {type(number) for number in defaults.get(key, ())} == {float}:
      values[key] = [float(number) for number in value]  # Whole numbers are taken as well.
  if values.get("data.loader") != "stream":
    values["data.loader"] = "auto"
  return {
    key: value
    for key, value in values.items()
    if value is not None
    and key not in FREE_KEYS
    and not key.startswith("log.")
    and (key in FIRST_KEYS or key not in defaults or value != defaults[key])
  }


def digest(config: Any) -> str:
  """Twelve hexadecimal digits that two configs share when they describe the same run."""
  text = json.dumps(essential(config), sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:12]


def _flat(config: Any) -> dict[str, Any]:
  """The values of a config by path, as JSON has them: tuples are lists."""
  text = json.dumps(config) if isinstance(config, dict) else config.to_json_best_effort()
  return dict(flatten(json.loads(text)))


class Workdir:
  """The folder of a run.

  `config.json` holds the config and what `runs.run.load` needs to know of the data, so that a
  run can be read without them; `metrics.jsonl` the figures (and TensorBoard events, made from
  it); `checkpoints/` the weights; `certificate.json` the proof, with `counterexample.npz`
  where convexity is refuted; `radii.csv` and `radii.png` certified radii; `profile/` a trace;
  `damaged/` checkpoints that were set aside; `log.txt` the output of a run of a sweep.
  """

  def __init__(self, path: str | os.PathLike[str]):
    self.path = files.expand(path)
    files.refuse_url("workdir", self.path, bucket=True)
    self.spool = files.Spool(self.path)
    self._renew_claim = lambda: None
    of = functools.partial(os.path.join, self.path)
    self.config_file = of("config.json")
    self.metrics_file = of("metrics.jsonl")
    self.checkpoints = of("checkpoints")
    self.damaged = of("damaged")
    self.certificate_file = of("certificate.json")
    self.counterexample_file = of("counterexample.npz")
    self.convexified_file = of("convexified.json")
    self.radii_table = of("radii.csv")
    self.radii_figure = of("radii.png")
    self.profile = of("profile")
    self.log_file = of("log.txt")
    self._lock = of(".lock")

  def exists(self) -> bool:
    """Whether the folder holds a run."""
    return files.exists(self.config_file)

  def describe(self, config: Any, data: Data, parameters: int) -> None:
    """Writes config.json; raises `Unsaved` where the storage does not take it."""
    content = {
      "format": FORMAT,
      "config": json.loads(config.to_json_best_effort()),
      "data": _about(data),
      "parameters": parameters,
      "versions": {name: metadata.version(name) for name in ("convex_jax", "jax", "flax", "optax")},
      "hardware": f"{jax.device_count()} x {_device_kind()}",
    }
    files.write_json(self.config_file, content)

  def description(self) -> dict[str, Any]:
    """The content of config.json; keys of the config that are younger have their defaults.

    Raises `UserError` where there is no such file, or it is not as it was written.
    """
    if not self.exists():
      raise UserError(f"{self.path} does not contain a run: there is no {self.config_file}")
    try:
      content = files.read_json(self.config_file)
      if content["format"] > FORMAT:
        raise UserError(
          f"{self.config_file} has format {content['format']}, written by convex_jax"
          f" {content['versions']['convex_jax']}; expected at most {FORMAT}. Install that version"
        )
      _complete(content["config"])
      _check_data(content["data"])
    except UserError:
      raise
    except (ValueError, LookupError, TypeError, AttributeError) as error:
      raise UserError(
        f"{self.config_file} is damaged: {error}\n  To recreate it, move it aside and rerun the"
        " command that trained the run."
      ) from error
    return content

  def rows(self, kind: str | None = None) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, all or of one `kind` ("train", "eval", "final"); [] if none.

    A line that was cut short, by a kill, is left out.
    """
    if not files.exists(self.metrics_file):
      return []
    found, _ = read_rows(self.metrics_file)
    return [row for row in found if kind in (None, row["kind"])]

  def certificate(self) -> dict[str, Any] | None:
    """The content of certificate.json, None where there is none; `UserError` where damaged."""
    if not files.exists(self.certificate_file):
      return None
    try:
      return files.read_json(self.certificate_file)
    except files.Damaged as error:
      raise UserError(
        f"{self.certificate_file} is damaged: {error}\n"
        f"  To write it again: python -m convex_jax certify --workdir={self.path}"
      ) from error

  def final_certificate(self) -> dict[str, Any] | None:
    """The certificate that tells whether the run is convex at its end; None where there is none.

    The file may hold that of another step: `certified.write` takes any, and so did earlier versions.
    """
    found, final = self.certificate(), self.rows("final")
    about = {"kind": "convex"} | ({"step": final[-1]["step"]} if final else {})
    return found if found and all(found.get(key, v) == v for key, v in about.items()) else None

  @contextlib.contextmanager
  def claim(self, config: Any) -> Iterator[None]:
    """While active, the folder is this run's alone, on one host.

    Raises `UserError` where it holds another run, cannot be written, or is in use.
    """
    if not buckets.holds(self.path):  # There the lock, an object, tells.
      files.refuse_unwritable("--workdir", self.path)
    if self.exists() and self._has_begun():
      self._check_same_run(config)
    is_new, lead = not os.path.exists(self.path), jax.process_index() == 0
    with saving():
      files.make_folder(self.path)
    words = f"{self.path} is in use by another run"
    lock = files.exclusive_lock(self._lock, words) if lead else contextlib.nullcontext(lambda: None)
    with lock as self._renew_claim:
      try:
        yield
      finally:
        there = os.listdir(self.path) if lead and is_new and os.path.isdir(self.path) else []
        if there == [os.path.basename(self._lock)]:
          shutil.rmtree(self.path)  # Refused before it began.

  def publish(self) -> None:
    """Brings what was appended (`spool`) to where others see it, if this run still holds the claim.

    Nothing is to be done for a folder of this machine. Raises `Unsaved`.
    """
    try:
      with saving():
        self._renew_claim()
        self.spool.upload(replacing="events.out.tfevents.")
    except UserError as error:  # Credentials that have expired, or a role that was taken away.
      raise Unsaved(str(error)) from error

  def _has_begun(self) -> bool:
    """Whether there is anything to lose: a row of metrics or a checkpoint, damaged ones included."""
    return bool(self.rows() or files.folders(self.checkpoints) or files.folders(self.damaged))

  def _check_same_run(self, config: Any) -> None:
    saved = self.description()["config"]
    before, now = essential(saved), essential(config)
    if before == now:
      return
    stored, given = _flat(saved), _flat(config)
    differ = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    lines = [f"{self.path} contains a run with a different config:"]
    lines += [f"  config.{k}: {stored.get(k)!r} there, {given.get(k)!r} now" for k in differ]
    fix = "To resume that run, pass the same config; to start a new one, pass another --workdir."
    if self.rows("final"):
      fix += (
        "\n  That run is finished. To train it further, in another --workdir, start from it:"
        f" --config.init_from={self.path} (with its optimizer state:"
        " --config.init_optimizer=True)."
      )
    raise UserError("\n".join([*lines, f"  {fix}"]))

  def check_same_data(self, data: Data) -> None:
    """Raises `UserError` where a run has begun here on data that differ in what config.json says.

    A folder of data may have been prepared anew; a run that resumed on other images would be neither
    the old one nor a new one.
    """
    if not (self.exists() and self._has_begun()):
      return
    saved, now = self.description()["data"], _about(data)
    differ = [k for k, v in now.items() if k in saved and not _is_same(saved[k], v)]
    if differ:
      lines = [f"{self.path} contains a run whose data have changed since:"]
      for key in differ:
        old, new = (_in_short(x, y) for x, y in ((saved[key], now[key]), (now[key], saved[key])))
        lines.append(f"  {key}: {old} in the run, {new} now")
      fix = "To resume that run, pass the folder of its data, --config.data.dir; to train on these, pass"
      raise UserError("\n".join([*lines, f"  {fix} another --workdir."]))


def _about(data: Data) -> dict[str, Any]:
  """What config.json says of the data."""
  mean, std = data.statistics
  return {
    "class_names": [*data.class_names],
    "image_shape": [*data.train.image_shape],
    "examples": {name: len(split) for name, split in data.splits().items()},
    "mean": [*mean],
    "std": [*std],
  }


def _in_short(value: Any, other: Any) -> str:
  """The value or, of a long list, its length and the first element that is another there."""
  if not isinstance(value, list) or len(value) <= 20:
    return repr(value)
  i = next((i for i, (x, y) in enumerate(zip(value, other, strict=False)) if x != y), 0)
  return f"{len(value)}, of which number {i} is {value[i]!r},"


def _is_same(saved: Any, now: Any) -> bool:
  """Whether two values are equal; numbers, to what another machine may make of them."""
  if isinstance(now, list) and all(isinstance(number, float) for number in now):
    return len(saved) == len(now) and bool(np.allclose(saved, now, rtol=1e-4))
  return saved == now


@contextlib.contextmanager
def saving() -> Iterator[None]:
  """While active, an OSError (a full disk, say) is raised as `Unsaved`."""
  try:
    yield
  except OSError as error:
    raise Unsaved(f"{error.filename or 'the workdir'}: {error.strerror or error}") from error


def read_rows(path: str) -> tuple[list[dict[str, Any]], int]:
  """The rows of a metrics.jsonl, and how many of its lines, but for the last, are damaged."""
  rows, damaged = [], 0
  with io.TextIOWrapper(io.BytesIO(files.read(path)), encoding="utf-8", errors="replace") as file:
    for line in file:
      try:
        row = json.loads(line)
        if not (isinstance(row, dict) and type(row["step"]) is int and row["kind"]):
          raise ValueError("not a row")
        rows.append(row)
      except (ValueError, KeyError, RecursionError):
        damaged += line.endswith("\n")
  return rows, damaged


def _device_kind() -> str:
  kind = jax.devices()[0].device_kind
  if kind != "cpu":
    return kind
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
  return f"{platform.machine()} CPU, {cores} core{'s' if cores != 1 else ''}"


def _complete(config: dict[str, Any]) -> None:
  """Adds the keys that a saved config lacks; raises `Damaged` unless a run can be built of it."""
  defaults = _flat(config_files.defaults())
  for path, default in defaults.items():
    *sections, key = path.split(".")
    section = config
    for name in sections:
      section = section[name]
    value = section.setdefault(key, default)
    if type(value) is not type(default) and not (type(default) is float and type(value) is int):
      raise files.Damaged(f"config.{path} is {value!r}")
  model = config["model"]
  if model["name"] not in catalog.names():
    raise files.Damaged(f"config.model.name is {model['name']!r}")
  own = {f"model.{name}" for name in catalog.fields(model["name"])}
  if unknown := dict(flatten(config)).keys() - defaults.keys() - own:
    raise files.Damaged(f"unknown key config.{min(unknown)}")
  catalog.build(FrozenConfigDict(ConfigDict(config)).model, classes=2)  # Whose lists are tuples.


def _check_data(about: dict[str, Any]) -> None:
  """Raises `Damaged` unless what is said of the data has the form that `describe` gives it."""
  names, shape, mean, std = (about[key] for key in ("class_names", "image_shape", "mean", "std"))
  fine = isinstance(names, list) and all(isinstance(name, str) for name in names)
  fine &= len(shape) == 3 and all(type(size) is int and size > 0 for size in shape)
  for numbers in (mean, std):
    fine &= len(numbers) == shape[2] and all(isinstance(v, float | int) for v in numbers)
  if not fine:
    raise files.Damaged("its description of the data has another form")
