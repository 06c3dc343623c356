"""Checkpoints: the only module that touches Orbax.

A checkpoint is a folder `STEP/` of items, trees of arrays: `weights` ({"params", "stats"}),
`ema` (the same, where weights are averaged) and `training` (all else that a run needs to
resume). Orbax writes into a temporary folder and renames it; then, last, comes the manifest,
by which a checkpoint is verified before it is used.
"""

import contextlib
import errno
import glob
import logging
import operator
import os
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from convex_jax import buckets, files
from convex_jax import mesh as meshes
from convex_jax.errors import Lost, Unsaved, UserError
from convex_jax.runs import manifest

_policies = ocp.training.preservation_policies


def quieten_orbax() -> None:
  """Makes a failed save be reported once, without a traceback of each Orbax thread."""
  logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
  logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
  show = sys.unraisablehook

  def unraisablehook(unraisable):
    if str(unraisable.exc_value) != "Event loop is closed":  # Concurrent writes.
      show(unraisable)

  sys.unraisablehook = unraisablehook


class _Save:
  """A checkpoint that is being written, by `write`, in a thread of its own.

  After `patience` seconds it is late: nothing waits for it any longer, though it may still be
  completed.
  """

  def __init__(self, step: int, write: Callable[[], None], patience: float):
    self.step, self._write, self._patience = step, write, patience
    self.error: Exception | None = None
    self._deadline = time.monotonic() + patience
    self._thread = threading.Thread(target=self._run, daemon=True)
    self._thread.start()

  def _run(self) -> None:
    try:
      self._write()
    except Exception as error:  # Whatever the storage backend raises.
      self.error = error

  def wait(self) -> bool:
    """Waits until it is written or has failed; False where it is late instead."""
    left = self._deadline - time.monotonic()  # Infinite, where patience is.
    self._thread.join(min(max(0.0, left), threading.TIMEOUT_MAX))
    return not self._thread.is_alive()

  def failure(self) -> str | None:
    """Why the checkpoint is missing, if that is known yet."""
    if self._thread.is_alive():
      late = time.monotonic() > self._deadline
      return f"not finished after {self._patience:g} s" if late else None
    return _words(self.error) if self.error is not None else None


