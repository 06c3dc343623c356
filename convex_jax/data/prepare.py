"""Prepares data sets with TFDS on a machine that has no TensorFlow.

TFDS reads array_record data and encodes PIL images without TensorFlow. But the official CIFAR,
MNIST, SVHN and STL-10 builders yield numpy images, which TFDS encodes with `tf.image`, and all
builders open their files with `tf.io.gfile`. The official builders run here with these two
replaced. The 23 ImageNet files that are not RGB JPEGs, which TensorFlow would re-encode, are
kept unchanged: `photos.decode` reads them.
"""

import contextlib
import glob
import hashlib
import importlib.util
import io
import os
import pathlib
import re
import shutil
import sys
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import PIL.Image
import rich.progress
import tensorflow_datasets as tfds
from tensorflow_datasets.core import registered
from tensorflow_datasets.core.download import extractor
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
from tensorflow_datasets.datasets.imagenet2012 import imagenet_common

from convex_jax import files
from convex_jax.data.catalog import DATASETS, IMAGENET, Dataset
from convex_jax.errors import UserError, nearest

with registered.skip_registration():  # Found by `builder_of`, not by `tfds.load`.

  class Digits(tfds.core.GeneratorBasedBuilder):
    """Scikit-learn's digits: 1,797 real scans, 8 x 8 px, 17 grey levels.

    Alpaydin and Kaynak 1998, "Optical Recognition of Handwritten Digits" (UCI). Every fifth
    image is a test image, so that both splits contain all 13 writers.
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
  """TFDS's builder of a data set in `data_dir` ("": TFDS's own folder).

  One that `DATASETS` lacks is read from its folder, whatever code has written it there.
  """
  folder = files.expand(data_dir) or None
  files.refuse_url("--data_dir", folder or "")
  if name in DATASETS and name != "digits":
    variant = DATASETS[name].config
    return tfds.builder(f"{name}/{variant}" if variant else name, data_dir=folder)
  if name == "digits":
    return Digits(data_dir=folder, file_format="array_record")
  own = _root(data_dir) / name
  if not (versions := _versions(own)):
    raise FileNotFoundError(f"{own} is not the folder of a data set")
  return tfds.builder_from_directory(versions[-1])


def _root(data_dir: str) -> pathlib.Path:
  """The folder of data sets; TFDS alone knows its own."""
  return pathlib.Path(str(builder_of("digits", data_dir).data_dir)).parents[1]


def _versions(folder: pathlib.Path) -> list[pathlib.Path]:
  found = [path for path in folder.glob("*") if re.fullmatch(r"\d+\.\d+\.\d+", path.name)]
  return sorted(found, key=lambda path: [int(number) for number in path.name.split(".")])


def own_names(data_dir: str) -> list[str]:
  """The data sets in a folder of them that `DATASETS` lacks."""
  return sorted(
    path.name for path in _root(data_dir).glob("*") if path.name not in DATASETS and _versions(path)
  )


def entry_of(name: str, data_dir: str) -> Dataset:
  """The facts about a data set: those in `DATASETS`, or those of a prepared folder.

  Raises `UserError` where there is neither, or it is not one of labelled images.
  """
  if name in DATASETS:
    return DATASETS[name]
  try:
    info = builder_of(name, data_dir).info
  except UserError:
    raise
  except Exception as error:  # TFDS raises anything for damaged files.
    raise UserError(
      f"config.data.name is {name!r}; expected one of {', '.join(DATASETS)}, or a data set of your"
      f" own in config.data.dir (`data import`): {error}{nearest(name, DATASETS)}"
    ) from error
  known: Any = info  # Type checkers know too little of TFDS's.
  features, splits = dict(known.features), known.splits
  image, label = features.get("image"), features.get("label")
  tests = [split for split in ("test", "validation") if split in splits]
  are_images = isinstance(image, tfds.features.Image) and image.np_dtype == np.uint8
  are_classes = isinstance(label, tfds.features.ClassLabel) and label.num_classes
  if not (are_images and are_classes and "train" in splits and tests):
    raise UserError(
      f"Data set {name!r} has the features {', '.join(features)} and the splits"
      f" {', '.join(splits)}; expected an image of 8 bits a channel, a label that is a class, train,"
      " and test or validation"
    )
  height, width, channels = features["image"].shape
  return Dataset(
    features["label"].num_classes,
    (height or 0, width or 0, channels or 3),
    *(splits[split].num_examples for split in ("train", tests[0])),
    test=tests[0],
    statistics=None if height and width else IMAGENET,
  )


@contextlib.contextmanager
def _without_tensorflow(builder: Any) -> Iterator[None]:
  """Lets an official builder run: it yields PIL images and opens files with Python's `open`."""
  if builder.name == "digits" or importlib.util.find_spec("tensorflow"):
    yield
    return
  generate = builder._generate_examples

  def generate_pil(*args, **kwargs):
    for key, example in generate(*args, **kwargs):
      image = example["image"]
      if isinstance(image, np.ndarray):
        image = PIL.Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
      yield key, {**example, "image": image}

  space = types.SimpleNamespace
  gfile = space(GFile=open, exists=os.path.exists, listdir=os.listdir, glob=glob.glob)
  plain = space(io=space(gfile=gfile), compat=space(as_text=str))
  replaced: list[tuple[Any, str, Any]] = [
    (builder, "_generate_examples", generate_pil),
    (sys.modules[type(builder).__module__], "tf", plain),
    (extractor, "tf", plain),
  ]
  if builder.name == "imagenet2012":
    replaced += [(imagenet_common, "tf", plain), (builder, "_fix_image", lambda _, image: image)]
  with contextlib.ExitStack() as stack:
    for owner, name, new in replaced:
      stack.enter_context(mock.patch.object(owner, name, new))
    yield


