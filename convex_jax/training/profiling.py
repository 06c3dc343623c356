"""A trace of some training steps, for XProf and TensorBoard's profiler."""

from collections.abc import Callable

import jax


class Profiler:
  """Traces the calls that hold steps `first` to `last` into a folder; last = 0: none."""

  def __init__(self, folder: str, steps: tuple[int, int], report: Callable[[str], None]):
    self._folder, self._report = folder, report
    self._first, self._last = steps
    self._tracing = False

  def before(self, steps: range) -> None:
    """To be called before each call, with its steps."""
    if not self._tracing and self._last and steps.start <= self._first < steps.stop:
      jax.profiler.start_trace(self._folder)
      self._tracing = True
    elif self._tracing and steps.start > self._last:
      self.close()

  def close(self) -> None:
    """Ends a trace that has begun."""
    if self._tracing:
      jax.profiler.stop_trace()
      self._tracing = False
      self._report(f"Profile saved. View it: xprof --logdir {self._folder}")
