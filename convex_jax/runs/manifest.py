"""Which checkpoints are intact: each has a manifest of its files, written last.

`manifest.json` in a checkpoint's folder holds its format and step, the accuracy where it was
evaluated, the versions of the libraries, and the size in bytes and the SHA-256 of each file. A
folder without a manifest was not finished. No path in a manifest is ever opened: the folder's
own files are compared with it.
"""

import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from importlib import metadata

import jax
import numpy as np
from jax.experimental import multihost_utils

from convex_jax import files
from convex_jax.errors import UserError

FORMAT = 1  # Of a checkpoint; incremented when older versions cannot read it.
NAME = "manifest.json"
LIBRARIES = ("convex_jax", "jax", "flax", "optax", "orbax-checkpoint")


def seal(folder: str, step: int, accuracy: float | None) -> None:
  """Writes the manifest of a checkpoint whose files are all there."""
  found = {name: [os.path.getsize(path), _sha256(path)] for name, path in _files(folder)}
  versions = {name: metadata.version(name) for name in LIBRARIES}
  content = {"format": FORMAT, "step": step, "accuracy": accuracy, "versions": versions}
  files.write_json(os.path.join(folder, NAME), content | {"files": found})


def is_sealed(folder: str) -> bool:
  """Whether there is a manifest."""
  return os.path.isfile(os.path.join(folder, NAME))


def accuracy(folder: str) -> float | None:
  """The accuracy in a manifest; None where it was not evaluated, or the manifest is damaged."""
  try:
    found = files.read_json(os.path.join(folder, NAME)).get("accuracy")
  except (files.Damaged, OSError):
    return None
  return found if isinstance(found, float) else None


def fault(folder: str, step: int) -> str | None:
  """What is wrong with a checkpoint: which file, and how; None where it is intact.

  Raises `UserError` where a newer version wrote it.
  """
  if not is_sealed(folder):
    return f"not finished (it has no {NAME})"
  try:
    content = files.read_json(os.path.join(folder, NAME))
    version, wanted, sealed_step = (content[key] for key in ("format", "files", "step"))
  except (files.Damaged, KeyError, OSError) as error:
    return f"{NAME} is damaged: {error}"
  if version != FORMAT:
    raise UserError(
      f"{folder} has format {version}, written by convex_jax"
      f" {content.get('versions', {}).get('convex_jax')}; expected {FORMAT}. Install that version"
    )
  if not isinstance(wanted, dict) or not all(
    type(v) is list and len(v) == 2 for v in wanted.values()
  ):
    return f"{NAME} is damaged: it does not list files"
  if sealed_step != step:
    return f"it is the checkpoint of step {sealed_step}"
  there = dict(_files(folder))
  for name in sorted(wanted.keys() | there.keys()):
    if name not in there:
      return f"{name} is missing"
    if name not in wanted:
      return f"unexpected file {name}"
    if not stat.S_ISREG(os.lstat(there[name]).st_mode):
      return f"{name} is not a regular file"
    size, digest = wanted[name]
    if os.path.getsize(there[name]) != size:
      return f"{name} has {os.path.getsize(there[name]):,} bytes instead of {size:,}"
    if _sha256(there[name]) != digest:
      return f"{name} is damaged: its SHA-256 differs"
  return None


def steps_in(folder: str) -> list[int]:
  """The steps that have a checkpoint, intact or not, oldest first."""
  names = os.listdir(folder) if os.path.isdir(folder) else []
  return sorted(int(name) for name in names if name.isdigit())


def faults(folder: str) -> dict[int, str | None]:
  """What is wrong with each checkpoint in a folder; None where it is intact."""
  return {step: fault(os.path.join(folder, str(step)), step) for step in steps_in(folder)}


def quarantine_damaged(folder: str) -> list[str]:
  """Moves damaged and unfinished checkpoints to `damaged/`, next to the folder; says which.

  Called by every process of a run; the first acts. Raises `UserError`, and moves nothing, where
  no checkpoint is intact; a single unfinished one is moved all the same, since that run was
  killed while it wrote its first.
  """
  lines, refusal = [], ""
  if jax.process_index() == 0:
    try:
      lines = _set_aside(folder)
    except UserError as error:
      refusal = str(error)
  if jax.process_count() > 1 and multihost_utils.broadcast_one_to_all(np.bool_(refusal)):
    refusal = refusal or f"{folder} has no intact checkpoint; see the message of process 0"
  if refusal:
    raise UserError(refusal)
  return lines


def _set_aside(folder: str) -> list[str]:
  workdir, found = os.path.dirname(os.path.abspath(folder)), faults(folder)
  wrong = {step: reason for step, reason in found.items() if reason is not None}
  unfinished = [step for step in wrong if not is_sealed(os.path.join(folder, str(step)))]
  if wrong and wrong == found and list(wrong) != unfinished[:1]:
    lines = [f"No checkpoint in {folder} is intact:"]
    lines += [f"  step {step}: {reason}" for step, reason in wrong.items()]
    lines += ["  To start a new run, pass another --workdir."]
    if unfinished:
      command = f"python -m convex_jax checkpoint seal {workdir}"
      lines += [f"  To trust those without a manifest: {command}"]
    raise UserError("\n".join(lines))
  lines = []
  for step, reason in wrong.items():
    target = os.path.join(workdir, "damaged", str(step))
    shutil.rmtree(target, ignore_errors=True)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    os.rename(os.path.join(folder, str(step)), target)
    lines.append(f"Checkpoint {step}: {reason}. Moved to {target}")
  return lines


def saved_steps(folder: str) -> dict[int, float | None]:
  """The finished checkpoints in a folder: step to accuracy, None where it was not evaluated."""
  paths = {step: os.path.join(folder, str(step)) for step in steps_in(folder)}
  return {s: accuracy(path) for s, path in paths.items() if is_sealed(path)}


def _files(folder: str) -> Iterator[tuple[str, str]]:
  """(name, path) of each file in a folder, at any depth, without the manifest; follows no link."""
  for root, folders, names in os.walk(folder):
    links = [name for name in folders if os.path.islink(os.path.join(root, name))]
    for name in names + links:
      path = os.path.join(root, name)
      relative = os.path.relpath(path, folder).replace(os.sep, "/")
      if relative not in (NAME, NAME + ".tmp"):
        yield relative, path


def _sha256(path: str) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
