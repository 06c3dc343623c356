"""Progress: on a terminal alone, on stderr, gone when it is done."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import rich.progress
from rich.console import Console


def track(
  sequence: Iterable[Any], text: str, total: float | None = None, disable: bool = False
) -> Iterator[Any]:
  """`rich.progress.track`; elsewhere it would leave an empty line."""
  console = Console(stderr=True)
  disable = disable or not console.is_terminal
  yield from rich.progress.track(
    sequence, text, total, console=console, transient=True, disable=disable
  )


@contextlib.contextmanager
def waiting(text: str) -> Iterator[None]:
  """Shows that work goes on, and for how long, where nothing says how much is left."""
  console = Console(stderr=True)
  columns = (
    rich.progress.SpinnerColumn(),
    rich.progress.TextColumn("{task.description}", markup=False),
    rich.progress.TimeElapsedColumn(),
  )
  with rich.progress.Progress(
    *columns, console=console, transient=True, disable=not console.is_terminal
  ) as shown:
    shown.add_task(text, total=None)
    yield
