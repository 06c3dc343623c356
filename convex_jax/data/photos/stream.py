"""Photographs decoded by worker processes while the devices compute.

Grain runs the workers. What they make is numbered by place in the run: chunk c of a process
holds the rows c R .. (c + 1) R - 1 of all the rows that this process feeds to its devices,
step after step. So order, crops and labels are a function of (seed, step), for any number of
workers, hosts and devices, and a resumed run begins at its chunk with no state to restore.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import grain
import jax
import numpy as np
from absl import flags, logging
from jax.sharding import Mesh

from convex_jax import mesh as meshes
from convex_jax.data.photos import worker as reader
from convex_jax.data.photos.records import Records
from convex_jax.data.sampling import positions
from convex_jax.errors import UserError

ENDLESS = 2**40  # Chunks.
CHUNK = 32  # Rows at most: what a worker makes at a time, and how much is in shared memory.
AHEAD = 4  # Chunks a worker is ahead of the training loop.
NAMED = 20  # Photographs that are told by name.
FEW = 4  # Cores that threads alone keep busy: past the codecs Python takes a tenth of the time.


def cores() -> int:
  """Those that this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def default_workers() -> int:
  """A process a core, or threads on few cores, where passing images on costs more."""
  return cores() if cores() > FEW else 0


def _follow_parent(*_: int) -> None:
  """A worker ends with its trainer, however that ends, and leaves signals to it.

  Ctrl-C and schedulers signal every process of a group: the trainer must live to save, and
  so must what it waits for.
  """
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
  parent = multiprocessing.parent_process()

  def follow():
    assert parent is not None
    parent.join()
    os._exit(0)

  threading.Thread(target=follow, daemon=True).start()


def chunks(rows: Any, first: int, stop: int, workers: int) -> Any:
  """An iterator over chunks first .. stop - 1 of `rows`, in order, made ahead by workers."""
  if not flags.FLAGS.is_parsed():  # Grain reads flags; notebooks and tests parse none.
    flags.FLAGS.mark_as_parsed()
  source = grain.MapDataset.range(first, stop).map(rows)
  if not workers:  # The codecs let go of the interpreter: threads do.
    threads = cores()
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=AHEAD * threads)
    return iter(source.to_iter_dataset(options))
  own = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  several = grain.MultiprocessingOptions(workers, per_worker_buffer_size=AHEAD)
  return iter(source.to_iter_dataset(own).mp_prefetch(several, _follow_parent))


