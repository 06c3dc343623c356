"""A trace of some training steps, for XProf and TensorBoard's profiler."""

import os
from collections.abc import Callable

import jax

from convex_jax.runs.workdir import Workdir


class Profiler:
  """Traces the calls that hold steps `first` to `last` into a workdir; last = 0: none."""

  def __init__(self, workdir: Workdir, steps: tuple[int, int], report: Callable[[str], None]):
    self._workdir, self._report = workdir, report
    self._first, self._last = steps
    self._tracing = False

  def before(self, steps: range) -> None:
    """To be called before each call, with its steps."""
    if not self._tracing and self._last and steps.start <= self._first < steps.stop:
      name = os.path.basename(self._workdir.profile)
      jax.profiler.start_trace(os.path.join(self._workdir.spool.folder, name))
      self._tracing = True
    elif self._tracing and steps.start > self._last:
      self.close()

  def close(self) -> None:
    """Ends a trace that has begun."""
    if self._tracing:
      jax.profiler.stop_trace()
      self._tracing = False
      self._report(f"Profile saved. View it: xprof --logdir {self._workdir.profile}")
