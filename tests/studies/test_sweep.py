"""A sweep: runs once what it says, goes on where it was stopped, overwrites nothing."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import pytest

from convex_jax import files
from convex_jax.errors import NOT_PROVED, Stopped, UserError
from convex_jax.studies import jobs, results, sweep
from tests.support import ROOT

SAVED = ROOT / "tests" / "fixtures" / "run_1_1"
FILE = """
from convex_jax.studies.jobs import Job

TITLE = "Twins"
SCHEDULES = {"tiny": "a few steps", "long": "more of them"}

def get_sweep(schedule):
  steps = {"tiny": 4, "long": 4000}[schedule]
  changed = {"steps": steps, "model.size": "tiny", "model.patch": 4, "eval.every_epochs": 1000.0}
  changed |= {"optimizer.learning_rate": RATE, "log.every_steps": 2, "model.depth": 1}
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
  return [sys.executable, "-m", "convex_jax", "sweep", *args]


def found_workdirs(tmp_path):
  return sorted((tmp_path / "out" / "tiny" / "twins").glob("*/seed_0"))


def test_a_sweep_runs_once_what_it_says(tmp_path, data_dir, monkeypatch, capsys):
  monkeypatch.chdir(ROOT)  # Where its processes start.
  started, most_alive = [], []

  class Popen(subprocess.Popen):
    def __init__(self, *args, **kwargs):
      super().__init__(*args, **kwargs)
      if "convex_jax" in self.args:  # Matplotlib starts fc-list, where it has no cache.
        started.append(self)
        most_alive.append(sum(process.poll() is None for process in started))

  monkeypatch.setattr(sweep.subprocess, "Popen", Popen)
  args = command(folder_of(tmp_path), tmp_path, data_dir, "--at_once=2")[4:]
  assert sweep.main(args) == 0, capsys.readouterr().err
  found = results.read(str(tmp_path / "out"))
  assert [row.key for row in found.rows] == [
    ("twins", "base", "tiny", 0),
    ("twins", "paper", "tiny", 0),
  ]
  # The paper twin keeps its LayerNorm: certified, and not proved.
  assert [bool(row.certificate) for row in found.rows] == [False, True]
  assert found.rows[1].certificate != "PROVED" and found.rows[1].broken_by
  assert found.points and (tmp_path / "out" / "report.html").exists()
  workdirs = found_workdirs(tmp_path)
  assert len(workdirs) == 2
  assert most_alive[:2] == [1, 2] and len(started) == 3  # Two trainings together; a certifier.
  config = json.loads((workdirs[0] / "config.json").read_text())["config"]
  assert config["steps"] == 4 and config["optimizer"]["learning_rate"] == 1e-3

  logs = {w: (w / "log.txt").stat().st_mtime_ns for w in workdirs}
  (tmp_path / "out" / "report.html").unlink()
  assert sweep.main(args) == 0 and (tmp_path / "out" / "report.html").exists()
  assert {w: (w / "log.txt").stat().st_mtime_ns for w in workdirs} == logs  # None was started.

  before = (tmp_path / "out" / "results.csv").read_bytes()
  folder_of(tmp_path, rate=2e-3)
  capsys.readouterr()
  assert sweep.main(args) == 2 and "of another config" in capsys.readouterr().err
  assert (tmp_path / "out" / "results.csv").read_bytes() == before


def test_the_runs_of_a_name_or_a_part_of_it_are_listed(tmp_path, capsys):
  folder = str(folder_of(tmp_path, text=FILE.replace("in (0,)", "in (0, 1)")))

  def listed(only):
    code = sweep.main([folder, "--list", f"--only={only}"])
    text = capsys.readouterr()
    return code, re.findall(r"twins/(\w+)/seed_(\d)", text.out), text.err

  assert listed("twins, base")[1] == [("base", "0"), ("base", "1")]
  assert listed("seed 1")[1] == [("base", "1"), ("paper", "1")]
  assert listed("twins, paper, seed 0")[1] == [("paper", "0")]
  code, none, message = listed("ioc")
  assert code == 2 and not none and "matches none of 4 runs" in message
  assert "twins, base, seed 0" in message  # How names look.


