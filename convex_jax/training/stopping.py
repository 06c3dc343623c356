"""What ends a run early: a signal, the clock, or skipped updates."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from convex_jax import signals
from convex_jax.errors import Diverged
from convex_jax.signals import STOP_SIGNALS


class Stopping:
  """While active, `STOP_SIGNALS` and the end of `limit` seconds (0: no limit) request a stop.

  While it is `held`, no signal ends the program, nor what it is writing; before and after, when
  there is nothing to save, a signal raises `Stopped`. Any of several processes may receive it:
  JAX's preemption service lets all of them see it at the same step.
  """

  def __init__(self, limit: float = 0.0):
    self._asked = threading.Event()
    self._alone, self._is_held = jax.process_count() == 1, False
    self._clock = threading.Timer(min(limit, threading.TIMEOUT_MAX), self._ask) if limit else None
    # Of several processes, JAX's preemption service listens to SIGTERM.
    mine = [n for n in STOP_SIGNALS if self._alone or n != signal.SIGTERM]
    self._signals = signals.sent_to(self._receive, mine)

  def should_stop(self, step: int) -> bool:
    """Whether to stop after `step`, the same answer in every process."""
    if self._alone:
      return self._asked.is_set()
    return multihost_utils.reached_preemption_sync_point(step)

  def _receive(self, number: int) -> None:
    self._ask()
    if self._alone and not self._is_held:
      signals.stop(number)

  def _ask(self) -> None:
    self._asked.set()
    if not self._alone:
      os.kill(os.getpid(), signal.SIGTERM)  # To the preemption service.

  @contextlib.contextmanager
  def held(self) -> Iterator[None]:
    """While active, a signal only makes `should_stop` true."""
    self._is_held = True
    try:
      yield
    finally:
      self._is_held = False

  def __enter__(self) -> "Stopping":
    self._signals.__enter__()
    if self._clock is not None:
      self._clock.daemon = True
      self._clock.start()
    return self

  def __exit__(self, *_: object) -> None:
    if self._clock is not None:
      self._clock.cancel()
    self._signals.__exit__(None, None, None)


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
          f" gradient norm {norm}). Whatever was saved is finite; updates after it are lost. Try a smaller"
          " config.optimizer.learning_rate, or config.optimizer.clip_norm=1."
        )
    return found
