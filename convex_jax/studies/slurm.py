"""Commands of a sweep as jobs of Slurm, submitted by `submitit`.

A job runs one command in the environment and the working folder of the sweep; both have to lie
where the nodes see them. Before a time limit or a preemption Slurm signals the job: the command
saves and ends, and is queued again, to go on from there. A job whose node is lost fails, and the
sweep's next call submits it again. Where the sweep itself was lost, that call finds the jobs that
still run.
"""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import submitit
from submitit.core.utils import FailedJobError

from convex_jax.errors import Stopped, UserError

JOBS = {"slurm": submitit.SlurmJob, "local": submitit.LocalJob}
MINUTES = 24 * 60  # The time limit of a job, unless the options say otherwise.
POLL = 1.0  # Seconds between two questions whether a job has ended.
# States of jobs that wait or run; UNKNOWN, where a cluster keeps no accounts, is none of them.
ALIVE = {"PENDING", "RUNNING", "REQUEUED", "COMPLETING", "CONFIGURING", "SUSPENDED"}
TIMEOUTS = 1000  # How often a job may meet it: each time it has come further.


class Command:
  """A command in a process of its own, as a function to submit; returns its exit code."""

  def __init__(self, arguments: Sequence[str], log: str):
    self._arguments, self._log, self._folder = list(arguments), log, os.getcwd()
    self._process: subprocess.Popen[bytes] | None = None

  def __call__(self) -> int:
    with open(self._log, "a") as file:
      self._process = subprocess.Popen(
        self._arguments, stdout=file, stderr=subprocess.STDOUT, cwd=self._folder
      )
    try:
      return self._process.wait()
    finally:
      self._end()

  def checkpoint(self) -> submitit.helpers.DelayedSubmission:
    """Called on Slurm's signal: ends the command, which saves, and says what to queue again."""
    self._end()
    self._process = None  # Cannot be pickled.
    return submitit.helpers.DelayedSubmission(self)

  def _end(self) -> None:
    if self._process is None or self._process.returncode is not None:
      return
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
      # Not by the methods of Popen: a signal's handler would wait for the lock of the call that it
      # interrupted.
      os.kill(self._process.pid, signal.SIGTERM)
      os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)


class Submitted:
  """A command as a job, with those methods of a `subprocess.Popen` that a sweep uses."""

  def __init__(self, executor: Any, command: Command, log: str, job: Any = None):
    self._executor, self._command, self._log = executor, command, log
    self._is_cancelled = False
    self._job = job or self._submit()

  def _submit(self) -> Any:
    try:
      return self._executor.submit(self._command)
    except FailedJobError as error:  # Of sbatch: a partition, a limit of jobs.
      raise UserError(f"Slurm refused the job: {str(error).strip()}") from error

  def poll(self) -> int | None:
    """None while the job waits or runs; then the exit code, 1 where the job was lost.

    A command that was stopped from outside, by a preemption, is submitted again.
    """
    if not self._job.done():
      return None
    try:
      code = self._job.result()
    except Exception as error:  # Whatever the job raised, or that it left no result.
      with open(self._log, "a") as file:
        file.write(f"Job {self._job.job_id} ended as {self._job.state}: {error}\n")
      return 1
    if code != Stopped.code or self._is_cancelled:
      return code
    # Stopped from outside. Of a preempted job Slurm may queue itself what it stopped.
    state = state_of(self._job)
    if state in ALIVE:
      return None
    if state.startswith("CANCELLED"):
      return code
    self._job = self._submit()
    return None

  def terminate(self) -> None:
    """Asks the command to save and to end."""
    self._is_cancelled = True
    if not self._job.done():
      self._job.cancel(check=False)

  def wait(self) -> None:
    """Waits until the job has ended; one that never started leaves no result."""
    while not self._job.done() and state_of(self._job) in ALIVE:
      time.sleep(POLL)


class Cluster:
  """Where jobs are submitted.

  Args:
    options: parameters of submitit's `AutoExecutor`, as {"timeout_min": 240, "gpus_per_node": 1,
      "slurm_partition": "gpu"}. With {"cluster": "local"} jobs are processes of this machine, by
      submitit's stand-in for Slurm.

  Raises:
    UserError: there is no Slurm, or an option is unknown.
  """

  def __init__(self, options: Mapping[str, Any]):
    self._options = {"timeout_min": MINUTES, "name": "convex_jax", **options}
    name = self._name = self._options.pop("cluster", "slurm")
    for key in ("nodes", "tasks_per_node"):
      if self._options.get(key, 1) != 1:
        raise UserError(
          f"--slurm_options: {key}={self._options[key]}; a run of a sweep is one process"
        )
    if name not in JOBS:
      raise UserError(f"--slurm_options: cluster={name}; expected {' or '.join(JOBS)}")
    if name == "slurm" and shutil.which("sbatch") is None:
      raise UserError(
        "--slurm: there is no sbatch on this machine; run the sweep on a login node of the cluster,"
        " or without --slurm"
      )
    with tempfile.TemporaryDirectory() as folder:
      self._executor(folder)  # Wrong options are refused before anything starts.

  def start(self, arguments: Sequence[str], log: str, slot: int = 0) -> Submitted:
    """Submits `python -m convex_jax COMMAND ...`, or finds its job of Slurm that a lost sweep submitted.

    The job's output is appended to `log`; submitit's files lie beside it, in jobs/COMMAND.
    """
    del slot  # Jobs share no machine.
    folder = os.path.join(os.path.dirname(log), "jobs", arguments[3])
    job = still_running(folder, JOBS[self._name])
    return Submitted(self._executor(folder), Command(arguments, log), log, job)

  def _executor(self, folder: str) -> submitit.AutoExecutor:
    executor = submitit.AutoExecutor(folder, cluster=self._name, slurm_max_num_timeout=TIMEOUTS)
    try:
      executor.update_parameters(**self._options)
    except (AssertionError, NameError, TypeError, ValueError) as error:
      raise UserError(f"--slurm_options: {error}") from error
    return executor


def still_running(folder: str, job_class: Callable[[str, str], Any]) -> Any:
  """The job that another process submitted into this folder; None if there is none, or it ended."""
  suffix = "_submitted.pkl"
  for path in pathlib.Path(folder).glob(f"*{suffix}"):
    job = job_class(folder, path.name.removesuffix(suffix))
    if not job.done() and state_of(job) in ALIVE:
      return job
  return None


def state_of(job: Any) -> str:
  """Slurm's state of a job, asked for now: submitit's own is up to ten minutes old."""
  info = job.get_info(mode="force")
  return info.get("State") or info.get("jobState") or "UNKNOWN"