class Checkpoints:
  """The checkpoints of a run: the latest `keep` and the best are kept.

  A checkpoint that cannot be written, or not within `patience` seconds, makes `check` raise
  `Unsaved`; with `go_on`, in a run of one process, it is only reported, by `report`. The first
  process calls `before_seal` once the files of a checkpoint are written; where it raises, they are
  no checkpoint.
  """

  def __init__(
    self,
    folder: str,
    keep: int,
    *,
    report: Callable[[str], None] = print,
    go_on: bool = False,
    patience: float = 600.0,
    before_seal: Callable[[], None] = lambda: None,
  ):
    best = _policies.BestN(
      get_metric_fn=operator.itemgetter("accuracy"), n=1, keep_checkpoints_without_metrics=False
    )
    self._policy = _policies.AnyPreservationPolicy([_policies.LatestN(keep), best])
    self._folder = files.absolute(folder)
    self._checkpointer = self._open()
    self._go_on = go_on and jax.process_count() == 1  # Others would wait for the one that failed.
    self._report, self._patience, self._before_seal = report, patience, before_seal
    self._newest = self.latest_step()  # The last step saved or attempted.
    self._save: _Save | None = None
    self._failure: str | None = None  # Why the newest is missing.
    self._abandoned = False

  def _open(self) -> ocp.training.Checkpointer:
    with _reached(self._folder):
      return ocp.training.Checkpointer(
        self._folder,
        preservation_policy=self._policy,  # pyright: ignore[reportArgumentType]
        cleanup_tmp_directories=True,
      )

  def latest_step(self) -> int | None:
    """The step of the newest complete checkpoint."""
    latest = self._checkpointer.latest
    return None if latest is None else latest.step

  def save(self, step: int, items: dict[str, Any], accuracy: float | None) -> None:
    """Starts to write a checkpoint, unless this step has one; training continues meanwhile.

    `accuracy`, where the step was evaluated, decides which checkpoint is the best.
    """
    if step == self._newest:
      return
    on_time = self.wait()
    self.check()
    self._newest = step
    if not on_time:
      self._fail(step, "an older one is still being written")
      return
    if self._failure is not None:  # Orbax would raise that failure again, at each save.
      with contextlib.suppress(Exception):
        self._checkpointer.close()
      try:
        self._checkpointer, self._failure = self._open(), None
      except OSError as error:  # A bucket that is still out of reach.
        self._fail(step, _words(error))
        return
    try:
      response: Any = self._checkpointer.save_checkpointables_async(
        step, items, force=True, metrics=None if accuracy is None else {"accuracy": accuracy}
      )
    except Exception as error:
      self._clear(step)
      self._raise_if_lost(error)
      self._fail(step, _words(error))
      return

    def write():
      try:
        response.result()
        if jax.process_index() == 0:
          self._before_seal()
          manifest.seal(os.path.join(self._folder, str(step)), step, accuracy)
      except Exception:
        self._clear(step)
        raise

    self._save = _Save(step, write, self._patience)

  def _fail(self, step: int, reason: str) -> None:
    self._failure = (
      f"The checkpoint of step {step} could not be written: {reason}\n"
      f"  The older ones in {self._folder} are unchanged. Run the same command once it can be written."
    )
    if self._go_on:
      self._report(self._failure)

  def _clear(self, step: int) -> None:
    """Removes what there is of a failed checkpoint, so that the disk is as full as before.

    In a bucket it is left to the next start: another run may have taken this one's place there.
    """
    if jax.process_index() or buckets.holds(self._folder):
      return
    whole = os.path.join(self._folder, str(step))
    if not manifest.is_sealed(whole):
      shutil.rmtree(whole, ignore_errors=True)
    pattern = os.path.join(glob.escape(self._folder), f"{step}.*tmp*")
    for _ in range(40):  # Other threads of Orbax may still be writing.
      for path in glob.glob(pattern):
        shutil.rmtree(path, ignore_errors=True)
      time.sleep(0.05)
      if not glob.glob(pattern):
        break

  def _raise_if_lost(self, error: Exception | None) -> None:
    """Raises `Lost` where a save failed because another process, which takes part, is gone."""
    if error is not None and jax.process_count() > 1 and meshes.is_collective_error(error):
      self.abandon()
      raise Lost(_words(error)) from error

  def check(self) -> None:
    """Raises `Unsaved` where a save failed or is late; with `go_on` reports it, once.

    Raises `Lost` where it failed because another process is gone.
    """
    if self._save is not None and self._save.step == self._newest:
      self._raise_if_lost(self._save.error)
      reason = self._save.failure()
      if reason is not None and self._failure is None:
        self._fail(self._save.step, reason)
      elif reason is None and self._failure is not None:
        self._failure = None
        self._report(f"The checkpoint of step {self._save.step} was written after the timeout.")
    if self._failure is not None and not self._go_on:
      raise Unsaved(self._failure)

  def wait(self) -> bool:
    """Waits for the last save; False where it is late and still being written."""
    return self._save is None or self._save.wait()

  def restore(self, like: dict[str, Any]) -> dict[str, Any]:
    """The items of the newest checkpoint, in the shapes and the layout of `like`."""
    abstract = jax.tree.map(
      lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), like
    )
    with _reached(self._folder):
      return self._checkpointer.load_checkpointables(self.latest_step(), abstract)

  def abandon(self) -> None:
    """Makes `close` wait for nothing: other processes, which would take part, are gone."""
    self._abandoned = True

  def close(self) -> None:
    """Waits until everything is written; raises `Unsaved` where the last save failed."""
    if self._abandoned:
      return
    on_time = self.wait()
    with contextlib.suppress(Unsaved):
      self.check()
    if self._failure is not None:  # Closing Orbax would raise it again, or hang.
      if on_time:
        self._clear(self._newest or 0)
      raise Unsaved(self._failure)
    if on_time:
      self._checkpointer.close()


