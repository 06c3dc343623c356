"""Checkpoints: the only module that touches Orbax.

A step is a folder `STEP/` with the items `weights` ({"params", "stats"}), `ema` (the same,
where weights are averaged) and `training` (step, optimizer state, the losses' running moments).
Orbax writes into a temporary folder and renames it; then, last, comes the manifest, by which a
restored checkpoint is verified.
"""

import contextlib
import glob
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from convex_jax.runs import manifest
from convex_jax.errors import UserError, Unsaved
from convex_jax.training.step import State

_policies = ocp.training.preservation_policies


def quieten_orbax() -> None:
  """A save that fails is told once, by us: not with a trace of each of Orbax's threads."""
  logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
  show = sys.unraisablehook

  def unraisablehook(unraisable):
    if str(unraisable.exc_value) != "Event loop is closed":  # Writes beside the one that failed.
      show(unraisable)

  sys.unraisablehook = unraisablehook


def _items(state: State) -> dict[str, Any]:
  items = {
    "weights": {"params": state.params, "stats": state.stats},
    "training": {"step": state.step, "opt_state": state.opt_state, "losses": state.losses},
  }
  return items if state.ema is None else {**items, "ema": state.ema}


def _accuracy(metrics: Any) -> float:
  return metrics["accuracy"]


class Checkpoints:
  """The checkpoints of a run: the latest `keep` and the best are kept.

  What cannot be written is told by `tell`, once; then `check` raises, unless `go_on`, which is
  of one process alone. A save that takes more than `patience` seconds is told as well, and
  nothing waits for it any longer.
  """

  def __init__(
    self,
    folder: str,
    keep: int,
    *,
    tell: Callable[[str], None] = print,
    go_on: bool = False,
    patience: float = 600.0,
  ):
    best = _policies.BestN(get_metric_fn=_accuracy, n=1, keep_checkpoints_without_metrics=False)
    self._policy = _policies.AnyPreservationPolicy([_policies.LatestN(keep), best])
    self._folder = os.path.abspath(folder)
    self._checkpointer = self._open()
    go_on &= jax.process_count() == 1  # Others would wait for the one that failed.
    self._tell, self._go_on, self._patience = tell, go_on, patience
    self._saved: int | None = self.latest_step()
    self._failure: str | None = None
    self._writing: threading.Thread | None = None
    self._settled = threading.Event()  # The last save is done, has failed, or is late.
    self._late = self._abandoned = False

  def _open(self) -> ocp.training.Checkpointer:
    return ocp.training.Checkpointer(
      self._folder,
      preservation_policy=self._policy,  # pyright: ignore[reportArgumentType]
      cleanup_tmp_directories=True,
    )

  def latest_step(self) -> int | None:
    """The newest whole checkpoint's step."""
    latest = self._checkpointer.latest
    return None if latest is None else latest.step

  def save(self, state: State, accuracy: float | None) -> None:
    """Starts to write a checkpoint, unless this step has one; training goes on meanwhile.

    `accuracy`, where the step was evaluated, decides which checkpoint is the best.
    """
    step = int(state.step)
    if step == self._saved:
      return
    on_time = self.wait()
    self.check()
    if not on_time:
      self._fail(step, "an older one is still being written")
      return
    if self._failure is not None:  # Of which Orbax would tell again, each time.
      with contextlib.suppress(Exception):
        self._checkpointer.close()
      self._checkpointer = self._open()
    self._saved, self._failure = step, None
    self._settled.clear()
    try:
      response = self._checkpointer.save_checkpointables_async(
        step,
        _items(state),
        force=True,
        metrics=None if accuracy is None else {"accuracy": accuracy},
      )
    except Exception as error:
      self._clear(step)
      self._fail(step, str(error))
      return
    self._writing = threading.Thread(
      target=self._finish, args=(step, accuracy, response), daemon=True
    )
    self._writing.start()

  def _finish(self, step: int, accuracy: float | None, response: Any) -> None:
    """Waits for Orbax, then seals: in a thread of its own."""
    try:
      try:
        response.result(self._patience)
      except TimeoutError:
        self._is_late(step)
        failure = self._failure
        response.result()
        if self._failure is failure:  # Not a later checkpoint's.
          self._failure = None
        self._tell(f"the checkpoint of step {step} is written at last")
      if jax.process_index() == 0:
        manifest.seal(os.path.join(self._folder, str(step)), step, accuracy)
    except Exception as error:  # Orbax raises what the storage makes it meet.
      self._clear(step)
      self._fail(step, str(error))
    finally:
      self._late = False
      self._settled.set()

  def _is_late(self, step: int) -> None:
    self._late = True
    self._fail(step, f"it is not written after {self._patience:g} s")

  def _fail(self, step: int, reason: str) -> None:
    self._failure = (
      f"the checkpoint of step {step} could not be written: {(reason.splitlines() or ['?'])[0]}\n"
      f"  the older ones in {self._folder} are as they were"
    )
    if self._go_on:
      self._tell(self._failure)
    self._settled.set()

  def _clear(self, step: int) -> None:
    """Removes what there is of a failed checkpoint, so that the disk is as full as before."""
    if jax.process_index():
      return
    whole = os.path.join(self._folder, str(step))
    if not manifest.is_sealed(whole):
      shutil.rmtree(whole, ignore_errors=True)
    pattern = os.path.join(glob.escape(self._folder), f"{step}.*tmp*")
    for _ in range(40):  # Orbax's other threads may still write beside the one that failed.
      for path in glob.glob(pattern):
        shutil.rmtree(path, ignore_errors=True)
      time.sleep(0.05)
      if not glob.glob(pattern):
        break

  def check(self) -> None:
    """Raises `Unsaved` where a save failed, unless the run is to go on."""
    if self._failure is not None and not self._go_on:
      raise Unsaved(self._failure)

  def wait(self) -> bool:
    """Waits for the last save; False where it is late and still being written."""
    if self._writing is not None:
      if not self._settled.wait(self._patience + 1):  # The manifest is what hangs.
        self._is_late(self._saved or 0)
      if not self._late:
        self._writing.join()
    return not self._late

  def restore(self, like: State) -> State:
    """The newest checkpoint, as a state of the shapes and the layout of `like`."""
    abstract = jax.tree.map(
      lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), _items(like)
    )
    items = self._checkpointer.load_checkpointables(self.latest_step(), abstract)
    return State(
      step=items["training"]["step"],
      params=items["weights"]["params"],
      stats=items["weights"]["stats"],
      opt_state=items["training"]["opt_state"],
      losses=items["training"]["losses"],
      ema=items.get("ema"),
    )

  def abandon(self) -> None:
    """Makes `close` wait for nothing: others, with whom it would be written, are gone."""
    self._abandoned = True

  def close(self) -> None:
    """Waits until everything is written; raises `Unsaved` where the last save failed."""
    if self._abandoned:
      return
    on_time = self.wait()
    if self._failure is not None:  # Orbax, closed, would tell of it again, or wait.
      if on_time:
        self._clear(self._saved or 0)
      raise Unsaved(self._failure)
    if on_time:
      self._checkpointer.close()


