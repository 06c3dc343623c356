"""The data sets, and the facts about each that need no files."""

import dataclasses

Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # Mean and deviation of each channel.

# Of ImageNet's training images, pixels in 0..1; used by every published recipe.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

# By `config.data.normalise`: what networks with public weights were trained with.
SCALINGS: dict[str, Statistics] = {
  "imagenet": IMAGENET,
  "half": ((0.5,) * 3, (0.5,) * 3),  # -1..1: the official Mixer's.
  "unit": ((0.0,) * 3, (1.0,) * 3),
}


@dataclasses.dataclass(frozen=True)
class Dataset:
  """The facts about a data set that need no files."""

  classes: int
  image_shape: tuple[int, int, int]  # (H, W, C), px; H and W are 0 where they vary.
  train_examples: int
  test_examples: int
  train: str = "train"  # TFDS split names.
  test: str = "test"
  statistics: Statistics | None = None  # None: measured.
  config: str = ""  # TFDS's name for the variant.
  synthetic: bool = False  # Noise of any size, made as needed.

  @property
  def is_natural(self) -> bool:
    """Whether the images are photographs of various sizes."""
    return not self.image_shape[0] and not self.synthetic


DATASETS = {
  "digits": Dataset(10, (8, 8, 1), 1437, 360),  # Included in scikit-learn.
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
