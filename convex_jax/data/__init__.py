"""Data sets through TFDS, without TensorFlow; batches that are a function of the step.

A split is one uint8 array. Training reads the endless sequence of shuffled epochs:
position p holds example `order(seed, p // n)[p % n]`, and step t reads positions
t B .. (t + 1) B - 1. So every example comes once an epoch, on any number of devices
and hosts, and a resumed run has nothing to restore but its step.

    python -m convex_jax.data list
    python -m convex_jax.data prepare NAME [--data_dir=...] [--manual_dir=...]
    python -m convex_jax.data check NAME [--data_dir=...]
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import io
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import PIL.Image
import rich.progress
from absl import logging
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from convex_jax import mesh as meshes
from convex_jax.errors import Mistake


@dataclasses.dataclass(frozen=True)
class Dataset:
  """What is known of a data set before it is on this machine."""

  classes: int
  image_shape: tuple[int, int, int]  # (H, W, C), px
  train_examples: int
  test_examples: int
  train: str = "train"  # TFDS split names.
  test: str = "test"


DATASETS = {
  "digits": Dataset(10, (8, 8, 1), 1437, 360),  # Comes with scikit-learn.
  "cifar10": Dataset(10, (32, 32, 3), 50_000, 10_000),
  "cifar100": Dataset(100, (32, 32, 3), 50_000, 10_000),
  "mnist": Dataset(10, (28, 28, 1), 60_000, 10_000),
  "fashion_mnist": Dataset(10, (28, 28, 1), 60_000, 10_000),
  "svhn_cropped": Dataset(10, (32, 32, 3), 73_257, 26_032),
  "stl10": Dataset(10, (96, 96, 3), 5_000, 8_000),
}


@dataclasses.dataclass(frozen=True)
class Split:
  """Decoded examples: images (N, H, W, C) uint8, labels (N,) int32."""

  images: np.ndarray
  labels: np.ndarray

  def __len__(self) -> int:
    return len(self.labels)

  def subset(self, index: np.ndarray) -> "Split":
    """The examples at `index`, in that order."""
    return Split(self.images[index], self.labels[index])

  def of_classes(self, kept: Sequence[int]) -> "Split":
    """The examples of these classes alone, labelled by their place among them."""
    place = np.full(max(self.labels.max(), *kept) + 1, -1, np.int32)
    place[list(kept)] = np.arange(len(kept))
    index = np.flatnonzero(place[self.labels] >= 0)
    return Split(self.images[index], place[self.labels[index]])

  def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, for pixels in 0..1, exact."""
    levels = np.arange(256) / 255
    counts = [np.bincount(c.ravel(), minlength=256) for c in np.moveaxis(self.images, -1, 0)]
    means = [float(np.average(levels, weights=n)) for n in counts]
    variances = [
      np.average((levels - m) ** 2, weights=n) for m, n in zip(means, counts, strict=True)
    ]
    # A channel that never changes is left as it is, not divided by zero.
    return tuple(means), tuple(float(np.sqrt(v)) or 1.0 for v in variances)


@dataclasses.dataclass(frozen=True)
class Data:
  """The splits of a run; `valid` is None unless a part of train is held out."""

  train: Split
  valid: Split | None
  test: Split
  class_names: tuple[str, ...]

  def splits(self) -> dict[str, Split]:
    """Those that exist, by name."""
    all_splits = {"train": self.train, "valid": self.valid, "test": self.test}
    return {name: split for name, split in all_splits.items() if split is not None}


def _open(name: str, data_dir: str) -> Any:
  """A prepared builder, or a `Mistake` that says which folder and what helps."""
  from convex_jax import prepare  # Imports TFDS, half a second that `--help` need not wait.

  builder = prepare.builder_of(name, data_dir)
  if not builder.is_prepared() and name == "digits":
    prepare.prepare(name, data_dir)
    builder = prepare.builder_of(name, data_dir)
  if not builder.is_prepared():
    raise Mistake(
      f"data set {name!r} is not prepared: nothing in {builder.data_dir}\n"
      f"  on a machine with a network: python -m convex_jax.data prepare {name}"
      f"{f' --data_dir={data_dir}' if data_dir else ''}\n"
      "  with no data at all: choose the embedded digits, --config=configs/<model>.py:digits\n"
      "  prepared elsewhere: --config.data.dir=<the folder that holds it>"
    )
  if builder.info.file_format.value != "array_record":
    raise Mistake(
      f"data set {name!r} in {builder.data_dir} is in {builder.info.file_format.value} form,"
      " which only TensorFlow reads; allowed: array_record\n"
      f"  python -m convex_jax.data prepare {name} --data_dir=<another folder>"
    )
  return builder


