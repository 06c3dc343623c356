"""Objects in a Google Cloud Storage bucket: what `files` does with a path gs://BUCKET/NAME.

The one module that knows about buckets; of what a run stores, only the arrays of its checkpoints go
another way, which is Orbax's own. An object appears as a whole or not at all, once its upload is
complete. There are no folders, and nothing is renamed, appended to or locked: see `claims` for what is done instead.

Requests go through Google's client, which the extra `gcs` brings with gcsfs: it verifies checksums,
and writes on the condition that nobody else has, which etils.epath and gcsfs do not.

Errors are those of files: FileNotFoundError, FileExistsError (another process wrote it), OSError
(the service cannot be reached); `UserError` where there is no such bucket, or no permission.
"""

import contextlib
import errno
import functools
import os
import posixpath
import re
from collections.abc import Iterator
from typing import Any

from convex_jax.errors import UserError

SCHEME = "gs://"
EXPECTED = "expected gs://BUCKET/FOLDER"
PATIENCE = 60.0  # Seconds for which a request is repeated while the network or the service fails.
CHUNK = 2**24  # Bytes that are read at once.


def holds(path: str) -> bool:
  """Whether a path is an address in a bucket."""
  return path.startswith(SCHEME)


def address(text: str) -> str:
  """An address in its one form; raises `UserError` for what looks like an address and is none."""
  match = re.fullmatch(r"gs://([a-z0-9][a-z0-9._-]{1,220}[a-z0-9])((?:/.*)?)", text, re.DOTALL)
  if match is None:
    raise UserError(f"{text!r} is not an address in a bucket; {EXPECTED}")
  folder = posixpath.normpath("/" + match[2]).strip("/")
  if not folder:
    raise UserError(f"{text!r} names a whole bucket, not a folder; {EXPECTED}")
  if ".." in text.split("/") or re.search(r"[\x00-\x1f#?*[\]]", folder):
    raise UserError(f"{text!r} has .. or one of # ? * [ ] in it; {EXPECTED} without them")
  return f"{SCHEME}{match[1]}/{folder}"


@functools.cache
def _client() -> Any:
  try:
    # Of the extra, which most runs do without; half a second.
    from google.auth.exceptions import DefaultCredentialsError
    from google.cloud import storage
  except ModuleNotFoundError as error:
    raise UserError("gs:// addresses need an extra: pip install 'convex_jax[gcs]'") from error
  try:
    return storage.Client(project=os.environ.get("GOOGLE_CLOUD_PROJECT", "none"))
  except DefaultCredentialsError:
    return storage.Client.create_anonymous_client()  # Enough for what is public.


def _bucket(path: str) -> tuple[Any, str]:
  """(the bucket of an address, the name in it)."""
  bucket, _, name = path.removeprefix(SCHEME).partition("/")
  return _client().bucket(bucket), name


def _retry() -> Any:
  from google.cloud.storage.retry import DEFAULT_RETRY  # As above.

  return DEFAULT_RETRY.with_timeout(PATIENCE)


@contextlib.contextmanager
def _errors_of(path: str) -> Iterator[None]:
  """While active, errors of requests are raised as those of files."""
  _client()
  # As above.
  from google.api_core import exceptions as api
  from google.auth.exceptions import GoogleAuthError
  from google.cloud.storage.exceptions import DataCorruption, InvalidResponse
  from requests.exceptions import RequestException

  try:
    yield
  except api.PreconditionFailed as error:
    raise FileExistsError(errno.EEXIST, "another process wrote it", path) from error
  except api.NotFound as error:
    raise FileNotFoundError(errno.ENOENT, "there is no such object", path) from error
  except (api.Unauthorized, GoogleAuthError) as error:
    raise UserError(
      f"{path}: there are no valid credentials ({_reason(error)}). To log in:"
      " gcloud auth application-default login"
    ) from error
  except api.Forbidden as error:
    raise UserError(
      f"{path}: permission denied ({_reason(error)}); expected the role Storage Object User"
      " (roles/storage.objectUser) on the bucket or, for reading only, Storage Object Viewer"
    ) from error
  except (api.GoogleAPIError, RequestException, DataCorruption, InvalidResponse) as error:
    raise OSError(errno.EIO, f"the bucket cannot be reached: {_reason(error)}", path) from error


def _reason(error: Exception) -> str:
  """The first line of an error, without the request's address."""
  cause = getattr(error, "cause", None) or error  # Of a RetryError.
  line = (str(cause).splitlines() or [repr(cause)])[0]
  return re.sub(r"^\d+ [A-Z]+ https?://\S+: ", "", line).rstrip(":. ")[:200]


def _no_bucket(path: str) -> UserError:
  bucket = SCHEME + path.removeprefix(SCHEME).partition("/")[0]
  return UserError(
    f"{path}: there is no bucket {bucket}; expected one that exists. To make one:"
    f" gcloud storage buckets create {bucket} --location=REGION"
  )


