"""Which process uses an address in a bucket: what a lock is to a folder, made of an object."""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from typing import Any

from convex_jax import buckets
from convex_jax.errors import Unsaved, UserError

RENEW = 20.0  # Seconds between two renewals of a lock.
STALE = 180.0  # Seconds without a renewal, after which another process takes it over.


class BucketLock:
  """An object that one process at a time holds: what a lock is to a file.

  Its holder renews it, every `RENEW` seconds. One that has not been renewed for `STALE` seconds is
  taken over, and at once where its holder was a process of this machine and is gone. Time is
  measured by who waits, so clocks need not agree. Used as a context.

  Raises `UserError`, with `words`, where another process holds it.
  """

  def __init__(self, path: str, words: str):
    self._path, self._words = path, words
    self._own = {
      "holder": f"process {os.getpid()} on {socket.gethostname()}",
      "process": _identity(os.getpid()),
      "claim": uuid.uuid4().hex,
    }
    self._generation, self._lost = 0, False
    self._writing, self._ended = threading.Lock(), threading.Event()

  def __enter__(self) -> "BucketLock":
    self._take()
    threading.Thread(target=self._keep, daemon=True).start()
    return self

  def __exit__(self, *_: Any) -> None:
    self._ended.set()
    with self._writing, contextlib.suppress(OSError, UserError):
      if not self._lost:
        buckets.remove(self._path, self._generation)

  def _take(self) -> None:
    first, deadline, told = None, 0.0, False
    while True:
      found = buckets.current(self._path)
      if found is None:
        first = None
      elif first is None or _claim(found) != _claim(first):
        first, deadline = found, time.monotonic() + STALE
      elif found[0] != first[0]:
        raise UserError(f"{self._words} ({_holder(found)}). Wait until it ends")
      free = found is None or _is_gone(found) or time.monotonic() >= deadline
      if free:
        with contextlib.suppress(FileExistsError):
          self._write(found[0] if found else 0)
          return
      elif not told and found is not None:
        told = True
        print(
          f"{os.path.dirname(self._path)} was last used by {_holder(found)}; waiting up to {STALE:g} s"
          " in case it is still running, then taking over",
          file=sys.stderr,
          flush=True,
        )
      time.sleep(RENEW / 10)

  def _write(self, generation: int) -> None:
    # Never twice the same content, so that one's own is recognised.
    content = {**self._own, "renewed": time.time(), "number": uuid.uuid4().hex}
    self._generation = buckets.write(self._path, json.dumps(content).encode(), generation)

  def _keep(self) -> None:
    while not self._ended.wait(RENEW):
      with contextlib.suppress(OSError, Unsaved, UserError):  # Tried again.
        self.renew()

  def renew(self) -> None:
    """Renews the lock; raises `Unsaved` where it has ended, or another process has taken it."""
    with self._writing:
      try:
        if not (self._lost or self._ended.is_set()):
          self._write(self._generation)
      except FileExistsError:
        self._lost = True
      if self._lost:
        raise Unsaved(f"{os.path.dirname(self._path)} was taken over by another process")
      if self._ended.is_set():
        raise Unsaved(f"{os.path.dirname(self._path)} is no longer in use by this process")


def _claim(found: tuple[int, bytes]) -> Any:
  return _content(found).get("claim")


def _holder(found: tuple[int, bytes]) -> str:
  return str(_content(found).get("holder", "another process"))


def _content(found: tuple[int, bytes]) -> dict[str, Any]:
  try:
    content = json.loads(found[1])
  except ValueError:
    content = None
  return content if isinstance(content, dict) else {}


def _is_gone(found: tuple[int, bytes]) -> bool:
  """Whether the holder of a lock was a process of this machine, and is none any more."""
  process = _content(found).get("process")
  own = _identity(os.getpid())
  if not (isinstance(process, list) and len(process) == 4 and own) or process[:2] != own[:2]:
    return False
  now = _identity(process[2])
  if now is not None:
    return now != process
  try:
    os.kill(process[2], 0)  # Of other users' processes /proc may not tell (hidepid).
  except ProcessLookupError:
    return True
  except (OSError, TypeError, OverflowError):
    return False
  return False


def _identity(pid: Any) -> list[Any] | None:
  """[boot of the machine, namespace of its numbers, number, start] of a process (Linux).

  The start is None where it has ended, and its parent has not asked yet. None for one that does not
  run, and where the system does not tell.
  """
  try:
    with open("/proc/sys/kernel/random/boot_id") as file:
      boot = file.read().strip()
    with open(f"/proc/{int(pid)}/stat", "rb") as file:
      state, *fields = file.read().rpartition(b")")[2].split()
    start = None if state in (b"Z", b"X") else int(fields[18])
    return [boot, os.readlink("/proc/self/ns/pid"), int(pid), start]
  except (OSError, ValueError, TypeError, IndexError):
    return None
