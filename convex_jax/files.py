"""Files that are whole or absent, JSON that knows when it was changed, folders with one writer."""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import socket
from collections.abc import Iterator
from typing import Any

from convex_jax.errors import UserError

MAX_JSON = 2**26  # Bytes; ours have thousands.


class Damaged(ValueError):
  """A file that is not what was written; the message says how."""


@contextlib.contextmanager
def atomic_write(path: str, mode: str = "w") -> Iterator[Any]:
  """A file to write to, which takes `path`'s place when all of it is on the disk."""
  part = path + ".tmp"
  try:
    with open(part, mode) as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    os.replace(part, path)
  except BaseException:
    with contextlib.suppress(OSError):
      os.remove(part)
    raise


def write_json(path: str, content: dict[str, Any]) -> None:
  """Writes `content` and a SHA-256 of it."""
  with atomic_write(path) as file:
    json.dump({**content, "sha256": _digest(content)}, file, indent=2)


def read_json(path: str, signed: bool = True) -> dict[str, Any]:
  """What `write_json` wrote, without the SHA-256, which may be absent unless `signed`.

  Raises `Damaged` for anything else, `FileNotFoundError` where there is no file.
  """
  if os.path.getsize(path) > MAX_JSON:
    raise Damaged(f"it has more than {MAX_JSON:,} bytes")
  try:
    with open(path, encoding="utf-8") as file:
      content = json.load(file)
  except (ValueError, RecursionError) as error:
    raise Damaged(f"it is no JSON: {error}") from error
  if not isinstance(content, dict):
    raise Damaged("it is no JSON object")
  digest = content.pop("sha256", None)
  if digest is None and not signed:
    if any(isinstance(v, str) and re.fullmatch("[0-9a-f]{64}", v) for v in content.values()):
      raise Damaged("its SHA-256 stands under another name")
    return content
  if digest != _digest(content):
    raise Damaged("it was changed since it was written (SHA-256)")
  return content


def _digest(content: dict[str, Any]) -> str:
  text = json.dumps(content, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


@contextlib.contextmanager
def exclusive_lock(path: str, words: str) -> Iterator[None]:
  """Raises `UserError` while another is within; whoever died holds nothing.

  `words` say what is in use; who uses it is added.
  """
  with open(path, "a+") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      file.seek(0)
      raise UserError(f"{words} ({file.read(200).strip()}); wait for it") from error
    except OSError:  # A file system without locks.
      pass
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    yield


def refuse_url(flag: str, path: str) -> None:
  """Raises `UserError` for a bucket's address: records are read at random, from a file system."""
  if "://" in path:
    bucket, _, rest = path.split("://", 1)[1].partition("/")
    raise UserError(
      f"{flag}={path} is no folder of this machine; mount the bucket on every host"
      f" (gcsfuse {bucket} /mnt/{bucket}), then {flag}=/mnt/{bucket}/{rest}"
    )
