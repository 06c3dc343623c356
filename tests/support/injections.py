"""Faults and what is left of a run after them: for tests, a few of each; for `experiments/faults`, all.

Each function injects `n` faults of a kind and returns a `Result`. Runs are tiny Mixers on the
embedded digits, in processes of their own (`victim.py`) where a process is to be lost.
"""

import collections
import contextlib
import dataclasses
import errno
import itertools
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
from tensorboard.compat.proto import event_pb2

import convex_jax
from convex_jax.errors import UserError
from convex_jax.runs import manifest
from convex_jax.runs.workdir import Workdir
from convex_jax.training import runtime
from tests.support import PATIENCE, ROOT

SETTINGS = [
  "--config=configs/mixer_ioc.py:digits",
  "--config.model.size=tiny",
  "--config.model.patch=4",
  "--config.model.depth=1",
  "--config.batch_size=16",
  "--config.data.train_fraction=0.2",  # 287 examples: 18 steps an epoch.
  "--config.ema_decay=0.9",
  "--config.log.every_steps=5",
  "--config.eval.every_epochs=1.0",
  "--config.checkpoint.every_steps=7",
]
SAVE_EVERY, EXAMPLES, BATCH = 7, 287, 16


@dataclasses.dataclass
class Result:
  """What a row of the table holds; None where a column has no meaning."""

  injected: int = 0
  survived: int = 0
  redone: int | None = None  # Steps done again after a fault, at most.
  lost: int | None = None  # Examples that an epoch lacks.
  repeated: int | None = None  # Examples that an epoch has twice.
  seconds: list[float] = dataclasses.field(default_factory=list)  # Command to first step beyond.
  note: str = ""

  @property
  def all_survived(self) -> bool:
    """Something was injected, all of it survived, no example was lost or came twice."""
    return self.injected == self.survived > 0 and not self.lost and not self.repeated

  def add(self, survived: bool, seconds: float | None = None, note: str = "") -> None:
    """One fault more."""
    self.injected += 1
    self.survived += bool(survived)
    if seconds is not None:
      self.seconds.append(seconds)
    if not survived and note:
      self.note += f"{note}; "


class Run:
  """A run's command, with faults, and what it leaves."""

  def __init__(self, data_dir: str, workdir: pathlib.Path, steps: int, *more: str):
    self.workdir, self.steps, self.address = workdir, steps, str(workdir)
    self.log = workdir.parent / f"{workdir.name}.log"
    self.arguments = [*SETTINGS, f"--config.data.dir={data_dir}", f"--config.steps={steps}", *more]

  def start(self, faults: dict[str, Any] | None = None, **env: str) -> subprocess.Popen:
    """The process; `faults` are `victim`'s."""
    faults = {"log": str(self.log), **(faults or {})}
    with mock.patch.dict(os.environ):
      runtime.keep_compiled_programs()  # `victim` imports JAX before `main` would do so.
      inherited = dict(os.environ)
    return subprocess.Popen(
      [sys.executable, "-m", "tests.support.victim", *self.arguments, f"--workdir={self.address}"],
      cwd=ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env={**inherited, "FAULTS": json.dumps(faults), **env},
    )

  def finish(self, faults: dict[str, Any] | None = None, **env: str) -> tuple[int, str, str]:
    """Exit code, output and errors of a whole process."""
    process = self.start(faults, **env)
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out, err

  def settle(self) -> None:
    """Puts what the run has written into the folder `workdir`, where it is looked at."""

  def logged(self) -> list[tuple[int, list[int]]]:
    """(step, examples) of each step that was done, in order, those done again twice."""
    if not self.log.exists():
      return []
    with open(self.log) as file:
      return [tuple(json.loads(line)) for line in file if line.endswith("\n")]

  def outcome(self) -> tuple[Any, Any]:
    """Every bit of the last checkpoint, and the rows without their clocks."""
    return last_bits(self.workdir), rows_without_clock(self.workdir)

  def redone(self) -> int:
    """Steps done again after an interruption, at most; negative where some were left out."""
    steps = [step for step, _ in self.logged()]
    back = [a - b + 1 for a, b in itertools.pairwise(steps) if b != a + 1]
    return max(back, key=abs, default=0)

  def audit(self) -> tuple[int, int]:
    """Examples lost, and repeated, in the whole epochs of the steps that counted."""
    final = dict(self.logged())
    order = [example for step in range(self.steps) for example in final.get(step, [])]
    lost = repeated = 0
    for start in range(0, len(order) - EXAMPLES + 1, EXAMPLES):
      seen = collections.Counter(order[start : start + EXAMPLES])
      lost += EXAMPLES - len(seen)
      repeated += sum(seen.values()) - len(seen)
    missing = (self.steps - len(final)) * BATCH
    return lost + missing, repeated


