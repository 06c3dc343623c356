"""How a run is asked to stop: by a signal, or by the clock."""

import os
import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils


class Stopping:
  """Within, SIGTERM, SIGINT and the end of `limit` seconds (0: none) ask for a stop.

  No signal ends the program, nor what it is writing. Of several processes any may be asked:
  JAX's preemption service lets all of them see it at the same step.
  """

  def __init__(self, limit: float = 0.0):
    self._asked = threading.Event()
    self._before: dict[int, Any] = {}
    self._alone = jax.process_count() == 1
    self._clock = threading.Timer(limit, self._ask) if limit else None

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
