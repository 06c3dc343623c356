"""Photographs decoded by worker processes while the devices compute.

Chunks are numbered by their place in the run: chunk c of a process
holds rows c R .. (c + 1) R - 1 of all the rows that the process feeds to its devices, step
after step. So order, crops and labels are a function of (seed, step) for any number of
workers, hosts and devices, and a resumed run starts at its chunk with no state to restore.
"""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from convex_jax import mesh as meshes
from convex_jax.data.photos import worker
from convex_jax.data.photos.chunks import Chunks, refuse_unguarded
from convex_jax.data.photos.decode import UNREADABLE
from convex_jax.data.photos.records import Records, source_of
from convex_jax.data.sampling import positions
from convex_jax.errors import UserError

ENDLESS = 2**40  # Chunks.
CHUNK = 32  # Largest number of rows that a worker prepares at a time, in shared memory.
NAMED = 20  # Damaged photographs that are reported by name.


class Stream:
  """`Batches` of encoded photographs, decoded in other processes.

  Raises `UserError` when more than a fraction `max_unreadable` of the split cannot be read.
  """

  arrays: dict[str, jax.Array] | None = None  # Nothing is resident on the devices.

  def __init__(
    self, records: Records, mesh: Mesh, workers: int, max_unreadable: float, repeats: int = 1
  ):
    self._records, self._mesh, self._workers = records, mesh, workers
    self._max_unreadable, self._repeats = max_unreadable, repeats
    if workers:
      refuse_unguarded()  # Before anything is compiled.
    self._training: tuple[Any, Chunks] | None = None  # The next (step, batch size, seed), chunks.
    self.damaged: dict[int, int] = {}  # Record number: its state (see `decode`).

  def __len__(self) -> int:
    return len(self._records)

  def train_plan(self, steps: range, batch_size: int, seed: int) -> dict[str, jax.Array]:
    """See `Batches.train_plan`; a plan also has each row's "position" in the run."""
    place = _Places(self._mesh, batch_size)
    expected = (steps.start, batch_size, seed)
    if self._training is None or self._training[0] != expected:
      self.close()
      rows = worker.Training(
        self._records, place.rows, batch_size, seed, place.chunk, self._repeats
      )
      first = steps.start * place.chunks
      self._training = (expected, Chunks(rows, first, ENDLESS, self._workers))
    _, made = self._training
    parts = [next(made) for _ in range(len(steps) * place.chunks)]
    self._training = ((steps.stop, batch_size, seed), made)
    self._inspect(parts, len(place.rows) / batch_size)
    columns = {name: _joined(parts, name, len(steps)) for name in ("image", "label")}
    columns["position"] = positions(steps, batch_size)[:, place.rows].astype(np.uint32)
    return {name: place.on_devices(column) for name, column in columns.items()}

  def eval_plans(self, batch_size: int, limit: int) -> Iterator[dict[str, jax.Array]]:
    """See `Batches.eval_plans`; rows of unreadable photographs are masked too."""
    n = min(limit, len(self)) if limit else len(self)
    place, batches = _Places(self._mesh, batch_size), -(-n // batch_size)
    rows = worker.Evaluation(self._records, place.rows, batch_size, n, place.chunk)
    # Without workers: starting processes each time costs more.
    made = Chunks(rows, 0, batches * place.chunks, workers=0)
    try:
      for start in range(0, n, batch_size):
        parts = [next(made) for _ in range(place.chunks)]
        self._inspect(parts, len(place.rows) / batch_size)
        columns = {name: _joined(parts, name, 1)[0] for name in ("image", "label")}
        readable = np.concatenate([part["state"] for part in parts]) != UNREADABLE
        columns["mask"] = (start + place.rows < n) & readable
        yield {name: place.on_devices(column, axis=0) for name, column in columns.items()}
    finally:
      made.close()

  def _inspect(self, parts: list[dict[str, np.ndarray]], fraction: float) -> None:
    """Counts and reports damaged photographs; raises `UserError` if they are too many.

    This process reads `fraction` of the examples of an epoch.
    """
    for part in parts:
      label, classes = part["label"], self._records.classes
      if classes and not ((label >= 0) & (label < classes)).all():
        raise UserError(
          f"{self._records.folder}: labels run from {label.min()} to {label.max()}; expected 0 to"
          f" {classes - 1}. Prepare the data set again"
        )
      for i in np.flatnonzero(part["state"]):
        record, state = int(part["record"][i]), int(part["state"][i])
        if record in self.damaged:
          continue
        self.damaged[record] = state
        if len(self.damaged) <= NAMED:
          what = "replaced by the next" if state == UNREADABLE else "decoded in part"
          logging.error("%s is damaged: %s", self.name_of(record), what)
    unreadable = [r for r, state in self.damaged.items() if state == UNREADABLE]
    if len(unreadable) > self._max_unreadable * len(self) * fraction:
      names = ", ".join(map(self.name_of, unreadable[:3]))
      raise UserError(
        f"{len(unreadable)} of {len(self):,} images in {self._records.folder} cannot be read"
        f" ({names} ...); expected at most a fraction of {self._max_unreadable:g}"
        " (config.data.max_unreadable). Prepare the data set again"
      )

  def name_of(self, record: int) -> str:
    """The file name of record number `record` of the split, or else its number."""
    try:
      example = source_of(self._records.folder, self._records.split)[record]
    except Exception:  # Its name cannot be read either.
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
  """The rows of a global batch that this process feeds, and their chunks."""

  def __init__(self, mesh: Mesh, batch_size: int):
    self._mesh, self._batch_size = mesh, batch_size
    where = meshes.sharded(mesh, 0).addressable_devices_indices_map((batch_size,))
    rows = {i for (at,) in where.values() for i in range(batch_size)[at]}  # pyright: ignore
    self.rows = np.array(sorted(rows))
    self.chunk = max(c for c in range(1, CHUNK + 1) if len(self.rows) % c == 0)
    self.chunks = len(self.rows) // self.chunk  # Per step.

  def on_devices(self, local: np.ndarray, axis: int = 1) -> jax.Array:
    """The global array of which `local` holds this process's rows, along `axis`."""
    shape = (*local.shape[:axis], self._batch_size, *local.shape[axis + 1 :])
    sharding = meshes.sharded(self._mesh, axis)
    return jax.make_array_from_process_local_data(sharding, local, shape)


def _joined(parts: list[dict[str, np.ndarray]], name: str, steps: int) -> np.ndarray:
  """A column of all chunks, of shape (steps, rows, ...)."""
  column = np.concatenate([part[name] for part in parts])
  return column.reshape(steps, -1, *column.shape[1:])
