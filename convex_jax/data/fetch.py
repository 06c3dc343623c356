"""Prepared data sets in a bucket, copied to this machine: array_record reads files alone.

A copy is made in a folder `....partial` beside its own, where one that was interrupted goes on. It
gets its name when size and CRC32C of every file are those that the bucket tells.
"""

import base64
import concurrent.futures
import contextlib
import fcntl
import os
import pathlib
import shutil
import sys

import google_crc32c
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from convex_jax import buckets, files
from convex_jax.data import prepare
from convex_jax.errors import UserError

SMALL = 2 * 10**9  # Bytes of a data set that a run copies without being asked.
AT_ONCE = 8  # Files.


def at_start(name: str, source: str) -> str:
  """The local folder of data sets with a copy of this one; makes it, where the set is small.

  Raises `UserError` where it is not, or is not in `source`, an address in a bucket.
  """
  total = sum(size for size, _ in _described(name, source).values())
  if total > SMALL:
    raise UserError(
      f"Data set {name!r} in {source} has {total / 1e9:,.1f} GB, and a run copies up to"
      f" {SMALL / 1e9:g} GB. To copy it, on every host, once:\n"
      f"  python -m convex_jax data prepare {name} --from={source} --data_dir=FOLDER\n"
      "  Then train with --config.data.dir=FOLDER"
    )
  folder = os.path.join(files.cache_folder(), "data", source.removeprefix(buckets.SCHEME))
  copy(name, source, folder)
  return folder


def copy(name: str, source: str, data_dir: str) -> str:
  """Copies a data set from an address of data sets to a folder of them; returns its own folder.

  Raises `UserError` where it is not there, or the disk lacks room, or holds another version of it.
  """
  described = _described(name, source)
  origin = f"{source}/{_relative(name)}"
  target = pathlib.Path(str(prepare.builder_of(name, data_dir).data_dir))
  try:
    # Asked before a lock is made: a complete copy may be on a disk that is read-only.
    if not target.exists() and _make(target, origin, described):
      return str(target)
    wrong = [file for file in sorted(described) if not _is_copy(target / file, described[file])]
  except OSError as error:
    raise UserError(
      f"{origin} could not be copied: {error.filename or target}: {error.strerror or error}\n"
      "  The same command goes on where this one stopped"
    ) from error
  if wrong:
    raise UserError(
      f"{target / wrong[0]} is not as in {origin}; expected the same data set. Move {target} aside,"
      " or pass another --data_dir"
    )
  return str(target)


def _make(target: pathlib.Path, origin: str, described: dict[str, tuple[int, str]]) -> bool:
  """Makes a copy; False where another process has made one meanwhile."""
  partial = target.with_name(f"{target.name}.partial")
  target.parent.mkdir(parents=True, exist_ok=True)
  with open(f"{partial}.lock", "a") as lock:
    with contextlib.suppress(OSError):  # The file system has no locks.
      fcntl.flock(lock, fcntl.LOCK_EX)  # The processes of a host copy once.
    if target.exists():
      return False
    _fill(partial, origin, described)
    os.rename(partial, target)
  return True


def _relative(name: str) -> str:
  """Where a data set is in a folder of them."""
  return prepare.builder_of(name, "").info.full_name


def _described(name: str, source: str) -> dict[str, tuple[int, str]]:
  """(size in bytes, CRC32C) of each file of a data set in a bucket."""
  found = buckets.described(f"{source}/{_relative(name)}")
  if not found:
    raise UserError(
      f"Data set {name!r} is not in {source}: {source}/{_relative(name)} is empty or absent; expected"
      " the address of a folder that TFDS has prepared, such as a copy of ~/tensorflow_datasets"
    )
  for file in found:  # Whoever owns the bucket chooses the names.
    if "\\" in file or "\0" in file or not {"", ".", ".."}.isdisjoint(file.split("/")):
      raise UserError(
        f"{source}/{_relative(name)} has an object named {file!r}; expected names of files in a"
        " folder that TFDS has prepared, without empty parts, '.', '..', backslashes and null"
        " characters. Nothing was copied"
      )
  return found


def _fill(folder: pathlib.Path, origin: str, described: dict[str, tuple[int, str]]) -> None:
  """Makes a folder a copy, of which some may be there."""
  for file in files.listing(str(folder)).keys() - described.keys():
    (folder / file).unlink()  # Of an earlier version of the data set.
  missing = [file for file in described if not _is_copy(folder / file, described[file])]
  total = sum(described[file][0] for file in missing)
  free = shutil.disk_usage(folder.parent).free
  if total > free:
    raise UserError(
      f"{folder.parent} has {free / 1e9:.1f} GB free, and {origin} needs {total / 1e9:.1f} GB more:"
      " make room, or pass another --data_dir"
    )
  target = folder.with_suffix("")
  print(f"Copying {origin} ({_size(total)}) to {target}", file=sys.stderr, flush=True)
  columns = TextColumn("copying"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
  with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
    task = progress.add_task("", total=total)

    def fetch(file):
      path = folder / file
      path.parent.mkdir(parents=True, exist_ok=True)
      with open(path, "wb") as content:
        for piece in buckets.pieces(f"{origin}/{file}"):
          content.write(piece)
          progress.advance(task, len(piece))
        content.flush()
        os.fsync(content.fileno())
      if not _is_copy(path, described[file]):
        raise OSError(
          None, "it was damaged on the way, or has changed meanwhile", f"{origin}/{file}"
        )

    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
      jobs = [pool.submit(fetch, file) for file in missing]
      try:
        for job in concurrent.futures.as_completed(jobs):
          job.result()
      finally:
        pool.shutdown(cancel_futures=True)


def _size(total: int) -> str:
  return f"{total / 1e6:,.1f} MB" if total < 1e9 else f"{total / 1e9:,.1f} GB"


def _is_copy(path: pathlib.Path, described: tuple[int, str]) -> bool:
  """Whether a file is there, with this size and CRC32C."""
  size, checksum = described
  if not path.is_file() or path.stat().st_size != size:
    return False
  found = google_crc32c.Checksum()
  with open(path, "rb") as file:
    while piece := file.read(2**22):
      found.update(piece)
  return base64.b64encode(found.digest()).decode() == checksum
