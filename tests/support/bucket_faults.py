"""Faults of a run in a bucket, as `injections` has those of a run on a disk."""

import functools
import os
import pathlib
import shutil
import time
import uuid
from typing import Any

from convex_jax.runs import checkpoint_command
from tests.support import PATIENCE, injections
from tests.support.bucket import Bucket, Network, at_random, environment
from tests.support.injections import Result, Run

FAULTS = ("503", "reset", "lost", "slow", "cut")  # See `Network`.
SHARE = 0.1  # Of the requests.


class BucketRun(Run):
  """A run in a bucket, of which `settle` makes a copy on the disk; `url`: by way of a network."""

  def __init__(
    self,
    bucket: Bucket,
    data_dir: str,
    workdir: pathlib.Path,
    steps: int,
    *more: str,
    url: str = "",
  ):
    super().__init__(data_dir, workdir, steps, *more)
    self.bucket, self.url = bucket, url or bucket.url
    self.address = bucket.address(f"{uuid.uuid4().hex[:8]}/{workdir.name}")

  def start(self, faults: dict[str, Any] | None = None, **env: str):
    faults = {"renew": 0.5, **(faults or {})}
    return super().start(faults, **environment(self.url), **env)

  def settle(self) -> None:
    shutil.rmtree(self.workdir, ignore_errors=True)
    self.bucket.fetch(self.address, self.workdir)

  def is_of(self, whole: Run) -> bool:
    """Whether it has the bits, rows and events of an undisturbed run, and all are intact."""
    self.settle()
    same = injections.last_bits(self.workdir) == injections.last_bits(whole.workdir)
    same &= injections.rows_are_of(self, whole, exactly=True)
    return same and checkpoint_command.main(["verify", str(self.workdir)]) == 0


def killed_while_saving(bucket: Bucket, data_dir: str, folder: pathlib.Path, n: int) -> Result:
  """SIGKILL at a random moment of the first, second or third save, and right before its manifest."""

  def faults(rng):
    how = rng.choice([{"die": "begun", "later": rng.uniform(0, 1.5)}, {"die": "in_seal"}])
    return {"at": rng.randint(1, 3), "sleep": 0.1, "renew": 0.5, **how}

  kind, by_itself = functools.partial(BucketRun, bucket), injections.by_itself
  return injections.chain(data_dir, folder, n, by_itself, faults, -9, 21 + 21 * n, None, kind)[0]


def flipped(bucket: Bucket, data_dir: str, folder: pathlib.Path, n: int) -> Result:
  """A bit of an object of the newest checkpoint: named, set aside, and the same end."""
  whole = BucketRun(bucket, data_dir, folder / "whole", 28)
  assert whole.finish()[0] == 0
  whole.settle()
  rng, result = injections.random.Random(0), Result(redone=0)
  for i in range(n):
    run = BucketRun(bucket, data_dir, folder / f"flipped_{i}", 28)
    shutil.copytree(bucket.file(whole.address), bucket.file(run.address))
    newest = bucket.file(run.address) / "checkpoints" / "28"
    path = rng.choice(injections.files_of(newest))
    injections.flip_bit(path, rng)
    began = time.monotonic()
    code, out, err = run.finish()
    told = f"Checkpoint 28: {path.relative_to(newest).as_posix()}" in out and "step 21 of 28" in out
    aside = (bucket.file(run.address) / "damaged" / "28").is_dir()
    fine = code == 0 and told and aside and run.is_of(whole)
    result.add(fine, time.monotonic() - began, err[-200:])
    result.redone = 7
  return result


