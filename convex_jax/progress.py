"""Progress bars: on a terminal alone, on stderr, gone when they are done."""

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
