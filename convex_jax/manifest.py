"""What a finished checkpoint holds: a digest of each of its files, written last.

`manifest.json` in a checkpoint's folder: format, step, accuracy where it was evaluated,
versions of the libraries, and for each file its size in bytes and its SHA-256. A folder without one was not finished. No path of a
manifest is ever opened: the folder's own files are compared with it.
"""

import hashlib
import os
import stat
from collections.abc import Iterator
from importlib import metadata

from convex_jax import files
from convex_jax.errors import Mistake

FORMAT = 1  # Of a checkpoint; rises when an older version could not read it.
NAME = "manifest.json"
LIBRARIES = ("convex_jax", "jax", "flax", "optax", "orbax-checkpoint")
UNFINISHED = f"has no {NAME}: it was not finished"


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
  """Of a sealed checkpoint; None where it was not evaluated, or the manifest is damaged."""
  try:
    found = files.read_json(os.path.join(folder, NAME)).get("accuracy")
  except (files.Damaged, OSError):
    return None
  return found if isinstance(found, float) else None


def fault(folder: str, step: int) -> str | None:
  """What is wrong with a checkpoint: which file, and how; None where nothing is.

  Raises `Mistake` where a newer version wrote it.
  """
  if not is_sealed(folder):
    return UNFINISHED
  try:
    content = files.read_json(os.path.join(folder, NAME))
    version, wanted, sealed_step = (content[key] for key in ("format", "files", "step"))
  except (files.Damaged, KeyError, OSError) as error:
    return f"{NAME} is damaged: {error}"
  if version != FORMAT:
    raise Mistake(
      f"{folder} is of format {version}, written by convex_jax"
      f" {content.get('versions', {}).get('convex_jax')}; allowed: {FORMAT}. Install that version"
    )
  listed = isinstance(wanted, dict) and all(
    type(v) is list and len(v) == 2 for v in wanted.values()
  )
  if not listed:
    return f"{NAME} is damaged: it lists no files"
  if sealed_step != step:
    return f"it is the checkpoint of step {sealed_step}"
  there = dict(_files(folder))
  for name in sorted(wanted.keys() | there.keys()):
    if name not in there:
      return f"{name} is missing"
    if name not in wanted:
      return f"{name} is no file of it"
    if not stat.S_ISREG(os.lstat(there[name]).st_mode):
      return f"{name} is no regular file"
    size, digest = wanted[name]
    if os.path.getsize(there[name]) != size:
      return f"{name} has {os.path.getsize(there[name]):,} bytes instead of {size:,}"
    if _sha256(there[name]) != digest:
      return f"{name} is damaged: its SHA-256 is another"
  return None


def _files(folder: str) -> Iterator[tuple[str, str]]:
  """(name, path) of each file in a folder, at any depth, but for the manifest; no link is followed."""
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