def _decode(builder: Any, split: str, progress: bool) -> Split:
  import tensorflow_datasets as tfds

  source = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
  shape, classes = builder.info.features["image"].shape, builder.info.features["label"].num_classes
  images = np.empty((len(source), *shape), np.uint8)
  labels = np.empty(len(source), np.int32)

  def read(start):
    stop = min(start + 1000, len(source))
    for i, example in enumerate(source.__getitems__(range(start, stop)), start):
      image = np.asarray(PIL.Image.open(io.BytesIO(example["image"])))
      images[i], labels[i] = image.reshape(shape), example["label"]

  with concurrent.futures.ThreadPoolExecutor() as pool:
    done = pool.map(read, range(0, len(source), 1000))
    description = f"decoding {builder.name} {split}"
    total = -(-len(source) // 1000)
    for _ in rich.progress.track(
      done, description, total, transient=True, disable=not progress, console=Console(stderr=True)
    ):
      pass
  if not ((labels >= 0) & (labels < classes)).all():
    raise Mistake(
      f"data set {builder.name!r} in {builder.data_dir}, split {split!r}: labels run from"
      f" {labels.min()} to {labels.max()}; allowed: 0 to {classes - 1}. Prepare it again."
    )
  return Split(images, labels)


def load(config: Any, seed: int, progress: bool = True) -> Data:
  """The splits that `config.data` and the run's seed describe, decoded.

  `seed` chooses which examples are kept (`train_fraction`), held out
  (`validation_fraction`) and given a random label (`label_noise`): a share of the
  training labels, drawn anew from all classes; validation and test labels never.

  Raises `Mistake` when the data set is not there, or has no such `classes`.
  """
  builder = _open(config.name, config.dir)
  entry = DATASETS[config.name]
  names = tuple(builder.info.features["label"].names)
  if unknown := [repr(name) for name in config.classes if name not in names]:
    raise Mistake(
      f"config.data.classes has {', '.join(unknown)}, no class of {config.name!r};"
      f" allowed: {', '.join(names)}"
    )
  train = _decode(builder, entry.train, progress)
  test = _decode(builder, entry.test, progress)
  if config.classes:
    kept = [names.index(name) for name in config.classes]
    names, train, test = config.classes, train.of_classes(kept), test.of_classes(kept)
  rng = np.random.default_rng([seed, 0])
  order = rng.permutation(len(train))
  num_valid = round(config.validation_fraction * len(train))
  num_train = round(config.train_fraction * (len(train) - num_valid))
  for key, share, count in (
    ("validation_fraction", config.validation_fraction, num_valid),
    ("train_fraction", config.train_fraction, num_train),
  ):
    if share and not count:
      raise Mistake(
        f"config.data.{key} is {share:g}, no example at all of the {len(train):,} of"
        f" {config.name!r}; allowed: more"
      )
  valid = train.subset(np.sort(order[:num_valid])) if num_valid else None
  if num_valid or config.train_fraction < 1:
    train = train.subset(np.sort(order[num_valid : num_valid + num_train]))
  if config.label_noise:
    train = dataclasses.replace(
      train, labels=add_label_noise(train.labels, len(names), config.label_noise, seed)
    )
  return Data(train, valid, test, tuple(names))


def add_label_noise(labels: np.ndarray, classes: int, share: float, seed: int) -> np.ndarray:
  """`share` of the labels replaced by one drawn from all classes (the true one too).

  As in Sivaprasad et al. 2021, table 3, where 100 % is pure chance.
  """
  rng = np.random.default_rng([seed, 1])
  labels = labels.copy()
  chosen = rng.permutation(len(labels))[: round(share * len(labels))]
  labels[chosen] = rng.integers(0, classes, len(chosen))
  return labels


@functools.lru_cache(maxsize=4)
def order(seed: int, epoch: int, n: int) -> np.ndarray:
  """The permutation of n examples in one epoch."""
  return np.random.default_rng([seed, 2, epoch]).permutation(n)


def examples_at(position_B: np.ndarray, seed: int, n: int) -> np.ndarray:
  """Which of n examples stand at these positions of the endless training sequence."""
  epochs, offsets = np.divmod(position_B, n)
  index = np.empty_like(position_B)
  for epoch in np.unique(epochs):
    here = epochs == epoch
    index[here] = order(seed, int(epoch), n)[offsets[here]]
  return index


class Feed:
  """A split on a mesh, either resident on every device or sent batch by batch.

  `arrays` and what `plan` returns go into a jitted function, where `take` makes a
  batch of them: by a gather from the resident split, or as it came.
  """

  def __init__(self, split: Split, mesh: Mesh, resident: bool):
    self.split, self.mesh = split, mesh
    self.arrays = (
      meshes.replicate(mesh, {"image": split.images, "label": split.labels}) if resident else None
    )

  def plan(self, index: np.ndarray, **columns: np.ndarray) -> dict[str, jax.Array]:
    """Examples at `index`, shape (..., B), with further columns; B over the devices.

    Each process touches only the examples of its own devices.
    """
    sharding = meshes.sharded(self.mesh, index.ndim - 1)

    def column(values, tail=()):
      return meshes.place(sharding, (*index.shape, *tail), values)

    plan = {name: column(values.__getitem__) for name, values in columns.items()}
    if self.arrays is not None:
      return {**plan, "index": column(index.astype(np.int32).__getitem__)}
    images, labels = self.split.images, self.split.labels
    plan["image"] = column(lambda at: images[index[at[: index.ndim]]], images.shape[1:])
    plan["label"] = column(lambda at: labels[index[at]])
    return plan

  def train_plan(self, steps: range, batch_size: int, seed: int) -> dict[str, jax.Array]:
    """The batches of several steps, stacked: columns of shape (steps, B)."""
    position = np.arange(steps.start * batch_size, steps.stop * batch_size)
    index = examples_at(position, seed, len(self.split)).reshape(len(steps), batch_size)
    return self.plan(index, position=position.reshape(index.shape).astype(np.uint32))

  def eval_plans(self, batch_size: int, limit: int) -> Iterator[dict[str, jax.Array]]:
    """Each of the first `limit` examples once; the last batch is filled and masked."""
    n = min(limit, len(self.split)) if limit else len(self.split)
    for start in range(0, n, batch_size):
      index = np.arange(start, start + batch_size)
      yield self.plan(np.minimum(index, n - 1), mask=index < n)


def take(arrays: dict[str, jax.Array] | None, plan: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """The batch that a plan stands for; called inside jit."""
  if arrays is None:
    return plan
  rest = {name: column for name, column in plan.items() if name != "index"}
  return {name: array[plan["index"]] for name, array in arrays.items()} | rest


def is_resident(loader: str, split: Split) -> bool:
  """Whether a split lives on the devices: as asked, or where it takes a quarter at most."""
  if loader != "auto":
    return loader == "resident"
  stats = jax.local_devices()[0].memory_stats()
  if stats and "bytes_limit" in stats:
    return split.images.nbytes <= stats["bytes_limit"] / 4
  host_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  return split.images.nbytes * jax.local_device_count() <= host_bytes / 4


def _list(args: argparse.Namespace) -> None:
  from convex_jax import prepare

  table = Table("name", "classes", "image (px)", "train", "test")
  table.add_column("prepared in", overflow="fold")
  for name, entry in DATASETS.items():
    builder = prepare.builder_of(name, args.data_dir)
    height, width, channels = entry.image_shape
    absent = "on first use" if name == "digits" else "-"
    table.add_row(
      name,
      str(entry.classes),
      f"{height} x {width} x {channels}",
      f"{entry.train_examples:,}",
      f"{entry.test_examples:,}",
      str(builder.data_dir) if builder.is_prepared() else absent,
    )
  Console().print(table)


def _prepare(args: argparse.Namespace) -> None:
  from convex_jax.prepare import prepare

  print(f"prepared {args.name} in {prepare(args.name, args.data_dir, args.manual_dir)}")


def _check(args: argparse.Namespace) -> None:
  builder = _open(args.name, args.data_dir)
  entry = DATASETS[args.name]
  for split, expected in ((entry.train, entry.train_examples), (entry.test, entry.test_examples)):
    decoded = _decode(builder, split, progress=True)
    if len(decoded) != expected:
      raise Mistake(
        f"data set {args.name!r} in {builder.data_dir}: {split} has {len(decoded):,} examples;"
        f" expected: {expected:,}. Delete the folder and prepare it again."
      )
    mean, std = decoded.statistics()
    print(
      f"{args.name} {split}: {len(decoded):,} images {decoded.images.shape[1:]}, mean"
      f" {np.round(mean, 4).tolist()}, std {np.round(std, 4).tolist()}, examples a class"
      f" {np.bincount(decoded.labels, minlength=entry.classes).tolist()}"
    )


def main(argv: list[str] | None = None) -> int:
  """Lists, prepares and checks data sets; returns the exit code."""
  parser = argparse.ArgumentParser("python -m convex_jax.data", description=_prepare.__doc__)
  commands = parser.add_subparsers(required=True)
  for name, action in (("list", _list), ("prepare", _prepare), ("check", _check)):
    command = commands.add_parser(name)
    command.set_defaults(action=action)
    if name != "list":
      command.add_argument("name", choices=list(DATASETS))
    command.add_argument("--data_dir", default="", help="default: TFDS's own folder")
    if name == "prepare":
      command.add_argument("--manual_dir", default="", help="archives downloaded by hand")
  args = parser.parse_args(argv)
  logging.set_verbosity(logging.ERROR)  # TFDS warns of each folder that is not there.
  try:
    args.action(args)
  except Mistake as mistake:
    print(mistake, file=sys.stderr)
    return mistake.code
  return 0


if __name__ == "__main__":
  sys.exit(main())
