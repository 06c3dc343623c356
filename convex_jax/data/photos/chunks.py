"""Chunks of photographs, decoded ahead by the threads of this process or by others.

Grain runs the processes. What can keep them from working is told in a sentence: a script that
each of them would run anew, a container's small shared memory, a worker that died.
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
import numpy as np
from absl import flags

from convex_jax.data.photos import worker
from convex_jax.errors import UserError

AHEAD = 4  # Chunks in a worker's queue, where there is room for them.
SHARED = "/dev/shm"  # Linux's shared memory; a container's has 64 MiB unless told otherwise.
UNGUARDED = (
  'each decoding worker imports the script; put what trains below `if __name__ == "__main__":`, so'
  " that it does not train as well."
)
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
    import grain  # Here, as most runs read no photographs.

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
  from grain.multiprocessing import SharedMemoryArray

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
