"""Lists, prepares, converts, caches and checks data sets: `python -m convex_jax data`."""

import argparse

import numpy as np
from absl import logging
from rich.console import Console
from rich.table import Table

from convex_jax import command_line
from convex_jax.data import datasets, prepare, tfrecord
from convex_jax.data.catalog import DATASETS
from convex_jax.data.photos import cache
from convex_jax.data.photos.stream import cores
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
    size = "various" if entry.is_natural else " x ".join(map(str, entry.image_shape))
    absent = "at first use" if name == "digits" else "-"
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
    raise UserError(f"{args.name} needs no cache: a run decodes it in seconds; expected {natural}")
  if args.image_size < 1:
    raise UserError(f"--image_size={args.image_size}; expected an integer from 1, in px")
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
      raise UserError(f"{args.name} has images of various sizes; pass the --image_size of a cache")
    if entry.is_natural:
      decoded = cache.read(args.name, builder.data_dir, split, args.image_size, max_unreadable=1.0)
    else:
      decoded = datasets.decode_split(builder, split, progress=True)
    if len(decoded) != expected:
      raise UserError(
        f"Data set {args.name!r} in {builder.data_dir}: {split} has {len(decoded):,} examples;"
        f" expected {expected:,}. Delete the folder and prepare it again"
      )
    mean, std = decoded.statistics()
    print(
      f"{args.name} {split}: {len(decoded):,} images {decoded.image_shape}, mean"
      f" {np.round(mean, 4).tolist()}, std {np.round(std, 4).tolist()}, examples per class"
      f" {np.bincount(decoded.labels, minlength=entry.classes).tolist()}"
    )


def _parser() -> argparse.ArgumentParser:
  parser = command_line.parser(
    "data",
    "List, prepare, convert, cache and check data sets.",
    "python -m convex_jax data prepare cifar10 --data_dir=~/data",
  )
  commands = parser.add_subparsers(required=True, metavar="COMMAND")

  def add(name, action, summary, example):
    command = commands.add_parser(
      name,
      help=summary,
      description=summary,
      epilog=f"example:\n  python -m convex_jax data {example}",
      formatter_class=argparse.RawDescriptionHelpFormatter,
      allow_abbrev=False,
    )
    command.set_defaults(action=action)
    if name != "list":
      prepared = [name for name, entry in DATASETS.items() if not entry.synthetic]
      command.add_argument("name", choices=prepared, metavar="NAME", help=", ".join(prepared))
    command.add_argument("--data_dir", default="", help="folder of data sets (default: TFDS's own)")
    return command

  add("list", _list, "List the data sets, and where they are prepared.", "list")
  command = add(
    "prepare",
    _prepare,
    "Download a data set and prepare it for training.",
    "prepare imagenet2012 --manual_dir=~/Downloads",
  )
  command.add_argument("--manual_dir", default="", help="folder of archives downloaded by hand")
  command = add(
    "convert",
    _convert,
    "Copy a data set that TFDS prepared as TFRecord files to array_record files.",
    "convert imagenet2012 --data_dir=/data/tfds --to=/data/array_record",
  )
  command.add_argument("--to", required=True, help="folder of the copy")
  command = add(
    "cache",
    _cache,
    "Decode photographs once, at one size, so that epochs only read them.",
    "cache imagenet2012 --image_size=80",
  )
  command.add_argument("--image_size", type=int, required=True, help="side of the images, in px")
  command.add_argument("--workers", type=int, default=-1, help="processes (-1: one per core)")
  command = add(
    "check",
    _check,
    "Read every example of a data set, and report counts and statistics.",
    "check cifar10",
  )
  command.add_argument("--image_size", type=int, default=0, help="side of cached images, in px")
  return parser


def main(argv: list[str] | None = None) -> int:
  """Runs the command; returns its exit code."""
  args = _parser().parse_args(argv)
  logging.set_verbosity(logging.ERROR)  # TFDS warns about every absent folder.
  return command_line.exit_code(lambda: args.action(args) or 0)
