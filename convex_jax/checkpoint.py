"""Checkpoints: the only module that touches Orbax.

A step is a folder `STEP/` with the items `weights` ({"params", "stats"}), `ema` (the same,
where weights are averaged) and `training` (step and optimizer state). Orbax writes into a
temporary folder and renames it, so a step that can be seen is whole.
"""

import os
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from convex_jax.errors import Mistake
from convex_jax.step import State

_policies = ocp.training.preservation_policies


def _items(state: State) -> dict[str, Any]:
  items = {
    "weights": {"params": state.params, "stats": state.stats},
    "training": {"step": state.step, "opt_state": state.opt_state},
  }
  return items if state.ema is None else {**items, "ema": state.ema}


def _accuracy(metrics: Any) -> float:
  return metrics["accuracy"]


class Checkpoints:
  """The checkpoints of a run: the latest `keep` and the best are kept."""

  def __init__(self, folder: str, keep: int):
    best = _policies.BestN(get_metric_fn=_accuracy, n=1, keep_checkpoints_without_metrics=False)
    policy = _policies.AnyPreservationPolicy([_policies.LatestN(keep), best])
    self._checkpointer = ocp.training.Checkpointer(
      os.path.abspath(folder),
      preservation_policy=policy,  # pyright: ignore[reportArgumentType]
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
    if step != self.latest_step():
      self._checkpointer.save_checkpointables_async(
        step,
        _items(state),
        force=True,
        metrics=None if accuracy is None else {"accuracy": accuracy},
      )

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
      ema=items.get("ema"),
    )

  def close(self) -> None:
    """Waits until everything is written."""
    self._checkpointer.close()


def saved_steps(folder: str) -> dict[int, float | None]:
  """The whole checkpoints in a folder: step to accuracy, None where not evaluated."""
  if not os.path.isdir(folder):
    return {}
  with ocp.training.Checkpointer(os.path.abspath(folder)) as checkpointer:
    found = {c.step: c.metrics and _accuracy(c.metrics) for c in checkpointer.checkpoints}
  return dict(sorted(found.items()))


def read_weights(folder: str, step: int | str, which: str) -> tuple[int, dict[str, Any]]:
  """(step, {"params", "stats"}) as numpy arrays, on any machine, without the run's code.

  `step` is a number, "latest" or "best"; `which` is "ema", "raw", or "auto": averages
  where there are any. Raises `Mistake` when there is no such checkpoint.
  """
  found = saved_steps(folder)
  chosen = step
  if step == "latest" and found:
    chosen = max(found)
  if step == "best" and found:
    chosen = max(found, key=lambda s: (found[s] if found[s] is not None else -1.0, s))
  if chosen not in found:
    names = ", ".join(map(str, found)) or "none"
    raise Mistake(f"no checkpoint {step!r} in {folder}; there: {names}, 'latest', 'best'")
  path = os.path.join(os.path.abspath(folder), str(chosen))
  has_ema = os.path.isdir(os.path.join(path, "ema"))
  if which == "ema" and not has_ema:
    raise Mistake(f"checkpoint {chosen} in {folder} has no averaged weights; allowed: raw, auto")
  item = "ema" if has_ema and which != "raw" else "weights"
  shapes = ocp.metadata(path, checkpointable_name=item).metadata
  target = jax.tree.map(lambda m: np.empty(m.shape, m.dtype), shapes)
  weights = ocp.load(path, target, checkpointable_name=item)
  return int(chosen), {"params": weights["params"], "stats": weights.get("stats") or {}}
