"""A split of decoded images, in one array or in a memory-mapped file."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
  """Decoded examples: images (N, H, W, C) uint8, labels (n,) int32; n = N without `index`."""

  images: np.ndarray
  labels: np.ndarray
  index: np.ndarray | None = None  # Rows of `images`, where these are too many to copy.

  def __len__(self) -> int:
    return len(self.labels)

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(H, W, C) in px."""
    return self.images.shape[1:]

  @property
  def nbytes(self) -> int:
    """Bytes of the images of all examples."""
    return len(self) * math.prod(self.image_shape)

  def take(self, at: Any) -> np.ndarray:
    """The images of the examples at `at`, an index array of any shape or a slice."""
    return self.images[at if self.index is None else self.index[at]]

  def subset(self, index: np.ndarray) -> "Split":
    """The examples at `index`, in that order; images in a file are not copied."""
    if isinstance(self.images, np.memmap) or self.index is not None:
      within = index if self.index is None else self.index[index]
      return Split(self.images, self.labels[index], within)
    return Split(self.images[index], self.labels[index])

  def first(self, n: int) -> "Split":
    """The first `n` examples, or all if there are fewer."""
    return Split(self.take(slice(n)), self.labels[:n])

  def of_classes(self, kept: Sequence[int]) -> "Split":
    """The examples of the classes `kept`, labelled by their place in `kept`."""
    place = np.full(max(self.labels.max(), *kept) + 1, -1, np.int32)
    place[list(kept)] = np.arange(len(kept))
    chosen = self.subset(np.flatnonzero(place[self.labels] >= 0))
    return dataclasses.replace(chosen, labels=place[chosen.labels])

  def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Exact mean and standard deviation of each channel, for pixels in 0..1."""
    levels = np.arange(256) / 255
    counts = np.zeros((self.image_shape[-1], 256), np.int64)
    for start in range(0, len(self), 1000):  # Counting takes 8 bytes per pixel.
      for c, channel in enumerate(np.moveaxis(self.take(slice(start, start + 1000)), -1, 0)):
        counts[c] += np.bincount(channel.ravel(), minlength=256)
    means = [float(np.average(levels, weights=n)) for n in counts]
    pairs = zip(means, counts, strict=True)
    variances = [np.average((levels - m) ** 2, weights=n) for m, n in pairs]
    # A constant channel is divided by 1, not by 0.
    return tuple(means), tuple(float(np.sqrt(v)) or 1.0 for v in variances)
