"""Data sets through TFDS, without TensorFlow.

Small images are decoded once, into one uint8 array per split (`splits.Split`). Photographs are
decoded as they are needed, by worker processes (`photos.records.Records`), or once, at a fixed
size, into a file (`photos.cache`). Either way the batch of a step is a function of the seed and
the step (`sampling`). `python -m convex_jax data --help` prepares and checks data sets.
"""

import concurrent.futures
import dataclasses
import functools
import os
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from convex_jax import buckets
from convex_jax.data import fetch, prepare
from convex_jax.data.catalog import SCALINGS, Dataset, Statistics
from convex_jax.data.photos import cache, decode
from convex_jax.data.photos.records import Records, source_of
from convex_jax.data.splits import Split
from convex_jax.errors import UserError
from convex_jax.files import expand
from convex_jax.progress import track

Examples = Split | Records


@dataclasses.dataclass(frozen=True, eq=False)
class Data:
  """The splits of a run; `valid` is None unless part of the training split is held out."""

  train: Examples
  valid: Examples | None
  test: Examples
  class_names: tuple[str, ...]
  known_statistics: Statistics | None = None

  def splits(self) -> dict[str, Examples]:
    """The splits that exist, by name."""
    held_out = {} if self.valid is None else {"valid": self.valid}
    return {"train": self.train, **held_out, "test": self.test}

  @functools.cached_property
  def statistics(self) -> Statistics:
    """Mean and standard deviation of each channel of the training images, pixels in 0..1."""
    if self.known_statistics is not None:
      return self.known_statistics
    assert isinstance(self.train, Split)
    return self.train.statistics()

  def scaled(self, normalise: str) -> "Data":
    """With the statistics that `config.data.normalise` names; "own": as they are.

    Raises `UserError` where those are of colour images and these are grey.
    """
    if normalise == "own":
      return self
    mean, std = SCALINGS[normalise]
    channels = self.train.image_shape[-1]
    if channels != len(mean) and len({*mean}) > 1:
      raise UserError(
        f"Pixels are to be scaled as {normalise!r}, channel by channel, and the images have"
        f" {channels}; set --config.data.normalise to own, half or unit"
      )
    return dataclasses.replace(self, known_statistics=(mean[:channels], std[:channels]))


def open_prepared(name: str, data_dir: str) -> Any:
  """TFDS's builder of a prepared data set; of one in a bucket, of its copy on this machine.

  Raises `UserError` where the data set is absent, incomplete, damaged or in another format.
  """
  data_dir = expand(data_dir)
  if buckets.holds(data_dir):
    data_dir = fetch.at_start(name, data_dir)
  entry = prepare.entry_of(name, data_dir)
  try:
    builder = prepare.builder_of(name, data_dir)
  except Exception as error:  # TFDS raises anything for damaged files.
    folder = os.path.join(data_dir or "~/tensorflow_datasets", name)
    raise _damaged(name, folder, error) from error
  if not builder.is_prepared() and name == "digits":
    prepare.prepare(name, data_dir)
    builder = prepare.builder_of(name, data_dir)
  if not builder.is_prepared():
    by_hand = " --manual_dir=<folder of both tars>" if name == "imagenet2012" else ""
    raise UserError(
      f"Data set {name!r} is not prepared: {builder.data_dir} is empty or absent.\n"
      f"  To prepare it (needs a network): python -m convex_jax data prepare {name}"
      f"{f' --data_dir={data_dir}' if data_dir else ''}{by_hand}\n"
      "  To train without any download: --config=configs/<model>.py:digits\n"
      "  If it is in another folder: --config.data.dir=<that folder>"
    )
  if builder.info.file_format.value != "array_record":
    raise UserError(
      f"Data set {name!r} in {builder.data_dir} is in {builder.info.file_format.value} format,"
      " which has no random access; expected array_record. To convert it:\n"
      f"  python -m convex_jax data convert {name} --data_dir={data_dir or '...'}"
      " --to=<another folder>"
    )
  if missing := {entry.train, entry.test} - set(builder.info.splits):
    raise UserError(
      f"Data set {name!r} in {builder.data_dir} lacks {', '.join(sorted(missing))}. Prepare it"
      " again from all its archives"
    )
  for split in (entry.train, entry.test):
    for path in builder.info.splits[split].filepaths:
      if not os.path.isfile(path):
        raise _damaged(name, builder.data_dir, FileNotFoundError(f"{path} is missing"))
  return builder


