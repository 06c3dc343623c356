"""Requests to stop: every signal, before, during and after training."""

import io
import os
import signal
import sys

import pytest

import convex_jax
from convex_jax.errors import Stopped
from convex_jax.runs import certified
from convex_jax.signals import STOP_SIGNALS, sent_to
from convex_jax.training import loop, program
from convex_jax.training.stopping import Stopping
from tests.support import of


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda n: signal.Signals(n).name)
def test_every_signal_is_a_request(number):
  before = signal.getsignal(number)
  with Stopping() as stopping:
    assert not stopping.should_stop(1)
    with stopping.held():
      os.kill(os.getpid(), number)
      os.kill(os.getpid(), number)
      assert stopping.should_stop(1)
    with pytest.raises(Stopped, match=signal.Signals(number).name) as caught:
      os.kill(os.getpid(), number)
    assert caught.value.code == 75
  assert signal.getsignal(number) == before


@pytest.mark.parametrize("meaning", [signal.SIG_IGN, lambda *_: None])
def test_a_signal_that_means_something_else_keeps_its_meaning(meaning):
  """Under nohup a closed terminal is nothing; a program's own handler stays."""
  before = signal.signal(signal.SIGHUP, meaning)
  try:
    with Stopping() as stopping, stopping.held():
      os.kill(os.getpid(), signal.SIGHUP)
      assert not stopping.should_stop(1)
      os.kill(os.getpid(), signal.SIGUSR1)
      assert stopping.should_stop(1)
  finally:
    signal.signal(signal.SIGHUP, before)


def test_signals_are_collected_for_a_sweep():
  received = []
  with sent_to(received.append, STOP_SIGNALS):
    for number in STOP_SIGNALS:
      os.kill(os.getpid(), number)
  assert received == list(STOP_SIGNALS)


def test_a_run_saves_when_it_is_warned_and_goes_on(tiny_config, few_digits, tmp_path, monkeypatch):
  """In training, on a console that is gone; then while it certifies; and before it begins."""
  workdir, call = str(tmp_path / "run"), program.Program.train_call

  def warned(job, state, plan):
    if int(state.step) == 3:
      os.kill(os.getpid(), signal.SIGHUP)
    return call(job, state, plan)

  reader, writer = os.pipe()
  os.close(reader)
  broken = io.TextIOWrapper(io.BufferedWriter(io.FileIO(writer, "w")), "utf-8")
  with monkeypatch.context() as patch:
    patch.setattr(program.Program, "train_call", warned)
    patch.setattr(sys, "stdout", broken)
    with pytest.raises(Stopped, match="at step 4, saved in"):
      loop.run(of(tiny_config, log__every_steps=1), workdir, few_digits)
    assert sys.stdout is broken
  assert convex_jax.load(workdir).step == 4
  monkeypatch.setattr(
    certified, "certify_and_write", lambda _: os.kill(os.getpid(), signal.SIGUSR1)
  )
  with pytest.raises(Stopped, match="SIGUSR1; nothing is lost"):
    loop.run(of(tiny_config, log__every_steps=1), workdir, few_digits)
  run = convex_jax.load(workdir)
  assert run.metrics("final") and [row["step"] for row in run.metrics("train")] == [*range(1, 7)]
  monkeypatch.setattr(loop, "Program", lambda *_: os.kill(os.getpid(), signal.SIGXCPU))
  with pytest.raises(Stopped, match="SIGXCPU"):
    loop.run(tiny_config, str(tmp_path / "early"), few_digits)
  assert not (tmp_path / "early").exists()
