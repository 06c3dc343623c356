"""Photographs decoded by worker processes while the devices compute.

Grain runs the workers. What they make is numbered by place in the run: chunk c of a process
holds the rows c R .. (c + 1) R - 1 of all the rows that this process feeds to its devices,
step after step. So order, crops and labels are a function of (seed, step), for any number of
workers, hosts and devices, and a resumed run begins at its chunk with no state to restore.
"""

import os
from collections.abc import Iterator
from typing import Any

import grain
import jax
import numpy as np
from absl import flags, logging
from jax.sharding import Mesh

from convex_jax import mesh as meshes
from convex_jax.data import reader
from convex_jax.data.splits import Records
from convex_jax.errors import Mistake

ENDLESS = 2**40  # Chunks.
CHUNK = 32  # Rows at most: what a worker makes at a time, and how much is in shared memory.
AHEAD = 4  # Chunks a worker is ahead of the training loop.
NAMED = 20  # Photographs that are told by name.


def chunks(rows: Any, first: int, stop: int, workers: int) -> Any:
  """An iterator over chunks first .. stop - 1 of `rows`, in order, made ahead by workers."""
  if not flags.FLAGS.is_parsed():  # Grain reads flags; notebooks and tests parse none.
    flags.FLAGS.mark_as_parsed()
  source = grain.MapDataset.range(first, stop).map(rows)
  if not workers:  # The codecs let go of the interpreter: threads do.
    cores = os.cpu_count() or 1
    options = grain.ReadOptions(num_threads=cores, prefetch_buffer_size=AHEAD * cores)
    return iter(source.to_iter_dataset(options))
  own = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  several = grain.MultiprocessingOptions(workers, per_worker_buffer_size=AHEAD)
  return iter(source.to_iter_dataset(own).mp_prefetch(several))


class Stream:
  """A split of records on a mesh: `feed.Feed`, with the work in other processes.

  Raises `Mistake` when more than `max_unreadable` of the split cannot be read.
  """

  arrays = None  # Nothing resides on the devices.

  def __init__(self, records: Records, mesh: Mesh, workers: int, max_unreadable: float):
    self._records, self._mesh, self._workers = records, mesh, workers
    self._max_unreadable = max_unreadable
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
      rows = reader.Training(self._records, place.rows, batch_size, seed, place.chunk)
      first = steps.start * place.chunks
      self._training = (expected, chunks(rows, first, ENDLESS, self._workers))
    _, made = self._training
    parts = [next(made) for _ in range(len(steps) * place.chunks)]
    self._training = ((steps.stop, batch_size, seed), made)
    self._look_at(parts)
    position = np.arange(steps.start * batch_size, steps.stop * batch_size, dtype=np.uint32)
    columns = {name: _joined(parts, name, len(steps)) for name in ("image", "label")}
    columns["position"] = position.reshape(len(steps), batch_size)[:, place.rows]
    return {name: place.on_devices(column) for name, column in columns.items()}

  def eval_plans(self, batch_size: int, limit: int) -> Iterator[dict[str, jax.Array]]:
    """Each of the first `limit` examples once; the last batch is filled and masked."""
    n = min(limit, len(self)) if limit else len(self)
    place, batches = _Places(self._mesh, batch_size), -(-n // batch_size)
    rows = reader.Evaluation(self._records, place.rows, batch_size, n, place.chunk)
    made = chunks(rows, 0, batches * place.chunks, self._workers)
    try:
      for start in range(0, n, batch_size):
        parts = [next(made) for _ in range(place.chunks)]
        self._look_at(parts)
        columns = {name: _joined(parts, name, 1)[0] for name in ("image", "label")}
        readable = np.concatenate([part["state"] for part in parts]) != reader.UNREADABLE
        columns["mask"] = (start + place.rows < n) & readable
        yield {name: place.on_devices(column, axis=0) for name, column in columns.items()}
    finally:
      made.close()

  def _look_at(self, parts: list[dict[str, np.ndarray]]) -> None:
    """Counts and names what could not be read as it should; stops where it is too much."""
    for part in parts:
      for i in np.flatnonzero(part["state"]):
        record, state = int(part["record"][i]), int(part["state"][i])
        if record in self.damaged:
          continue
        self.damaged[record] = state
        if len(self.damaged) <= NAMED:
          what = "replaced by the next" if state == reader.UNREADABLE else "decoded in part"
          logging.error("%s, damaged: %s", self.name_of(record), what)
    unreadable = [r for r, state in self.damaged.items() if state == reader.UNREADABLE]
    if len(unreadable) > self._max_unreadable * len(self):
      names = ", ".join(map(self.name_of, unreadable[:3]))
      raise Mistake(
        f"{len(unreadable)} of {len(self):,} images in {self._records.folder} cannot be read"
        f" ({names} ...); allowed: a share of {self._max_unreadable:g}, config.data.max_unreadable."
        " Prepare the data set again"
      )

  def name_of(self, record: int) -> str:
    """What to call record number `record` of the split."""
    example = reader.source_of(self._records.folder, self._records.split)[record]
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

    return meshes.place(meshes.sharded(self._mesh, axis), shape, part)


def _joined(parts: list[dict[str, np.ndarray]], name: str, steps: int) -> np.ndarray:
  """A column of all chunks, (steps, rows, ...)."""
  column = np.concatenate([part[name] for part in parts])
  return column.reshape(steps, -1, *column.shape[1:])
