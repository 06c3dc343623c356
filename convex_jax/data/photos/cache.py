"""Photographs decoded once: the central square of each, at one size, in a memory-mapped file.

An epoch of 1.28 million photographs of 72 px is 20 GB. Reading it from memory takes as long as
training a small network on it; decoding it takes one core half an hour. The workers of `stream`
write it in parallel, with a checksum per block; an interrupted command resumes where it stopped.
"""

import concurrent.futures
import contextlib
import os
import shutil
import zlib
from typing import Any

import numpy as np

from convex_jax import files
from convex_jax.data.photos import worker
from convex_jax.data.photos.chunks import Chunks
from convex_jax.data.photos.decode import UNREADABLE
from convex_jax.data.photos.records import Records
from convex_jax.data.splits import Split
from convex_jax.errors import Unsaved, UserError
from convex_jax.progress import track

FORMAT = 1
BLOCK = 256  # Images per checksum, and per chunk of a worker.
SAVE_EVERY = 16  # Blocks between two saves.


def path_of(folder: Any, split: str, size: int) -> str:
  """The path of a cache's description, which is written last."""
  return os.path.join(str(folder), f"convex_jax_{size}px", f"{split}.json")


def _arrays(path: str) -> tuple[str, str]:
  stem = path.removesuffix(".json")
  return stem + "_images.npy", stem + "_labels.npy"


def link(folder: str, target: str) -> None:
  """Makes `target` a prepared data set of links to the files of `folder`, to put caches in."""
  os.makedirs(target, exist_ok=True)
  for entry in os.scandir(folder):
    there = os.path.join(target, entry.name)
    if os.path.islink(there):
      os.remove(there)  # Of an earlier command; the data may have moved since.
    if entry.is_file() and not os.path.exists(there):
      os.symlink(os.path.abspath(entry.path), there)


def write(name: str, folder: str, split: str, count: int, size: int, workers: int) -> str:
  """Decodes `count` records of a prepared data set, or resumes doing so; returns a message.

  Raises `UserError` where the disk lacks room or refuses, or another command writes the same
  cache.
  """
  path = path_of(folder, split, size)
  if os.path.exists(path):
    return f"{name} {split}: {path} already exists"
  try:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with files.exclusive_lock(path + ".lock", f"{path} is being written by another command"):
      unreadable = _fill(path, name, folder, split, count, size, workers)
  except (OSError, Unsaved) as error:
    raise UserError(
      f"The cache of {name} cannot be written: {error}\n  To write it into another folder:"
      f" python -m convex_jax data cache {name} --image_size={size} --data_dir=... --to=FOLDER;\n"
      "  then train with --config.data.dir=FOLDER"
    ) from error
  return f"{name} {split}: {count:,} images of {size} px in {path}, {unreadable} unreadable"