@contextlib.contextmanager
def _reached(folder: str) -> Iterator[None]:
  """While active, whatever the clients of a bucket raise is an OSError, which says so."""
  try:
    yield
  except Exception as error:
    if not buckets.holds(folder) or meshes.is_collective_error(error):
      raise
    raise OSError(errno.EIO, f"the bucket cannot be read: {_words(error)}", folder) from error


def _words(error: BaseException) -> str:
  """The first line of an error; of a mount that renames no folders, also what to do."""
  line, cause = (str(error).splitlines() or [repr(error)])[0], error
  while cause is not None:
    # No other system refuses a rename, which has a second name, by "Too many open files".
    if isinstance(cause, OSError) and cause.errno == errno.EMFILE and cause.filename2 is not None:
      return (
        f"{line}\n  The folder is a bucket mounted by gcsfuse, which renames no folders unless told"
        " to. Pass its address,\n  --workdir=gs://BUCKET/FOLDER, or mount it with"
        " --rename-dir-limit=200000."
      )
    cause = cause.__cause__ or cause.__context__
  return line


def read_weights(folder: str, step: int | str, which: str) -> tuple[int, dict[str, Any]]:
  """(step, {"params", "stats"}) as numpy arrays, on any machine.

  `step` is a number, "latest" or "best"; `which` is "ema", "raw", or "auto": averaged weights
  if the run averaged them. Warns of files that are not the checkpoint's, which are left alone.
  Raises `UserError` when there is no such checkpoint, or it is damaged; OSError where it is in a
  bucket that cannot be reached.
  """
  found = manifest.saved_steps(folder)
  chosen = step
  if not found:
    raise UserError(
      f"There is no checkpoint in {folder}; expected a run that has saved one. Run the command that"
      " trained it again"
    )
  if step == "latest":
    chosen = max(found)
  if step == "best":
    chosen = max(found, key=lambda s: (found[s] if found[s] is not None else -1.0, s))
  if chosen not in found:
    names = ", ".join(map(str, found))
    raise UserError(
      f"There is no checkpoint {step!r} in {folder}; expected one of {names}, 'latest', 'best'"
    )
  path = os.path.join(files.absolute(folder), str(chosen))
  if reason := manifest.fault(path, int(chosen)):
    intact = [s for s, fault in manifest.faults(folder).items() if fault is None]
    raise UserError(f"checkpoint {chosen} in {folder}: {reason}; intact ones: {intact or 'none'}")
  if words := manifest.left_alone(folder, [int(chosen)]):
    warnings.warn(words, stacklevel=3)  # Once, where `load` is called.
  has_ema = has_averages(folder, int(chosen))
  if which == "ema" and not has_ema:
    raise UserError(
      f"checkpoint {chosen} in {folder} has no averaged weights; expected raw or auto"
    )
  item = "ema" if has_ema and which != "raw" else "weights"
  with _reached(folder):
    shapes = ocp.metadata(path, checkpointable_name=item).metadata
    target = jax.tree.map(lambda m: np.empty(m.shape, m.dtype), shapes)
    weights = ocp.load(path, target, checkpointable_name=item)
  return int(chosen), {"params": weights["params"], "stats": weights.get("stats") or {}}


def read_training(folder: str, step: int, like: dict[str, Any]) -> dict[str, Any]:
  """The item `training` of a checkpoint as numpy arrays, in the structure and shapes of `like`.

  Raises `UserError` where it has another structure: it is another optimizer's; OSError where it
  is in a bucket that cannot be reached.
  """
  path = os.path.join(files.absolute(folder), str(step))
  target = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), like)
  try:
    return ocp.load(path, target, checkpointable_name="training")
  except Exception as error:  # Orbax raises whatever is at hand.
    files.listing(path)  # Raises OSError where that is because a bucket cannot be reached.
    reason = (str(error).splitlines() or [repr(error)])[0][:200]
    raise UserError(f"the optimizer state of {path} is another optimizer's: {reason}") from error


def has_averages(folder: str, step: int) -> bool:
  """Whether a checkpoint holds averaged weights."""
  return any(name.startswith("ema/") for name in manifest.listed(os.path.join(folder, str(step))))
