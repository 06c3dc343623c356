"""`python -m convex_jax sweep`: many runs by one command, and a report of them.

The folder's sweep.py is pure data: TITLE, SCHEDULES (name: description, the default first)
and `get_sweep(schedule)`, which returns the jobs. Each job is the command that a user would
type, in a process and a workdir of its own below `--workdir`; results.csv, curves.csv,
report.md, report.html and the figures in `--out` are made from every run that has ended. The
same command resumes a sweep: finished runs are not repeated, interrupted ones are resumed, and
a result of another config is never overwritten.

Seeds of a variant compile the same programs, which each training keeps in JAX's persistent cache
(`runtime.keep_compiled_programs`; 60 steps of a DenseNet of 121 layers on one core take 125 s,
then 60).
"""

import argparse
import contextlib
import functools
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from convex_jax import command_line, files, streams
from convex_jax.errors import NOT_PROVED, Diverged, Stopped, UserError
from convex_jax.models.constraints import PENALISED
from convex_jax.runs.workdir import Workdir
from convex_jax.signals import STOP_SIGNALS, sent_to
from convex_jax.studies import figures, jobs, report, results
from convex_jax.studies.jobs import Task

POLL = 0.5  # Seconds between two looks at the processes.
LAST = 4096  # Bytes at the end of metrics.jsonl that hold its last row.


class Started(Protocol):
  """A command that runs: a `subprocess.Popen`, or a job of a cluster."""

  def poll(self) -> int | None: ...
  def terminate(self) -> None: ...
  def wait(self) -> object: ...


Start = Callable[[list[str], str, int], Started]  # Of (arguments, log, slot).


def start_here(arguments: list[str], log: str, slot: int, slots: int) -> Started:
  """Starts a command on this machine, one of `slots` that share its cores and accelerators."""
  environment = dict(os.environ)
  if slots > 1:  # By default JAX takes three quarters of a GPU's memory.
    environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{0.9 / slots:.3f}")
  with open(log, "a") as file:
    process = subprocess.Popen(
      arguments,
      stdout=file,
      stderr=subprocess.STDOUT,
      env=environment,
      start_new_session=True,  # Ctrl-C reaches the sweep alone, which stops its runs.
    )
  if slots > 1 and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) >= slots:  # XLA starts a thread for each core that it may use.
      with contextlib.suppress(ProcessLookupError):
        os.sched_setaffinity(process.pid, cores[slot::slots])
  return process


class Process:
  """The process of a task: its training, then its certification."""

  def __init__(self, task: Task, data_dir: str, start: Start, slot: int):
    self.task, self.slot, self._start = task, slot, start
    os.makedirs(task.workdir, exist_ok=True)
    self.log = Workdir(task.workdir).log_file
    options = [f"--config.data.dir={data_dir}"] if data_dir else []
    self._run("train", *task.job.arguments(), *options)
    self._certifies = False

  def _run(self, command: str, *arguments: str) -> None:
    line = ["convex_jax", command, *arguments, f"--workdir={self.task.workdir}"]
    self.started = self._start([sys.executable, "-m", *line], self.log, self.slot)

  def poll(self) -> str | None:
    """None while it runs, then its outcome: "finished", "diverged", or "stopped".

    Raises `UserError` where it failed.
    """
    code = self.started.poll()
    if code is None:
      return None
    if not self._certifies and code == Diverged.code:
      return "diverged"
    if code == Stopped.code:
      return "stopped"
    if code and not (self._certifies and code == NOT_PROVED):  # Not proved is a result.
      with open(self.log, errors="replace") as file:
        tail = "\n  ".join(["", *file.read().splitlines()[-8:]])
      raise UserError(f"{self.task.workdir} ended with exit code {code}, see {self.log}:{tail}")
    if not _lacks_certificate(self.task.workdir):
      return "finished"
    if self._certifies:  # The verdict is in the log; the storage did not take it.
      raise UserError(f"{self.task.workdir} has no certificate, see {self.log}")
    self._certifies = True
    self._run("certify")
    return None


def progress_of(task: Task) -> float:
  """Epochs or steps of a task that are done, by the last row of its metrics."""
  try:
    with open(Workdir(task.workdir).metrics_file, "rb") as file:
      file.seek(max(0, file.seek(0, os.SEEK_END) - LAST))
      lines = file.read().split(b"\n")
    return json.loads(lines[-2])[task.unit]
  except (OSError, ValueError, LookupError):  # None yet, or one is being written.
    return 0.0


