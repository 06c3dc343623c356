"""A split of encoded photographs on disk, decoded as they are needed."""

import contextlib
import dataclasses
import functools
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_generated_pb2

from convex_jax.data.photos.decode import Unreadable, central_crop
from convex_jax.data.splits import Split

_proto: Any = tf_example_generated_pb2  # Built at import: no type checker sees its messages.


@dataclasses.dataclass(frozen=True, eq=False)
class Records:
  """Encoded photographs of any size, to be decoded to (size, size, 3)."""

  folder: str  # Of a prepared TFDS data set.
  split: str
  index: np.ndarray  # Record numbers in the split, in this order.
  size: int  # px
  crop_area: tuple[float, float]  # Fraction of the area that a training crop shows.
  eval_share: float  # Fraction of the shorter side that the evaluation crop shows.
  classes: int = 0  # Labels must be below it; 0: not checked.

  def __len__(self) -> int:
    return len(self.index)

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(H, W, C) of a decoded record, in px."""
    return (self.size, self.size, 3)

  def subset(self, index: np.ndarray) -> "Records":
    """The examples at `index`, in that order."""
    return dataclasses.replace(self, index=self.index[index])

  def first(self, n: int) -> Split:
    """Central crops of the first `n` examples, without those that cannot be read."""
    found = []
    for i in range(min(n, len(self))):
      with contextlib.suppress(Unreadable):
        example = self.read(i)
        image, _ = central_crop(example["image"], self.size, self.eval_share)
        found.append((image, example["label"]))
    images, labels = zip(*found, strict=True)
    return Split(np.stack(images), np.array(labels, np.int32))

  def read(self, i: int) -> dict[str, Any]:
    """Example i: its "image" (bytes) and its "label". Raises `Unreadable` if it is damaged.

    A record is a `tf.train.Example`, of which two features matter. TFDS's own parser takes
    longer than resizing a crop and holds the interpreter lock meanwhile.
    """
    source = source_of(self.folder, self.split).data_source
    try:
      record = source[int(self.index[i])]
      feature = _proto.Example.FromString(record).features.feature
      image, label = feature["image"].bytes_list.value, feature["label"].int64_list.value
      return {"image": image[0], "label": label[0]}
    except (RuntimeError, ValueError, IndexError) as error:  # From ArrayRecord or its content.
      raise Unreadable(str(error)) from error


@functools.lru_cache(maxsize=4)
def source_of(folder: str, split: str) -> Any:
  """TFDS's random access to the undecoded records of a split, opened once per process."""
  builder: Any = tfds.builder_from_directory(folder)
  return builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
