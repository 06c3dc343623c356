"""What a worker process does: rows of a run, from records to arrays. No device work."""

import dataclasses
from typing import Any

import cv2
import numpy as np

from convex_jax.data.photos.decode import FINE, UNREADABLE, Unreadable, central_crop, random_crop
from convex_jax.data.photos.records import Records, source_of
from convex_jax.data.sampling import examples_at
from convex_jax.errors import UserError

__all__ = ["FINE", "UNREADABLE", "Evaluation", "Training", "source_of"]
cv2.setNumThreads(0)  # Workers share the cores already; whoever only imports us keeps theirs.
TRIES = 100  # Records in a row that may be unreadable.


@dataclasses.dataclass(frozen=True)
class _Rows:
  """Maps the number of a chunk to its rows; step s has the rows of this process at s B."""

  records: Records
  rows: np.ndarray
  batch_size: int

  def positions(self, number: int, chunk: int) -> np.ndarray:
    """Positions in the run of the rows of a chunk."""
    at = np.arange(number * chunk, (number + 1) * chunk)
    return at // len(self.rows) * self.batch_size + self.rows[at % len(self.rows)]


@dataclasses.dataclass(frozen=True)
class Training(_Rows):
  """Random crops of examples in training order, a function of (seed, position)."""

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


@dataclasses.dataclass(frozen=True)
class Evaluation(_Rows):
  """Central crops in the order of the split; beyond the last of `n`, the last again."""

  n: int
  chunk: int

  def __call__(self, number: int) -> dict[str, np.ndarray]:
    examples = np.minimum(self.positions(number, self.chunk), self.n - 1)

    def crop(_, data):
      return central_crop(data, self.records.size, self.records.eval_share)

    return _read(self.records, examples, crop)


def _read(records: Records, examples: np.ndarray, crop: Any) -> dict[str, np.ndarray]:
  """image, label, and of which record and in what state; unreadable ones replaced."""
  n = len(examples)
  out = {
    "image": np.empty((n, *records.image_shape), np.uint8),
    "label": np.empty(n, np.int32),
    "record": records.index[examples].astype(np.int64),
    "state": np.full(n, FINE, np.uint8),
  }
  for i, example in enumerate(examples):
    for step in range(TRIES):  # The next that can be read takes its place, label and all.
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
        f"{records.folder}: {TRIES} images in a row that cannot be read, from {int(example)} on;"
        " prepare the data set again"
      )
  return out
