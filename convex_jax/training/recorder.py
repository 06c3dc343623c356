"""What was measured in a run: means over steps, rates, evaluations, as rows."""

import time
from typing import Any

import numpy as np

from convex_jax.errors import Unsaved
from convex_jax.runs.metrics_file import MetricsFile
from convex_jax.runs.workdir import Workdir
from convex_jax.training.console import Console

ADVISE_AT = 50  # Steps, after which the first row shows whether the input is too slow.
LONG_WAIT = 0.2  # Fraction of the time.


class Recorder:
  """Makes rows of what is measured; the first process (`lead`) writes and shows them."""

  def __init__(
    self,
    workdir: Workdir,
    console: Console,
    config: Any,
    *,
    start: int,
    total_steps: int,
    epochs: float,
    lead: bool,
  ):
    self._console, self._config = console, config
    self._total, self._epochs = total_steps, epochs
    self._file = MetricsFile(workdir, start) if lead else None
    self._calls: list[tuple[int, dict[str, np.ndarray]]] = []
    self._logged, self._skipped = start, []
    self._clock, self._waited, self._advised, self._reported = time.monotonic(), 0.0, False, False
    if self._file is not None and self._file.damaged:
      console.print(f"{self._file.path}: {self._file.damaged} damaged lines were left out")
    console.start(start, total_steps, epochs)

  def restart_clock(self) -> None:
    """Leaves what happened since the last row (an evaluation, say) out of images/s."""
    self._clock, self._waited = time.monotonic(), 0.0

  def add_input_wait(self, seconds: float) -> None:
    """Counts time for which the devices had nothing to do but wait for images."""
    self._waited += seconds

  def train(self, step: int, metrics: dict[str, np.ndarray], skipped: list[str]) -> None:
    """Takes the metrics of the steps of one call, the last of which is `step`."""
    self._calls.append((step, metrics))
    self._skipped += skipped
    self._console.advance(step)
    every = self._config.log.every_steps
    if step // every > self._logged // every:
      self.flush()

  def flush(self) -> None:
    """Writes a row for the training steps since the previous one."""
    if not self._calls:
      return
    step, names = self._calls[-1]
    columns = {name: np.concatenate([call[name] for _, call in self._calls]) for name in names}
    skipped = columns.pop("skipped") > 0
    # Means over applied updates, since one NaN would spoil them; none if all were skipped.
    means = {n: float(np.mean(c[~skipped])) for n, c in columns.items() if not skipped.all()}
    if self._skipped:
      more = f" (and {n} more up to step {step})" if (n := len(self._skipped) - 1) else ""
      self._console.print(self._skipped[0] + more)
    images = (step - self._logged) * self._config.batch_size
    seconds = max(time.monotonic() - self._clock, 1e-9)
    wait = min(self._waited / seconds, 1.0)
    rates = {"images_per_second": images / seconds, "input_wait_frac": wait}
    self._calls, self._logged, self._skipped = [], step, []
    self.restart_clock()
    self.evaluated("train", step, means | {"skipped": int(skipped.sum())} | rates)
    if step >= ADVISE_AT and not self._advised:
      self._advised = True
      how = "keep them on the devices (config.data.loader=resident)"
      if self._config.data.loader == "stream":
        how = "use more cores (config.data.workers), or decode once (python -m convex_jax data"
        how += " cache) and train from that (config.data.loader=resident)"
      if wait > LONG_WAIT:
        self._console.print(f"The devices wait for images {100 * wait:.0f} % of the time: {how}")

  def evaluated(self, kind: str, step: int, figures: dict[str, Any]) -> None:
    """Writes a row of this kind ("train", "eval", "final")."""
    row = {"epoch": self._epochs * step / self._total, **figures}
    if self._file is not None:
      about = {"step": step, "kind": kind, "time": round(time.time(), 3)}
      failure = self._file.append(about | row)
      if failure and not self._reported:
        self._console.print(f"{failure}; rows are kept in memory and written with the next one")
      self._reported = failure is not None
    self._console.show(step, row, log=kind != "final")  # After that one comes the report.

  def sync(self) -> None:
    """Returns when the disk has every row."""
    if self._file is not None and not self._reported:
      self._file.sync()

  def close(self) -> None:
    """Ends the live line and the event file; raises `Unsaved` where rows could not be written."""
    self._console.close()
    if self._file is not None and (failure := self._file.close()):
      raise Unsaved(f"{failure}; the last rows are lost")