def _blobs(path: str, prefix: str, **options: Any) -> Iterator[Any]:
  """The objects of a bucket whose names start with `prefix`."""
  bucket, _ = _bucket(path)
  try:
    with _errors_of(path):
      yield from bucket.list_blobs(prefix=prefix, retry=_retry(), **options)
  except FileNotFoundError as error:
    raise _no_bucket(path) from error


def is_file(path: str) -> bool:
  """Whether there is an object of this name."""
  _, name = _bucket(path)
  return any(blob.name == name for blob in _blobs(path, name, max_results=1))


def exists(path: str) -> bool:
  """Whether there is an object of this name, or one below it."""
  _, name = _bucket(path)
  return is_file(path) or any(_blobs(path, name + "/", max_results=1))


def described(folder: str) -> dict[str, tuple[int, str]]:
  """(size in bytes, CRC32C in base64) of all objects below an address, by names from there."""
  prefix = _bucket(folder)[1] + "/"
  blobs = {blob.name.removeprefix(prefix): blob for blob in _blobs(folder, prefix)}
  # What is named like a folder is what consoles make to show one.
  return {n: (blob.size, blob.crc32c) for n, blob in blobs.items() if n and not n.endswith("/")}


def folders(folder: str) -> list[str]:
  """The names, directly below an address, below which there are objects."""
  prefix = _bucket(folder)[1] + "/"
  pages = _client().list_blobs(_bucket(folder)[0], prefix=prefix, delimiter="/", retry=_retry())
  try:
    with _errors_of(folder):
      list(pages)
  except FileNotFoundError as error:
    raise _no_bucket(folder) from error
  return sorted(name.removeprefix(prefix).strip("/") for name in pages.prefixes)


def read(path: str) -> bytes:
  """The content of an object, whose checksum is verified."""
  bucket, name = _bucket(path)
  with _errors_of(path):
    return bucket.blob(name).download_as_bytes(retry=_retry())


def pieces(path: str) -> Iterator[bytes]:
  """The content of an object, piece by piece; no checksum is verified."""
  bucket, name = _bucket(path)
  with _errors_of(path), bucket.blob(name).open("rb", chunk_size=CHUNK, retry=_retry()) as file:
    while piece := file.read(CHUNK):
      yield piece


def write(path: str, content: bytes, generation: int | None = None) -> int:
  """Writes an object; returns its generation, by which its contents are told apart.

  With `generation` only in place of that one, and with 0 only where there is none: raises
  `FileExistsError` where another process was faster.
  """
  bucket, name = _bucket(path)
  blob = bucket.blob(name)
  try:
    with _errors_of(path):
      blob.upload_from_string(
        content,
        "application/octet-stream",
        if_generation_match=generation,
        checksum="crc32c",
        retry=_retry(),
      )
  except FileNotFoundError as error:
    raise _no_bucket(path) from error
  except FileExistsError:
    # Where the answer was lost, the request was repeated, and has met its own work.
    written = current(path)
    if written is None or written[1] != content:
      raise
    return written[0]
  return blob.generation


def current(path: str) -> tuple[int, bytes] | None:
  """(generation, content) of an object, None where there is none."""
  bucket, name = _bucket(path)
  blob = bucket.blob(name)
  try:
    with _errors_of(path):
      content = blob.download_as_bytes(retry=_retry())
  except FileNotFoundError:
    return None
  return blob.generation, content


def remove(path: str, generation: int | None = None) -> None:
  """Deletes an object, with `generation` only that one; no error where there is none."""
  bucket, name = _bucket(path)
  with contextlib.suppress(FileNotFoundError, FileExistsError), _errors_of(path):
    bucket.blob(name).delete(if_generation_match=generation, retry=_retry())


def move_tree(source: str, target: str) -> None:
  """Moves all objects: first all are copied, within the bucket, then the old ones deleted."""
  bucket, start = _bucket(source)
  names = list(described(source))
  for name in names:
    with _errors_of(source):
      new = f"{_bucket(target)[1]}/{name}"
      bucket.copy_blob(bucket.blob(f"{start}/{name}"), bucket, new, retry=_retry())
  for name in names:
    remove(f"{source}/{name}")


def upload_tree(folder: str, target: str, replacing: str, known: dict[str, Any]) -> None:
  """Uploads the files of a local folder, but for those that are as `known`, which is updated.

  Then deletes objects that lie directly in `target`, have a name that starts with `replacing`, and
  are not in the folder.
  """
  for root, _, names in os.walk(folder):
    for name in names:
      path = os.path.join(root, name)
      try:
        about = os.stat(path)
        state = about.st_size, about.st_mtime_ns
        if known.get(path) == state:
          continue
        with open(path, "rb") as file:
          content = file.read()
      except FileNotFoundError:  # Replaced meanwhile.
        continue
      write(f"{target}/{os.path.relpath(path, folder).replace(os.sep, '/')}", content)
      known[path] = state
  prefix = _bucket(target)[1] + "/"
  for blob in list(_blobs(target, prefix + replacing)):
    name = blob.name.removeprefix(prefix)
    if not os.path.exists(os.path.join(folder, name)):
      remove(f"{target}/{name}")