def last_bits(workdir: pathlib.Path) -> tuple[int, list[bytes]]:
  """Every array of the last checkpoint, optimizer state included."""
  from orbax.checkpoint import v1 as ocp

  step = manifest.steps_in(str(workdir / "checkpoints"))[-1]
  path = str(workdir / "checkpoints" / str(step))
  items = {}
  for name in ("weights", "ema", "training"):
    if os.path.isdir(os.path.join(path, name)):
      shapes = ocp.metadata(path, checkpointable_name=name).metadata
      target = jax.tree.map(lambda m: np.empty(m.shape, m.dtype), shapes)
      items[name] = ocp.load(path, target, checkpointable_name=name)
  return step, [leaf.tobytes() for leaf in jax.tree.leaves(items)]


def rows_without_clock(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """The rows of metrics.jsonl, but for what a clock measured."""
  clock = ("images_per_second", "input_wait_frac", "time")
  every = Workdir(str(workdir)).rows()
  return [{k: v for k, v in row.items() if k not in clock} for row in every]


def wait_for(what: Callable[[], Any], process: subprocess.Popen, seconds: float = PATIENCE) -> Any:
  """Polls until `what` is true; an error where the process ends before, or time does."""
  until = time.monotonic() + seconds
  while not (found := what()):
    if process.poll() is not None or time.monotonic() > until:
      process.kill()
      raise RuntimeError(f"ended too early: {process.communicate()}")
    time.sleep(0.005)
  return found


@contextlib.contextmanager
def killed_at_the_end(process: subprocess.Popen) -> Iterator[subprocess.Popen]:
  """No process outlives what started it."""
  try:
    yield process
  finally:
    if process.poll() is None:
      process.kill()
    process.communicate()


# Interruptions: a chain of them on one run, beside an undisturbed one.


def chain(
  data_dir: str,
  folder: pathlib.Path,
  n: int,
  interrupt: Callable[[subprocess.Popen, Run, random.Random], None],
  faults: Callable[[random.Random], dict[str, Any]],
  code: int,
  steps: int,
  whole: Run | None = None,
  kind: Callable[..., Run] = Run,
) -> tuple[Result, Run, Run]:
  """Interrupts a run `n` times at random moments; (result, the run, an undisturbed one).

  Survived: each leg ended by the exit code that was due, and the end has the same bits, and
  rows: no step twice, none missing. (A stop divides a row of training means in two.)
  With `whole`, a finished run, its steps are those; `kind` makes the run that is interrupted.
  """
  rng, result = random.Random(0), Result()
  if whole is None:
    whole = undisturbed(data_dir, folder / "undisturbed", steps)
  run = kind(data_dir, folder / "interrupted", whole.steps)
  fine, seconds = [], []
  for _ in range(n):
    before, began = len(run.logged()), time.monotonic()
    with killed_at_the_end(run.start({"sleep": 0.02, **faults(rng)})) as process:
      wait_for(lambda n=before: len(run.logged()) > n, process)
      seconds.append(time.monotonic() - began)
      if interrupt is not by_itself:  # The first step is still being compiled.
        wait_for(lambda n=before: len(run.logged()) > n + 2, process)
      interrupt(process, run, rng)
      process.wait(timeout=PATIENCE)
      fine.append(process.returncode == code)
  ended, _, err = run.finish()
  run.settle()
  same = ended == 0 and last_bits(run.workdir) == last_bits(whole.workdir)
  same &= rows_are_of(run, whole, exactly=code == -9)
  for survived, spent in zip(fine, seconds, strict=True):
    result.add(survived and same, spent, f"exit codes or bits differ {err[-200:]}")
  result.redone, (result.lost, result.repeated) = run.redone(), run.audit()
  return result, run, whole


def undisturbed(data_dir: str, workdir: pathlib.Path, steps: int) -> Run:
  """A finished run."""
  whole = Run(data_dir, workdir, steps)
  code, _, err = whole.finish()
  assert code == 0, err
  return whole


def rows_are_of(run: Run, whole: Run, exactly: bool) -> bool:
  """Whether a run's rows are an undisturbed one's; its events are its rows."""
  ours, theirs = rows_without_clock(run.workdir), rows_without_clock(whole.workdir)
  if not exactly:
    train = [row["step"] for row in ours if row["kind"] == "train"]
    if train != sorted(set(train)):
      return False
    ours, theirs = ([row for row in part if row["kind"] != "train"] for part in (ours, theirs))
  told = [(row["step"], row["kind"]) for row in rows_without_clock(run.workdir)]
  return ours == theirs and told == [(step, kind) for step, kind, _ in events(run.workdir)]


def events(workdir: pathlib.Path) -> list[tuple[int, str, dict[str, float]]]:
  """(step, kind, scalars) of every TensorBoard event of a workdir, in the order of the files."""
  found = []
  for path in sorted(workdir.glob("events.out.tfevents.*")):
    content = path.read_bytes()
    while content:
      (length,) = struct.unpack("<Q", content[:8])
      event = event_pb2.Event.FromString(content[12 : 12 + length])
      if scalars := {value.tag: value.simple_value for value in event.summary.value}:
        found.append((event.step, next(iter(scalars)).split("/")[0], scalars))
      content = content[16 + length :]
  return found


def after_a_moment(number: int) -> Callable[..., None]:
  """Sends a signal within two seconds of the first steps."""

  def interrupt(process, run, rng):
    time.sleep(rng.uniform(0, 2.0))
    process.send_signal(number)

  return interrupt


def by_itself(process: subprocess.Popen, run: Run, rng: random.Random) -> None:
  """Waits until the process has killed itself."""
  process.wait(timeout=PATIENCE)


def twice_while_saving(process: subprocess.Popen, run: Run, rng: random.Random) -> None:
  """One signal stops the run; more come while it saves."""
  time.sleep(rng.uniform(0, 0.2))
  for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
    process.send_signal(number)
    time.sleep(rng.uniform(0.02, 0.2))


POINTS = ("begun", "before_commit", "after_commit", "in_seal", "after_seal")


def killed(
  data_dir: str, folder: pathlib.Path, n: int, whole: Run | None = None
) -> tuple[Result, Run, Run]:
  """SIGKILL at a random moment."""
  interrupt = after_a_moment(signal.SIGKILL)
  return chain(data_dir, folder, n, interrupt, lambda rng: {}, -9, 60 + 25 * n, whole)


def killed_while_saving(
  data_dir: str, folder: pathlib.Path, n: int, whole: Run | None = None
) -> Result:
  """SIGKILL at a point inside the first, second or third save."""

  def faults(rng):
    return {"die": rng.choice(POINTS), "at": rng.randint(1, 3), "sleep": 0.005}

  return chain(data_dir, folder, n, by_itself, faults, -9, 60 + 21 * n, whole)[0]


def signalled(
  data_dir: str, folder: pathlib.Path, n: int, number: int, whole: Run | None = None
) -> Result:
  """SIGTERM or SIGINT at a random moment."""
  interrupt = after_a_moment(number)
  return chain(data_dir, folder, n, interrupt, lambda rng: {}, 75, 60 + 30 * n, whole)[0]


def signalled_while_saving(
  data_dir: str, folder: pathlib.Path, n: int, whole: Run | None = None
) -> Result:
  """Two more signals while the stopped run saves."""
  slow = {"linger": 0.4}
  return chain(data_dir, folder, n, twice_while_saving, lambda rng: slow, 75, 60 + 30 * n, whole)[0]


# A read-only copy: as a mount has it, and as tests see it that run as root.


@contextlib.contextmanager
def unwritable(folder: Any, number: int = errno.EROFS) -> Iterator[None]:
  """Nothing below a folder can be written by what Python offers for it."""
  inside = os.path.join(os.path.realpath(folder), "")

  def is_below(path):
    if not isinstance(path, str | os.PathLike):  # A file descriptor.
      return False
    where, name = os.path.split(os.path.abspath(path))  # Of a link, not of what it points to.
    return os.path.join(os.path.realpath(where), name, "").startswith(inside)

  def refused(function, writes=lambda *_, **__: True):
    def patched(*args, **options):
      paths = args[1:2] if function is symlink else args[:2]
      if (below := list(filter(is_below, paths))) and writes(*args, **options):
        raise OSError(number, os.strerror(number), os.fspath(below[-1]))
      return function(*args, **options)

    return patched

  def opens_to_write(_, mode="r", *args, **options):
    return any(letter in mode for letter in "wax+")

  access, symlink = os.access, os.symlink
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr("builtins.open", refused(open, opens_to_write))
    for name in ("mkdir", "remove", "rename", "replace", "rmdir", "symlink", "truncate"):
      patch.setattr(os, name, refused(getattr(os, name)))
    patch.setattr(os, "access", lambda p, m: access(p, m) and not (m == os.W_OK and is_below(p)))
    yield


# Damage to what is stored.


def flip_bit(path: pathlib.Path, rng: random.Random) -> None:
  """One bit of a file."""
  content = bytearray(path.read_bytes())
  bit = rng.randrange(8 * len(content))
  content[bit // 8] ^= 1 << bit % 8
  path.write_bytes(content)


def truncate(path: pathlib.Path, rng: random.Random) -> None:
  """Some of a file's end is missing."""
  os.truncate(path, rng.randrange(path.stat().st_size))


def delete(path: pathlib.Path, rng: random.Random) -> None:
  """A file is missing."""
  path.unlink()


def swap(path: pathlib.Path, rng: random.Random) -> None:
  """A file of the older checkpoint is in its place."""
  files = [p for p in path.parent.parent.rglob("*") if p.is_file() and p != path]
  other = rng.choice([p for p in files if p.read_bytes() != path.read_bytes()])
  path.write_bytes(other.read_bytes())


def files_of(folder: pathlib.Path) -> list[pathlib.Path]:
  """Those that hold anything."""
  return sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)


def damaged(
  whole: Run, folder: pathlib.Path, n: int, damages: list[Callable], seed: int = 0
) -> Result:
  """Damages a file of the newest checkpoint of a finished run, each time of a fresh copy.

  Survived: reading the newest is refused, the file named, the older one found in its place.
  """
  rng, result = random.Random(seed), Result()
  for i in range(n):
    workdir = folder / f"damaged_{i}"
    shutil.copytree(whole.workdir, workdir)
    steps = manifest.steps_in(str(workdir / "checkpoints"))
    newest = workdir / "checkpoints" / str(steps[-1])
    path = rng.choice(files_of(newest))
    damages[i % len(damages)](path, rng)
    name = path.relative_to(newest).as_posix()
    try:
      told = refusal(lambda w=workdir: convex_jax.load(str(w)))
      lines = manifest.quarantine_damaged(str(workdir / "checkpoints"), str(workdir / "damaged"))
      named = len(lines) == 1 and name in lines[0] and f"Checkpoint {steps[-1]}: " in lines[0]
      found = manifest.steps_in(str(workdir / "checkpoints")) == steps[:-1]
      loads = i % 10 or convex_jax.load(str(workdir)).step == steps[-2]
      unfinished = name == "manifest.json" and not path.exists()
      result.add((name in told or unfinished) and named and found and loads, note=f"{name}: {told}")
    finally:
      shutil.rmtree(workdir)
  return result


def refusal(action: Callable[[], Any]) -> str:
  """The words of the `UserError` that an action raises; empty where it raises none."""
  try:
    action()
  except UserError as error:
    return str(error)
  return ""


def resumed_after_damage(whole: Run, folder: pathlib.Path, n: int) -> Result:
  """A bit of the newest checkpoint is flipped, and the same command given: the same end."""
  rng, result = random.Random(1), Result(redone=0)
  for i in range(n):
    run = Run("", folder / f"resumed_{i}", whole.steps)
    run.arguments = whole.arguments
    shutil.copytree(whole.workdir, run.workdir)
    newest = manifest.steps_in(str(run.workdir / "checkpoints"))[-1]
    older = manifest.steps_in(str(run.workdir / "checkpoints"))[-2]
    flip_bit(rng.choice(files_of(run.workdir / "checkpoints" / str(newest))), rng)
    began = time.monotonic()
    code, out, err = run.finish()
    told = f"Checkpoint {newest}: " in out and f"at step {older} " in out
    result.add(
      code == 0 and told and run.outcome() == whole.outcome(), time.monotonic() - began, err[-200:]
    )
    result.redone = max(result.redone, newest - older)
  return result


def all_damaged(whole: Run, folder: pathlib.Path, n: int) -> Result:
  """Every checkpoint has a flipped bit: exit code 2, each named, nothing moved."""
  rng, result = random.Random(2), Result()
  for i in range(n):
    run = Run("", folder / f"all_damaged_{i}", whole.steps)
    run.arguments = whole.arguments
    shutil.copytree(whole.workdir, run.workdir)
    steps = manifest.steps_in(str(run.workdir / "checkpoints"))
    for step in steps:
      flip_bit(rng.choice(files_of(run.workdir / "checkpoints" / str(step))), rng)
    code, _, err = run.finish()
    named = all(f"step {step}: " in err for step in steps) and "start a new run" in err
    kept = manifest.steps_in(str(run.workdir / "checkpoints")) == steps
    result.add(code == 2 and named and kept and "Traceback" not in err, note=err[-200:])
  return result


# Storage that does not take what is written.


def full_disk(
  data_dir: str,
  folder: pathlib.Path,
  n: int,
  mount: pathlib.Path | None = None,
  whole: Run | None = None,
) -> Result:
  """No checkpoint and no row can be written for some steps; every other run is to go on.

  With `mount`, a small file system of its own, the disk is really full; else no file may be
  larger than 1,000 bytes. Survived: told at that step, the older checkpoints as they were, no
  temporaries, and in the end the bits and rows of an undisturbed run.
  """
  whole, result = whole or undisturbed(data_dir, folder / "undisturbed", 70), Result()
  for i in range(n):
    goes_on = i % 2 == 0
    more = [f"--config.checkpoint.must_save={not goes_on}"]
    run = Run(data_dir, (mount or folder) / f"full_{i}", whole.steps, *more)
    faults: dict[str, Any] = {"full": (24, 50), "sleep": 0.05}
    if mount:
      faults["ballast"] = str(mount / "ballast")
    code, out, err = run.finish(faults)
    told = [s for s in range(99) if f"checkpoint of step {s} could not be written" in out + err]
    left = [p.name for p in (run.workdir / "checkpoints").iterdir() if not p.name.isdigit()]
    if goes_on:
      fine = code == 0 and told == [28, 35, 36, 42, 49]
    else:
      with contextlib.suppress(OSError):
        (mount or folder).joinpath("ballast").unlink()
      intact = not any(manifest.faults(str(run.workdir / "checkpoints")).values())
      fine = code == 74 and told == [28] and intact
      fine &= run.finish()[0] == 0
    fine &= not left and run.outcome() == whole.outcome()
    result.add(fine and "Traceback" not in err, note=f"{code} {told} {left} {err[-300:]}")
    shutil.rmtree(run.workdir)
  return result


def hung_save(data_dir: str, folder: pathlib.Path, n: int, whole: Run | None = None) -> Result:
  """A checkpoint's commit never ends; every other run is to go on.

  Survived: told within `checkpoint.patience`, exit code 74 in bounded time, and the next
  command ends with the bits of an undisturbed run.
  """
  whole, result = whole or undisturbed(data_dir, folder / "undisturbed", 70), Result()
  for i in range(n):
    goes_on = i % 2 == 1
    more = [f"--config.checkpoint.must_save={not goes_on}", "--config.checkpoint.patience=10.0"]
    run = Run(data_dir, folder / f"hung_{i}", whole.steps, *more)
    code, out, err = run.finish({"hang": 21, "sleep": 0.05})
    told = "step 21 could not be written: not finished after 10 s" in out + err
    last = max(step for step, _ in run.logged())
    fine = code == 74 and told and (last == whole.steps - 1) == goes_on
    began = time.monotonic()
    fine &= run.finish()[0] == 0 and run.outcome() == whole.outcome()
    result.add(fine, time.monotonic() - began, f"{code} {last} {out[-200:]} {err[-300:]}")
  return result


def used_workdir(data_dir: str, folder: pathlib.Path, n: int) -> Result:
  """A second run in a workdir that is in use: exit code 2, the first goes on undisturbed."""
  result = Result()
  run = Run(data_dir, folder / "used", 10_000)
  with killed_at_the_end(run.start({"sleep": 0.05})) as process:
    wait_for(run.logged, process)
    for _ in range(n):
      code, _, err = Run(data_dir, run.workdir, 10_000).finish({"log": os.devnull})
      fine = code == 2 and f"in use by another run (process {process.pid} on" in err
      result.add(fine and process.poll() is None, note=err[-200:])
  return result


def read_only(data_dir: str, mount: pathlib.Path, n: int) -> Result:
  """A workdir on a file system that takes nothing: exit code 2 before any work."""
  result = Result()
  for i in range(n):
    code, _, err = Run(data_dir, mount / f"run_{i}", 10).finish({"log": os.devnull})
    result.add(code == 2 and "not writable" in err and "Traceback" not in err, note=err[-200:])
  return result


# Several processes, several devices.


def free_port() -> int:
  """A port of this machine that nobody listens on."""
  with socket.socket() as s:
    s.bind(("localhost", 0))
    return s.getsockname()[1]


@contextlib.contextmanager
def hosts(
  make: Callable[..., Run],
  count: int,
  address: str = "",
  faults: dict[int, dict[str, Any]] | None = None,
  late: float = 0.0,
) -> Iterator[tuple[Run, list[subprocess.Popen]]]:
  """A run of `count` processes, as on so many hosts: (what the first leaves, the processes).

  `make(*options)` is the run of one of them. Its place is `address`, if that is given; `faults` are
  `victim`'s, by process. The last one starts `late` seconds after the others.
  """
  port, first, processes = free_port(), None, []
  with contextlib.ExitStack() as stack:
    for i in range(count):
      where = [f"--coordinator=localhost:{port}", f"--num_processes={count}", f"--process_id={i}"]
      run = make("--distributed=on", *where)
      first = first or run
      run.address = first.address = address or first.address
      run.log = run.log.with_suffix(f".{i}.log")
      time.sleep(late if i == count - 1 else 0)
      own = {"sleep": 0.05, "log": str(run.log), **(faults or {}).get(i, {})}
      process = run.start(own, JAX_NUM_CPU_DEVICES="1")
      processes.append(stack.enter_context(killed_at_the_end(process)))
    assert first is not None
    yield first, processes


def ends_of(processes: list[subprocess.Popen]) -> list[tuple[int, str]]:
  """Exit code and errors of each process, once all have ended."""
  errors = [process.communicate(timeout=PATIENCE)[1] for process in processes]
  return [(process.returncode, err) for process, err in zip(processes, errors, strict=True)]


# What may happen to one of several hosts. The first coordinates the others, and alone writes rows.
HOST_FAULTS = ("killed", "first killed", "warned", "late")
# Killed where it begins to do what the last word says: `victim`'s faults.
PLACES: dict[str, dict[str, Any]] = {
  place: {"gone": place} for place in ("start", "restore", "evaluate", "gather")
}
PLACES["last save"] = {"die": "begun", "at": 5}  # The fifth save is that of step 28, the last.
HOSTS_GONE = tuple(f"{who} at: {place}" for place in PLACES for who in ("gone", "first gone"))
LATE = 20.0  # Seconds after the others.
SOON = 150.0  # Seconds in which the others end: 100 until JAX misses one that is silent.


def one_of_several(
  data_dir: str,
  folder: pathlib.Path,
  n: int,
  count: int,
  faults: tuple[str, ...] = HOST_FAULTS,
  kind: Callable[..., Run] = Run,
) -> Result:
  """Something happens to one of `count` hosts, and the same command is given on all of them.

  Survived: where one is killed, the others end within `SOON`, with exit code 75, and say what to
  do; where one is warned, all save and do so; one that is late is waited for. Then the same command
  ends with the bits and rows of a run to which nothing happened.
  """
  rng, result, whole = random.Random(0), Result(redone=0), None
  for i, fault in enumerate(["nothing", *itertools.islice(itertools.cycle(faults), n)]):

    def make(*where, i=i):
      # A row for each step: a stop divides none.
      more = ["--config.log.every_steps=1", *where]
      return kind(data_dir, folder / f"hosts_{i}", 28, *more)

    address, told, spent, before, late = "", True, None, [], LATE if fault == "late" else 0.0
    if fault not in ("nothing", "late"):
      chosen = 0 if fault.startswith("first") else rng.randrange(1, count)
      place, reached = fault.partition(" at: ")[2], rng.randrange(8, 20)
      if place == "restore":  # Only a run that was begun restores.
        with hosts(make, count) as (run, processes):
          wait_for(lambda r=run, n=reached: len(r.logged()) > n, processes[0])
          processes[0].terminate()
          told, address = {code for code, _ in ends_of(processes)} == {75}, run.address
      gone = {chosen: PLACES[place]} if place else None
      with hosts(make, count, address, gone) as (run, processes):
        if place:
          processes[chosen].wait(timeout=PATIENCE)
        else:
          wait_for(lambda r=run, n=reached: len(r.logged()) > n, processes[0])
          processes[chosen].send_signal(signal.SIGTERM if fault == "warned" else signal.SIGKILL)
        began = time.monotonic()
        before = ends_of(processes)
        spent = time.monotonic() - began
      words = "saved in" if fault == "warned" else "same command on every host"
      left = [end for k, end in enumerate(before) if fault == "warned" or k != chosen]
      told &= all(code == 75 and words in err and "Traceback" not in err for code, err in left)
      told, address = told and spent < SOON, run.address
    with hosts(make, count, address, late=late) as (run, processes):
      ends = ends_of(processes)
    run.settle()
    fine = told and [code for code, _ in ends] == [0] * count
    if whole is None:
      assert fine, ends
      whole = run.outcome()
      continue
    same = fine and run.outcome() == whole
    why = [(code, err[-300:]) for code, err in before + ends]
    result.add(same, spent, f"{fault}: told {told}, same {same}, {spent} s {why}")
    result.redone = max(result.redone or 0, run.redone())
  return result


def other_devices(data_dir: str, folder: pathlib.Path, n: int) -> Result:
  """A run stopped and gone on with on another number of devices, again and again."""
  counts = [1, 2, 4, 8]
  whole = undisturbed(data_dir, folder / "undisturbed", 60 + 30 * n)
  run = Run(data_dir, folder / "moved", whole.steps)
  result, rng, fine = Result(), random.Random(3), []
  for i in range(n):
    before = len(run.logged())
    devices = {"JAX_NUM_CPU_DEVICES": str(counts[i % 4])}
    with killed_at_the_end(run.start({"sleep": 0.02}, **devices)) as process:
      wait_for(lambda n=before: len(run.logged()) > n + 2, process)
      time.sleep(rng.uniform(0, 0.4))
      process.terminate()
      fine.append(process.wait(timeout=PATIENCE) == 75)
  fine.append(run.finish()[0] == 0)
  order = dict(run.logged()) == dict(whole.logged())
  a, b = (rows_without_clock(x.workdir)[-1]["train_loss"] for x in (run, whole))
  far = abs(a / b - 1)
  for survived in fine[:-1]:
    result.add(survived and fine[-1] and order and far < 1e-2, note=f"loss apart {far:.1e}")
  result.redone, (result.lost, result.repeated) = run.redone(), run.audit()
  result.note += f"the final losses are {far:.1e} apart"
  return result


def same_seed(data_dir: str, folder: pathlib.Path, n: int) -> Result:
  """The same command in two workdirs: the same bits and rows."""
  runs = [Run(data_dir, folder / f"seed_{i}", 40) for i in range(n + 1)]
  outcomes = []
  for run in runs:
    assert run.finish()[0] == 0
    outcomes.append(run.outcome())
  result = Result()
  for outcome in outcomes[1:]:
    result.add(outcome == outcomes[0])
  return result
