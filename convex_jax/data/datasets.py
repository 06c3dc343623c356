"""Data sets through TFDS, without TensorFlow.

Small images are decoded once into one uint8 array a split (`splits.Split`). Photographs of
natural size are decoded as they are needed, by worker processes (`splits.Records`), or once,
at a fixed size, into a file (`cache`). Either way the batch of a step is a function of the
seed and the step (`order`).

`python -m convex_jax.data --help` prepares and checks them.
"""

import concurrent.futures
import dataclasses
import functools
import os
from typing import Any

import numpy as np
import rich.progress
from rich.console import Console

from convex_jax.data.catalog import DATASETS, Dataset, Statistics
from convex_jax.data.photos.records import Records, source_of
from convex_jax.data.splits import Split
from convex_jax.errors import UserError
from convex_jax.files import refuse_url

Examples = Split | Records


@dataclasses.dataclass(frozen=True)
class Data:
  """The splits of a run; `valid` is None unless a part of train is held out."""

  train: Examples
  valid: Examples | None
  test: Examples
  class_names: tuple[str, ...]
  known_statistics: Statistics | None = None

  def splits(self) -> dict[str, Examples]:
    """Those that exist, by name."""
    all_splits = {"train": self.train, "valid": self.valid, "test": self.test}
    return {name: split for name, split in all_splits.items() if split is not None}

  @functools.cached_property
  def statistics(self) -> Statistics:
    """Mean and standard deviation of each channel of the training images, pixels in 0..1."""
    if self.known_statistics is not None:
      return self.known_statistics
    assert isinstance(self.train, Split)
    return self.train.statistics()


def open_prepared(name: str, data_dir: str) -> Any:
  """A prepared builder, or a `UserError` that says which folder and what helps."""
  from convex_jax.data import prepare  # Imports TFDS: half a second that `--help` need not wait.

  refuse_url("--config.data.dir", data_dir)
  entry = DATASETS[name]
  try:
    builder = prepare.builder_of(name, data_dir, entry.config)
  except Exception as error:  # TFDS raises what the damage makes it meet.
    folder = os.path.join(data_dir or "~/tensorflow_datasets", name)
    raise _damaged(name, folder, error) from error
  if not builder.is_prepared() and name == "digits":
    prepare.prepare(name, data_dir)
    builder = prepare.builder_of(name, data_dir)
  if not builder.is_prepared():
    by_hand = " --manual_dir=<folder of both tars>" if name == "imagenet2012" else ""
    raise UserError(
      f"data set {name!r} is not prepared: nothing in {builder.data_dir}\n"
      f"  on a machine with a network: python -m convex_jax.data prepare {name}"
      f"{f' --data_dir={data_dir}' if data_dir else ''}{by_hand}\n"
      "  with no data at all: choose the embedded digits, --config=configs/<model>.py:digits\n"
      "  prepared elsewhere: --config.data.dir=<the folder that holds it>"
    )
  if builder.info.file_format.value != "array_record":
    raise UserError(
      f"data set {name!r} in {builder.data_dir} is in {builder.info.file_format.value} form,"
      " which cannot be read at random; allowed: array_record\n"
      f"  python -m convex_jax.data convert {name} --data_dir={data_dir or '...'}"
      " --to=<another folder>"
    )
  if missing := {entry.train, entry.test} - set(builder.info.splits):
    raise UserError(
      f"data set {name!r} in {builder.data_dir} lacks {', '.join(sorted(missing))}: prepare it"
      " again with all its archives"
    )
  for split in (entry.train, entry.test):
    for path in builder.info.splits[split].filepaths:
      if not os.path.isfile(path):
        raise _damaged(name, builder.data_dir, FileNotFoundError(f"{path} is missing"))
  return builder


def _damaged(name: str, folder: Any, error: Exception) -> UserError:
  reason = (str(error).splitlines() or [repr(error)])[0]
  return UserError(
    f"data set {name!r} in {folder} is damaged: {reason}\n"
    f"  delete that folder, then: python -m convex_jax.data prepare {name}"
  )


