"""Photographs decoded once: the central square of each, at one size, in a memory-mapped file.

An epoch of 1.28 million photographs of 72 px is 20 GB: read from memory it costs what a small
network costs, where decoding costs a core half an hour. Written in parallel by the workers of
`stream`, with a checksum a block; an interrupted command goes on where it was.
"""

import concurrent.futures
import contextlib
import os
import shutil
import zlib
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from convex_jax import files
from convex_jax.data.photos import worker
from convex_jax.data.photos.records import Records
from convex_jax.data.splits import Split
from convex_jax.errors import UserError

FORMAT = 1
BLOCK = 256  # Images a checksum and a worker's chunk.
SAVE_EVERY = 16  # Blocks.


def path_of(folder: Any, split: str, size: int) -> str:
  """The description of a finished cache, which is written last."""
  return os.path.join(str(folder), f"convex_jax_{size}px", f"{split}.json")


def _arrays(path: str) -> tuple[str, str]:
  stem = path.removesuffix(".json")
  return stem + "_images.npy", stem + "_labels.npy"


def write(name: str, folder: str, split: str, count: int, size: int, workers: int) -> str:
  """Decodes `count` records of a prepared data set, or goes on doing so; returns what it tells.

  Raises `UserError` where there is no room.
  """
  path = path_of(folder, split, size)
  if os.path.exists(path):
    return f"{name} {split}: {path} is there already"
  os.makedirs(os.path.dirname(path), exist_ok=True)
  with files.exclusive_lock(path + ".lock", f"{path} is being written by another command"):
    return _write(name, folder, split, count, size, workers)


def _write(name: str, folder: str, split: str, count: int, size: int, workers: int) -> str:
  from convex_jax.data.photos.stream import chunks  # Grain: only whoever decodes need wait for it.

  path = path_of(folder, split, size)
  images, labels, about = _begin(path, count, size)
  records = Records(folder, split, np.arange(count), size, crop_area=(1.0, 1.0), eval_share=1.0)
  rows = worker.Evaluation(records, np.arange(BLOCK), BLOCK, count, BLOCK)
  blocks, first = -(-count // BLOCK), len(about["crc32"])
  made = chunks(rows, first, blocks, workers)
  label, console = f"decoding {name} {split}", Console(stderr=True)
  try:
    for i in track(range(first, blocks), label, console=console, transient=True):
      part, start = next(made), i * BLOCK
      stop = min(start + BLOCK, count)
      images[start:stop], labels[start:stop] = (part[k][: stop - start] for k in ("image", "label"))
      about["crc32"].append(_checksum(images, labels, start))
      unreadable = part["state"][: stop - start] == worker.UNREADABLE
      about["replaced"] += (start + np.flatnonzero(unreadable)).tolist()
      if i % SAVE_EVERY == SAVE_EVERY - 1 or i == blocks - 1:
        images.flush()
        labels.flush()
        files.write_json(path + ".partial", about)
  finally:
    made.close()
  os.replace(path + ".partial", path)
  return (
    f"{name} {split}: {count:,} images of {size} px in {path}, {len(about['replaced'])} unreadable"
  )


def _begin(path: str, count: int, size: int) -> tuple[np.memmap, np.memmap, dict[str, Any]]:
  """The arrays to fill, and what is known of those filled so far."""
  image_file, label_file = _arrays(path)
  if os.path.exists(path + ".partial"):
    with contextlib.suppress(OSError, ValueError, KeyError):  # Not whole: begin again.
      about = files.read_json(path + ".partial", signed=False)
      if about["format"] == FORMAT and about["examples"] == count:
        images, labels = (np.lib.format.open_memmap(f, "r+") for f in (image_file, label_file))
        if (images.shape, labels.shape) == ((count, size, size, 3), (count,)):
          return images, labels, about
  need, free = count * size * size * 3, shutil.disk_usage(os.path.dirname(path)).free
  if need > free:
    raise UserError(
      f"{os.path.dirname(path)} needs {need / 1e9:.1f} GB and has {free / 1e9:.1f} GB free; make"
      " room, or choose a smaller --image_size"
    )
  images = np.lib.format.open_memmap(image_file, "w+", np.uint8, (count, size, size, 3))
  labels = np.lib.format.open_memmap(label_file, "w+", np.int32, (count,))
  if hasattr(os, "posix_fallocate"):  # A full disk is an error now, not a dead process later.
    with open(image_file, "r+b") as file:
      os.posix_fallocate(file.fileno(), 0, os.path.getsize(image_file))
  about = {"format": FORMAT, "examples": count, "image_size": size, "replaced": [], "crc32": []}
  return images, labels, about


def _checksum(images: np.ndarray, labels: np.ndarray, start: int) -> int:
  block = slice(start, start + BLOCK)
  return zlib.crc32(labels[block].tobytes(), zlib.crc32(images[block].tobytes()))


def read(
  name: str, folder: Any, split: str, size: int, max_unreadable: float, progress: bool = True
) -> Split:
  """The decoded split, mapped into memory, without what could not be read.

  Raises `UserError` where it is absent or damaged, or too much of it could not be read.
  """
  path = path_of(folder, split, size)
  cure = f"python -m convex_jax.data cache {name} --image_size={size}"
  if not os.path.exists(path):
    raise UserError(
      f"data set {name!r} is not decoded at {size} px: there is no {path}\n  decode it once: {cure}"
      f" --data_dir=...\n  or decode as it is needed: --config.data.loader=stream"
    )
  try:
    about = files.read_json(path, signed=False)
    images, labels = (np.load(f, mmap_mode="r") for f in _arrays(path))
    bad = _damaged(images, labels, about, size, f"checking {name} {split}", progress)
  except (OSError, ValueError, KeyError) as error:
    raise UserError(f"{path} is damaged: {error}; delete the folder, then {cure}") from error
  if bad:
    raise UserError(
      f"{path}: images {bad[0] * BLOCK} to {bad[0] * BLOCK + BLOCK - 1} are damaged"
      f" ({len(bad)} blocks of {len(about['crc32'])}); delete the folder, then {cure}"
    )
  replaced = about["replaced"]
  if len(replaced) > max_unreadable * len(labels):
    raise UserError(
      f"{len(replaced)} of the {len(labels):,} images of {path} could not be read; allowed: a share"
      f" of {max_unreadable:g}, config.data.max_unreadable. Prepare the data set again"
    )
  whole = Split(images, np.array(labels))
  return whole.subset(np.delete(np.arange(len(labels)), replaced)) if replaced else whole


def _damaged(images, labels, about, size, text: str, progress: bool) -> list[int]:
  """Blocks whose checksums differ; raises `ValueError` for files of another kind."""
  if about.get("format") != FORMAT:
    raise ValueError(f"its format is {about.get('format')}; allowed: {FORMAT}")
  shapes = (about["examples"], size, size, 3), (about["examples"],)
  if (images.shape, labels.shape) != shapes:
    raise ValueError(f"arrays of {images.shape} and {labels.shape} instead of {shapes}")
  starts, console = range(0, len(labels), BLOCK), Console(stderr=True)
  if len(about["crc32"]) != len(starts):
    raise ValueError(f"{len(about['crc32'])} checksums for {len(starts)} blocks")
  with concurrent.futures.ThreadPoolExecutor() as pool:
    sums = pool.map(lambda start: _checksum(images, labels, start), starts)
    shown = track(sums, text, len(starts), transient=True, disable=not progress, console=console)
    return [
      i for i, (now, then) in enumerate(zip(shown, about["crc32"], strict=True)) if now != then
    ]
