"""Lists, prepares, converts, decodes and checks data sets.

python -m convex_jax.data list
python -m convex_jax.data prepare NAME [--data_dir=...] [--manual_dir=...]
python -m convex_jax.data convert NAME --to=... [--data_dir=...]
python -m convex_jax.data cache NAME --image_size=80 [--data_dir=...]
python -m convex_jax.data check NAME [--data_dir=...] [--image_size=80]
"""

import argparse
import sys

import numpy as np
from absl import logging
from rich.console import Console
from rich.table import Table

from convex_jax.data import datasets, prepare, tfrecord
from convex_jax.data.catalog import DATASETS
from convex_jax.data.photos import cache
from convex_jax.errors import UserError


def _list(args: argparse.Namespace) -> None:
  table = Table("name", "classes", "image (px)", "train", "test")
  table.add_column("prepared in", overflow="fold")
  for name, entry in DATASETS.items():
    if entry.synthetic:
      counts = (f"{entry.train_examples:,}", f"{entry.test_examples:,}")
      table.add_row(name, str(entry.classes), "any", *counts, "made as needed")
      continue
    builder = prepare.builder_of(name, args.data_dir, entry.config)
    size = "natural" if entry.is_natural else " x ".join(map(str, entry.image_shape))
    absent = "on first use" if name == "digits" else "-"
    table.add_row(
      name,
      str(entry.classes),
      size,
      f"{entry.train_examples:,}",
      f"{entry.test_examples:,}",
      str(builder.data_dir) if builder.is_prepared() else absent,
    )
  Console().print(table)


def _prepare(args: argparse.Namespace) -> None:
  config = DATASETS[args.name].config
  folder = prepare.prepare(args.name, args.data_dir, args.manual_dir, config)
  print(f"prepared {args.name} in {folder}")


def _convert(args: argparse.Namespace) -> None:
  source = str(prepare.builder_of(args.name, args.data_dir, DATASETS[args.name].config).data_dir)
  target = str(prepare.builder_of(args.name, args.to, DATASETS[args.name].config).data_dir)
  print(f"{args.name}: {tfrecord.convert(source, target)}")


def _cache(args: argparse.Namespace) -> None:
  entry = DATASETS[args.name]
  if not entry.is_natural:
    natural = ", ".join(name for name, e in DATASETS.items() if e.is_natural)
    raise UserError(f"{args.name} is decoded in seconds at the start of a run; allowed: {natural}")
  if args.image_size < 1:
    raise UserError(f"--image_size={args.image_size}; allowed: whole numbers from 1, px")
  from convex_jax.data.photos.stream import cores

  builder = datasets.open_prepared(args.name, args.data_dir)
  workers = args.workers if args.workers >= 0 else cores()
  for split in (entry.train, entry.test):
    count = builder.info.splits[split].num_examples
    folder = str(builder.data_dir)
    print(cache.write(args.name, folder, split, count, args.image_size, workers))


def _check(args: argparse.Namespace) -> None:
  builder = datasets.open_prepared(args.name, args.data_dir)
  entry = DATASETS[args.name]
  for split, expected in ((entry.train, entry.train_examples), (entry.test, entry.test_examples)):
    if entry.is_natural and not args.image_size:
      raise UserError(f"{args.name} has images of natural size; give the --image_size of its cache")
    if entry.is_natural:
      decoded = cache.read(args.name, builder.data_dir, split, args.image_size, max_unreadable=1.0)
    else:
      decoded = datasets.decode_split(builder, split, progress=True)
    if len(decoded) != expected:
      raise UserError(
        f"data set {args.name!r} in {builder.data_dir}: {split} has {len(decoded):,} examples;"
        f" expected: {expected:,}. Delete the folder and prepare it again."
      )
    mean, std = decoded.statistics()
    print(
      f"{args.name} {split}: {len(decoded):,} images {decoded.image_shape}, mean"
      f" {np.round(mean, 4).tolist()}, std {np.round(std, 4).tolist()}, examples a class"
      f" {np.bincount(decoded.labels, minlength=entry.classes).tolist()}"
    )


def main(argv: list[str] | None = None) -> int:
  """Lists, prepares, converts, decodes and checks data sets; returns the exit code."""
  parser = argparse.ArgumentParser("python -m convex_jax.data", description=main.__doc__)
  commands = parser.add_subparsers(required=True)
  actions = {
    "list": _list,
    "prepare": _prepare,
    "convert": _convert,
    "cache": _cache,
    "check": _check,
  }
  for name, action in actions.items():
    command = commands.add_parser(name)
    command.set_defaults(action=action)
    if name != "list":
      prepared = [name for name, entry in DATASETS.items() if not entry.synthetic]
      command.add_argument("name", choices=prepared)
    command.add_argument("--data_dir", default="", help="default: TFDS's own folder")
    if name == "prepare":
      command.add_argument("--manual_dir", default="", help="archives downloaded by hand")
    if name == "convert":
      command.add_argument("--to", required=True, help="where to; a TFRecord folder stays")
    if name in ("cache", "check"):
      needed = name == "cache"
      command.add_argument("--image_size", type=int, default=0, required=needed, help="px")
    if name == "cache":
      command.add_argument("--workers", type=int, default=-1, help="processes; -1: one a core")
  args = parser.parse_args(argv)
  logging.set_verbosity(logging.ERROR)  # TFDS warns of each folder that is not there.
  try:
    args.action(args)
  except UserError as error:
    print(error, file=sys.stderr)
    return error.code
  return 0
