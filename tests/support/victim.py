"""`convex_jax.main` with a fault, for tests that need a process to lose.

FAULTS, a JSON object in the environment, says which:

| key | what happens |
|---|---|
| sleep | seconds before each call of the compiled step |
| die, at | SIGKILL of itself at the n-th save: `begun`, `before_commit`, `after_commit`, `in_seal`, `after_seal` |
| later | seconds after which it dies instead |
| gone | SIGKILL of itself where it begins to do this: a key of `PLACES` |
| linger | seconds that the commit of a checkpoint takes |
| hang | the commit of the checkpoint of this step never ends |
| full | (first, last) step of a disk that takes no file above 1,000 bytes; a save that was begun before is completed first, one that was begun within fails |
| ballast | a file that fills its disk during those steps instead |
| renew | seconds between two renewals of a lock in a bucket |
| requests | seconds for which a request to a bucket is repeated |
| log | a file to which the examples of each step are written |
"""

import contextlib
import json
import os
import resource
import signal
import sys
import threading
import time

import numpy as np

from convex_jax import bucket_locks, buckets, files, main
from convex_jax.runs import checkpoints, manifest
from convex_jax.training import program

FAULTS = json.loads(os.environ.get("FAULTS", "{}"))
PLACES = {
  "start": (manifest, "quarantine_damaged"),
  "restore": (checkpoints.Checkpoints, "restore"),
  "evaluate": (program.Program, "evaluate"),
  "gather": (program.Program, "gathered"),
}
saves = 0
opened = []  # Checkpoints.


def die(at: str) -> None:
  if FAULTS.get("die") == at and saves == FAULTS["at"]:
    if "later" in FAULTS:
      threading.Timer(FAULTS["later"], os.kill, (os.getpid(), signal.SIGKILL)).start()
      return
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def committing(rename):
  def patched(source, target, **kwargs):
    name = os.path.basename(os.fspath(target))
    commits = name.isdigit() and "checkpoints" in os.fspath(target)
    if commits and "damaged" not in os.fspath(target):
      if FAULTS.get("hang") == int(name):
        threading.Event().wait()
      die("before_commit")
      rename(source, target, **kwargs)
      die("after_commit")
      time.sleep(FAULTS.get("linger", 0))
    else:
      rename(source, target, **kwargs)

  return patched


def counted(save):
  def patched(*args, **kwargs):
    global saves
    saves += 1
    response = save(*args, **kwargs)
    die("begun")
    return response

  return patched


def kept(init):
  def patched(ours, *args, **kwargs):
    init(ours, *args, **kwargs)
    opened.append(ours)

  return patched


def sealing(seal):
  def patched(folder, step, accuracy):
    if FAULTS.get("die") == "in_seal" and saves == FAULTS["at"]:
      with files.atomic_write(os.path.join(folder, manifest.NAME)) as file:
        file.write("{")
        file.flush()
        die("in_seal")
    seal(folder, step, accuracy)
    die("after_seal")

  return patched


def fill(is_full: bool) -> None:
  if "ballast" not in FAULTS:
    most = 1000 if is_full else resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
  elif is_full:
    with contextlib.suppress(OSError), open(FAULTS["ballast"], "ab", buffering=0) as file:
      while file.write(bytes(4096)) == 4096:
        pass
  else:
    with contextlib.suppress(OSError):
      os.remove(FAULTS["ballast"])


def stepping(call):
  def patched(job, state, plan):
    time.sleep(FAULTS.get("sleep", 0))
    step = int(state.step)
    if "full" in FAULTS:
      if step in FAULTS["full"]:  # On a slow machine, too, the same saves fail.
        for ours in opened:
          ours.wait()
      fill(False)
    if "log" in FAULTS:
      here = [np.asarray(shard.data).ravel() for shard in plan["index"].addressable_shards]
      examples = np.concatenate(here).tolist()
      with open(FAULTS["log"], "a") as file:
        file.write(json.dumps([step, examples]) + "\n")
    if "full" in FAULTS:
      fill(FAULTS["full"][0] <= step < FAULTS["full"][1])
    return call(job, state, plan)

  return patched


if __name__ == "__main__":
  os.rename = committing(os.rename)
  manifest.seal = sealing(manifest.seal)
  checkpoints.Checkpoints.__init__ = kept(checkpoints.Checkpoints.__init__)
  checkpointer = checkpoints.ocp.training.Checkpointer
  checkpointer.save_checkpointables_async = counted(checkpointer.save_checkpointables_async)
  if "gone" in FAULTS:
    setattr(*PLACES[FAULTS["gone"]], lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
  buckets.PATIENCE = FAULTS.get("requests", buckets.PATIENCE)
  bucket_locks.RENEW = FAULTS.get("renew", bucket_locks.RENEW)
  program.Program.train_call = stepping(program.Program.train_call)
  sys.exit(main.main())
