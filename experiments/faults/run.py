"""Injects every fault of the table and counts how many a run survives.

    python -m experiments.faults.run [--rows=1,5,17] [--scale=0.2]

Two rows at a time, each in its own process. Updates the chosen rows of results.csv, report.md and
killed.png next to this file. Needs the test and notebooks extras. `--scale` multiplies how often
each fault is injected.
"""

import argparse
import concurrent.futures
import contextlib
import csv
import dataclasses
import datetime
import functools
import itertools
import multiprocessing
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import jax
import matplotlib.pyplot as plt
from absl import logging
from rich.console import Console
from rich.progress import Progress

from convex_jax import command_line
from convex_jax.data import prepare
from convex_jax.studies import tables
from convex_jax.training import runtime
from tests.support import bad_input, bucket, bucket_faults, injections
from tests.support.injections import Result

FOLDER = pathlib.Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Row:
  """A fault: how often, what must hold, and the function that injects it in a fresh folder."""

  fault: str
  times: int
  must_hold: str
  inject: Callable[[str, pathlib.Path, int], Result]


@contextlib.contextmanager
def mounted(folder: pathlib.Path, options: str) -> Iterator[pathlib.Path | None]:
  """A separate file system; None where this user may not mount one."""
  folder.mkdir()
  done = subprocess.run(
    ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True
  )
  if done.returncode:
    yield None
    return
  try:
    yield folder
  finally:
    subprocess.run(["umount", "-l", folder], check=True)


def killed(data_dir, folder, n):
  result, run, whole = injections.killed(data_dir, folder, n)
  if n >= 10:
    draw(run, whole, n)
  return result


def photos(folder):
  return bad_input.prepare_photos(folder, 70, 11)


def whole_run(data_dir, folder):
  return injections.undisturbed(data_dir, folder / "whole", 70)


