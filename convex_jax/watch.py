"""What a run tells: a live line or plain lines, metrics.jsonl, TensorBoard events.

`metrics.jsonl` is the truth: one JSON object a row, `kind` "train" (means since the row
before), "eval" (inference mode, images not augmented) or "final" (the same, on every
example). After a resume it holds every step once.
"""

import dataclasses
import importlib.util
import json
import math
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from convex_jax.errors import Diverged

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


def _event_writer(folder: str) -> tuple[Callable[[int, dict[str, float]], None], Callable]:
  """(write, close) of TensorBoard events: clu's writer with TensorFlow, else tensorboardX."""
  if importlib.util.find_spec("tensorflow") and importlib.util.find_spec("tensorboard"):
    from clu import metric_writers

    writer = metric_writers.SummaryWriter(folder)
    return writer.write_scalars, writer.close
  import tensorboardX

  writer = tensorboardX.SummaryWriter(folder, write_to_disk=True)

  def write(step, scalars):
    for name, value in scalars.items():
      writer.add_scalar(name, value, step)

  return write, writer.close


class Watch:
  """The watcher of one run; only process 0's (`active`) speaks and writes."""

  def __init__(
    self, workdir: str, start: int, total: int, epochs: float, config: Any, active: bool
  ):
    self._active, self._total, self._epochs, self._config = active, total, epochs, config
    self._console = Console(highlight=False, soft_wrap=True)
    self._last: dict[str, Any] = {}
    self._train: list[tuple[int, dict[str, np.ndarray]]] = []
    self._logged = start
    self._clock, self._waited, self._advised = time.monotonic(), 0.0, False
    self._workdir, self._tracing = workdir, False
    if not active:
      return
    self._path = os.path.join(workdir, "metrics.jsonl")
    self._truncate(start)
    self._write_events, self._close_events = _event_writer(workdir)
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

  def _truncate(self, step: int) -> None:
    """Drops rows of steps that will be done again, and a last line cut short."""
    rows = read_metrics(self._path) if os.path.exists(self._path) else []
    kept = [row for row in rows if row["step"] <= step and row["kind"] != "final"]
    with open(self._path + ".tmp", "w") as file:
      file.writelines(json.dumps(row) + "\n" for row in kept)
    os.replace(self._path + ".tmp", self._path)

  def say(self, text: str) -> None:
    """A plain line, above the live one."""
    if self._active:
      self._console.print(text, markup=False)

  def show(self, table: Table) -> None:
    """A table."""
    if self._active:
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

    Raises `Diverged` when a loss is not finite.
    """
    host = {name: np.atleast_1d(np.asarray(values)) for name, values in metrics.items()}
    bad = np.flatnonzero(~np.isfinite(host["loss"]))
    if bad.size:
      at = step - len(host["loss"]) + 1 + int(bad[0])
      raise Diverged(
        f"the loss of step {at} is {host['loss'][bad[0]]}; the newest checkpoint is from before."
        " A smaller optimizer.learning_rate or optimizer.clip_norm=1 may help"
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
    means = {
      name: float(np.mean(np.concatenate([host[name] for _, host in self._train])))
      for name in self._train[0][1]
    }
    now = time.monotonic()
    images = (step - self._logged) * self._config.batch_size
    seconds = max(now - self._clock, 1e-9)
    share = min(self._waited / seconds, 1.0)
    row = {**means, "images_per_second": images / seconds, "input_wait_frac": share}
    self._train, self._logged, self._clock, self._waited = [], step, now, 0.0
    self._write("train", step, row)
    if step >= ADVISE_AT and not self._advised:
      self._advised = True
      if share > WAITS_LONG:
        streamed = self._config.data.loader == "stream"
        cure = (
          "give more cores (config.data.workers), or decode once (python -m convex_jax.data cache)"
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
    with open(self._path, "a") as file:
      file.write(json.dumps({"step": step, "kind": kind, **row}) + "\n")
    self._write_events(step, {f"{kind}/{name}": value for name, value in row.items()})
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

  def close(self) -> None:
    """Ends the live line and the event file."""
    if self._tracing:
      self._stop_tracing()
    if self._active:
      self._progress.stop()
      self._close_events()


def read_metrics(path: str) -> list[dict[str, Any]]:
  """The rows of a metrics.jsonl; a last line cut short by a kill is left out."""
  rows = []
  with open(path) as file:
    for line in file:
      if line.endswith("\n"):
        rows.append(json.loads(line))
  return rows
