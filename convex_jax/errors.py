"""How a run can end before it is done: exceptions, each with its exit code."""

import difflib
from collections.abc import Iterable
from typing import Any

NOT_PROVED = 4  # The exit code of a command whose network could not be proved convex.


class Ended(Exception):
  """A run that ends early; `main` prints the message and exits with `code`."""

  code: int
  at_once = False  # Whether threads might wait for ever, so that the process must be ended.


class UserError(Ended, ValueError):
  """Invalid input: what is wrong, where, what is expected, how to fix it. Do not retry."""

  code = 2


class Diverged(Ended):
  """Too many consecutive updates were skipped; the last checkpoint is finite."""

  code = 3


class Unsaved(Ended):
  """A checkpoint could not be written; earlier ones are intact."""

  code = 74
  at_once = True


class Lost(Ended):
  """Another process of the run was lost. Run the same command on every host to resume."""

  code = 75
  at_once = True

  def __init__(self, reason: str):
    super().__init__(
      f"Another process is gone, or cannot be reached: {reason}\n"
      "  Run the same command on every host to resume from the newest checkpoint."
    )


class Stopped(Ended):
  """Stopped on request, after saving. Run the same command to resume."""

  code = 75


def nearest(value: Any, names: Iterable[str]) -> str:
  """A hint for a message: the name that is closest to a mistyped one; "" if none is close."""
  close = difflib.get_close_matches(str(value), list(names), n=1, cutoff=0.5)
  return f". Did you mean {close[0]!r}?" if close else ""