def official_archives(builder: Any) -> dict[str, tuple[int, str]]:
  """{name: (bytes, SHA-256)} of the archives to download by hand, as TFDS knows them."""
  if not builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
    return {}
  known = builder.url_infos or {}
  return {os.path.basename(url): (info.size, info.checksum) for url, info in known.items()}


def check_archives(builder: Any, manual_dir: str) -> None:
  """Raises `UserError` unless all archives to download by hand are present and intact.

  Checks, before hours of work, sizes, then checksums, then the room on the disk.
  """
  archives = official_archives(builder)
  if not archives:
    return
  total = sum(size for size, _ in archives.values())
  listed = ", ".join(f"{name} ({size / 1e9:.1f} GB)" for name, (size, _) in archives.items())
  if not manual_dir:
    raise UserError(
      f"Data set {builder.name!r} requires that you register at {builder.info.homepage}. Download"
      f" {listed} to one folder, and pass --manual_dir=<that folder>"
    )
  lines, paths = [], {os.path.join(manual_dir, name): facts for name, facts in archives.items()}
  for path, (size, _) in paths.items():
    found = os.path.getsize(path) if os.path.exists(path) else 0
    if found != size:
      lines.append(f"{path} has {found:,} of {size:,} bytes: resume or repeat the download")
  for path, (_, checksum) in paths.items() if not lines else ():
    with rich.progress.open(path, "rb", description=f"checking {path}", transient=True) as file:
      if hashlib.file_digest(file, "sha256").hexdigest() != checksum:  # pyright: ignore
        lines.append(f"{path} is not the official file (its SHA-256 differs): download it again")
  folder = pathlib.Path(str(builder.data_dir)).absolute()
  free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
  if not lines and free < 2 * total:  # The records, and TFDS's temporary copy.
    lines.append(
      f"{builder.data_dir} has {free / 1e9:.0f} GB free and needs {2 * total / 1e9:.0f} GB, half of"
      " that temporarily: make room, or pass another --data_dir"
    )
  if lines:
    raise UserError("\n".join([f"Data set {builder.name!r} cannot be prepared:", *lines]))


def prepare(name: str, data_dir: str, manual_dir: str = "") -> str:
  """Downloads and prepares a data set in array_record format; returns its folder.

  On a machine without a network, `manual_dir` is a folder with the official archives. Raises
  `UserError` when the folder cannot be written or the archives cannot be downloaded.
  """
  config = tfds.download.DownloadConfig(
    manual_dir=os.path.abspath(files.expand(manual_dir)) if manual_dir else None,
    try_download_gcs=False,
  )
  builder = builder_of(name, data_dir)
  if not builder.is_prepared():
    check_archives(builder, files.expand(manual_dir))
  if name == "digits":  # Takes a second, at first use: no progress bars in a training log.
    tfds.disable_progress_bar()
  try:
    with _without_tensorflow(builder), contextlib.redirect_stdout(io.StringIO()):
      builder.download_and_prepare(download_config=config, file_format="array_record")
  except (OSError, NonMatchingChecksumError) as error:
    fix = "download the archives elsewhere and pass --manual_dir=<their folder>"
    # A file's or a disk's; requests' own errors are OSErrors too, and have no number.
    if getattr(error, "errno", None) and not isinstance(error, ConnectionError | TimeoutError):
      fix = "pass another folder: --data_dir, or in training --config.data.dir"
    raise UserError(
      f"Data set {name!r} could not be prepared in {builder.data_dir}: {error}\n  {fix}"
    ) from error
  return str(builder.data_dir)