def read_weights(folder: str, step: int | str, which: str) -> tuple[int, dict[str, Any]]:
  """(step, {"params", "stats"}) as numpy arrays, on any machine, without the run's code.

  `step` is a number, "latest" or "best"; `which` is "ema", "raw", or "auto": averages
  where there are any. Raises `UserError` when there is no such checkpoint, or it is damaged.
  """
  found = manifest.saved_steps(folder)
  chosen = step
  if step == "latest" and found:
    chosen = max(found)
  if step == "best" and found:
    chosen = max(found, key=lambda s: (found[s] if found[s] is not None else -1.0, s))
  if chosen not in found:
    names = ", ".join(map(str, found)) or "none"
    raise UserError(f"no checkpoint {step!r} in {folder}; there: {names}, 'latest', 'best'")
  path = os.path.join(os.path.abspath(folder), str(chosen))
  if reason := manifest.fault(path, int(chosen)):
    sound = [s for s, fault in manifest.faults(folder).items() if fault is None]
    raise UserError(f"checkpoint {chosen} in {folder}: {reason}; sound ones: {sound or 'none'}")
  has_ema = os.path.isdir(os.path.join(path, "ema"))
  if which == "ema" and not has_ema:
    raise UserError(f"checkpoint {chosen} in {folder} has no averaged weights; allowed: raw, auto")
  item = "ema" if has_ema and which != "raw" else "weights"
  shapes = ocp.metadata(path, checkpointable_name=item).metadata
  target = jax.tree.map(lambda m: np.empty(m.shape, m.dtype), shapes)
  weights = ocp.load(path, target, checkpointable_name=item)
  return int(chosen), {"params": weights["params"], "stats": weights.get("stats") or {}}