def one_bit(data_dir, folder, n):
  whole = whole_run(data_dir, folder)
  result = injections.damaged(whole, folder, n, [injections.flip_bit])
  ended = injections.resumed_after_damage(whole, folder, max(1, n // 40))
  return together(result, ended, f"{ended.injected} of them resumed to the end, same bits")


def files(data_dir, folder, n):
  damages = [injections.truncate, injections.delete, injections.swap]
  return injections.damaged(whole_run(data_dir, folder), folder, n, damages)


def together(a: Result, b: Result, note: str = "") -> Result:
  """The sum of two results."""
  redone = [x for x in (a.redone, b.redone) if x is not None]
  return Result(
    a.injected + b.injected,
    a.survived + b.survived,
    max(redone, default=None),
    a.lost if b.lost is None else b.lost,
    a.repeated if b.repeated is None else b.repeated,
    a.seconds + b.seconds,
    a.note + b.note + note,
  )


def signals(data_dir, folder, n):
  return together(
    *(
      injections.signalled(data_dir, folder / number.name, n // 2, number)
      for number in (signal.SIGTERM, signal.SIGINT)
    )
  )


def full(data_dir, folder, n):
  result = injections.full_disk(data_dir, folder / "limit", n // 2)
  with mounted(folder / "disk", "size=1m") as mount:
    if mount is None:
      return together(result, Result(note="no file system mounted: file sizes limited"))
    return together(result, injections.full_disk(data_dir, folder / "real", n - n // 2, mount))


def refused(data_dir, folder, n):
  used = injections.used_workdir(data_dir, folder, n // 2)
  with mounted(folder / "disk", "ro,size=1m") as mount:
    if mount is None:
      return together(used, Result(note="read-only: may not mount, not injected"))
    return together(used, injections.read_only(data_dir, mount, n - n // 2))


def restored(data_dir, folder, n):
  moved = bad_input.other_meshes(data_dir, folder, n)
  return together(moved, bad_input.older_formats(), "one format so far")


def same(data_dir, folder, n):
  seeds = injections.same_seed(data_dir, folder, n // 2)
  return together(seeds, bad_input.worker_counts(photos(folder), n - n // 2))


def audited(data_dir, folder, n):
  """Three kills in each of n / 3 runs; counts what the epochs contain."""
  result = Result(lost=0, repeated=0)
  for i in range(max(1, n // 3)):
    one, _, _ = injections.killed(data_dir, folder / str(i), 3)
    lost, repeated = result.lost + one.lost, result.repeated + one.repeated
    result = dataclasses.replace(together(result, one), lost=lost, repeated=repeated)
  return result


def rows_after(data_dir, folder, n):
  """Kills, then signals: rows and events must increase strictly, with none missing."""
  result, _, _ = injections.killed(data_dir, folder / "kills", n // 2)
  return together(
    result, injections.signalled(data_dir, folder / "stops", n - n // 2, signal.SIGTERM)
  )


def in_bucket(fault: Callable[..., Result]) -> Callable[[str, pathlib.Path, int], Result]:
  """Injects a fault into runs in a bucket, on a server of this machine."""

  def inject(data_dir, folder, n):
    root = folder / "bucket"
    root.mkdir()
    with bucket.server(root) as url:
      os.environ.update(bucket.environment(url))
      return fault(bucket.Bucket(url, root), data_dir, folder, n)

  return inject


KILLED = ("first killed", "killed")  # Of two processes.
SEVERAL = "the others exit 75 in bounded time, or wait; started again, same bits and rows"
ROWS = {
  1: Row("SIGKILL at a random step", 50, "same bits and rows at the end", killed),
  2: Row("SIGKILL inside a save", 50, "the old or the new checkpoint, never a mixture", injections.killed_while_saving),
  3: Row("SIGTERM, SIGINT", 40, "saved, exit 75, same bits", signals),
  4: Row("more signals while saving", 10, "exit 75, same bits", injections.signalled_while_saving),
  5: Row("one bit of the newest checkpoint flipped", 200, "file and step reported, an older one used", one_bit),
  6: Row("a file truncated, deleted, swapped", 60, "file and step reported, an older one used", files),
  7: Row(
    "every checkpoint damaged", 5, "exit 2, each reported, nothing moved",
    lambda d, f, n: injections.all_damaged(whole_run(d, f), f, n),
  ),
  8: Row("disk full", 10, "reported at that step, continues or exits 74, older ones intact", full),
  9: Row("workdir in use, or read-only", 10, "exit 2 at the start", refused),
  10: Row(
    "NaN in one batch, in 5 consecutive ones", 25, "update skipped; exit 3 with a finite checkpoint",
    lambda d, f, n: bad_input.bad_batches(d, f, n - n // 5, n // 5),
  ),
  11: Row("hundredfold loss spike", 10, "skipped, as configured", lambda d, f, n: bad_input.spikes(d, n)),
  12: Row("unusual, damaged, hostile images", 60, "decoded or refused", lambda d, f, n: bad_input.odd_images(n)),
  13: Row(
    "a decoding process killed", 10, "exit 2 with a message, no hang",
    lambda d, f, n: bad_input.lost_workers(photos(f), f, n),
  ),
  14: Row(
    "data missing, half built, damaged", 15, "reported within 5 s, with how to fix it",
    lambda d, f, n: bad_input.no_data(d, photos(f), f, n),
  ),
  15: Row("invalid configs", 40, "every error reported, no device used", lambda d, f, n: bad_input.bad_configs(n)),
  16: Row("1, 2, 4, 8 devices in turn", 12, "same order of examples, losses within 1 %", injections.other_devices),
  17: Row(
    "one of two processes killed: in training, at the start, restoring, evaluating, saving, at the end", 12,
    "the other exits 75 with a message; started again, same bits and rows",
    lambda d, f, n: injections.one_of_several(d, f, n, 2, (*KILLED, *injections.HOSTS_GONE)),
  ),
  18: Row("restored on fewer devices, from older formats", 9, "equal arrays", restored),
  19: Row("same seed twice; different numbers of workers", 10, "same bits", same),
  20: Row("three crashes, every example audited", 12, "each seen once per epoch", audited),
  21: Row("rows and events after a resume", 20, "every step once", rows_after),
  22: Row("networks that are not convex", 60, "never PROVED", lambda d, f, n: bad_input.broken_twins(n)),
  23: Row("every optimizer, dtype, accumulation", 36, "no constrained weight below 0", lambda d, f, n: bad_input.constrained_updates(n)),
  24: Row("a save that hangs", 5, "reported in bounded time, exit 74, same bits afterwards", injections.hung_save),
  25: Row("in a bucket: SIGKILL inside a save", 20, "the old or the new checkpoint, same bits and rows at the end", in_bucket(bucket_faults.killed_while_saving)),
  26: Row("in a bucket: one bit of the newest checkpoint flipped", 10, "file and step reported, an older one used, same bits at the end", in_bucket(bucket_faults.flipped)),
  27: Row("in a bucket: a tenth of all requests refused, reset, unanswered, late, cut", 10, "same bits and rows", in_bucket(bucket_faults.bad_network)),
  28: Row("in a bucket: the network gone", 4, "reported in bounded time, exit 74, same bits and rows afterwards", in_bucket(bucket_faults.no_network)),
  29: Row("in a bucket: one of two processes killed", 4, "the other exits 75; started again, same bits and rows", in_bucket(functools.partial(bucket_faults.one_of_several, count=2, faults=KILLED))),
  30: Row("in a bucket: a second run at the same address", 4, "exit 2, the first undisturbed", in_bucket(bucket_faults.two_writers)),
  31: Row(
    "one of four hosts killed, the first killed, one warned, one 20 s late", 8, SEVERAL,
    lambda d, f, n: injections.one_of_several(d, f, n, 4),
  ),
  32: Row("in a bucket: one of four hosts killed, the first killed, one warned, one 20 s late", 4, SEVERAL, in_bucket(bucket_faults.one_of_several)),
}  # fmt: skip


def lead_group() -> None:
  """Makes a worker and what it starts one group; SIGTERM unwinds it, so that nothing stays mounted."""
  os.setpgrp()
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))


def stop_with(pool: concurrent.futures.ProcessPoolExecutor, progress: Progress) -> None:
  """Makes SIGTERM and SIGINT end this command, its workers and all runs that they started."""

  def stop(*_):
    # Before Python 3.14, which has `terminate_workers`, no public name leads to them.
    for worker in list((pool._processes or {}).values()):
      try:
        os.killpg(worker.pid, signal.SIGTERM)
      except ProcessLookupError:  # It has only just begun.
        worker.terminate()
    progress.stop()
    os._exit(75)  # The pool would start the rows that it has queued.

  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, stop)


def inject(number: int, scale: float) -> tuple[Result, float]:
  """The result of a row, and the seconds it took; runs in its own process."""
  jax.config.update("jax_num_cpu_devices", 8)
  logging.set_verbosity(logging.ERROR)
  runtime.keep_compiled_programs()
  row, began = ROWS[number], time.monotonic()
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    os.environ["XDG_CACHE_HOME"] = str(pathlib.Path(tempfile.gettempdir()) / "faults_cache")
    prepare.prepare("digits", str(folder / "data"))
    (folder / "runs").mkdir()
    n = max(2, round(scale * row.times))
    result = row.inject(str(folder / "data"), folder / "runs", n)
  return result, time.monotonic() - began


def draw(run: injections.Run, whole: injections.Run, n: int) -> None:
  """Draws the training losses of both runs, and where the first was killed."""
  figure, axes = plt.subplots(figsize=(7, 3.4), layout="constrained")
  steps = [step for step, _ in run.logged()]
  kills = [a for a, b in itertools.pairwise(steps) if b != a + 1]
  for which, style in ((whole, {"color": "0.65", "lw": 4}), (run, {"color": "black", "lw": 1})):
    rows = [r for r in injections.rows_without_clock(which.workdir) if r["kind"] == "train"]
    label = "undisturbed" if which is whole else f"killed {n} times"
    axes.plot([r["step"] for r in rows], [r["loss"] for r in rows], label=label, **style)
  axes.plot(kills, [axes.get_ylim()[0]] * len(kills), "|", color="black", ms=9, label="kill")
  axes.set_xlabel("Step")
  axes.set_ylabel("Training loss (nats)")
  axes.legend()
  figure.savefig(FOLDER / "killed.png", dpi=110)


def line_of(number: int, result: Result, seconds: float) -> dict[str, str]:
  """A row of results.csv."""
  row = ROWS[number]
  known = {
    "row": number,
    "fault": row.fault,
    "injected": result.injected,
    "survived": result.survived,
    "must hold": row.must_hold,
    "steps redone at most": result.redone,
    "examples lost": result.lost,
    "examples repeated": result.repeated,
    "seconds to resume": f"{statistics.median(result.seconds):.1f}" if result.seconds else None,
    "seconds in all": f"{seconds:.0f}",
    "note": " ".join(result.note.split()),
    "date": datetime.date.today().isoformat(),
  }
  return {key: "" if value is None else str(value) for key, value in known.items()}


def write(lines: list[dict[str, str]]) -> None:
  """Updates rows of results.csv, and writes report.md."""
  path, measured = FOLDER / "results.csv", {line["row"] for line in lines}
  if path.exists():
    with open(path, newline="") as file:
      lines = lines + [row for row in csv.DictReader(file) if row["row"] not in measured]
  for line in lines:
    row = ROWS[int(line["row"])]
    line |= {"fault": row.fault, "must hold": row.must_hold}
  lines = sorted(lines, key=lambda line: int(line["row"]))
  with open(path, "w", newline="") as file:
    writer = csv.DictWriter(file, lines[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
  shown = [key for key in lines[0] if key not in ("seconds in all", "note", "date")]
  text = ["# Faults injected, faults survived", ""]
  text += [
    "Written by `python -m experiments.faults.run`; [README.md](README.md) explains the columns.",
    "",
  ]
  text += [tables.markdown(shown, [[line[key] for key in shown] for line in lines])]
  total = [sum(int(line[key]) for line in lines) for key in ("injected", "survived")]
  text += ["", f"{total[0]} injected, {total[1]} survived. Empty: not applicable.", ""]
  text += ["![Training losses of a run that was killed and of an undisturbed one](killed.png)", ""]
  (FOLDER / "report.md").write_text("\n".join(text))


def _numbers(text: str) -> list[int]:
  """The type of the option --rows."""
  known = {str(number): number for number in ROWS}
  if unknown := [name for name in text.split(",") if name not in known]:
    raise argparse.ArgumentTypeError(f"{unknown[0]!r} given; expected some of {','.join(known)}")
  return [known[name] for name in text.split(",")]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument(
    "--rows", type=_numbers, default=",".join(map(str, ROWS)), help="separated by commas"
  )
  parser.add_argument(
    "--scale", type=float, default=1.0, help="factor on how often each fault is injected"
  )
  args = parser.parse_args()
  console, failed = Console(), []
  spawn = multiprocessing.get_context("spawn")
  with (
    concurrent.futures.ProcessPoolExecutor(
      2, spawn, initializer=lead_group, max_tasks_per_child=1
    ) as pool,
    Progress(console=console) as progress,
  ):
    stop_with(pool, progress)
    jobs = {pool.submit(inject, n, args.scale): n for n in args.rows}
    task = progress.add_task("faults", total=len(jobs))
    for job in concurrent.futures.as_completed(jobs):
      number = jobs[job]
      progress.advance(task)
      if job.exception():
        console.print(f"row {number}: {job.exception()!r}", markup=False)
        failed.append(number)
        continue
      result, seconds = job.result()
      line = line_of(number, result, seconds)
      write([line])
      words = f"row {number}: {line['fault']}: {line['survived']} of {line['injected']}"
      console.print(words, f"in {line['seconds in all']} s", line["note"], markup=False)
      if result.survived < result.injected:
        failed.append(number)
  if failed:
    raise SystemExit(f"not survived: rows {sorted(failed)}")


if __name__ == "__main__":
  sys.exit(command_line.exit_code(main))
