"""Photographs decoded by worker processes while the devices compute.

Grain runs the workers. Chunks are numbered by their place in the run: chunk c of a process
holds rows c R .. (c + 1) R - 1 of all the rows that the process feeds to its devices, step
after step. So order, crops and labels are a function of (seed, step) for any number of
workers, hosts and devices, and a resumed run starts at its chunk with no state to restore.
"""

import ast
import atexit
import contextlib
import errno
import gc
import inspect
import math
import os
import re
import shutil
import signal
import sys
import tokenize
from collections.abc import Iterator
from typing import Any

import cv2
import grain
import jax
import numpy as np
from absl import flags, logging
from grain.multiprocessing import SharedMemoryArray
from jax.sharding import Mesh

from convex_jax import mesh as meshes
from convex_jax.data.photos import worker
from convex_jax.data.photos.decode import UNREADABLE
from convex_jax.data.photos.records import Records, source_of
from convex_jax.data.sampling import positions
from convex_jax.errors import UserError

ENDLESS = 2**40  # Chunks.
CHUNK = 32  # Largest number of rows that a worker prepares at a time, in shared memory.
AHEAD = 4  # Chunks in a worker's queue, where there is room for them.
SHARED = "/dev/shm"  # Linux's shared memory; a container's has 64 MiB unless told otherwise.
UNGUARDED = (
  'each decoding worker imports the script; put what trains below `if __name__ == "__main__":`, so that'
  " it does not train as well."
)
NAMED = 20  # Damaged photographs that are reported by name.
FEW = 4  # Threads keep so many cores busy: Python takes a tenth of the time, codecs the rest.


def cores() -> int:
  """The number of cores that this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def default_workers() -> int:
  """One process per core, or 0 (threads) on few cores, where passing images on costs more."""
  return cores() if cores() > FEW else 0


class Chunks:
  """Iterates over chunks first .. stop - 1 of `rows` in order, prepared ahead by workers.

  To be closed. Raises `UserError` where processes cannot work: a script that is not guarded,
  too little shared memory, a worker that died.
  """

  def __init__(
    self, rows: worker.Training | worker.Evaluation, first: int, stop: int, workers: int
  ):
    if not flags.FLAGS.is_parsed():  # Grain reads flags; notebooks and tests parse none.
      flags.FLAGS.mark_as_parsed()
    source, self._shared = grain.MapDataset.range(first, stop).map(rows), workers > 0
    if not workers:  # Threads suffice: the codecs release the interpreter lock.
      cv2.setNumThreads(0)  # These threads use all cores already.
      threads = cores()
      options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=AHEAD * threads)
      self._made: Any = iter(source.to_iter_dataset(options))
      return
    refuse_unguarded()
    atexit.register(_free_shared_memory)  # Of threads that a `close` did not wait for.
    ahead = _ahead(rows.chunk * math.prod(rows.records.image_shape), workers)
    own = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    several = grain.MultiprocessingOptions(workers, per_worker_buffer_size=ahead)
    with _explained():
      self._made = iter(source.to_iter_dataset(own).mp_prefetch(several, worker.start))

  def __next__(self) -> dict[str, np.ndarray]:
    with _explained():
      chunk = next(self._made)
    if self._shared:  # Copied, so that shared memory is freed here and now.
      chunk = {name: np.array(column) for name, column in chunk.items()}
    return chunk

  def close(self) -> None:
    """Ends the workers, and frees the shared memory."""
    made, self._made = self._made, iter(())
    made.close()
    del made
    if self._shared:
      _free_shared_memory()


def _free_shared_memory() -> None:
  """Waits for the thread of Grain that frees what is no longer used.

  Python warns of what is left when the process ends.
  """
  gc.collect()  # Iterators hold their last chunks.
  if (freeing := getattr(SharedMemoryArray, "_del_thread_pool", None)) is not None:
    freeing.apply(int)  # After all that it has to do.


def _ahead(size: int, workers: int) -> int:
  """How many chunks of `size` bytes of images each worker may be ahead: what /dev/shm has room for.

  Grain keeps twice as many for each worker, in a queue and behind it, and two in the making.
  """
  try:
    found = os.statvfs(SHARED)
  except OSError:  # Another system.
    return AHEAD
  page = 4096
  size = -(-size // page) * page + 3 * page  # Labels, records and states have a page each.
  free = found.f_bavail * found.f_frsize if found.f_blocks else math.inf  # 0: no limit.
  ahead = min(AHEAD, free // size // workers // 2 - 1)
  if ahead < 1:
    raise UserError(_short_of_memory(f"{workers} need {4 * size * workers / 1e6:.1f} MB", free))
  return int(ahead)


def _short_of_memory(need: str, free: float) -> str:
  return (
    f"Decoding workers pass images on through shared memory: {need} of it, and {SHARED} has"
    f" {free / 1e6:.1f} MB free. Give it more (docker run --shm-size=2g), or use fewer workers"
    " (config.data.workers; data cache: --workers), or 0, which decodes in threads"
  )


@contextlib.contextmanager
def _explained() -> Iterator[None]:
  """Raises `UserError` for what Grain and multiprocessing raise where a process cannot work."""
  try:
    yield
  except (RuntimeError, OSError) as error:
    if "bootstrapping" in str(error):  # This is a worker already, which imports the script.
      raise UserError(UNGUARDED) from error
    code = re.search(r"exit code (-?\d+)", str(error))
    died, full = int(code[1]) if code else 0, getattr(error, "errno", 0) == errno.ENOSPC
    if full or died == -signal.SIGBUS:
      free = shutil.disk_usage(SHARED).free if os.path.exists(SHARED) else 0
      raise UserError(_short_of_memory("there was not enough", free)) from error
    fix = "If it ran out of memory, lower config.data.workers."
    if died > 0:  # By an error of Python's, which it printed.
      fix = f"Its error is above. {UNGUARDED}"
    raise UserError(
      f"A decoding worker died: {error}\n  {fix} Rerun to resume from the newest checkpoint."
    ) from error


def refuse_unguarded() -> None:
  """Raises `UserError` where each worker would run the script anew: it imports `__main__`.

  That is where a line of the script itself, outside any `if __name__ == "__main__":`, is what
  leads here.
  """
  main = sys.modules["__main__"]
  path, frame = getattr(main, "__file__", None), inspect.currentframe()
  while frame is not None and not (
    frame.f_globals is vars(main) and frame.f_code.co_name == "<module>"
  ):
    frame = frame.f_back
  name = getattr(getattr(main, "__spec__", None), "name", "")
  if path is None or frame is None or not os.path.isfile(path) or name.endswith("__main__"):
    return  # A notebook, say, or `python -m package`: workers import nothing of it.
  with contextlib.suppress(OSError, SyntaxError), tokenize.open(path) as file:
    for node in ast.walk(ast.parse(file.read())):
      if (
        isinstance(node, ast.If)
        and node.lineno <= frame.f_lineno <= (node.end_lineno or 0)
        and re.search("__name__|_process", ast.unparse(node.test))
      ):
        return
    raise UserError(f"{path}, line {frame.f_lineno}: {UNGUARDED} Or set config.data.workers=0")


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
