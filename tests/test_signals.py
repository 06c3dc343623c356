"""Signals that come before training, in the middle of an import, or where exceptions are lost."""

import gc
import importlib.machinery
import importlib.util
import os
import signal
import sys
import time

import pytest

from convex_jax import command_line, main
from convex_jax.signals import STOP_SIGNALS
from tests.support import PATIENCE

DIGITS = "--config=configs/mixer_ioc.py:digits"


def wait():
  """For a signal, in the main thread."""
  end = time.monotonic() + PATIENCE
  while time.monotonic() < end:
    time.sleep(0.01)
  return 0


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda n: signal.Signals(n).name)
def test_a_signal_before_training_stops_the_run(number, monkeypatch, tmp_path, capsys):
  """With the code on which scripts start it again; it is not the system that ends the process."""
  before = [signal.getsignal(n) for n in STOP_SIGNALS]

  def configure(*_):
    assert signal.getsignal(number) not in (signal.SIG_DFL, signal.default_int_handler)
    os.kill(os.getpid(), number)
    return wait()

  monkeypatch.setattr(main, "configure", configure)
  assert main.main([DIGITS, f"--workdir={tmp_path / 'run'}"]) == 75
  err = capsys.readouterr().err
  assert err.startswith(f"Stopped by {signal.Signals(number).name}; nothing is lost.")
  assert [signal.getsignal(n) for n in STOP_SIGNALS] == before


def test_an_interruption_is_not_lost_in_a_collection_of_garbage(capsys):
  """Python ignores exceptions there, and JAX has a callback of it."""
  calls = []

  def callback(*_):
    if not calls:
      calls.append(True)
      os.kill(os.getpid(), signal.SIGINT)

  def action():
    gc.callbacks.append(callback)
    try:
      gc.collect()
      return wait()
    finally:
      gc.callbacks.remove(callback)

  hook = sys.unraisablehook
  assert command_line.exit_code(action) == 130
  assert calls and capsys.readouterr().err == "Interrupted\n"
  assert sys.unraisablehook is hook


def test_an_interruption_waits_for_an_extension_to_be_initialised(monkeypatch, capsys):
  """In the middle of it, an exception is an ImportError of its own, or a crash."""
  done = []

  class Loader(importlib.machinery.ExtensionFileLoader):
    def create_module(self, spec):
      os.kill(os.getpid(), signal.SIGINT)
      time.sleep(0.2)
      done.append(spec.name)

    def exec_module(self, module):
      pass

  def action():
    spec = importlib.util.spec_from_loader("extension", Loader("extension", "extension.so"))
    importlib.util.module_from_spec(spec)
    return wait()

  assert command_line.exit_code(action) == 130
  assert done == ["extension"] and capsys.readouterr().err == "Interrupted\n"
