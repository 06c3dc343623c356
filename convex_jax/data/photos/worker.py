"""The work of a worker process: rows of a run, from records to arrays. No device work."""

import dataclasses
import multiprocessing
import os
import signal
import threading
from typing import Any

import cv2
import numpy as np

from convex_jax.data.photos.decode import FINE, UNREADABLE, Unreadable, central_crop, random_crop
from convex_jax.data.photos.records import Records
from convex_jax.data.sampling import examples_at
from convex_jax.errors import UserError
from convex_jax.signals import STOP_SIGNALS

TRIES = 100  # Consecutive records that may be unreadable.


def start(*_: int) -> None:
  """Prepares a worker process: it ends with its trainer, and leaves signals to it.

  Ctrl-C and schedulers signal every process of a group. The trainer must survive to save, and
  so must the workers that it waits for.
  """
  cv2.setNumThreads(0)  # The workers use all cores already.
  for number in STOP_SIGNALS:
    signal.signal(number, signal.SIG_IGN)
  parent = multiprocessing.parent_process()

  def follow():
    assert parent is not None
    parent.join()
    os._exit(0)

  threading.Thread(target=follow, daemon=True).start()


@dataclasses.dataclass(frozen=True, eq=False)
class _Rows:
  """The rows that one process feeds, in chunks; called with a chunk's number, returns its rows."""

  records: Records
  rows: np.ndarray
  batch_size: int

  def positions(self, number: int, chunk: int) -> np.ndarray:
    """Positions in the run of the rows of chunk `number`; step s starts at s * batch_size."""
    at = np.arange(number * chunk, (number + 1) * chunk)
    return at // len(self.rows) * self.batch_size + self.rows[at % len(self.rows)]


@dataclasses.dataclass(frozen=True, eq=False)
class Training(_Rows):
  """Random crops in training order, each a function of (seed, position)."""

  seed: int
  chunk: int
  repeats: int = 1

  def __call__(self, number: int) -> dict[str, np.ndarray]:
    position = self.positions(number, self.chunk)
    examples = examples_at(position, self.seed, len(self.records), self.repeats)

    def crop(i, data):
      rng = np.random.default_rng([self.seed, 3, int(position[i])])
      return random_crop(data, rng, self.records.size, self.records.crop_area)

    return _read(self.records, examples, crop)


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation(_Rows):
  """Central crops of the first `n` examples in order, then of the last one repeatedly."""

  n: int
  chunk: int

  def __call__(self, number: int) -> dict[str, np.ndarray]:
    examples = np.minimum(self.positions(number, self.chunk), self.n - 1)

    def crop(_, data):
      return central_crop(data, self.records.size, self.records.eval_share)

    return _read(self.records, examples, crop)


def _read(records: Records, examples: np.ndarray, crop: Any) -> dict[str, np.ndarray]:
  """Columns image, label, record and state; the next readable example replaces unreadable ones."""
  n = len(examples)
  out = {
    "image": np.empty((n, *records.image_shape), np.uint8),
    "label": np.empty(n, np.int32),
    "record": records.index[examples].astype(np.int64),
    "state": np.full(n, FINE, np.uint8),
  }
  for i, example in enumerate(examples):
    for step in range(TRIES):  # The next readable record takes its place, with its label.
      try:
        found = records.read((int(example) + step) % len(records))
        out["image"][i], state = crop(i, found["image"])
      except Unreadable:
        out["state"][i] = UNREADABLE
        continue
      out["label"][i] = found["label"]
      out["state"][i] = max(out["state"][i], state)
      break
    else:
      raise UserError(
        f"{records.folder}: {TRIES} consecutive images cannot be read, from example {int(example)}"
        " on. Prepare the data set again"
      )
  return out