def _damaged(name: str, folder: Any, error: Exception) -> UserError:
  reason = (str(error).splitlines() or [repr(error)])[0]
  return UserError(
    f"Data set {name!r} in {folder} is damaged: {reason}\n"
    f"  Move that folder aside, then: python -m convex_jax data prepare {name}"
  )


def decode_split(builder: Any, split: str, progress: bool) -> Split:
  """The decoded split of a data set whose images have one size.

  Raises `UserError` for damaged records, images of another size and labels out of range.
  """
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
          f"Data set {builder.name!r} in {builder.data_dir}, split {split!r}, example {i}: {error}."
          " Prepare it again"
        ) from error

  text, starts = f"decoding {builder.name} {split}", range(0, len(source), 1000)
  try:
    with concurrent.futures.ThreadPoolExecutor() as pool:
      list(track(pool.map(read, starts), text, len(starts), disable=not progress))
  except RuntimeError as error:  # From ArrayRecord, for a changed file.
    raise _damaged(builder.name, builder.data_dir, error) from error
  if not ((labels >= 0) & (labels < classes)).all():
    raise UserError(
      f"Data set {builder.name!r} in {builder.data_dir}, split {split!r}: labels run from"
      f" {labels.min()} to {labels.max()}; expected 0 to {classes - 1}. Prepare it again"
    )
  return Split(images, labels)


def load(config: Any, seed: int, progress: bool = True) -> Data:
  """The splits described by `config`, a `config.data`, and the run's seed.

  `seed` chooses which training examples are kept (`train_fraction`), held out
  (`validation_fraction`) and given a random label (`label_noise`). Validation and test labels
  have no noise.

  Raises `UserError` when the data set is absent or damaged, or lacks one of `config.classes`.
  """
  entry, builder, names = _opened(config)
  train, test = (
    _of_classes(config, names, _examples(config, entry, builder, split, progress))
    for split in (entry.train, entry.test)
  )
  names = tuple(config.classes) or names
  rng = np.random.default_rng([seed, 0])
  order = rng.permutation(len(train))
  num_train, num_valid = _counts(config, len(train))
  valid = train.subset(np.sort(order[:num_valid])) if num_valid else None
  if num_valid or config.train_fraction < 1:
    train = train.subset(np.sort(order[num_valid : num_valid + num_train]))
  if config.label_noise:
    noisy = add_label_noise(train.labels, len(names), config.label_noise, seed)
    train = dataclasses.replace(train, labels=noisy)
  return Data(train, valid, test, names, entry.statistics)


def load_test(config: Any, progress: bool = True) -> Examples:
  """The test split alone, as `load` gives it; no other is read. Raises `UserError` as `load` does."""
  entry, builder, names = _opened(config)
  return _of_classes(config, names, _examples(config, entry, builder, entry.test, progress))


def _opened(config: Any) -> tuple[Dataset, Any, tuple[str, ...]]:
  """(what is known of a data set, its builder unless it is synthetic, the names of all classes)."""
  entry = prepare.entry_of(config.name, config.dir)
  builder = None if entry.synthetic else open_prepared(config.name, config.dir)
  names = tuple(builder.info.features["label"].names if builder else map(str, range(entry.classes)))
  if unknown := [repr(name) for name in config.classes if name not in names]:
    raise UserError(
      f"config.data.classes has {', '.join(unknown)}, unknown in {config.name!r};"
      f" expected names among {', '.join(names)}"
    )
  return entry, builder, names


def _of_classes(config: Any, names: tuple[str, ...], examples: Any) -> Any:
  """The examples of `config.classes`, or all if these are none."""
  kept = [names.index(name) for name in config.classes]
  return examples.of_classes(kept) if kept else examples


