"""Signals that end a command: none is lost, and none interrupts what it would break."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from importlib.machinery import ExtensionFileLoader
from types import FrameType
from typing import Any

from convex_jax.errors import Ended, Stopped

# By which terminals and schedulers ask a program to stop, or warn that they will end it: kill and
# preemption, Ctrl-C, a closed terminal, Slurm's and Grid Engine's own, a limit of processor time.
_NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
STOP_SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))

LATER = 0.05  # Seconds until a signal is sent again.


class _Handler:
  """Calls a function of the signal's number, but not while an extension module is initialised.

  An exception would make that fail, with an error of its own or a crash.
  """

  def __init__(self, call: Callable[[int], Any]):
    self._call = call

  def __call__(self, number: int, frame: FrameType | None) -> None:
    while frame is not None:
      if isinstance(frame.f_locals.get("self"), ExtensionFileLoader):
        return _again(number)
      frame = frame.f_back
    self._call(number)


def _again(number: int) -> None:
  timer = threading.Timer(LATER, os.kill, (os.getpid(), number))
  timer.daemon = True
  timer.start()


@contextlib.contextmanager
def sent_to(handler: Callable[[int], Any], numbers: Iterable[int]) -> Iterator[None]:
  """While active, in the main thread, these signals call `handler(number)`, and do nothing else.

  But for SIGTERM and SIGINT, a signal that has another meaning keeps it: that under nohup a
  closed terminal ends nothing, or what a program that trains does on SIGUSR1.
  """
  before = {}
  if threading.current_thread() is threading.main_thread():
    for number in numbers:
      always = number in (signal.SIGTERM, signal.SIGINT)
      previous = signal.getsignal(number)
      if always or previous == signal.SIG_DFL or isinstance(previous, _Handler):
        before[number] = signal.signal(number, _Handler(handler))
  try:
    yield
  finally:
    for number, previous in before.items():
      # None: it was not set by Python, and cannot be set again.
      signal.signal(number, signal.SIG_DFL if previous is None else previous)


def stop(number: int) -> None:
  """A handler for a run that has nothing to save; raises `Stopped`."""
  name = signal.Signals(number).name
  raise Stopped(f"Stopped by {name}; nothing is lost. Run the same command to go on.")


def _interrupt(_: int) -> None:
  raise KeyboardInterrupt


@contextlib.contextmanager
def ending_the_command() -> Iterator[None]:
  """While active, Ctrl-C and what `stop` raises end the command wherever they come.

  Python ignores exceptions in callbacks of its garbage collection, of which JAX has one; such a
  signal is sent again.
  """
  before = sys.unraisablehook

  def ignored(what: Any) -> None:
    if issubclass(what.exc_type, KeyboardInterrupt):
      _again(signal.SIGINT)
    elif issubclass(what.exc_type, Ended):
      _again(signal.SIGTERM)
    else:
      before(what)

  # Where it is ignored, as in the background of a script, it stays so.
  mine = [signal.SIGINT] if signal.getsignal(signal.SIGINT) == signal.default_int_handler else []
  sys.unraisablehook = ignored
  try:
    with sent_to(_interrupt, mine):
      yield
  finally:
    sys.unraisablehook = before
