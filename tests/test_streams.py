"""A console that goes away, fills up or stands still: text is lost, nothing else."""

import io
import os
import pty
import subprocess
import sys
import threading

import pytest

from convex_jax import progress, streams
from tests.support import PATIENCE, ROOT

PROGRAM = """
import sys
from convex_jax import streams
with streams.careful(PATIENCE):
  for i in range(3000):
    print(i, "│ ≥ line of a run that goes on and on")
    print(i, "and of its errors", file=sys.stderr)
open("done", "w").close()
sys.exit(7)
"""


def start(folder, patience=0.2, flags=(), **more):
  program = PROGRAM.replace("PATIENCE", repr(patience))
  env = {**os.environ, "PYTHONPATH": str(ROOT), **more.pop("env", {})}
  return subprocess.Popen([sys.executable, *flags, "-c", program], cwd=folder, env=env, **more)


def ends_as_it_would(process, folder):
  return process.wait(timeout=PATIENCE) == 7 and (folder / "done").exists()


@pytest.mark.parametrize("flags", [(), ("-u",)])
def test_a_reader_that_goes_away(tmp_path, flags):
  pipe = subprocess.PIPE
  with start(tmp_path, flags=flags, stdout=pipe, stderr=pipe) as process:
    for stream in (process.stdout, process.stderr):
      stream.readline()
      stream.close()
    assert ends_as_it_would(process, tmp_path)


@pytest.mark.parametrize("flags", [(), ("-u",)])
def test_a_reader_that_does_not_read(tmp_path, flags):
  """A pager on its first page; a terminal after Ctrl-S."""
  pipe = subprocess.PIPE
  with start(tmp_path, flags=flags, stdout=pipe, stderr=pipe) as process:
    assert ends_as_it_would(process, tmp_path)
    assert process.stdout.read().startswith(b"0 ")


def test_a_command_that_is_no_run_waits_for_its_reader(tmp_path):
  with start(tmp_path, None, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
    with pytest.raises(subprocess.TimeoutExpired):
      process.wait(timeout=0.5)
    lines = process.stdout.read().splitlines()
    assert len(lines) == 6000 and ends_as_it_would(process, tmp_path)


def test_a_reader_that_is_slow_gets_every_line(tmp_path):
  with start(tmp_path, 60, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
    lines = process.stdout.read().decode().splitlines()
    assert len(lines) == 3000 and lines[-1].startswith("2999 │ ≥")
    assert ends_as_it_would(process, tmp_path)


@pytest.mark.parametrize("reads", [True, False])
def test_a_terminal_that_is_closed_or_stands_still(tmp_path, reads):
  ours, theirs = pty.openpty()
  process = start(tmp_path, stdin=theirs, stdout=theirs, stderr=theirs)
  os.close(theirs)
  if reads:
    os.read(ours, 100)
    os.close(ours)
  assert ends_as_it_would(process, tmp_path)


def test_a_full_disk(tmp_path):
  with open("/dev/full", "w") as full:
    assert ends_as_it_would(start(tmp_path, stdout=full, stderr=full), tmp_path)


def test_no_console_at_all(tmp_path):
  command = f"{sys.executable} -c '{PROGRAM.replace('PATIENCE', '1')}' >&- 2>&- <&-"
  env = {**os.environ, "PYTHONPATH": str(ROOT)}
  assert subprocess.run(["sh", "-c", command], cwd=tmp_path, env=env).returncode == 7


def test_a_descriptor_that_does_not_block(tmp_path):
  """As some terminals leave it behind."""
  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  process = start(tmp_path, None, stdout=writer, stderr=writer)
  os.close(writer)
  with open(reader, "rb") as file:
    assert len(file.read().splitlines()) == 6000
  assert ends_as_it_would(process, tmp_path)


def test_a_console_that_lacks_a_character(tmp_path):
  with start(
    tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={"PYTHONIOENCODING": "ascii"}
  ) as process:
    assert process.stdout.readline() == b"0 ? ? line of a run that goes on and on\n"
    process.stdout.close()
    assert ends_as_it_would(process, tmp_path)


def test_the_program_itself_would_end():
  """The control: without care it does."""
  process = subprocess.Popen(
    [sys.executable, "-c", "for i in range(9999): print(i, flush=True)"],
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
  )
  process.stdout.close()
  assert process.wait(timeout=PATIENCE) != 0


def test_streams_come_back_and_those_of_others_stay(monkeypatch):
  before = sys.stdout, sys.stderr
  with streams.careful():
    assert (sys.stdout, sys.stderr) == before  # Pytest's own.
  reader, writer = os.pipe()
  text = io.TextIOWrapper(io.BufferedWriter(io.FileIO(writer, "w")), "utf-8")
  monkeypatch.setattr(sys, "stdout", text)
  text.write("a ")
  with streams.careful(1.0):
    outer = sys.stdout
    assert outer is not text
    with streams.careful(9.0):
      assert sys.stdout is outer and outer.buffer.raw.patience == 9.0
      print("b", end=" ")
    assert outer.buffer.raw.patience == 1.0
  assert sys.stdout is text
  del outer
  print("c")
  text.close()
  with open(reader) as file:
    assert file.read() == "a b c\n"


def test_a_line_is_seen_at_once():
  reader, writer = os.pipe()
  raw = streams._Careful(writer, None)
  threading.Thread(target=lambda: raw.write(b"x")).start()
  assert os.read(reader, 9) == b"x"
  for descriptor in (reader, writer):
    os.close(descriptor)


def test_progress_is_shown_on_a_terminal_alone(capfd, monkeypatch):
  def shown():
    assert list(progress.track(range(3), "reading")) == [0, 1, 2]
    with progress.waiting("compiling [v5e]"):
      pass
    return capfd.readouterr()

  assert shown() == ("", "")
  monkeypatch.setenv("TTY_COMPATIBLE", "1")  # Which rich takes for a terminal.
  monkeypatch.setenv("TERM", "xterm")
  out, err = shown()
  assert not out and "reading" in err and "compiling [v5e]" in err