def run_all(
  tasks: list[Task], out: str, data_dir: str, at_once: int, start: Start | None = None
) -> results.Results:
  """Runs the tasks that have no result yet, `at_once` at a time; writes each result into `out`.

  `start` starts a command, by default on this machine.

  A job that fails does not keep the others from running. Raises `UserError` at the end if
  any failed, `Stopped` where any was stopped, and after a signal (`signals.STOP_SIGNALS`), once
  all processes have ended.
  """
  found = results.read(out)
  jobs.refuse_other_configs(tasks, found)
  for task in tasks:
    workdir, known = Workdir(task.workdir), {row.key for row in found.rows}
    ended = workdir.exists() and workdir.rows("final")
    if task.key not in known and ended and not _lacks_certificate(task.workdir):
      with contextlib.suppress(UserError):  # Told below, when it is run again.
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
  start = start or functools.partial(start_here, slots=at_once)
  processes: dict[Process, Any] = {}
  free, failures, stopped = list(range(at_once)), [], 0
  received: list[int] = []
  handled = sent_to(received.append, STOP_SIGNALS)
  with progress, handled, _stopped_at_the_end(processes):
    total = progress.add_task("runs", total=len(tasks), completed=len(tasks) - len(waiting))
    while (waiting or processes) and not received:
      while waiting and free:
        task = waiting.pop(0)
        try:
          process = Process(task, data_dir, start, free[0])
        except UserError as error:  # As below.
          failures.append(words := f"{task.workdir}: {error}")
          progress.advance(total)
          progress.console.print(words, markup=False, soft_wrap=True)
          continue
        del free[0]
        words = f"  {process.task.name}: {process.task.unit}"
        processes[process] = progress.add_task(words, total=process.task.total)
      time.sleep(POLL)
      for process, line in list(processes.items()):
        progress.update(line, completed=progress_of(process.task))
        try:
          outcome = process.poll()
          if outcome is None:
            continue
          if outcome == "stopped":
            stopped, words = stopped + 1, f"{process.task.name}: stopped and saved"
          else:
            found = _add(found, process.task, outcome, out)
            words = _line(found.rows[-1])
        except UserError as error:  # Of this run, which keeps no other from running.
          failures.append(words := str(error))
        del processes[process]
        free.append(process.slot)
        progress.remove_task(line)
        progress.advance(total)
        progress.console.print(words, markup=False, soft_wrap=True)
  if received:
    raise Stopped("Stopped; all runs saved. Run the same command to continue.")
  if failures:
    count = f"{len(failures)} run{'s' * (len(failures) > 1)} failed"
    raise UserError("\n".join([*failures, f"{count}; run the same command to retry."]))
  if stopped:
    count = f"{stopped} run{'s' * (stopped > 1)} stopped early"
    raise Stopped(f"{count}, and saved. Run the same command to continue.")
  return found


@contextlib.contextmanager
def _stopped_at_the_end(processes: Iterable[Process]) -> Iterator[None]:
  """Ends the processes that still run at the end, whatever ends it: they save first."""
  try:
    yield
  finally:
    for process in processes:
      process.started.terminate()
    for process in processes:
      process.started.wait()


def _lacks_certificate(path: str) -> bool:
  """Whether a finished run is still to be certified; one with weights of any sign need not be convex.

  So is one whose certificate is damaged, or of another step: certifying writes it again.
  """
  workdir = Workdir(path)
  model = workdir.description()["config"]["model"]
  if model["parts"] == "base" or model["constraint"] == PENALISED:
    return False
  try:
    return workdir.final_certificate() is None
  except UserError:
    return True


def _add(found: results.Results, task: Task, outcome: str, out: str) -> results.Results:
  """The results with that of a task; also writes them into `out`."""
  job = task.job
  new = results.of_workdir(task.workdir, job.panel, job.variant, task.schedule, job.source, outcome)
  found += new
  results.write(found, out)
  return found


def _line(row: results.Result) -> str:
  name = f"{row.panel}, {row.variant}, seed {row.seed}"
  if row.outcome != "finished":
    return f"{name}: {row.outcome} at epoch {row.epochs:.1f}"
  words = [f"train {100 * row.train_accuracy:.2f} %, test {100 * row.test_accuracy:.2f} %"]
  words += filter(None, [f"{row.seconds:.0f} s", row.certificate])
  return f"{name}: {', '.join(words)}"


