"""Output that may be lost and never ends a run: what is printed is not the result."""

import contextlib
import io
import math
import os
import select
import stat
import sys
import time
from collections.abc import Iterator
from typing import Any

PATIENCE = 1.0  # Seconds that a run waits for its console.


class _Careful(io.FileIO):
  """A file descriptor to write to; what it does not take is dropped.

  That is after an error (a pipe whose reader is gone, a closed terminal, a full disk), and where
  it takes nothing for `patience` seconds (a pager that is not read, Ctrl-S): until it does again,
  nothing waits for it any more. With a patience of None it is waited for.
  """

  def __init__(self, descriptor: int, patience: float | None):
    own = _reopened(descriptor)
    super().__init__(descriptor if own is None else own, "w", closefd=own is not None)
    self.patience, self._stuck = patience, False

  def write(self, content: Any) -> int:
    limit = math.inf if self.patience is None else 0 if self._stuck else self.patience
    deadline, poll = time.monotonic() + limit, select.poll()
    try:
      poll.register(self.fileno(), select.POLLOUT)
      while True:
        left = deadline - time.monotonic()
        # Pipes take this many bytes, once they take any.
        if poll.poll(None if left == math.inf else max(0, 1000 * left)):
          written = super().write(memoryview(content)[:512])
          if written is not None:
            self._stuck = False
            return written
        if time.monotonic() >= deadline:
          self._stuck = True
          return len(content)
        time.sleep(0.01)  # A terminal's `poll` promises more than it keeps.
    except (OSError, ValueError):
      return len(content)


def _reopened(descriptor: int) -> int | None:
  """The pipe or terminal that a descriptor leads to, opened so that writing never blocks.

  To unblock the descriptor itself would do so for all processes that have it, the shell's too.
  None for other files, and where the system does not allow it.
  """
  try:
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISFIFO(mode) or os.isatty(descriptor):
      flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY
      return os.open(f"/proc/self/fd/{descriptor}", flags)
  except OSError:
    pass
  return None


@contextlib.contextmanager
def careful(patience: float | None = None) -> Iterator[None]:
  """While active, what cannot be written to standard output or standard error is dropped.

  Leaves alone what a notebook or a program has put in their place.
  """
  before, changed = (sys.stdout, sys.stderr), []
  for name in ("stdout", "stderr"):
    stream: Any = getattr(sys, name)
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)  # There is but one with `python -u`.
    if isinstance(raw, _Careful):
      changed.append((raw, raw.patience))
      raw.patience = patience
    elif type(stream) is io.TextIOWrapper and isinstance(raw, io.FileIO):
      with contextlib.suppress(OSError):
        stream.flush()
      buffered = io.BufferedWriter(_Careful(raw.fileno(), patience))
      # A console that lacks a character is no reason to end either.
      errors = "replace" if stream.errors == "strict" else stream.errors
      new = io.TextIOWrapper(buffered, stream.encoding, errors, line_buffering=True)
      setattr(sys, name, new)
  try:
    yield
  finally:
    for stream in (sys.stdout, sys.stderr):
      if stream is not None:
        with contextlib.suppress(OSError, ValueError):
          stream.flush()
    for raw, old in changed:
      raw.patience = old
    sys.stdout, sys.stderr = before