class Stream:
  """A split of records on a mesh: `feed.Feed`, with the work in other processes.

  Raises `UserError` when more than `max_unreadable` of the split cannot be read.
  """

  arrays = None  # Nothing resides on the devices.

  def __init__(
    self, records: Records, mesh: Mesh, workers: int, max_unreadable: float, repeats: int = 1
  ):
    self._records, self._mesh, self._workers = records, mesh, workers
    self._max_unreadable, self._repeats = max_unreadable, repeats
    self._training: tuple[Any, Any] | None = None  # What comes next, and the chunks.
    self.damaged: dict[int, int] = {}  # Record: how it was read (`decode`).

  def __len__(self) -> int:
    return len(self._records)

  def train_plan(self, steps: range, batch_size: int, seed: int) -> dict[str, jax.Array]:
    """The batches of several steps, stacked: columns of shape (steps, B)."""
    place = _Places(self._mesh, batch_size)
    expected = (steps.start, batch_size, seed)
    if self._training is None or self._training[0] != expected:
      self.close()
      rows = reader.Training(
        self._records, place.rows, batch_size, seed, place.chunk, self._repeats
      )
      first = steps.start * place.chunks
      self._training = (expected, chunks(rows, first, ENDLESS, self._workers))
    _, made = self._training
    try:
      parts = [next(made) for _ in range(len(steps) * place.chunks)]
    except RuntimeError as error:  # Grain's, of a worker that is no more.
      raise UserError(
        f"a process that decodes images died: {error}\n  if memory ran out: fewer"
        " config.data.workers; the same command goes on from the newest checkpoint"
      ) from error
    self._training = ((steps.stop, batch_size, seed), made)
    self._look_at(parts, len(place.rows) / batch_size)
    columns = {name: _joined(parts, name, len(steps)) for name in ("image", "label")}
    columns["position"] = positions(steps, batch_size)[:, place.rows].astype(np.uint32)
    return {name: place.on_devices(column) for name, column in columns.items()}

  def eval_plans(self, batch_size: int, limit: int) -> Iterator[dict[str, jax.Array]]:
    """Each of the first `limit` examples once; the last batch is filled and masked."""
    n = min(limit, len(self)) if limit else len(self)
    place, batches = _Places(self._mesh, batch_size), -(-n // batch_size)
    rows = reader.Evaluation(self._records, place.rows, batch_size, n, place.chunk)
    made = chunks(rows, 0, batches * place.chunks, workers=0)  # No processes to start each time.
    try:
      for start in range(0, n, batch_size):
        parts = [next(made) for _ in range(place.chunks)]
        self._look_at(parts, len(place.rows) / batch_size)
        columns = {name: _joined(parts, name, 1)[0] for name in ("image", "label")}
        readable = np.concatenate([part["state"] for part in parts]) != reader.UNREADABLE
        columns["mask"] = (start + place.rows < n) & readable
        yield {name: place.on_devices(column, axis=0) for name, column in columns.items()}
    finally:
      made.close()

  def _look_at(self, parts: list[dict[str, np.ndarray]], share: float) -> None:
    """Counts and names what could not be read as it should; stops where it is too much.

    `share` of the examples of an epoch come to this process.
    """
    for part in parts:
      label, classes = part["label"], self._records.classes
      if classes and not ((label >= 0) & (label < classes)).all():
        raise UserError(
          f"{self._records.folder}: labels run from {label.min()} to {label.max()}; allowed: 0 to"
          f" {classes - 1}. Prepare the data set again"
        )
      for i in np.flatnonzero(part["state"]):
        record, state = int(part["record"][i]), int(part["state"][i])
        if record in self.damaged:
          continue
        self.damaged[record] = state
        if len(self.damaged) <= NAMED:
          what = "replaced by the next" if state == reader.UNREADABLE else "decoded in part"
          logging.error("%s, damaged: %s", self.name_of(record), what)
    unreadable = [r for r, state in self.damaged.items() if state == reader.UNREADABLE]
    if len(unreadable) > self._max_unreadable * len(self) * share:
      names = ", ".join(map(self.name_of, unreadable[:3]))
      raise UserError(
        f"{len(unreadable)} of {len(self):,} images in {self._records.folder} cannot be read"
        f" ({names} ...); allowed: a share of {self._max_unreadable:g}, config.data.max_unreadable."
        " Prepare the data set again"
      )

  def name_of(self, record: int) -> str:
    """What to call record number `record` of the split."""
    try:
      example = reader.source_of(self._records.folder, self._records.split)[record]
    except Exception:  # Not even its name can be read.
      example = {}
    name = example.get("file_name", b"")
    text = name.decode() if isinstance(name, bytes) else str(name)
    return text or f"{self._records.split} example {record}"

  def close(self) -> None:
    """Ends the workers."""
    if self._training is not None:
      self._training[1].close()
      self._training = None


class _Places:
  """Which rows of a global batch this process feeds, and in which chunks."""

  def __init__(self, mesh: Mesh, batch_size: int):
    self._mesh, self._batch_size = mesh, batch_size
    where = meshes.sharded(mesh, 0).addressable_devices_indices_map((batch_size,))
    rows = {i for (at,) in where.values() for i in range(batch_size)[at]}  # pyright: ignore
    self.rows = np.array(sorted(rows))
    self.chunk = max(c for c in range(1, CHUNK + 1) if len(self.rows) % c == 0)
    self.chunks = len(self.rows) // self.chunk  # A step.

  def on_devices(self, local: np.ndarray, axis: int = 1) -> jax.Array:
    """The global array of which `local` holds this process's rows, along `axis`."""
    shape = (*local.shape[:axis], self._batch_size, *local.shape[axis + 1 :])

    def part(at):
      rows = np.searchsorted(self.rows, range(self._batch_size)[at[axis]])
      return local[(slice(None),) * axis + (slice(rows[0], rows[-1] + 1),)]

    return meshes.make_global_array(meshes.sharded(self._mesh, axis), shape, part)


def _joined(parts: list[dict[str, np.ndarray]], name: str, steps: int) -> np.ndarray:
  """A column of all chunks, (steps, rows, ...)."""
  column = np.concatenate([part[name] for part in parts])
  return column.reshape(steps, -1, *column.shape[1:])