def bad_network(
  bucket: Bucket,
  data_dir: str,
  folder: pathlib.Path,
  n: int,
  kinds: tuple[tuple[str, ...], ...] = tuple((fault,) for fault in FAULTS),
) -> Result:
  """A share of all requests fails, from the first to the last: the same bits and rows.

  `kinds`: the faults of each run, in turn.

  Where an answer is lost, a request of Orbax may meet its own work and fail for good. Then the run
  ends with exit code 74, as it says, and the same command goes on once the network is sound.
  """
  whole = injections.undisturbed(data_dir, folder / "whole", 21)
  result, done = Result(), 0
  for i in range(n):
    faults = kinds[i % len(kinds)]
    with Network(bucket.url, at_random(faults, SHARE, seed=i)) as network:
      run = BucketRun(bucket, data_dir, folder / f"bad_{i}", 21, url=network.url)
      code, _, err = run.finish()
      if "lost" in faults and code == 74 and "could not be written" in err:
        run.url = bucket.url
        code, _, err = run.finish()
      failed = [network.done[fault] for fault in faults]
      done += sum(failed)
    fine = code == 0 and sum(failed) > 10 and all(failed) and run.is_of(whole)
    result.add(fine, note=f"{faults} {failed} {err[-300:]}")
    result.lost, result.repeated = (
      sum(pair) for pair in zip((result.lost or 0, result.repeated or 0), run.audit(), strict=True)
    )
  result.note += f"{done} requests failed"
  return result


def no_network(bucket: Bucket, data_dir: str, folder: pathlib.Path, n: int) -> Result:
  """From some moment on every request fails: exit code 74 in bounded time; then the same end."""
  whole = injections.undisturbed(data_dir, folder / "whole", 42)
  result = Result()
  for i in range(n):
    with Network(bucket.url, lambda *_: "") as network:
      run = BucketRun(
        bucket, data_dir, folder / f"no_{i}", 42, "--config.checkpoint.patience=10", url=network.url
      )
      process = run.start({"sleep": 0.2, "requests": 3.0})
      with injections.killed_at_the_end(process):
        injections.wait_for(lambda run=run: len(run.logged()) > 9, process)
        network.fault = lambda *_, i=i: ("503", "reset")[i % 2]
        began = time.monotonic()
        _, err = process.communicate(timeout=PATIENCE)
        spent = time.monotonic() - began
      told = process.returncode == 74 and "could not be written" in err and "Traceback" not in err
      code, _, again = run.finish({"log": os.devnull, "requests": 3.0})
      told_again = code == 2 and "the bucket cannot be re" in again and "Traceback" not in again
      network.fault = lambda *_: ""
      ended, _, last = run.finish()
    fine = told and told_again and spent < 120 and ended == 0 and run.is_of(whole)
    result.add(fine, note=f"{process.returncode} {err[-400:]} {code} {again[-300:]} {last[-200:]}")
    result.redone = max(result.redone or 0, run.redone())
  return result


def one_of_several(
  bucket: Bucket,
  data_dir: str,
  folder: pathlib.Path,
  n: int,
  count: int = 4,
  faults: tuple[str, ...] = injections.HOST_FAULTS,
) -> Result:
  """What happens to one of several hosts, as `injections` has it."""
  kind = functools.partial(BucketRun, bucket)
  return injections.one_of_several(data_dir, folder, n, count, faults, kind)


def two_writers(bucket: Bucket, data_dir: str, folder: pathlib.Path, n: int) -> Result:
  """A second run at the address of one that trains: exit code 2; the first ends undisturbed."""
  result = Result()
  whole = injections.undisturbed(data_dir, folder / "whole", 42)
  run = BucketRun(bucket, data_dir, folder / "first", 42)
  with injections.killed_at_the_end(run.start({"sleep": 1.0})) as process:
    injections.wait_for(run.logged, process)
    fine = []
    for _ in range(n):
      second = BucketRun(bucket, data_dir, folder / "second", 42)
      second.address = run.address
      code, _, err = second.finish({"log": os.devnull})
      fine.append(code == 2 and f"in use by another run (process {process.pid} on" in err)
      fine[-1] &= process.poll() is None
    first = process.wait(timeout=PATIENCE)
  same = first == 0 and run.is_of(whole)
  for survived in fine:
    result.add(survived and same, note=f"{first} {err[-200:]}")
  return result