class Ended:
  """A child process that ends at once, by a code."""

  def __init__(self, code):
    self.pid, self.code = 0, code

  def poll(self):
    return self.code

  def wait(self):
    return self.code

  def terminate(self):
    self.code = 75


def test_a_sweep_that_could_not_draw_starts_no_run(monkeypatch, tmp_path, capsys):
  monkeypatch.setitem(sys.modules, "matplotlib", None)
  args = [str(ROOT / "experiments" / "mlp"), "--schedule=digits", f"--workdir={tmp_path / 'runs'}"]
  assert sweep.main(args) == 2
  assert "pip install 'convex_jax[report]'" in capsys.readouterr().err
  assert not (tmp_path / "runs").exists()


def run_with(monkeypatch, tmp_path, ends, parts="paper", at_once=1):
  """`run_all` of jobs whose processes only end: {seed: (code of training, of certifying)}."""
  started = []

  def popen(command, stdout, **_):
    workdir = pathlib.Path(next(a for a in command if a.startswith("--workdir="))[10:])
    seed, certifies = int(workdir.name), "certify" in command
    started.append((seed, certifies))
    code, certificate = ends[seed][int(certifies)], workdir / "certificate.json"
    if not certifies:
      shutil.copytree(SAVED, workdir, dirs_exist_ok=True)
      certificate.write_text("{") if code == "damaged" else certificate.unlink()
      code = 0 if code == "damaged" else code
      content = files.read_json(str(workdir / "config.json"))
      content["config"]["model"]["parts"], content["config"]["seed"] = parts, seed
      files.write_json(str(workdir / "config.json"), content)
    elif code == NOT_PROVED:
      files.write_json(str(certificate), {"verdict": "REFUTED", "reason": "LayerNorm"})
    return Ended(code)

  monkeypatch.setattr(sweep.subprocess, "Popen", popen)
  monkeypatch.setattr(sweep, "POLL", 0.0)
  tasks = [
    jobs.Task(jobs.Job("p", "v", "", {}, s), "x", str(tmp_path / str(s)), "", 1, "step")
    for s in ends
  ]
  return lambda: sweep.run_all(tasks, str(tmp_path), "", at_once), started


def test_what_is_not_proved_is_a_result(monkeypatch, tmp_path):
  run, started = run_with(monkeypatch, tmp_path, {0: (0, 4)})
  assert [row.certificate for row in run().rows] == ["REFUTED"]
  assert started == [(0, False), (0, True)]


def test_a_base_is_not_certified(monkeypatch, tmp_path):
  run, started = run_with(monkeypatch, tmp_path, {0: (0, 4)}, parts="base")
  assert [row.certificate for row in run().rows] == [""] and started == [(0, False)]


def test_a_certifier_that_fails_makes_no_result(monkeypatch, tmp_path):
  run, _ = run_with(monkeypatch, tmp_path, {0: (0, 1)})  # 1 is a crash.
  with pytest.raises(UserError, match=r"exit code 1, see .*log\.txt"):
    run()
  assert not results.read(str(tmp_path)).rows


def test_a_certifier_that_could_not_write_makes_no_result(monkeypatch, tmp_path):
  run, _ = run_with(monkeypatch, tmp_path, {0: (0, 0)})
  with pytest.raises(UserError, match=r"0 has no certificate, see .*log\.txt"):
    run()
  assert not results.read(str(tmp_path)).rows


def test_a_damaged_certificate_is_written_again(monkeypatch, tmp_path):
  run, started = run_with(monkeypatch, tmp_path, {0: ("damaged", 4)})
  assert [row.certificate for row in run().rows] == ["REFUTED"]
  assert started == [(0, False), (0, True)]
  (tmp_path / "results.csv").unlink()  # Once more, where the run is found finished.
  (tmp_path / "0" / "certificate.json").write_text("{")
  monkeypatch.setattr(jobs, "refuse_other_configs", lambda *_: None)
  assert [row.certificate for row in run().rows] == ["REFUTED"]


