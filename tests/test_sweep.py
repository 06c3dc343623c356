"""A sweep: runs once what it says, goes on where it was stopped, overwrites nothing."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from convex_jax import results, sweep
from convex_jax.errors import Mistake
from tests.conftest import ROOT

FILE = """
from convex_jax.sweep import Job

TITLE = "Twins"
SCHEDULES = {"tiny": "a few steps", "long": "more of them"}

def get_sweep(schedule):
  steps = {"tiny": 4, "long": 4000}[schedule]
  changed = {"steps": steps, "model.size": "tiny", "model.patch": 4, "checkpoint.every_steps": 2}
  changed |= {"optimizer.learning_rate": RATE, "log.every_steps": 2}
  return [
    Job("twins", parts, "configs/mixer.py:digits", {**changed, "model.parts": parts}, seed)
    for parts in ("base", "paper") for seed in (0,)
  ]
"""


def folder_of(tmp_path, rate=1e-3, text=FILE):
  folder = tmp_path / "claim"
  folder.mkdir(exist_ok=True)
  (folder / "sweep.py").write_text(text.replace("RATE", str(rate)))
  return folder


def command(folder, tmp_path, data_dir, *more):
  args = [str(folder), f"--workdir={tmp_path / 'out'}", f"--data_dir={data_dir}", *more]
  return [sys.executable, "-m", "convex_jax.sweep", *args]


def test_a_sweep_runs_once_what_it_says(tmp_path, data_dir):
  folder = folder_of(tmp_path)
  start = command(folder, tmp_path, data_dir, "--at_once=2")
  first = subprocess.run(start, cwd=ROOT, capture_output=True, text=True, timeout=300)
  assert first.returncode == 0, first.stderr
  found = results.read(str(tmp_path / "out"))
  assert [row.key for row in found.rows] == [
    ("twins", "base", "tiny", 0),
    ("twins", "paper", "tiny", 0),
  ]
  # The paper twin keeps its LayerNorm: certified, and not proved.
  assert [bool(row.certificate) for row in found.rows] == [False, True]
  assert found.rows[1].certificate != "PROVED" and found.rows[1].broken_by
  assert found.points and (tmp_path / "out" / "report.html").exists()
  workdirs = sorted((tmp_path / "out" / "tiny" / "twins").glob("*/seed_0"))
  assert len(workdirs) == 2
  config = json.loads((workdirs[0] / "config.json").read_text())["config"]
  assert config["steps"] == 4 and config["optimizer"]["learning_rate"] == 1e-3

  logs = {w: (w / "log.txt").stat().st_mtime_ns for w in workdirs}
  (tmp_path / "out" / "report.html").unlink()
  again = subprocess.run(start, cwd=ROOT, capture_output=True, text=True, timeout=300)
  assert again.returncode == 0 and (tmp_path / "out" / "report.html").exists()
  assert {w: (w / "log.txt").stat().st_mtime_ns for w in workdirs} == logs  # None was started.

  before = (tmp_path / "out" / "results.csv").read_bytes()
  folder_of(tmp_path, rate=2e-3)
  other = subprocess.run(start, cwd=ROOT, capture_output=True, text=True, timeout=300)
  assert other.returncode == 2 and "of another config" in other.stderr
  assert (tmp_path / "out" / "results.csv").read_bytes() == before


@pytest.mark.slow
def test_a_stopped_sweep_saves_its_runs_and_goes_on(tmp_path, data_dir):
  folder = folder_of(tmp_path)
  start = command(folder, tmp_path, data_dir, "--schedule=long", "--only=twins, base")
  rows = tmp_path / "out" / "long" / "twins" / "base" / "seed_0" / "metrics.jsonl"
  with subprocess.Popen(start, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as first:
    while not rows.exists() or len(rows.read_text().splitlines()) < 3:
      assert first.poll() is None
      time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    _, errors = first.communicate(timeout=60)
  assert first.returncode == 75 and b"the same command goes on" in errors
  saved = max(int(step) for step in os.listdir(rows.parent / "checkpoints") if step.isdigit())
  assert 0 < saved < 4000 and not results.read(str(tmp_path / "out")).rows
  second = subprocess.run(start, cwd=ROOT, capture_output=True, text=True, timeout=500)
  assert second.returncode == 0, second.stderr
  assert f"at step {saved} of 4000" in (rows.parent / "log.txt").read_text()
  assert len(results.read(str(tmp_path / "out")).rows) == 1


@pytest.mark.parametrize(
  ("text", "schedule", "words"),
  [
    ("TITLE = 'x'", "tiny", "does not define SCHEDULES, get_sweep"),
    (FILE, "other", "--schedule=other is none; allowed: tiny, long"),
    (FILE.replace('"model.size"', '"model.seize"'), "tiny", "model.seize"),
    (FILE.replace("RATE", "-1.0"), "tiny", "learning_rate"),
    (FILE.replace("(0,)", "(0, 0)"), "tiny", "is two jobs"),
  ],
)
def test_a_sweep_that_cannot_be_run_is_told_first(tmp_path, monkeypatch, text, schedule, words):
  monkeypatch.chdir(ROOT)
  folder = folder_of(tmp_path, text=text)
  with pytest.raises(Mistake, match=words):
    sweep.tasks_of(sweep.read_sweep(str(folder)), schedule, str(tmp_path / "out"))
  assert not (tmp_path / "out").exists()


def test_sweeps_that_are_kept_can_be_run(monkeypatch):
  """Each claim's: every schedule's configs fit."""
  monkeypatch.chdir(ROOT)
  for path in sorted(pathlib.Path("experiments").glob("*/sweep.py")):
    module = sweep.read_sweep(str(path.parent))
    for schedule in module.SCHEDULES:
      assert sweep.tasks_of(module, schedule, "runs/x"), (path, schedule)
