"""Examples of a split: decoded in one array, or still records on disk."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from convex_jax.data.decode import Unreadable, central_crop


@dataclasses.dataclass(frozen=True)
class Split:
  """Decoded examples: images (N, H, W, C) uint8, labels (n,) int32; n = N without `index`."""

  images: np.ndarray
  labels: np.ndarray
  index: np.ndarray | None = None  # Which images are meant, where they are too many to copy.

  def __len__(self) -> int:
    return len(self.labels)

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(H, W, C), px."""
    return self.images.shape[1:]

  @property
  def nbytes(self) -> int:
    """Bytes of the images of all examples."""
    return len(self) * math.prod(self.image_shape)

  def take(self, at: Any) -> np.ndarray:
    """The images of the examples at `at`, an array of any shape or a slice."""
    return self.images[at if self.index is None else self.index[at]]

  def subset(self, index: np.ndarray) -> "Split":
    """The examples at `index`, in that order; images in a file stay there."""
    if isinstance(self.images, np.memmap) or self.index is not None:
      within = index if self.index is None else self.index[index]
      return Split(self.images, self.labels[index], within)
    return Split(self.images[index], self.labels[index])

  def first(self, n: int) -> "Split":
    """The first `n` examples, or all."""
    return Split(self.take(slice(n)), self.labels[:n])

  def of_classes(self, kept: Sequence[int]) -> "Split":
    """The examples of these classes alone, labelled by their place among them."""
    place = np.full(max(self.labels.max(), *kept) + 1, -1, np.int32)
    place[list(kept)] = np.arange(len(kept))
    chosen = self.subset(np.flatnonzero(place[self.labels] >= 0))
    return dataclasses.replace(chosen, labels=place[chosen.labels])

  def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, for pixels in 0..1, exact."""
    levels = np.arange(256) / 255
    counts = np.zeros((self.image_shape[-1], 256), np.int64)
    for start in range(0, len(self), 1000):  # Counting takes eight bytes a pixel.
      for c, channel in enumerate(np.moveaxis(self.take(slice(start, start + 1000)), -1, 0)):
        counts[c] += np.bincount(channel.ravel(), minlength=256)
    means = [float(np.average(levels, weights=n)) for n in counts]
    variances = [
      np.average((levels - m) ** 2, weights=n) for m, n in zip(means, counts, strict=True)
    ]
    # A channel that never changes is left as it is, not divided by zero.
    return tuple(means), tuple(float(np.sqrt(v)) or 1.0 for v in variances)


@dataclasses.dataclass(frozen=True)
class Records:
  """Encoded photographs of any size, decoded to (size, size, 3) when they are read."""

  folder: str  # Of a prepared TFDS data set.
  split: str
  index: np.ndarray  # Which of the split's records, in this order.
  size: int  # px
  crop_area: tuple[float, float]  # Share of a photograph that a training crop shows.
  eval_share: float  # Of the shorter side that the central crop of evaluation shows.
  classes: int = 0  # Of which labels are checked; 0: not.

  def __len__(self) -> int:
    return len(self.index)

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(H, W, C) of what is made of a record, px."""
    return (self.size, self.size, 3)

  def subset(self, index: np.ndarray) -> "Records":
    """The examples at `index`, in that order."""
    return dataclasses.replace(self, index=self.index[index])

  def first(self, n: int) -> Split:
    """Central crops of the first `n` examples, or of all that can be read."""
    found = []
    for i in range(min(n, len(self))):
      with contextlib.suppress(Unreadable):
        example = self.read(i)
        image, _ = central_crop(example["image"], self.size, self.eval_share)
        found.append((image, example["label"]))
    images, labels = zip(*found, strict=True)
    return Split(np.stack(images), np.array(labels, np.int32))

  def read(self, i: int) -> dict[str, Any]:
    """Example i: its "image" as bytes, and its "label". Raises `Unreadable` for a damaged record.

    TFDS's own reading of a record takes longer than the crop's resizing, and holds the
    interpreter meanwhile; this is a `tf.train.Example` with two features of interest.
    """
    from tensorflow_datasets.proto import tf_example_generated_pb2

    proto: Any = tf_example_generated_pb2

    source = source_of(self.folder, self.split).data_source
    try:
      record = source[int(self.index[i])]
      feature = proto.Example.FromString(record).features.feature
      image, label = feature["image"].bytes_list.value, feature["label"].int64_list.value
      return {"image": image[0], "label": label[0]}
    except (RuntimeError, ValueError, IndexError) as error:  # Of ArrayRecord, and of its content.
      raise Unreadable(str(error)) from error


@functools.lru_cache(maxsize=4)
def source_of(folder: str, split: str) -> Any:
  """TFDS's random access to the undecoded records of a split, opened once a process."""
  import tensorflow_datasets as tfds

  builder: Any = tfds.builder_from_directory(folder)
  return builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})


Examples = Split | Records
