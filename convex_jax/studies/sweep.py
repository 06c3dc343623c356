"""Many runs by one command: `python -m convex_jax.sweep experiments/mlp`.

The folder's sweep.py is pure data: TITLE, SCHEDULES (name: what it is, the default first)
and `get_sweep(schedule)`, which returns the jobs. Each job is the command that a user would
type, in a process and a workdir of its own below `--workdir`; results.csv, curves.csv,
report.md, report.html and the pictures in `--out` are made from all that has ended. The same
command again goes on: what is finished is not run again, what was interrupted resumes, and a result
that was made from another config is never overwritten.

Seeds of a variant compile the same programs, which each training keeps in JAX's persistent cache
(`startup.keep_compiled_programs`; 60 steps of a DenseNet of 121 layers on one core take 125 s,
then 60).
"""

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from convex_jax import files
from convex_jax.errors import Diverged, Ended, NotProved, Stopped, UserError
from convex_jax.runs import workdir as describe
from convex_jax.studies import jobs, report, results
from convex_jax.studies.jobs import Task

POLL = 0.5  # Seconds between two looks at the processes.
LAST = 4096  # Bytes of metrics.jsonl that hold its last row.


class Process:
  """A task's process: its training, then its certificate."""

  def __init__(self, task: Task, data_dir: str, slot: int, slots: int):
    self.task, self.slot, self._slots = task, slot, slots
    os.makedirs(task.workdir, exist_ok=True)
    self.log = os.path.join(task.workdir, "log.txt")
    command = ["convex_jax", "train", *task.job.arguments(), f"--workdir={task.workdir}"]
    self._start(command + ([f"--config.data.dir={data_dir}"] if data_dir else []))
    self._certifies = False

  def _start(self, command: list[str]) -> None:
    environment = dict(os.environ)
    if self._slots > 1:  # Of a GPU's memory JAX takes three quarters by default.
      environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{0.9 / self._slots:.3f}")
    with open(self.log, "a") as file:
      self._process = subprocess.Popen(
        [sys.executable, "-m", *command],
        stdout=file,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,  # A Ctrl-C is the sweep's, which tells its runs.
      )
    if self._slots > 1 and hasattr(os, "sched_setaffinity"):
      cores = sorted(os.sched_getaffinity(0))
      if len(cores) >= self._slots:  # XLA starts a thread for each core that it may use.
        with contextlib.suppress(ProcessLookupError):
          os.sched_setaffinity(self._process.pid, cores[self.slot :: self._slots])

  def poll(self) -> str | None:
    """None while it runs, then how it ended: "finished", "diverged", or what went wrong."""
    code = self._process.poll()
    if code is None:
      return None
    if code == Diverged.code and not self._certifies:
      return "diverged"
    if code and not (self._certifies and code == NotProved.code):  # Not proved: a result as well.
      return f"{self.task.workdir} ended with exit code {code}, see {self.log}:{self._tail()}"
    if not _lacks_certificate(self.task.workdir):
      return "finished"
    if self._certifies:
      return f"{self.task.workdir} has no certificate, see {self.log}:{self._tail()}"
    self._certifies = True
    self._start(["convex_jax", "certify", f"--workdir={self.task.workdir}"])
    return None

  def _tail(self) -> str:
    with open(self.log, errors="replace") as file:
      return "\n  ".join(["", *file.read().splitlines()[-8:]])

  def progress(self) -> float:
    """How far it is, in its task's unit, by its last row."""
    try:
      with open(os.path.join(self.task.workdir, "metrics.jsonl"), "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - LAST))
        lines = file.read().split(b"\n")
      return json.loads(lines[-2])[self.task.unit]
    except (OSError, ValueError, LookupError):  # None yet, or one is being written.
      return 0.0

  def stop(self) -> None:
    """Asks it to save and end."""
    if self._process.poll() is None:
      self._process.send_signal(signal.SIGTERM)

  def wait(self) -> None:
    """Returns when it has ended."""
    self._process.wait()


def run_all(tasks: list[Task], out: str, data_dir: str, at_once: int) -> results.Results:
  """Runs what is not finished, `at_once` at a time; writes the results into `out` after each.

  A job that fails does not keep the others from running. Raises `UserError` at the end where
  some did, `Stopped` after SIGTERM, SIGINT or SIGHUP once all processes have ended.
  """
  found = results.read(out)
  jobs.refuse_other_configs(tasks, found)
  for task in tasks:
    if task.key not in {row.key for row in found.rows} and _is_finished(task):
      found = _add(found, task, "finished", out)
  done = {row.key for row in found.rows}
  waiting = [task for task in tasks if task.key not in done]
  progress = Progress(
    TextColumn("{task.description}", markup=False),
    BarColumn(),
    TextColumn("{task.completed:g}/{task.total:g}"),
    TimeElapsedColumn(),
    console=Console(highlight=False),
  )
  processes: dict[Process, Any] = {}
  free, failures = list(range(at_once)), []
  with progress, _asked_to_stop() as asked:
    total = progress.add_task("runs", total=len(tasks), completed=len(tasks) - len(waiting))
    while (waiting or processes) and not asked:
      while waiting and free:
        process = Process(waiting.pop(0), data_dir, free.pop(0), at_once)
        words = f"  {process.task.name}: {process.task.unit}"
        processes[process] = progress.add_task(words, total=process.task.total)
      time.sleep(POLL)
      for process, line in list(processes.items()):
        progress.update(line, completed=process.progress())
        outcome = process.poll()
        if outcome is None:
          continue
        del processes[process]
        free.append(process.slot)
        progress.remove_task(line)
        progress.advance(total)
        if outcome in ("finished", "diverged"):
          found = _add(found, process.task, outcome, out)
          outcome = _line(found.rows[-1])
        else:
          failures.append(outcome)
        progress.console.print(outcome, markup=False, soft_wrap=True)
    for process in processes:
      process.stop()
    for process in processes:
      process.wait()
  if asked:
    raise Stopped("stopped, and so are its runs; the same command goes on")
  if failures:
    raise UserError(
      "\n".join([*failures, f"{len(failures)} runs failed; the same command tries again"])
    )
  return found


def _is_finished(task: Task) -> bool:
  return results.is_finished(task.workdir, task.digest) and not _lacks_certificate(task.workdir)


def _lacks_certificate(workdir: str) -> bool:
  """Whether a finished run is still to be certified: a base twin is not meant to be convex."""
  parts = describe.Workdir(workdir).description()["config"]["model"]["parts"]
  return parts != "base" and not os.path.exists(os.path.join(workdir, "certificate.json"))


def _add(found: results.Results, task: Task, outcome: str, out: str) -> results.Results:
  """The results with a task's; also in `out`."""
  job = task.job
  new = results.of_workdir(task.workdir, job.panel, job.variant, task.schedule, job.source, outcome)
  found += new
  results.write(found, out)
  return found


def _line(row: results.Result) -> str:
  name = f"{row.panel}, {row.variant}, seed {row.seed}"
  if row.outcome != "finished":
    return f"{name}: {row.outcome} in epoch {row.epochs:.1f}"
  words = f"train {100 * row.train_accuracy:.2f} %, test {100 * row.test_accuracy:.2f} %"
  return f"{name}: {words}, {row.seconds:.0f} s" + (
    f", {row.certificate}" if row.certificate else ""
  )


@contextlib.contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
  """Within, SIGTERM, SIGINT and SIGHUP are taken down in a list, and do nothing else."""
  asked: list[int] = []
  before = {}
  for name in ("SIGTERM", "SIGINT", "SIGHUP"):
    number = getattr(signal, name, None)  # Windows knows no SIGHUP; under nohup it is ignored.
    if number is not None and signal.getsignal(number) != signal.SIG_IGN:
      before[number] = signal.signal(number, lambda number, _: asked.append(number))
  try:
    yield asked
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def main(argv: list[str] | None = None) -> int:
  """Runs a sweep and reports it; returns 0, 2 after a mistake, 75 where it was stopped."""
  parser = argparse.ArgumentParser("python -m convex_jax.sweep", description=main.__doc__)
  parser.add_argument("folder", help="folder of a sweep.py")
  parser.add_argument("--schedule", default="", help="one of the sweep's; default: its first")
  parser.add_argument("--workdir", default="", help="folder of its runs; default: runs/NAME")
  parser.add_argument("--out", default="", help="folder of the results; default: the workdir")
  parser.add_argument("--only", default="", help="jobs whose panel and variant hold this text")
  parser.add_argument("--at_once", type=int, default=1, help="runs at a time, on one device")
  parser.add_argument("--data_dir", default="", help="of the data; default: TFDS's")
  parser.add_argument("--list", action="store_true", help="tell what would be run, and end")
  args = parser.parse_args(argv)
  name = os.path.basename(os.path.abspath(args.folder))
  workdir = args.workdir or os.path.join("runs", name)
  out = args.out or workdir
  sys.path.insert(0, os.getcwd())  # A config imports `configs.base` from where it is run.
  jax.config.update("jax_platforms", "cpu")  # The accelerator is for the runs.
  try:
    if args.at_once < 1:
      raise UserError(f"--at_once={args.at_once} is out of range; allowed: 1 or more")
    module = jobs.read_sweep(args.folder)
    schedule = args.schedule or next(iter(module.SCHEDULES))
    every = jobs.tasks_of(module, schedule, workdir)
    tasks = [task for task in every if args.only in f"{task.job.panel}, {task.job.variant}"]
    if not tasks:
      raise UserError(f"--only={args.only} matches none of {len(every)} jobs; see --list")
    if args.list:
      for task in tasks:
        print(shlex.join([*task.job.arguments(), f"--workdir={task.workdir}"]))
      return 0
    os.makedirs(out, exist_ok=True)
    with files.exclusive_lock(os.path.join(out, ".lock"), f"{out} is in use by another sweep"):
      found = jobs.in_order(run_all(tasks, out, args.data_dir, args.at_once), module)
      ran = {row.schedule for row in found.rows}
      words = [f"Schedule `{n}`: {what}" for n, what in module.SCHEDULES.items() if n in ran]
      report.write_report(found, out, module.TITLE, "\n\n".join(words))
  except OSError as error:
    print(f"{error.filename or out}: {error.strerror}", file=sys.stderr)
    return UserError.code
  except Ended as end:
    print(end, file=sys.stderr)
    return end.code
  print(os.path.join(out, "report.html"))
  return 0