def test_one_run_that_cannot_be_read_keeps_no_other_from_running(monkeypatch, tmp_path):
  """A base need not be certified, but has a certificate, which is damaged."""
  run, _ = run_with(monkeypatch, tmp_path, {0: ("damaged", 4), 1: (0, 4)}, parts="base")
  with pytest.raises(UserError, match=r"(?s)0/certificate.json is damaged.*1 run failed"):
    run()
  assert [row.seed for row in results.read(str(tmp_path)).rows] == [1]
  monkeypatch.setattr(jobs, "refuse_other_configs", lambda *_: None)
  with pytest.raises(UserError, match=r"(?s)0/certificate.json is damaged.*1 run failed"):
    run()  # Where it is found finished.


def test_a_sweep_that_dies_leaves_no_process(monkeypatch, tmp_path):
  run, _ = run_with(monkeypatch, tmp_path, {0: (None, 0), 1: (0, 4)}, at_once=2)
  popen, alive = sweep.subprocess.Popen, []
  monkeypatch.setattr(
    sweep.subprocess, "Popen", lambda *a, **k: alive.append(popen(*a, **k)) or alive[-1]
  )

  def full(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(results, "write", full)
  with pytest.raises(OSError, match="No space left"):
    run()
  assert alive[0].poll() == 75  # Told to save and to end.


def test_a_job_that_fails_keeps_no_other_from_running(monkeypatch, tmp_path):
  run, started = run_with(monkeypatch, tmp_path, {0: (137, 0), 1: (3, 0), 2: (0, 4)})
  with pytest.raises(
    UserError, match=r"(?s)exit code 137.*1 run failed; run the same command to retry"
  ):
    run()
  rows = results.read(str(tmp_path)).rows
  assert [(row.seed, row.outcome) for row in rows] == [(1, "diverged"), (2, "finished")]
  assert started == [(0, False), (1, False), (2, False), (2, True)]
  run, started = run_with(monkeypatch, tmp_path, {0: (0, 4), 1: (0, 4), 2: (0, 4)})
  monkeypatch.setattr(jobs, "refuse_other_configs", lambda *_: None)
  assert {row.seed for row in run().rows} == {0, 1, 2}
  assert started == [(0, False), (0, True)]  # What failed; a diverged one would diverge again.


def test_a_job_that_was_stopped_is_no_failure(monkeypatch, tmp_path):
  """By its own time limit, or by a signal to all processes of a job."""
  run, started = run_with(monkeypatch, tmp_path, {0: (75, 0), 1: (0, 75), 2: (0, 4)})
  with pytest.raises(Stopped, match="2 runs stopped early, and saved"):
    run()
  assert [row.seed for row in results.read(str(tmp_path)).rows] == [2] and len(started) == 5


def test_a_sweep_says_how_far_a_run_is(tmp_path):
  workdir = tmp_path / "0"
  task = jobs.Task(jobs.Job("p", "v", "", {}, 0), "x", str(workdir), "", 9.0, "epoch")
  assert sweep.progress_of(task) == 0.0
  workdir.mkdir()
  rows = "".join(json.dumps({"epoch": i / 2, "text": "x" * 100}) + "\n" for i in range(200))
  (workdir / "metrics.jsonl").write_text(rows)
  assert sweep.progress_of(task) == 99.5
  (workdir / "metrics.jsonl").write_text(rows + '{"epoch": 1')  # One is being written.
  assert sweep.progress_of(task) == 99.5


def test_results_stand_as_the_jobs_do():
  module = types.SimpleNamespace(
    SCHEDULES={"short": "", "full": ""},
    get_sweep=lambda _: [jobs.Job("p", v, "", {}, s) for v in ("base", "ioc") for s in (0, 1)],
  )
  keys = [("p", "ioc", "full", 1), ("p", "base", "full", 0), ("p", "other", "full", 0)]
  keys += [("p", "ioc", "short", 0)]
  rows = tuple(results.Result(*key, "", "finished", 1, 1.0, 1) for key in keys)
  found = jobs.in_order(results.Results(rows), module).rows
  assert [row.key for row in found] == [keys[3], keys[1], keys[0], keys[2]]


def test_two_sweeps_do_not_write_one_table(tmp_path, capsys):
  folder, out = folder_of(tmp_path), tmp_path / "out"
  out.mkdir()
  with files.exclusive_lock(str(out / ".lock"), "in use"):
    assert sweep.main([str(folder), f"--workdir={out}"]) == 2
  assert "in use by another sweep" in capsys.readouterr().err


@pytest.mark.slow
def test_a_stopped_sweep_saves_its_runs_and_goes_on(tmp_path, data_dir):
  folder = folder_of(tmp_path)
  start = command(folder, tmp_path, data_dir, "--schedule=long", "--only=twins, base")
  rows = tmp_path / "out" / "long" / "twins" / "base" / "seed_0" / "metrics.jsonl"
  with subprocess.Popen(start, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as first:
    while not rows.exists() or len(rows.read_text().splitlines()) < 3:
      assert first.poll() is None
      time.sleep(0.1)
    first.send_signal(signal.SIGHUP)  # The terminal is closed, or Slurm warns.
    first.send_signal(signal.SIGINT)  # Impatience does no harm.
    _, errors = first.communicate(timeout=60)
  assert first.returncode == 75 and b"Run the same command to continue" in errors
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
    (FILE, "other", "Unknown --schedule=other; expected tiny or long"),
    (
      FILE.replace('"model.size"', '"model.seize"'),
      "tiny",
      "model.seize. Did you mean 'model.size'",
    ),
    (FILE.replace("mixer.py", "mixture.py"), "tiny", "mixture.py is no file; bundled: "),
    (FILE.replace('TITLE = "Twins"', "TITLE = None"), "tiny", "TITLE is None; expected text"),
    (
      FILE.replace("SCHEDULES = {", "SCHEDULES = {} and {"),
      "tiny",
      "SCHEDULES is {}; expected a d",
    ),
    (
      FILE.replace("SCHEDULES = {", "SCHEDULES = [*{").replace('them"}', 'them"}]'),
      "tiny",
      "expected a dict",
    ),
    (FILE.replace("for seed in (0,)", "for seed in (0,) if 1 / seed"), "tiny", "ZeroDivisionError"),
    (FILE.replace("return [", "["), "tiny", "TypeError"),
    (FILE.replace('Job("twins"', "Job(None"), "tiny", "panel of Job.* is None; expected text"),
    (FILE.replace('"twins"', '"--"'), "tiny", "panel of Job.* is '--'; expected text"),
    (FILE.replace('"model.parts": parts}, seed', '"seed": 5}, seed'), "tiny", "set the seed"),
    (
      FILE.replace("parts}, seed", "parts}, str(seed)"),
      "tiny",
      "seed of Job.* is '0'; expected an i",
    ),
    (FILE.replace("parts}, seed", "parts}, seed, (98.1,)"), "tiny", "source of Job.* is .98.1,."),
    (
      FILE.replace('{**changed, "model.parts": parts}', "None"),
      "tiny",
      "overrides of Job.* are None",
    ),
    (FILE.replace("RATE", "-1.0"), "tiny", "learning_rate"),
    (FILE.replace("(0,)", "(0, 0)"), "tiny", "Two jobs share the workdir"),
  ],
)
def test_a_sweep_that_cannot_be_run_is_reported_first(tmp_path, text, schedule, words):
  folder = folder_of(tmp_path, text=text)
  with pytest.raises(UserError, match=words):
    jobs.tasks_of(jobs.read_sweep(str(folder)), schedule, str(tmp_path / "out"))
  assert not (tmp_path / "out").exists()
