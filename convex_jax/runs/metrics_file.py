"""The figures of a run, as they are written: metrics.jsonl and TensorBoard events made from it.

`metrics.jsonl` is the truth: one JSON object a row, `kind` "train" (means since the previous
row), "eval" (inference mode, images not augmented) or "final" (the same, on every example),
`time` in seconds since 1970. After a resume both files hold every step once.
"""

import glob
import json
import os
import socket
import time
from typing import Any

# These parts of it import neither TensorFlow nor torch, where they are installed.
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

from convex_jax import files
from convex_jax.errors import Unsaved
from convex_jax.runs.workdir import Workdir, read_rows, saving

# Made when they are imported: no type checker sees them.
_Event: Any = event_pb2.Event  # pyright: ignore[reportAttributeAccessIssue]
_Summary: Any = summary_pb2.Summary  # pyright: ignore[reportAttributeAccessIssue]
_NO_SCALARS = ("step", "kind", "time")


class MetricsFile:
  """The writer of a run's rows, of which those up to step `start` are kept.

  A full disk loses none: rows that cannot be written wait in memory for the next one.
  `damaged` counts the lines that were left out because they could not be read.
  """

  def __init__(self, workdir: Workdir, start: int):
    self.path = workdir.metrics_file
    self._workdir, self._folder = workdir, workdir.spool.folder
    self._file = os.path.join(self._folder, os.path.basename(self.path))
    self._waiting, self._events = [], None
    rows, self.damaged = read_rows(self.path) if files.exists(self.path) else ([], 0)
    kept = [row for row in rows if row["step"] <= start and row["kind"] != "final"]
    with saving():
      with files.atomic_write(self._file) as file:
        file.writelines(json.dumps(row) + "\n" for row in kept)
      self._renew_events()

  def append(self, row: dict[str, Any]) -> str | None:
    """Writes a row, and those that wait; returns why not, where that was not possible."""
    self._waiting.append(row)
    return self.write()

  def write(self) -> str | None:
    """Writes the rows that wait and missing events; returns why not, where it cannot."""
    if not self._waiting and self._events is not None:
      return None
    try:
      with open(self._file, "ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        text = "".join(json.dumps(row) + "\n" for row in self._waiting).encode()
        if file.write(text) < len(text):  # The disk took a part.
          file.truncate(end)
          raise OSError("the disk is full")
        written, self._waiting = self._waiting, []
      if self._events is None:
        self._renew_events()
      else:
        _write_events(self._events, written)
    except OSError as error:
      self._events = None
      return f"{self.path}: {error.strerror or error}"
    return None

  def sync(self) -> None:
    """Flushes the rows to disk, so that no checkpoint is newer than its rows."""
    with saving(), open(self._file, "ab") as file:
      os.fsync(file.fileno())

  def _renew_events(self) -> None:
    """Writes one event file with all rows in place of those of earlier starts."""
    for path in glob.glob(os.path.join(glob.escape(self._folder), "events.out.tfevents.*")):
      os.remove(path)
    name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
    writer = RecordWriter(open(os.path.join(self._folder, name), "wb"))  # noqa: SIM115
    first = _Event(wall_time=time.time(), file_version="brain.Event:2")
    writer.write(first.SerializeToString())
    _write_events(writer, read_rows(self._file)[0])
    self._events = writer

  def close(self) -> str | None:
    """Writes what waits; returns why not, where that was not possible."""
    failure = self.write()
    if self._events is not None:
      self._events.close()
    try:
      self._workdir.publish()
    except Unsaved as error:
      return str(error)
    return failure


def _write_events(writer: Any, rows: list[dict[str, Any]]) -> None:
  for row in rows:
    scalars = {f"{row['kind']}/{k}": v for k, v in row.items() if k not in _NO_SCALARS}
    values = [_Summary.Value(tag=tag, simple_value=v) for tag, v in scalars.items()]
    event = _Event(wall_time=row.get("time", 0.0), step=row["step"], summary=_Summary(value=values))
    writer.write(event.SerializeToString())
  writer.flush()
