"""What a run shows: a live line on a terminal, plain lines elsewhere."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from clu import parameter_overview
from rich.console import Console as Terminal
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from convex_jax.models.constraints import FREE, PENALISED

_Row = dataclasses.make_dataclass("_Row", ["name", "shape", "dtype", "size", "constraint"])


def parameter_table(params: Any, constraints: Any) -> str:
  """Each parameter's shape, size and constraint, with the totals."""
  flat = parameter_overview.flatten_dict(params)
  kinds = parameter_overview.flatten_dict(constraints)
  rows = [_Row(n, p.shape, str(p.dtype), math.prod(p.shape), kinds[n]) for n, p in flat.items()]
  total = sum(row.size for row in rows)
  bound = sum(row.size for row in rows if row.constraint not in (FREE, PENALISED))
  table = parameter_overview.make_table(rows)
  return f"{table}\n{total:,} parameters, {bound:,} of them constrained"


class Console:
  """The output of one run; silent in all processes but the first (`lead`)."""

  def __init__(self, lead: bool = True):
    # Plain lines in notebooks too: rich's own mode there adds a blank line after each.
    self._terminal = Terminal(highlight=False, soft_wrap=True, force_jupyter=False, quiet=not lead)
    self._progress = Progress(
      TextColumn("{task.description}"),
      BarColumn(),
      TextColumn("step {task.completed}/{task.total}"),
      TimeRemainingColumn(),
      console=self._terminal,
      transient=True,
      disable=not (lead and self._terminal.is_terminal),
    )
    self._task = self._progress.add_task("starting", total=None, visible=False)
    self._last: dict[str, Any] = {}

  def print(self, text: str) -> None:
    """Prints a plain line, above the live one."""
    self._terminal.print(text, markup=False)

  def start(self, step: int, total_steps: int, epochs: float) -> None:
    """Starts the live line, at a step."""
    self._total, self._epochs = total_steps, epochs
    self._progress.update(self._task, total=total_steps, completed=step, visible=True)
    self._progress.start()

  def advance(self, step: int) -> None:
    """Moves the live line to a step."""
    self._progress.update(self._task, completed=step)

  def show(self, step: int, row: dict[str, Any], log: bool = True) -> None:
    """Shows the newest figures; where there is no live line, and if `log`, prints them."""
    self._last |= row
    text = "  ".join(self._words(self._last))
    self._progress.update(self._task, completed=step, description=text)
    if log and not self._terminal.is_terminal:
      self.print(f"step {step}/{self._total}  {text}")

  def _words(self, last: dict[str, Any]) -> Iterator[str]:
    if "epoch" in last:
      yield f"epoch {last['epoch']:.1f}/{round(self._epochs, 1):g}"
    if "loss" in last:
      yield f"loss {last['loss']:.3f}"
    for split in ("train", "valid", "test"):
      if f"{split}_accuracy" in last:
        yield f"{split} accuracy {100 * last[f'{split}_accuracy']:.2f} %"
    if "images_per_second" in last:
      yield f"{last['images_per_second']:,.0f} images/s"
      if last["input_wait_frac"] >= 0.01:
        yield f"input wait {100 * last['input_wait_frac']:.0f} %"

  def report(self, title: str, figures: dict[str, float]) -> None:
    """Prints the figures of a finished run, as a table."""
    table = Table("split", "accuracy", "loss (nats)", "calibration error", title=title)
    for split in ("train", "valid", "test"):
      if f"{split}_accuracy" in figures:
        keys = ("accuracy", "loss", "calibration_error")
        accuracy, loss, error = (figures[f"{split}_{key}"] for key in keys)
        table.add_row(split, f"{100 * accuracy:.2f} %", f"{loss:.4f}", f"{100 * error:.2f} %")
    self._terminal.print(table)
    lines = [f"generalisation gap: {100 * figures['gap']:.2f} percentage points"]
    if "zero_share" in figures:
      lines.append(
        f"constrained weights: the smallest is {figures['smallest_constrained']:g},"
        f" {100 * figures['zero_share']:.1f} % are exactly 0"
      )
    self.print("\n".join(lines))

  def close(self) -> None:
    """Ends the live line."""
    self._progress.stop()
