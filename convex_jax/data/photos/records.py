"""A split of encoded photographs on disk, decoded when they are read."""

import contextlib
import dataclasses
import functools
from typing import Any

import numpy as np

from convex_jax.data.photos.decode import Unreadable, central_crop
from convex_jax.data.splits import Split


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
