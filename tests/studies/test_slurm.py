"""Jobs of a cluster, by submitit's local executor: ended, preempted, lost, found again."""

import os
import pathlib
import shutil
import signal
import sys
import time
from typing import ClassVar

import pytest

from convex_jax.errors import UserError
from convex_jax.studies import jobs, results, sweep
from tests.studies.test_sweep import command, folder_of, found_workdirs
from tests.support import PATIENCE, ROOT

slurm = pytest.importorskip("convex_jax.studies.slurm", reason="submitit is not installed")
LOCAL = {"cluster": "local", "timeout_min": 10}
# Like a training: saves when it is told to end, and goes on where it was.
TRAINING = """
import os, signal, sys, time
saved = {saved!r}
def save(*_):
  open(saved, "w").close()
  sys.exit(75)
signal.signal(signal.SIGTERM, save)
print("started", os.getpid(), flush=True)
if os.path.exists(saved):
  sys.exit(0)
time.sleep({seconds})
"""


@pytest.fixture(autouse=True)
def as_on_a_cluster(monkeypatch):
  """submitit waits so many seconds for the result of a job that has ended without one.

  It cancels its local jobs by SIGINT, which commands that a script runs in the background, such as
  `make test &`, ignore.
  """
  monkeypatch.setattr(slurm.submitit.LocalJob, "_results_timeout_s", 1)
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


def start(tmp_path, seconds=PATIENCE):
  script = TRAINING.format(saved=str(tmp_path / "saved"), seconds=seconds)
  line = [sys.executable, "-c", script, "train"]
  return slurm.Cluster(LOCAL).start(line, str(tmp_path / "log.txt"))


def wait_for(found):
  until = time.monotonic() + PATIENCE
  while (what := found()) is None:
    assert time.monotonic() < until
    time.sleep(0.05)
  return what


def pid_of(tmp_path, start=0):
  """The process id that the command's n-th start wrote into the log."""

  def read():
    path = tmp_path / "log.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    ids = [int(line.split()[1]) for line in lines if line.startswith("started")]
    return ids[start] if len(ids) > start else None

  return wait_for(read)


def parent_of(pid):
  status = pathlib.Path(f"/proc/{pid}/status").read_text()
  return int(next(line for line in status.splitlines() if line.startswith("PPid:")).split()[1])


def test_a_job_ends_with_the_exit_code_of_its_command(tmp_path):
  job = start(tmp_path, seconds=0)
  assert wait_for(job.poll) == 0 and pid_of(tmp_path)
  assert list((tmp_path / "jobs" / "train").glob("*_result.pkl"))


def test_a_preempted_job_saves_and_is_queued_again(tmp_path):
  job = start(tmp_path)
  first = pid_of(tmp_path)
  os.kill(parent_of(first), signal.SIGUSR2)  # As Slurm signals the tasks of a job.
  assert wait_for(job.poll) == 0
  assert (tmp_path / "saved").exists() and pid_of(tmp_path, 1) != first


def test_a_command_that_was_preempted_is_submitted_again(tmp_path):
  """Where Slurm only says SIGTERM, to all processes of the job."""
  job = start(tmp_path)
  os.kill(pid_of(tmp_path), signal.SIGTERM)
  assert wait_for(job.poll) == 0
  assert (tmp_path / "saved").exists() and pid_of(tmp_path, 1)


def test_a_lost_job_is_told_and_can_be_tried_again(tmp_path):
  job = start(tmp_path)
  training = pid_of(tmp_path)
  os.kill(parent_of(training), signal.SIGKILL)
  assert wait_for(job.poll) == 1
  assert f"Job {job._job.job_id} ended as" in (tmp_path / "log.txt").read_text()
  os.kill(training, signal.SIGTERM)  # On a cluster it is lost with its node.
  wait_for(lambda: (tmp_path / "saved").exists() or None)
  assert wait_for(start(tmp_path).poll) == 0


def test_a_job_that_is_cancelled_saves_and_stays_so(tmp_path):
  job = start(tmp_path)
  pid_of(tmp_path)
  job.terminate()
  job.wait()
  assert job.poll() in (1, 75)
  wait_for(lambda: (tmp_path / "saved").exists() or None)
  assert (tmp_path / "log.txt").read_text().count("started") == 1


class Job:
  """A job of Slurm, by what its accounts say of it."""

  states: ClassVar[dict[str, str]] = {}

  def __init__(self, folder, job_id, result=None):
    self.job_id, self._result = job_id, result

  def done(self):
    return self._result is not None

  def result(self):
    return self._result

  def get_info(self, mode):
    assert mode == "force"
    return {"State": self.states.get(self.job_id, "")}


