"""Paths that users give, atomic writes, JSON signed against damage, and locks."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

from convex_jax.errors import Unsaved, UserError

# Of an OSError where a file system is read-only, or a folder somebody else's.
REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)
MAX_JSON = 2**26  # Bytes; real files have thousands.


class Damaged(ValueError):
  """A file differs from what was written; the message says how."""


@contextlib.contextmanager
def atomic_write(path: str, mode: str = "w") -> Iterator[Any]:
  """Opens a file for writing that replaces `path` once all of it is on the disk.

  If the body raises, `path` is left as it was. Raises `Unsaved` where the disk refuses.
  """
  part = path + ".tmp"
  try:
    with open(part, mode) as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    os.replace(part, path)
  except BaseException as error:
    with contextlib.suppress(OSError):
      os.remove(part)
    if isinstance(error, OSError):
      raise Unsaved(f"{path} could not be written: {error.strerror or error}") from error
    raise


def try_to_write(write: Callable[..., None], *args: Any) -> None:
  """Calls `write`; where the storage does not take it, says so: what was printed holds."""
  try:
    write(*args)
  except (Unsaved, OSError) as error:
    print(f"{error}; the result above holds", file=sys.stderr, flush=True)


def refuse_unwritable(flag: str, path: str) -> None:
  """Raises `UserError` where no file can be written into a folder, or it cannot be made."""
  there = os.path.abspath(path)
  while not os.path.exists(there):
    there = os.path.dirname(there)
  if not os.path.isdir(there) or not os.access(there, os.W_OK):
    raise UserError(f"{flag}={path}: {there} is not writable; pass another {flag}")


def write_json(path: str, content: dict[str, Any]) -> None:
  """Writes `content` and its SHA-256; raises `Unsaved` where the disk refuses."""
  with atomic_write(path) as file:
    json.dump({**content, "sha256": _digest(content)}, file, indent=2)


def read_json(path: str) -> dict[str, Any]:
  """The content that `write_json` wrote.

  Raises `Damaged` for any other file, `FileNotFoundError` where there is none.
  """
  if os.path.getsize(path) > MAX_JSON:
    raise Damaged(f"it is larger than {MAX_JSON:,} bytes")
  try:
    with open(path, encoding="utf-8") as file:
      content = json.load(file)
  except (ValueError, RecursionError) as error:
    raise Damaged(f"it is not JSON: {error}") from error
  if not isinstance(content, dict):
    raise Damaged("it is not a JSON object")
  if content.pop("sha256", None) != _digest(content):
    raise Damaged("it was changed after it was written (SHA-256)")
  return content


def _digest(content: dict[str, Any]) -> str:
  text = json.dumps(content, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


@contextlib.contextmanager
def exclusive_lock(path: str, words: str) -> Iterator[None]:
  """Holds a lock on the file `path`, which a process that dies releases.

  Raises `UserError` while another process holds it: `words`, and which process that is.
  """
  with open(path, "a+") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      file.seek(0)
      raise UserError(f"{words} ({file.read(200).strip()}). Wait until it ends") from error
    except OSError:  # The file system has no locks.
      pass
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    yield


def expand(path: str | os.PathLike[str]) -> str:
  """A path that a user gave, with a leading `~` or `~NAME` replaced by the home folder.

  Every path that a command, a config or a function takes goes through here, before it is used.
  Raises `UserError` for what is no path, and where there is no such user.
  """
  if not isinstance(path, str | os.PathLike) or not isinstance(text := os.fspath(path), str):
    raise UserError(f"{path!r} is no path; expected text or a pathlib.Path")
  if "\0" in text:
    raise UserError(f"{text!r} is no path: it contains a null character")
  expanded = os.path.expanduser(text)
  if expanded.startswith("~"):
    # Left as it is, it would name a folder here that a shell takes for somebody's home.
    name = text.partition(os.sep)[0]
    raise UserError(f"{text}: no home folder of {name} is known; to name a file here: ./{text}")
  return expanded


def refuse_url(flag: str, path: str) -> None:
  """Raises `UserError` for a URL: these files need a file system."""
  if "://" in path:
    bucket, _, rest = path.split("://", 1)[1].partition("/")
    raise UserError(
      f"{flag}={path} is a URL; expected a local folder. Mount the bucket on every host"
      f" (gcsfuse {bucket} /mnt/{bucket}), then pass {flag}=/mnt/{bucket}/{rest}"
    )
