"""Which checkpoints are intact: each has a manifest of its files, written last.

`manifest.json` in a checkpoint's folder holds its format and step, the accuracy where it was
evaluated, the versions of the libraries, and the size in bytes and the SHA-256 of each file. A
folder without a manifest was not finished. No path in a manifest is ever opened: the folder's
own files are compared with it. Files that it does not list are left alone: desktops, file servers
and editors put theirs anywhere.
"""

import concurrent.futures
import fnmatch
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from importlib import metadata
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from convex_jax import buckets, files
from convex_jax.errors import UserError

FORMAT = 1  # Of a checkpoint; incremented when older versions cannot read it.
NAME = "manifest.json"
COMMITTED = "commit_success.txt"  # Orbax's, in a folder that it has finished.
READERS = 8  # Files of a bucket that are read at a time; its client keeps 10 connections.
LIBRARIES = ("convex_jax", "jax", "flax", "optax", "orbax-checkpoint")
# Names, in lower case, that desktops, file servers and editors give to files which come and go:
# no manifest lists them. Orbax uses none.
STRAYS = (
  *(".*", "*~", "#*#", "~$*", "*.swp", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"),
  *("@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found", "__macosx"),
)


def seal(folder: str, step: int, accuracy: float | None) -> None:
  """Writes the manifest of a checkpoint whose files are all there."""
  sizes = {name: size for name, size in _files(folder).items() if not _is_stray(name)}
  found = {name: [sizes[name], digest] for name, digest in _digests(folder, sizes)}
  versions = {name: metadata.version(name) for name in LIBRARIES}
  content = {"format": FORMAT, "step": step, "accuracy": accuracy, "versions": versions}
  files.write_json(os.path.join(folder, NAME), content | {"files": found}, new=True)


def is_sealed(folder: str) -> bool:
  """Whether there is a manifest."""
  return files.is_file(os.path.join(folder, NAME))


def accuracy(folder: str) -> float | None:
  """The accuracy in a manifest; None where it was not evaluated, or the manifest is damaged."""
  try:
    found = _content(folder).get("accuracy")
  except files.Damaged:
    return None
  return found if isinstance(found, float) else None


def _content(folder: str) -> dict[str, Any]:
  """The content of a manifest; raises `files.Damaged` where it cannot be read.

  But an OSError where a bucket cannot be reached, which says nothing of what is in it.
  """
  try:
    return files.read_json(os.path.join(folder, NAME))
  except OSError as error:
    if buckets.holds(folder) and not isinstance(error, FileNotFoundError):
      raise
    raise files.Damaged(str(error)) from error


def fault(folder: str, step: int) -> str | None:
  """What is wrong with a checkpoint: which file, and how; None where it is intact.

  Raises `UserError` where a newer version wrote it.
  """
  if not is_sealed(folder):
    return f"not finished (it has no {NAME})"
  try:
    content = _content(folder)
    version, wanted, sealed_step = (content[key] for key in ("format", "files", "step"))
  except (files.Damaged, KeyError) as error:
    return f"{NAME} is damaged: {error}"
  if version != FORMAT:
    raise UserError(
      f"{folder} has format {version}, written by convex_jax"
      f" {content.get('versions', {}).get('convex_jax')}; expected {FORMAT}. Install that version"
    )
  entries = list(wanted.values()) if isinstance(wanted, dict) else []
  if not entries or not all(type(entry) is list and len(entry) == 2 for entry in entries):
    return f"{NAME} is damaged: it does not list files"
  if sealed_step != step:
    return f"it is the checkpoint of step {sealed_step}"
  there = _files(folder)
  names = sorted(name for name in wanted if not _is_stray(name))
  for name in names:
    if name not in there:
      return f"{name} is missing"
    if there[name] is None:
      return f"{name} is not a regular file"
    if there[name] != (size := wanted[name][0]):
      return f"{name} has {there[name]:,} bytes instead of {size:,}"
  for name, digest in _digests(folder, names):
    if digest != wanted[name][1]:
      return f"{name} is damaged: its SHA-256 differs"
  return None


def listed(folder: str) -> list[str]:
  """The files that a checkpoint's manifest lists; none where it cannot be read."""
  try:
    return list(_content(folder)["files"])
  except (files.Damaged, KeyError, TypeError):
    return []


def left_alone(folder: str, steps: Iterable[int]) -> str:
  """A sentence about files in these checkpoints that no manifest lists; empty without any."""
  names = []
  for step in steps:
    own = set(listed(path := os.path.join(folder, str(step))))
    names += [f"{step}/{name}" for name in _files(path) if own and name not in own]
  if not names:
    return ""
  more = f" and {len(names) - 3} more" if len(names) > 3 else ""
  shown = ", ".join(map(ascii, sorted(names)[:3])) + more
  return f"Left alone, since no manifest lists what is in {folder}: {shown}"


def steps_in(folder: str) -> list[int]:
  """The steps that have a checkpoint, intact or not, oldest first."""
  paths = {step: os.path.join(folder, str(step)) for step in _numbered(folder)}
  return [step for step, path in paths.items() if not _holds_strays_alone(path)]


def _numbered(folder: str) -> list[int]:
  """The numbers that are names of folders in this one, but for what Orbax is still writing.

  On a disk that has another name. In a bucket nothing is renamed, and `COMMITTED` comes last.
  """
  steps = [int(name) for name in files.folders(folder) if re.fullmatch("0|[1-9][0-9]*", name)]
  if buckets.holds(folder):
    paths = {step: os.path.join(folder, str(step)) for step in steps}
    steps = [s for s, path in paths.items() if {NAME, COMMITTED} & files.listing(path).keys()]
  return sorted(steps)


def _holds_strays_alone(folder: str) -> bool:
  """Whether a desktop's file is what is left of a checkpoint that was deleted."""
  names = _files(folder)
  return bool(names) and all(map(_is_stray, names))


def faults(folder: str) -> dict[int, str | None]:
  """What is wrong with each checkpoint in a folder; None where it is intact."""
  return {step: fault(os.path.join(folder, str(step)), step) for step in steps_in(folder)}


def quarantine_damaged(folder: str, aside: str) -> list[str]:
  """Moves damaged and unfinished checkpoints to the folder `aside`; says which.

  Called by every process of a run; the first acts. Raises `UserError`, and moves nothing, where
  no checkpoint is intact; a single unfinished one is moved all the same, since that run was
  killed while it wrote its first. Also raises it where the storage fails.
  """
  lines, refusal = [], ""
  if jax.process_index() == 0:
    try:
      lines = _set_aside(folder, aside)
    except UserError as error:
      refusal = str(error)
    except OSError as error:  # The other processes would wait for this one.
      refusal = f"{error.filename or folder}: {error.strerror or error}"
  if jax.process_count() > 1 and multihost_utils.broadcast_one_to_all(np.bool_(refusal)):
    refusal = refusal or f"{folder}: no checkpoint can be used; see the message of process 0"
  if refusal:
    raise UserError(refusal)
  return lines


def _set_aside(folder: str, aside: str) -> list[str]:
  found = faults(folder)
  wrong = {step: reason for step, reason in found.items() if reason is not None}
  unfinished = [step for step in wrong if not is_sealed(os.path.join(folder, str(step)))]
  if wrong and wrong == found and list(wrong) != unfinished[:1]:
    lines = [f"No checkpoint in {folder} is intact:"]
    lines += [f"  step {step}: {reason}" for step, reason in wrong.items()]
    lines += ["  To start a new run, pass another --workdir."]
    if unfinished:
      command = f"python -m convex_jax checkpoint seal {os.path.dirname(files.absolute(folder))}"
      lines += [f"  To trust those without a manifest: {command}"]
    raise UserError("\n".join(lines))
  for step in _numbered(folder):
    if step not in found:  # Orbax would take the folder for a checkpoint.
      wrong[step] = "nothing of a checkpoint is in its folder"
  lines = []
  for step, reason in wrong.items():
    names = itertools.chain([str(step)], (f"{step}.{n}" for n in itertools.count(1)))
    paths = (os.path.join(aside, name) for name in names)
    target = next(path for path in paths if not (files.exists(path) or os.path.islink(path)))
    files.move_tree(os.path.join(folder, str(step)), target)
    lines.append(f"Checkpoint {step}: {reason}. Moved to {target}")
  return lines + list(filter(None, [left_alone(folder, steps_in(folder))]))


def saved_steps(folder: str) -> dict[int, float | None]:
  """The finished checkpoints in a folder: step to accuracy, None where it was not evaluated."""
  paths = {step: os.path.join(folder, str(step)) for step in steps_in(folder)}
  return {s: accuracy(path) for s, path in paths.items() if is_sealed(path)}


def _files(folder: str) -> dict[str, int | None]:
  """`files.listing` of a checkpoint, without the manifest."""
  found = files.listing(folder)
  return {name: size for name, size in found.items() if name not in (NAME, NAME + ".tmp")}


def _is_stray(name: str) -> bool:
  """Whether a file, or a folder that it is in, has one of the names `STRAYS`."""
  parts = name.lower().split("/")
  return any(fnmatch.fnmatchcase(part, stray) for part in parts for stray in STRAYS)


def _digests(folder: str, names: Iterable[str]) -> Iterator[tuple[str, str]]:
  """(name, SHA-256) of files."""
  paths = [os.path.join(folder, name) for name in names]
  with concurrent.futures.ThreadPoolExecutor(READERS if buckets.holds(folder) else 1) as pool:
    yield from zip(names, pool.map(files.sha256, paths), strict=True)