def _fill(
  path: str, name: str, folder: str, split: str, count: int, size: int, workers: int
) -> int:
  images, labels, about = _begin(path, count, size)
  records = Records(folder, split, np.arange(count), size, crop_area=(1.0, 1.0), eval_share=1.0)
  rows = worker.Evaluation(records, np.arange(BLOCK), BLOCK, count, BLOCK)
  blocks, first = -(-count // BLOCK), len(about["crc32"])
  made = Chunks(rows, first, blocks, workers)
  try:
    for i in track(range(first, blocks), f"decoding {name} {split}"):
      part, start = next(made), i * BLOCK
      stop = min(start + BLOCK, count)
      images[start:stop], labels[start:stop] = (part[k][: stop - start] for k in ("image", "label"))
      about["crc32"].append(_checksum(images, labels, start))
      unreadable = part["state"][: stop - start] == UNREADABLE
      about["replaced"] += (start + np.flatnonzero(unreadable)).tolist()
      if i % SAVE_EVERY == SAVE_EVERY - 1 or i == blocks - 1:
        images.flush()
        labels.flush()
        files.write_json(path + ".partial", about)
  finally:
    made.close()
  os.replace(path + ".partial", path)
  return len(about["replaced"])


def _begin(path: str, count: int, size: int) -> tuple[np.memmap, np.memmap, dict[str, Any]]:
  """The arrays to fill, and the description of the blocks filled so far."""
  image_file, label_file = _arrays(path)
  with contextlib.suppress(OSError, ValueError, KeyError):  # Absent or incomplete: start again.
    about = files.read_json(path + ".partial")
    images, labels = (np.lib.format.open_memmap(f, "r+") for f in (image_file, label_file))
    shapes = (images.shape, labels.shape) == ((count, size, size, 3), (count,))
    if shapes and (about["format"], about["examples"]) == (FORMAT, count):
      return images, labels, about
  need, free = count * size * size * 3, shutil.disk_usage(os.path.dirname(path)).free
  if need > free:
    raise UserError(
      f"{os.path.dirname(path)} needs {need / 1e9:.1f} GB and has {free / 1e9:.1f} GB free. Make"
      " room, or choose a smaller --image_size"
    )
  images = np.lib.format.open_memmap(image_file, "w+", np.uint8, (count, size, size, 3))
  labels = np.lib.format.open_memmap(label_file, "w+", np.int32, (count,))
  if hasattr(os, "posix_fallocate"):  # So that a full disk is an error, not a crash.
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
  """The decoded split, memory-mapped, without the photographs that could not be read.

  Raises `UserError` where the cache is absent or damaged, or where a fraction of more than
  `max_unreadable` could not be read.
  """
  path = path_of(folder, split, size)
  command = f"python -m convex_jax data cache {name} --image_size={size}"
  if not os.path.exists(path):
    raise UserError(
      f"Data set {name!r} is not decoded at {size} px: {path} does not exist.\n  To decode it once:"
      f" {command} --data_dir=...\n  To decode it as needed: --config.data.loader=stream"
    )
  try:
    about = files.read_json(path)
    images, labels = (np.load(f, mmap_mode="r") for f in _arrays(path))
    bad = _damaged(images, labels, about, size, f"checking {name} {split}", progress)
  except (OSError, ValueError, KeyError) as error:
    raise UserError(
      f"{path} is damaged: {error}. Move the folder aside, then: {command}"
    ) from error
  if bad:
    raise UserError(
      f"{path}: images {bad[0] * BLOCK} to {bad[0] * BLOCK + BLOCK - 1} are damaged"
      f" ({len(bad)} of {len(about['crc32'])} blocks). Move the folder aside, then: {command}"
    )
  replaced = about["replaced"]
  if len(replaced) > max_unreadable * len(labels):
    raise UserError(
      f"{len(replaced)} of the {len(labels):,} images of {path} could not be read; expected at most"
      f" a fraction of {max_unreadable:g} (config.data.max_unreadable). Prepare the data set again"
    )
  whole = Split(images, np.array(labels))
  return whole.subset(np.delete(np.arange(len(labels)), replaced)) if replaced else whole


def _damaged(images, labels, about, size, text: str, progress: bool) -> list[int]:
  """Numbers of the blocks whose checksums differ; raises `ValueError` for other files."""
  if about.get("format") != FORMAT:
    raise ValueError(f"its format is {about.get('format')}; expected {FORMAT}")
  shapes = (about["examples"], size, size, 3), (about["examples"],)
  if (images.shape, labels.shape) != shapes:
    raise ValueError(f"its arrays have shapes {images.shape} and {labels.shape}; expected {shapes}")
  starts = range(0, len(labels), BLOCK)
  if len(about["crc32"]) != len(starts):
    raise ValueError(f"it has {len(about['crc32'])} checksums for {len(starts)} blocks")
  with concurrent.futures.ThreadPoolExecutor() as pool:
    sums = pool.map(lambda start: _checksum(images, labels, start), starts)
    found = list(track(sums, text, len(starts), disable=not progress))
  return np.flatnonzero(np.not_equal(found, about["crc32"])).tolist()