def main(argv: list[str] | None = None) -> int:
  """Runs a sweep and reports it; returns 0, 2 for invalid input, 75 if it was stopped."""
  parser = command_line.parser(
    "sweep",
    "Train and certify every network of a comparison, and write one report of all of them. The\n"
    "same command resumes a sweep that was stopped. The folder's sweep.py lists the runs.\n"
    "Exit codes: 0 done; 2 invalid input, or a run failed; 75 stopped and saved.",
    "python -m convex_jax sweep experiments/mlp --schedule=digits --at_once=2",
  )
  parser.add_argument(
    "folder", type=command_line.path, help="folder of a sweep.py, such as experiments/mlp"
  )
  what = parser.add_argument_group("what to run")
  what.add_argument("--schedule", default="", help="a schedule of the sweep (default: its first)")
  what.add_argument(
    "--only", default="", help="only runs whose name contains this: 'MLP on MNIST, ioc, seed 0'"
  )
  what.add_argument("--list", action="store_true", help="print the runs' options, and end")
  where = parser.add_argument_group("where")
  where.add_argument(
    "--workdir", type=command_line.path, help="folder of the runs (default: runs/NAME)"
  )
  where.add_argument(
    "--out", type=command_line.path, help="folder of the report (default: the workdir)"
  )
  where.add_argument(
    "--data_dir", type=command_line.path, help="folder of the data (default: TFDS's)"
  )
  how = parser.add_argument_group("how")
  how.add_argument(
    "--at_once",
    type=command_line.integer(1),
    help="simultaneous runs (default: 1; with --slurm, all)",
  )
  how.add_argument(
    "--slurm",
    action="store_true",
    help="submit the runs as jobs of Slurm, from a folder that its nodes share",
  )
  how.add_argument(
    "--slurm_options",
    default={},
    type=_options,
    metavar="KEY=VALUE,...",
    help="of submitit's executor, such as timeout_min=240,gpus_per_node=1,slurm_partition=gpu;"
    " cluster=local submits to this machine, to try it",
  )
  return command_line.exit_code(_sweep, parser.parse_args(argv), console_patience=streams.PATIENCE)


def _options(text: str) -> dict[str, int | str]:
  pairs = [part.partition("=") for part in text.split(",")]
  if not all(key and value for key, _, value in pairs):
    raise argparse.ArgumentTypeError(f"{text!r} given; expected KEY=VALUE,KEY=VALUE,...")
  return {key: int(value) if value.isdecimal() else value for key, _, value in pairs}


def _cluster(args: argparse.Namespace) -> Start | None:
  """What submits to Slurm; None where the runs are to start here."""
  if not args.slurm:
    if args.slurm_options:
      raise UserError("--slurm_options is given without --slurm")
    return None
  try:
    from convex_jax.studies import slurm  # Of an extra.
  except ModuleNotFoundError as error:
    raise UserError(
      f"--slurm needs {error.name}, which is not installed: pip install 'convex_jax[slurm]'"
    ) from error
  return slurm.Cluster(args.slurm_options).start


def _sweep(args: argparse.Namespace) -> int:
  jax.config.update("jax_platforms", "cpu")  # Leave the accelerator to the runs.
  workdir = args.workdir or os.path.join("runs", os.path.basename(os.path.abspath(args.folder)))
  out = args.out or workdir
  files.refuse_url("--workdir", workdir)  # Logs of its runs are appended to.
  module = jobs.read_sweep(args.folder)
  every = jobs.tasks_of(module, args.schedule or next(iter(module.SCHEDULES)), workdir)
  tasks = [task for task in every if args.only in task.name]
  if not tasks:
    raise UserError(
      f"--only={args.only} matches none of {len(every)} runs, of which the first is {every[0].name}"
    )
  if args.list:
    for task in tasks:
      print(shlex.join([*task.job.arguments(), f"--workdir={task.workdir}"]))
    return 0
  figures.require_matplotlib()  # Before hours of training, not after them.
  start, at_once = _cluster(args), args.at_once or (len(tasks) if args.slurm else 1)
  files.refuse_unwritable("--out", out)
  os.makedirs(out, exist_ok=True)
  with files.exclusive_lock(os.path.join(out, ".lock"), f"{out} is in use by another sweep"):
    found = jobs.in_order(run_all(tasks, out, args.data_dir, at_once, start), module)
    print(report.write_report(found, out, module.TITLE, jobs.introduction(found, module)))
  return 0
