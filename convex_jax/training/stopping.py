"""What ends a run early: a signal, the clock, or skipped updates."""

import os
import signal
import threading
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from convex_jax.errors import Diverged


class Stopping:
  """While active, SIGTERM, SIGINT and the end of `limit` seconds (0: no limit) request a stop.

  No signal ends the program, nor what it is writing. Any of several processes may receive it:
  JAX's preemption service lets all of them see it at the same step.
  """

  def __init__(self, limit: float = 0.0):
    self._asked = threading.Event()
    self._before: dict[int, Any] = {}
    self._alone = jax.process_count() == 1
    self._clock = threading.Timer(min(limit, threading.TIMEOUT_MAX), self._ask) if limit else None

  def should_stop(self, step: int) -> bool:
    """Whether to stop after `step`, the same answer in every process."""
    if self._alone:
      return self._asked.is_set()
    return multihost_utils.reached_preemption_sync_point(step)

  def _ask(self) -> None:
    self._asked.set()
    if not self._alone:
      os.kill(os.getpid(), signal.SIGTERM)  # To the preemption service.

  def __enter__(self) -> "Stopping":
    if self._alone and threading.current_thread() is threading.main_thread():
      for number in (signal.SIGTERM, signal.SIGINT):
        self._before[number] = signal.signal(number, lambda *_: self._asked.set())
    if self._clock is not None:
      self._clock.daemon = True
      self._clock.start()
    return self

  def __exit__(self, *_: object) -> None:
    if self._clock is not None:
      self._clock.cancel()
    for number, handler in self._before.items():
      signal.signal(number, handler)


class SkippedUpdates:
  """Counts skipped updates; raises `Diverged` after `limit` in a row."""

  def __init__(self, limit: int):
    self._limit, self._in_a_row = limit, 0

  def count(self, step: int, metrics: dict[str, np.ndarray]) -> list[str]:
    """Looks at the steps of one call, the last of which is `step`; describes the skipped ones."""
    found = []
    for i, skipped in enumerate(metrics["skipped"]):
      self._in_a_row = self._in_a_row + 1 if skipped else 0
      if not skipped:
        continue
      at = step - len(metrics["skipped"]) + 1 + i
      loss, norm = (f"{metrics[name][i]:.4g}" for name in ("loss", "gradient_norm"))
      found.append(f"Skipped the update of step {at}: loss {loss}, gradient norm {norm}")
      if self._in_a_row == self._limit:
        raise Diverged(
          f"Stopped after {self._limit} consecutive skipped updates (last: step {at}, loss {loss},"
          f" gradient norm {norm}). The newest checkpoint is finite; updates after it are lost. Try a smaller"
          " config.optimizer.learning_rate, or config.optimizer.clip_norm=1."
        )
    return found
