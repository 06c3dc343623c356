"""What a run tells: a live line or plain lines, and rows of what was measured."""

import dataclasses
import math
import os
import time
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from convex_jax.errors import Diverged, Unsaved
from convex_jax.runs.metrics_file import Rows

ADVISE_AT = 50  # Steps, after which the first row tells whether the input is too slow.
WAITS_LONG = 0.2  # Share of the time.


@dataclasses.dataclass(frozen=True)
class _Row:
  name: str
  shape: tuple[int, ...]
  dtype: str
  size: int
  constraint: str


def parameter_table(params: Any, constraints: Any) -> str:
  """Each parameter's shape, size and constraint, with the totals."""
  flat = parameter_overview.flatten_dict(params)
  kinds = parameter_overview.flatten_dict(constraints)
  rows = [_Row(n, p.shape, str(p.dtype), math.prod(p.shape), kinds[n]) for n, p in flat.items()]
  total = sum(row.size for row in rows)
  bound = sum(row.size for row in rows if row.constraint != "free")
  table = parameter_overview.make_table(rows)
  return f"{table}\n{total:,} parameters, {bound:,} of them constrained"


class Watch:
  """The watcher of one run; only process 0's (`active`) speaks and writes."""

  def __init__(
    self, workdir: str, start: int, total: int, epochs: float, config: Any, active: bool
  ):
    self._active, self._total, self._epochs, self._config = active, total, epochs, config
    # In a notebook, too, plain lines: its own kind has a blank one after each.
    self._console = Console(highlight=False, soft_wrap=True, force_jupyter=False)
    self._last: dict[str, Any] = {}
    self._train: list[tuple[int, dict[str, np.ndarray]]] = []
    self._logged = start
    self._clock, self._waited, self._advised = time.monotonic(), 0.0, False
    self._workdir, self._tracing = workdir, False
    self._skipped: list[str] = []
    self._skipped_in_a_row, self._told = 0, False
    if not active:
      return
    self._rows = Rows(workdir, start)
    if self._rows.torn:
      self.say(f"{self._rows.torn} lines of {self._rows.path} were damaged and are left out")
    self._progress = Progress(
      TextColumn("{task.description}"),
      BarColumn(),
      TextColumn("step {task.completed}/{task.total}"),
      TimeRemainingColumn(),
      console=self._console,
      transient=True,
      disable=not self._console.is_terminal,
    )
    self._task = self._progress.add_task("starting", total=total, completed=start)
    self._progress.start()

  def say(self, text: str) -> None:
    """A plain line, above the live one."""
    if self._active:
      self._console.print(text, markup=False)

  def report(self, figures: dict[str, float]) -> None:
    """The figures of a finished run, as a table."""
    if not self._active:
      return
    model = self._config.model
    name = f"{model.name} {model.parts} on {self._config.data.name}"
    table = Table("split", "accuracy", "loss", "calibration error", title=name)
    for split in ("train", "valid", "test"):
      if f"{split}_accuracy" in figures:
        accuracy, loss, error = (
          figures[f"{split}_{key}"] for key in ("accuracy", "loss", "calibration_error")
        )
        table.add_row(split, f"{100 * accuracy:.2f} %", f"{loss:.4f}", f"{100 * error:.2f} %")
    table.caption = f"generalisation gap {100 * figures['gap']:.2f} points"
    if "zero_share" in figures:
      table.caption += (
        f"; smallest constrained weight {figures['smallest_constrained']:g},"
        f" {100 * figures['zero_share']:.1f} % of them exactly 0"
      )
    self._console.print(table)

  def restart_clock(self) -> None:
    """Leaves what happened since the last row (an evaluation, say) out of images/s."""
    self._clock, self._waited = time.monotonic(), 0.0

  def waited(self, seconds: float) -> None:
    """The loop waited for images, and in the end the devices had nothing to do."""
    self._waited += seconds

  def profile(self, steps: range) -> None:
    """Traces the calls that hold the steps of `log.profile_steps` into workdir/profile."""
    first, last = self._config.log.profile_steps
    if self._active and last and not self._tracing and steps.start <= first < steps.stop:
      jax.profiler.start_trace(os.path.join(self._workdir, "profile"))
      self._tracing = True
    elif self._tracing and steps.start > last:
      self._stop_tracing()

  def _stop_tracing(self) -> None:
    jax.profiler.stop_trace()
    self._tracing = False
    self.say(f"profile written: xprof --logdir {os.path.join(self._workdir, 'profile')}")

  def train(self, step: int, metrics: dict[str, jax.Array]) -> None:
    """Takes the metrics of the steps of one call, the last of which is `step`.

    Raises `Diverged` after `max_skipped` updates in a row that could not be made.
    """
    host = {name: np.atleast_1d(np.asarray(values)) for name, values in metrics.items()}
    for i, skipped in enumerate(host["skipped"]):
      self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
      if not skipped:
        continue
      at = step - len(host["skipped"]) + 1 + i
      words = ", ".join(
        f"{name.replace('_', ' ')} {host[name][i]:.4g}" for name in ("loss", "gradient_norm")
      )
      self._skipped.append(f"step {at} made no update: {words}")
      if self._skipped_in_a_row == self._config.max_skipped:
        raise Diverged(
          f"{self._skipped[-1]}, the {self._config.max_skipped}. in a row; the weights before"
          " are kept. A smaller optimizer.learning_rate or optimizer.clip_norm=1 may help"
        )
    self._train.append((step, host))
    if self._active:
      self._progress.update(self._task, completed=step)
    if step // self._config.log.every_steps > self._logged // self._config.log.every_steps:
      self.flush()

  def flush(self) -> None:
    """Writes a row for the training steps since the row before."""
    if not self._train:
      return
    step = self._train[-1][0]
    columns = {
      name: np.concatenate([host[name] for _, host in self._train]) for name in self._train[0][1]
    }
    skipped = columns.pop("skipped") > 0
    # Of updates that were made: a mean with a NaN in it is none. None made: no mean.
    means = {n: float(np.mean(c[~skipped])) for n, c in columns.items() if not skipped.all()}
    if self._skipped:
      more = len(self._skipped) - 1
      self.say(self._skipped[0] + (f" (and {more} more up to step {step})" if more else ""))
      self._skipped = []
    now = time.monotonic()
    images = (step - self._logged) * self._config.batch_size
    seconds = max(now - self._clock, 1e-9)
    share = min(self._waited / seconds, 1.0)
    row = {**means, "skipped": int(skipped.sum())}
    row |= {"images_per_second": images / seconds, "input_wait_frac": share}
    self._train, self._logged, self._clock, self._waited = [], step, now, 0.0
    self._write("train", step, row)
    if step >= ADVISE_AT and not self._advised:
      self._advised = True
      if share > WAITS_LONG:
        streamed = self._config.data.loader == "stream"
        cure = (
          "give more cores (config.data.workers), or decode once (python -m convex_jax data cache)"
          " and read that (config.data.loader=resident)"
          if streamed
          else "keep them on the devices (config.data.loader=resident)"
        )
        self.say(f"the devices wait for images {100 * share:.0f} % of the time: {cure}")

  def evaluated(self, kind: str, step: int, row: dict[str, float]) -> None:
    """Writes what an evaluation ("eval", "final") found."""
    self._write(kind, step, row)

  def _write(self, kind: str, step: int, row: dict[str, Any]) -> None:
    if not self._active:
      return
    row = {"epoch": self._epochs * step / self._total, **row}
    now = {"step": step, "kind": kind, "time": round(time.time(), 3)}
    failure = self._rows.append(now | row)
    if failure and not self._told:
      self.say(f"{failure}; rows are kept in memory and tried again with the next")
    self._told = failure is not None
    self._last |= row
    text = self._line()
    self._progress.update(self._task, completed=step, description=text)
    if not self._console.is_terminal and kind != "final":  # The report follows that one.
      self._console.print(f"step {step}/{self._total} {text}", markup=False)

  def _line(self) -> str:
    last = self._last
    words = []
    if "epoch" in last:
      words.append(f"epoch {last['epoch']:.1f}/{self._epochs:.0f}")
    if "loss" in last:
      words.append(f"loss {last['loss']:.3f}")
    for split in ("train", "valid", "test"):
      if f"{split}_accuracy" in last:
        words.append(f"{split} {100 * last[f'{split}_accuracy']:.2f} %")
    if "images_per_second" in last:
      words.append(f"{last['images_per_second']:,.0f} images/s")
      if last["input_wait_frac"] >= 0.01:
        words.append(f"{100 * last['input_wait_frac']:.0f} % waiting for them")
    return "  ".join(words)

  def sync(self) -> None:
    """Returns when the disk has every row."""
    if self._active and not self._told:
      self._rows.sync()

  def close(self) -> None:
    """Ends the live line and the event file; raises `Unsaved` where rows could not be written."""
    if self._tracing:
      self._stop_tracing()
    if self._active:
      self._progress.stop()
      if failure := self._rows.close():
        raise Unsaved(f"{failure}; the last rows are lost")