def decode_split(builder: Any, split: str, progress: bool) -> Split:
  """A split of images of one size, decoded; raises `UserError` for others, and wrong labels."""
  import tensorflow_datasets as tfds

  from convex_jax.data.photos import decode  # OpenCV, which `--help` need not wait for.

  try:
    source = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
  except RuntimeError as error:
    raise _damaged(builder.name, builder.data_dir, error) from error
  shape, classes = builder.info.features["image"].shape, builder.info.features["label"].num_classes
  images = np.empty((len(source), *shape), np.uint8)
  labels = np.empty(len(source), np.int32)

  def read(start):
    stop = min(start + 1000, len(source))
    for i, example in enumerate(source.__getitems__(range(start, stop)), start):
      try:
        images[i], labels[i] = decode.whole_image(example["image"], shape), example["label"]
      except decode.Unreadable as error:
        raise UserError(
          f"data set {builder.name!r} in {builder.data_dir}, split {split!r}, example {i}: {error};"
          " prepare it again"
        ) from error

  text, total = f"decoding {builder.name} {split}", -(-len(source) // 1000)
  console, hidden = Console(stderr=True), not progress
  try:
    with concurrent.futures.ThreadPoolExecutor() as pool:
      done = pool.map(read, range(0, len(source), 1000))
      for _ in rich.progress.track(
        done, text, total, transient=True, disable=hidden, console=console
      ):
        pass
  except RuntimeError as error:  # ArrayRecord's, of a file that is not as it was written.
    raise _damaged(builder.name, builder.data_dir, error) from error
  if not ((labels >= 0) & (labels < classes)).all():
    raise UserError(
      f"data set {builder.name!r} in {builder.data_dir}, split {split!r}: labels run from"
      f" {labels.min()} to {labels.max()}; allowed: 0 to {classes - 1}. Prepare it again."
    )
  return Split(images, labels)


def load(config: Any, seed: int, progress: bool = True) -> Data:
  """The splits that `config.data` and the run's seed describe.

  `seed` chooses which examples are kept (`train_fraction`), held out
  (`validation_fraction`) and given a random label (`label_noise`): a share of the
  training labels, drawn anew from all classes; validation and test labels never.

  Raises `UserError` when the data set is not there, or has no such `classes`.
  """
  entry = DATASETS[config.name]
  builder = None if entry.synthetic else open_prepared(config.name, config.dir)
  names = tuple(builder.info.features["label"].names if builder else map(str, range(entry.classes)))
  if unknown := [repr(name) for name in config.classes if name not in names]:
    raise UserError(
      f"config.data.classes has {', '.join(unknown)}, no class of {config.name!r};"
      f" allowed: {', '.join(names)}"
    )
  train, test = (_examples(config, builder, s, progress) for s in (entry.train, entry.test))
  if config.classes:
    kept = [names.index(name) for name in config.classes]
    names, train, test = tuple(config.classes), train.of_classes(kept), test.of_classes(kept)
  rng = np.random.default_rng([seed, 0])
  order = rng.permutation(len(train))
  num_valid = round(config.validation_fraction * len(train))
  num_train = round(config.train_fraction * (len(train) - num_valid))
  for key, share, count in (
    ("validation_fraction", config.validation_fraction, num_valid),
    ("train_fraction", config.train_fraction, num_train),
  ):
    if share and not count:
      raise UserError(
        f"config.data.{key} is {share:g}, no example at all of the {len(train):,} of"
        f" {config.name!r}; allowed: more"
      )
  valid = train.subset(np.sort(order[:num_valid])) if num_valid else None
  if num_valid or config.train_fraction < 1:
    train = train.subset(np.sort(order[num_valid : num_valid + num_train]))
  if config.label_noise:
    noisy = add_label_noise(train.labels, len(names), config.label_noise, seed)
    train = dataclasses.replace(train, labels=noisy)
  return Data(train, valid, test, names, entry.statistics)


def _examples(config: Any, builder: Any, split: str, progress: bool) -> Any:
  """A split as `config.loader` asks for it."""
  from convex_jax.data.photos import cache

  if builder is None:
    return synthetic(DATASETS[config.name], split, config.cache_size or config.image_size)
  if not DATASETS[config.name].is_natural:
    return decode_split(builder, split, progress)
  if config.loader == "stream":
    every = np.arange(builder.info.splits[split].num_examples)
    area = tuple(config.crop_area)
    folder = str(builder.data_dir)
    classes = builder.info.features["label"].num_classes
    _refuse_unlike(config.name, folder, split, len(every))
    return Records(folder, split, every, config.image_size, area, config.eval_share, classes)
  size = config.cache_size or config.image_size
  return cache.read(config.name, builder.data_dir, split, size, config.max_unreadable, progress)


def _refuse_unlike(name: str, folder: str, split: str, count: int) -> None:
  """Raises `UserError` where the records of a split cannot be opened, or are fewer than it says."""
  try:
    found = len(source_of(folder, split))
  except Exception as error:  # TFDS's and ArrayRecord's.
    raise _damaged(name, folder, error) from error
  if found != count:
    raise _damaged(name, folder, ValueError(f"{found:,} records in {split} instead of {count:,}"))


DISTINCT = 4096  # Synthetic images, repeated.


def synthetic(entry: Dataset, split: str, size: int) -> Split:
  """Noise with random labels, as many examples as ImageNet: the speed of a run without input."""
  count = entry.train_examples if split == entry.train else entry.test_examples
  rng = np.random.default_rng([count, size])
  images = rng.integers(0, 256, (min(DISTINCT, count), size, size, 3), np.uint8)
  labels = rng.integers(0, entry.classes, count, np.int32)
  return Split(images, labels, np.arange(count) % len(images))


def add_label_noise(labels: np.ndarray, classes: int, share: float, seed: int) -> np.ndarray:
  """`share` of the labels replaced by one drawn from all classes (the true one too).

  As in Sivaprasad et al. 2021, table 3, where 100 % is pure chance.
  """
  rng = np.random.default_rng([seed, 1])
  labels = labels.copy()
  chosen = rng.permutation(len(labels))[: round(share * len(labels))]
  labels[chosen] = rng.integers(0, classes, len(chosen))
  return labels
