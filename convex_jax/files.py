"""Paths that users give, atomic writes, JSON signed against damage, and locks.

A path is that of a file or folder of this machine, or of a run also an address gs://BUCKET/NAME:
the functions that a run needs take both (see `buckets`).
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import io
import json
import os
import re
import socket
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import Any

from convex_jax import bucket_locks, buckets
from convex_jax.errors import Unsaved, UserError

# Of an OSError where a file system is read-only, or a folder somebody else's.
REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)
MAX_JSON = 2**26  # Bytes; real files have thousands.


class Damaged(ValueError):
  """A file differs from what was written; the message says how."""


@contextlib.contextmanager
def atomic_write(path: str, mode: str = "w", new: bool = False) -> Iterator[Any]:
  """Opens a file for writing that replaces `path` once all of it is stored.

  If the body raises, `path` is left as it was. Raises `Unsaved` where the storage refuses, with
  `new` also where another process has written to this address in a bucket before.
  """
  part = path + ".tmp"
  try:
    if buckets.holds(path):
      with io.BytesIO() as content:
        file = content if "b" in mode else io.TextIOWrapper(content, "utf-8", newline="")
        yield file
        file.flush()
        buckets.write(path, content.getvalue(), 0 if new else None)
      return
    with open(part, mode, encoding=None if "b" in mode else "utf-8") as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    os.replace(part, path)
  except BaseException as error:
    with contextlib.suppress(OSError):
      os.remove(part)
    if isinstance(error, OSError):
      raise Unsaved(f"{path} could not be written: {error.strerror or error}") from error
    if isinstance(error, UserError) and buckets.holds(path):  # No permission.
      raise Unsaved(str(error)) from error
    raise


def try_to_write(write: Callable[..., None], *args: Any) -> None:
  """Calls `write`; where the storage does not take it, says so: what was printed holds."""
  try:
    write(*args)
  except (Unsaved, OSError) as error:
    print(f"{error}; the result above holds", file=sys.stderr, flush=True)


def refuse_unwritable(flag: str, path: str) -> None:
  """Raises `UserError` where no file can be written into a folder, or it cannot be made."""
  refuse_url(flag, path)
  there = os.path.abspath(path)
  while not os.path.exists(there):
    there = os.path.dirname(there)
  if not os.path.isdir(there) or not os.access(there, os.W_OK):
    raise UserError(f"{flag}={path}: {there} is not writable; pass another {flag}")


def write_json(path: str, content: dict[str, Any], new: bool = False) -> None:
  """Writes `content` and its SHA-256; raises `Unsaved` and takes `new` as `atomic_write`."""
  with atomic_write(path, new=new) as file:
    json.dump({**content, "sha256": _digest(content)}, file, indent=2)


def read_json(path: str) -> dict[str, Any]:
  """The content that `write_json` wrote.

  Raises `Damaged` for any other file, `FileNotFoundError` where there is none.
  """
  if not buckets.holds(path) and os.path.getsize(path) > MAX_JSON:
    raise Damaged(f"it is larger than {MAX_JSON:,} bytes")
  try:
    content = json.loads(read(path).decode())
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
def exclusive_lock(path: str, words: str) -> Iterator[Callable[[], None]]:
  """Holds a lock on the file `path`, which a process that dies releases.

  Yields a function that raises `Unsaved` where another process has taken it over since: in a
  bucket, where it is a `bucket_locks.BucketLock`, from a process that was not seen for minutes.

  Raises `UserError` while another process holds it: `words`, and which process that is.
  """
  if buckets.holds(path):
    with bucket_locks.BucketLock(path, words) as lock:
      yield lock.renew
    return
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
    yield lambda: None


def is_file(path: str) -> bool:
  """Whether a path is that of a file."""
  return buckets.is_file(path) if buckets.holds(path) else os.path.isfile(path)


def exists(path: str) -> bool:
  """Whether a path is that of a file or a folder."""
  return buckets.exists(path) if buckets.holds(path) else os.path.exists(path)


def is_folder(path: str) -> bool:
  """Whether a path is that of a folder, as any address in a bucket may be."""
  return buckets.holds(path) or os.path.isdir(path)


def listing(folder: str) -> dict[str, int | None]:
  """The sizes in bytes of all files in a folder, at any depth, by relative name with "/".

  None for what is no regular file: links are not followed.
  """
  if buckets.holds(folder):
    return {name: size for name, (size, _) in buckets.described(folder).items()}
  found = {}
  for root, folders_, names in os.walk(folder):
    links = [name for name in folders_ if os.path.islink(os.path.join(root, name))]
    for name in names + links:
      about = os.lstat(path := os.path.join(root, name))
      relative = os.path.relpath(path, folder).replace(os.sep, "/")
      found[relative] = about.st_size if stat.S_ISREG(about.st_mode) else None
  return found


def folders(folder: str) -> list[str]:
  """The names of the folders in a folder; none where it does not exist."""
  if buckets.holds(folder):
    return buckets.folders(folder)
  names = os.listdir(folder) if os.path.isdir(folder) else []
  return [name for name in names if os.path.isdir(os.path.join(folder, name))]


def read(path: str) -> bytes:
  """The content of a file."""
  if buckets.holds(path):
    return buckets.read(path)
  with open(path, "rb") as file:
    return file.read()


def sha256(path: str) -> str:
  """The SHA-256 of a file, in hexadecimal digits."""
  if buckets.holds(path):
    digest = hashlib.sha256()
    for piece in buckets.pieces(path):
      digest.update(piece)
    return digest.hexdigest()
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def make_folder(path: str) -> None:
  """Makes a folder; in a bucket there are none."""
  if not buckets.holds(path):
    os.makedirs(path, exist_ok=True)


def move_tree(source: str, target: str) -> None:
  """Moves a folder to a path of the same storage, where nothing is."""
  if buckets.holds(source):
    buckets.move_tree(source, target)
    return
  os.makedirs(os.path.dirname(target), exist_ok=True)
  os.rename(source, target)


class Spool:
  """A folder of this machine for what is appended to, that is to be found in the folder `path`.

  That is `path` itself; for an address in a bucket a temporary one, of which `upload` brings there
  what has changed.
  """

  def __init__(self, path: str):
    self._path, self._known, self._uploading = path, {}, threading.Lock()

  @functools.cached_property
  def folder(self) -> str:
    """Where to write."""
    if not buckets.holds(self._path):
      return self._path
    self._temporary = tempfile.TemporaryDirectory(prefix="convex_jax_")
    return self._temporary.name

  def upload(self, replacing: str) -> None:
    """Also deletes files whose names start with `replacing` and which the spool does not have.

    Raises OSError where the storage does not take it.
    """
    if buckets.holds(self._path):
      with self._uploading:
        buckets.upload_tree(self.folder, self._path, replacing, self._known)


def cache_folder() -> str:
  """Where this user's machine keeps what can be made again."""
  home = expand(os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache"))
  return os.path.join(home, "convex_jax")


def absolute(path: str) -> str:
  """An absolute path; an address in a bucket is one."""
  return path if buckets.holds(path) else os.path.abspath(path)


def expand(path: str | os.PathLike[str]) -> str:
  """A path that a user gave, with a leading `~` or `~NAME` replaced by the home folder.

  Every path that a command, a config or a function takes goes through here, before it is used.
  Raises `UserError` for what is no path, and where there is no such user.
  """
  if not isinstance(path, str | os.PathLike) or not isinstance(text := os.fspath(path), str):
    raise UserError(f"{path!r} is no path; expected text or a pathlib.Path")
  if "\0" in text:
    raise UserError(f"{text!r} is no path: it contains a null character")
  if re.match("gs:/", text, re.IGNORECASE):
    return buckets.address(text)
  expanded = os.path.expanduser(text)
  if expanded.startswith("~"):
    # Left as it is, it would name a folder here that a shell takes for somebody's home.
    name = text.partition(os.sep)[0]
    raise UserError(f"{text}: no home folder of {name} is known; to name a file here: ./{text}")
  return expanded


def refuse_url(flag: str, path: str, bucket: bool = False) -> None:
  """Raises `UserError` for a URL; with `bucket`, for one that is not of Google Cloud Storage."""
  if "://" in path and not (bucket and buckets.holds(path)):
    expected = f"a path of this machine{', or gs://BUCKET/FOLDER' if bucket else ''}"
    raise UserError(f"{flag}={path} is a URL; expected {expected}")