def test_a_job_that_still_runs_is_not_submitted_twice(tmp_path, monkeypatch):
  states = {"16": "COMPLETED", "17": "PENDING", "18": "PREEMPTED"}  # And one without accounts.
  monkeypatch.setattr(Job, "states", states)
  assert slurm.still_running(str(tmp_path / "none"), Job) is None
  for name in ("16", "18", "19"):
    (tmp_path / f"{name}_submitted.pkl").touch()
  assert slurm.still_running(str(tmp_path), Job) is None
  (tmp_path / "17_submitted.pkl").touch()
  assert slurm.still_running(str(tmp_path), Job).job_id == "17"


class Executor:
  """Hands out the jobs that it is given; then sbatch refuses."""

  def __init__(self, *jobs):
    self.jobs = list(jobs)

  def submit(self, _):
    if not self.jobs:
      raise slurm.FailedJobError("sbatch: error: job violates a limit")
    return self.jobs.pop(0)


@pytest.mark.parametrize(
  ("state", "code", "left"),
  [
    ("COMPLETED", None, 0),  # Preempted: submitted again.
    ("REQUEUED", None, 1),  # By Slurm itself.
    ("CANCELLED by 1000", 75, 1),  # By the user.
  ],
)
def test_a_job_that_was_stopped_is_submitted_again_where_nobody_else_does(
  tmp_path, monkeypatch, state, code, left
):
  monkeypatch.setattr(Job, "states", {"1": state})
  executor = Executor(Job("", "1", 75), Job("", "2"))
  job = slurm.Submitted(executor, None, str(tmp_path / "log.txt"))
  assert job.poll() == code and len(executor.jobs) == left


def test_a_job_that_slurm_refuses_keeps_no_other_from_running(tmp_path):
  task = jobs.Task(jobs.Job("p", "v", "", {}, 0), "x", str(tmp_path / "0"), "", 1, "step")

  def start(line, log, slot):
    return slurm.Submitted(Executor(), None, log)

  with pytest.raises(UserError, match=r"(?s)refused the job: sbatch.*1 run failed; run"):
    sweep.run_all([task], str(tmp_path), "", 1, start)


@pytest.mark.parametrize(
  ("options", "words"),
  [
    (["--slurm"], "there is no sbatch on this machine"),
    (["--slurm_options=cluster=local"], "is given without --slurm"),
    (["--slurm", "--slurm_options=cluster=k8s"], "cluster=k8s; expected slurm or local"),
    (["--slurm", "--slurm_options=cluster=local,slurm_qeue=x"], "slurm_qeue"),
    (["--slurm", "--slurm_options=cluster=local,timeout_min=1h"], "timeout_min"),
    (
      ["--slurm", "--slurm_options=cluster=local,nodes=2"],
      "nodes=2; a run of a sweep is one process",
    ),
  ],
)
def test_wrong_options_are_one_error(tmp_path, capsys, monkeypatch, options, words):
  monkeypatch.setattr(shutil, "which", lambda _: None)
  line = [str(ROOT / "experiments" / "mlp"), f"--workdir={tmp_path / 'out'}"]
  assert sweep.main([*line, *options]) == 2
  assert words in capsys.readouterr().err
  assert not (tmp_path / "out").exists()


def test_without_submitit_there_is_one_sentence(tmp_path, capsys, monkeypatch):
  monkeypatch.setitem(sys.modules, "submitit", None)
  monkeypatch.delitem(sys.modules, "convex_jax.studies.slurm")
  monkeypatch.delattr("convex_jax.studies.slurm", raising=False)
  assert sweep.main([str(ROOT / "experiments" / "mlp"), "--slurm"]) == 2
  assert "pip install 'convex_jax[slurm]'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_sweep_by_jobs_trains_and_certifies(tmp_path, data_dir, monkeypatch, capsys):
  monkeypatch.chdir(ROOT)
  line = command(folder_of(tmp_path), tmp_path, data_dir, "--slurm")[4:]
  line += ["--slurm_options=cluster=local,timeout_min=60"]
  assert sweep.main(line) == 0, capsys.readouterr().err
  found = results.read(str(tmp_path / "out"))
  assert [row.variant for row in found.rows] == ["base", "paper"]
  assert found.rows[1].certificate and not found.rows[0].certificate
  for workdir in found_workdirs(tmp_path):
    assert list((workdir / "jobs" / "train").glob("*_result.pkl"))