def outline(config: Any) -> Data:
  """The splits that `load` would give, of the right sizes and shapes, without any content.

  Nothing is read. Where `config.classes` chooses some classes, each counts as its equal share;
  where the statistics would be measured, they are made up.
  """
  entry = prepare.entry_of(config.name, config.dir)
  names = tuple(config.classes) or tuple(map(str, range(entry.classes)))
  side, channels = config.cache_size or config.image_size, entry.image_shape[2]
  shape = entry.image_shape if entry.image_shape[0] else (side, side, channels)

  def one(count: int) -> Examples:
    if entry.is_natural and config.loader == "stream":
      area = tuple(config.crop_area)
      return Records("", "", np.arange(count), config.image_size, area, config.eval_share)
    return Split(np.broadcast_to(np.uint8(0), (count, *shape)), np.zeros(count, np.int32))

  train, test = (
    n * len(names) // entry.classes for n in (entry.train_examples, entry.test_examples)
  )
  num_train, num_valid = _counts(config, train)
  statistics = entry.statistics or ((0.5,) * channels, (0.25,) * channels)
  valid = one(num_valid) if num_valid else None
  return Data(one(num_train), valid, one(test), names, statistics)


def _counts(config: Any, n: int) -> tuple[int, int]:
  """How many of n training examples are for training, and how many are held out."""
  num_valid = round(config.validation_fraction * n)
  num_train = round(config.train_fraction * (n - num_valid))
  for key, fraction, count in (
    ("validation_fraction", config.validation_fraction, num_valid),
    ("train_fraction", config.train_fraction, num_train),
  ):
    if fraction and not count:
      raise UserError(
        f"config.data.{key} is {fraction:g}, which selects none of the {n:,} examples of"
        f" {config.name!r}; expected more"
      )
  return num_train, num_valid


def _examples(config: Any, entry: Dataset, builder: Any, split: str, progress: bool) -> Any:
  """A split, in the form that `config.loader` and the data set require."""
  if builder is None:
    return synthetic(entry, split, config.cache_size or config.image_size)
  if not entry.is_natural:
    return decode_split(builder, split, progress)
  if config.loader == "stream":
    every, folder = np.arange(builder.info.splits[split].num_examples), str(builder.data_dir)
    try:
      found = len(source_of(folder, split))
    except Exception as error:  # From TFDS or ArrayRecord.
      raise _damaged(config.name, folder, error) from error
    if found != len(every):
      reason = f"{found:,} records in {split} instead of {len(every):,}"
      raise _damaged(config.name, folder, ValueError(reason))
    area, classes = tuple(config.crop_area), builder.info.features["label"].num_classes
    return Records(folder, split, every, config.image_size, area, config.eval_share, classes)
  size = config.cache_size or config.image_size
  return cache.read(config.name, builder.data_dir, split, size, config.max_unreadable, progress)


DISTINCT = 4096  # Number of different synthetic images.


def synthetic(entry: Dataset, split: str, size: int) -> Split:
  """Noise with random labels, as many examples as ImageNet: to time runs without their input."""
  count = entry.train_examples if split == entry.train else entry.test_examples
  rng = np.random.default_rng([count, size])
  images = rng.integers(0, 256, (min(DISTINCT, count), size, size, 3), np.uint8)
  labels = rng.integers(0, entry.classes, count, np.int32)
  return Split(images, labels, np.arange(count) % len(images))


def add_label_noise(labels: np.ndarray, classes: int, fraction: float, seed: int) -> np.ndarray:
  """Labels of which a fraction is replaced by uniform draws from all classes, the true included.

  As in Sivaprasad et al. 2021, table 3, where 100 % is pure chance.
  """
  rng = np.random.default_rng([seed, 1])
  labels = labels.copy()
  chosen = rng.permutation(len(labels))[: round(fraction * len(labels))]
  labels[chosen] = rng.integers(0, classes, len(chosen))
  return labels
