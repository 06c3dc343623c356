"""What data sets there are, and what is known of each before it is on this machine."""

import dataclasses

Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # Mean and deviation of each channel.

# Of ImageNet's training images, pixels in 0..1; what every published recipe uses.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclasses.dataclass(frozen=True)
class Dataset:
  """What is known of a data set before it is on this machine."""

  classes: int
  image_shape: tuple[int, int, int]  # (H, W, C), px; H and W 0 where they vary.
  train_examples: int
  test_examples: int
  train: str = "train"  # TFDS split names.
  test: str = "test"
  statistics: Statistics | None = None  # None: measured.
  config: str = ""  # TFDS's name of the variant.
  synthetic: bool = False  # Noise of any size: nothing to prepare, nothing to wait for.

  @property
  def is_natural(self) -> bool:
    """Whether images have sizes of their own."""
    return not self.image_shape[0] and not self.synthetic


DATASETS = {
  "digits": Dataset(10, (8, 8, 1), 1437, 360),  # Comes with scikit-learn.
  "cifar10": Dataset(10, (32, 32, 3), 50_000, 10_000),
  "cifar100": Dataset(100, (32, 32, 3), 50_000, 10_000),
  "mnist": Dataset(10, (28, 28, 1), 60_000, 10_000),
  "fashion_mnist": Dataset(10, (28, 28, 1), 60_000, 10_000),
  "svhn_cropped": Dataset(10, (32, 32, 3), 73_257, 26_032),
  "stl10": Dataset(10, (96, 96, 3), 5_000, 8_000),
  "imagenet2012": Dataset(
    1000, (0, 0, 3), 1_281_167, 50_000, test="validation", statistics=IMAGENET
  ),
  "imagenette": Dataset(
    10, (0, 0, 3), 9_469, 3_925, test="validation", statistics=IMAGENET, config="full-size-v2"
  ),
  "synthetic": Dataset(1000, (0, 0, 3), 1_281_167, 50_000, statistics=IMAGENET, synthetic=True),
}
