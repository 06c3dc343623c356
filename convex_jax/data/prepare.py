"""Preparing data sets with TFDS on a machine that has no TensorFlow.

TFDS reads array_record data and encodes PIL images without TensorFlow, but the official
CIFAR, MNIST, SVHN and STL-10 builders yield numpy images, which it encodes with
`tf.image`, and open their files with `tf.io.gfile`. The builders stay the official
ones; only what they yield and how they open a local file is replaced here.
"""

import contextlib
import importlib.util
import io
import os
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds
from tensorflow_datasets.core import registered
from tensorflow_datasets.core.download import extractor
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

from convex_jax.errors import Mistake

with registered.skip_registration():  # `builder_of` finds it, not `tfds.load`.

  class Digits(tfds.core.GeneratorBasedBuilder):
    """Scikit-learn's digits: 1,797 real scans, 8 x 8 px, 17 grey levels.

    Alpaydin and Kaynak 1998, "Optical Recognition of Handwritten Digits" (UCI). Every
    fifth image is a test image, so that both splits hold all 13 writers.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      return tfds.core.DatasetInfo(
        builder=self,
        description="1,797 scans of handwritten digits, 8 x 8 px, from scikit-learn.",
        features=tfds.features.FeaturesDict(
          {
            "image": tfds.features.Image(shape=(8, 8, 1)),
            "label": tfds.features.ClassLabel(num_classes=10),
          }
        ),
        supervised_keys=("image", "label"),
        homepage="https://archive.ics.uci.edu/dataset/80",
      )

    def _split_generators(self, dl_manager):
      return {"train": self._generate_examples(False), "test": self._generate_examples(True)}

    def _generate_examples(self, test):
      from sklearn.datasets import load_digits

      digits: Any = load_digits()
      for i, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        if (i % 5 == 0) == test:
          grey = np.round(image * (255 / 16)).astype(np.uint8)
          yield i, {"image": PIL.Image.fromarray(grey), "label": int(label)}


def builder_of(name: str, data_dir: str) -> Any:
  """TFDS's builder of a data set in `data_dir`; "" is TFDS's default folder."""
  folder = os.path.expanduser(data_dir) or None
  if name == "digits":
    return Digits(data_dir=folder, file_format="array_record")
  return tfds.builder(name, data_dir=folder)


def _as_pil(image: np.ndarray) -> PIL.Image.Image:
  return PIL.Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


@contextlib.contextmanager
def _without_tensorflow(builder: Any) -> Iterator[None]:
  """Lets an official builder run: PIL images out, Python's `open` in, archives too."""
  if builder.name == "digits" or importlib.util.find_spec("tensorflow"):
    yield
    return
  generate = builder._generate_examples

  def generate_pil(*args, **kwargs):
    for key, example in generate(*args, **kwargs):
      yield key, {**example, "image": _as_pil(example["image"])}

  gfile = types.SimpleNamespace(GFile=open, exists=os.path.exists)
  plain = types.SimpleNamespace(
    io=types.SimpleNamespace(gfile=gfile), compat=types.SimpleNamespace(as_text=str)
  )
  modules: list[Any] = [sys.modules[type(builder).__module__], extractor]
  lazy = [module.tf for module in modules]
  builder._generate_examples = generate_pil
  for module in modules:
    module.tf = plain
  try:
    yield
  finally:
    for module, tf in zip(modules, lazy, strict=True):
      module.tf = tf
    del builder._generate_examples


def prepare(name: str, data_dir: str, manual_dir: str = "") -> str:
  """Downloads and prepares a data set in array_record form; returns its folder.

  `manual_dir` may hold the official archives, for a machine without a network.

  Raises `Mistake` when the folder cannot be written or the archives not be fetched.
  """
  config = tfds.download.DownloadConfig(
    manual_dir=os.path.abspath(os.path.expanduser(manual_dir)) if manual_dir else None,
    try_download_gcs=False,
  )
  builder = builder_of(name, data_dir)
  if name == "digits":  # A second's work, on first use: no progress bars in a training log.
    tfds.disable_progress_bar()
  try:
    with _without_tensorflow(builder), contextlib.redirect_stdout(io.StringIO()):
      builder.download_and_prepare(download_config=config, file_format="array_record")
  # requests' connection errors are OSErrors too.
  except (OSError, NonMatchingChecksumError) as error:
    raise Mistake(
      f"data set {name!r} could not be prepared in {builder.data_dir}: {error}\n"
      "  no network, or a file that is not the official one: fetch the archives elsewhere and"
      " give --manual_dir=<their folder>\n"
      "  a folder that cannot be written: give another --data_dir"
    ) from error
  return str(builder.data_dir)
