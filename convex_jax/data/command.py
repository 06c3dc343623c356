"""Lists, prepares, imports, converts, caches and checks data sets: `python -m convex_jax data`."""

import argparse
import contextlib
import os

import numpy as np
from absl import logging
from rich.console import Console
from rich.table import Table

from convex_jax import buckets, command_line, files
from convex_jax.data import datasets, fetch, image_folders, prepare, tfrecord
from convex_jax.data.catalog import DATASETS
from convex_jax.data.photos import cache
from convex_jax.data.photos.chunks import cores
from convex_jax.errors import UserError


def _list(args: argparse.Namespace) -> None:
  table = Table("name", "classes", "image (px)", "train", "test")
  table.add_column("prepared in", overflow="fold")
  own = {}
  for name in prepare.own_names(args.data_dir):
    with contextlib.suppress(UserError):  # Not one of labelled images.
      own[name] = prepare.entry_of(name, args.data_dir)
  for name, entry in {**DATASETS, **own}.items():
    size = " x ".join(map(str, entry.image_shape)) if entry.image_shape[0] else "various"
    where = {"digits": "at first use", "synthetic": "made as needed"}.get(name, "-")
    if not entry.synthetic:
      builder = prepare.builder_of(name, args.data_dir)
      where = str(builder.data_dir) if builder.is_prepared() else where
    counts = (f"{entry.train_examples:,}", f"{entry.test_examples:,}")
    table.add_row(name, str(entry.classes), size, *counts, where)
  Console().print(table)


def _prepare(args: argparse.Namespace) -> None:
  if args.source:
    if not buckets.holds(args.source):
      raise UserError(f"--from={args.source}; {buckets.EXPECTED}, where TFDS has prepared it")
    if args.manual_dir:
      raise UserError(
        f"--manual_dir={args.manual_dir} and --from={args.source}; expected one of the two: archives"
        " are prepared, and what is in a bucket is copied as it is"
      )
    print(f"copied {args.name} to {fetch.copy(args.name, args.source, args.data_dir)}")
    return
  folder = prepare.prepare(args.name, args.data_dir, args.manual_dir)
  print(f"prepared {args.name} in {folder}")


def _convert(args: argparse.Namespace) -> None:
  prepare.entry_of(args.name, args.data_dir)
  builder = prepare.builder_of(args.name, args.data_dir)
  target = os.path.join(args.to, builder.info.full_name)
  print(f"{args.name}: {tfrecord.convert(str(builder.data_dir), target)}")


def _import(args: argparse.Namespace) -> None:
  folder = image_folders.prepare(args.name, args.source, args.data_dir)
  print(f"prepared {args.name} in {folder}")


def _cache(args: argparse.Namespace) -> None:
  entry = prepare.entry_of(args.name, args.data_dir)
  if not entry.is_natural:
    natural = ", ".join(name for name, e in DATASETS.items() if e.is_natural)
    raise UserError(f"{args.name} needs no cache: a run decodes it in seconds; expected {natural}")
  builder = datasets.open_prepared(args.name, args.data_dir)
  workers, folder = args.workers if args.workers >= 0 else cores(), str(builder.data_dir)
  if args.to:
    source, folder = folder, os.path.join(args.to, builder.info.full_name)
    cache.link(source, folder)
  for split in (entry.train, entry.test):
    count = builder.info.splits[split].num_examples
    print(cache.write(args.name, folder, split, count, args.image_size, workers))


def _check(args: argparse.Namespace) -> None:
  builder = datasets.open_prepared(args.name, args.data_dir)
  entry = prepare.entry_of(args.name, args.data_dir)
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
        f" expected {expected:,}. Move the folder aside and prepare it again"
      )
    mean, std = decoded.statistics()
    print(
      f"{args.name} {split}: {len(decoded):,} images {decoded.image_shape}, mean"
      f" {np.round(mean, 4).tolist()}, std {np.round(std, 4).tolist()}, examples per class"
      f" {np.bincount(decoded.labels, minlength=entry.classes).tolist()}"
    )


PREPARED = [name for name, entry in DATASETS.items() if not entry.synthetic]
IMPORT = "Make a data set of your own from images in FOLDER/train/CLASS/ and FOLDER/test/CLASS/."
COMMANDS = {  # Name: (action, summary, arguments of an example).
  "list": (_list, "List the data sets, and where they are prepared.", ""),
  "prepare": (
    _prepare,
    "Download and prepare a data set, or copy a prepared one from a bucket.",
    "cifar10 --data_dir=~/data",
  ),
  "import": (_import, IMPORT, "flowers --from=~/photos --data_dir=~/data"),
  "convert": (_convert, "Copy TFDS's TFRecord files to array_record.", "stl10 --to=~/data"),
  "cache": (_cache, "Decode photographs once, at one size.", "imagenet2012 --image_size=80"),
  "check": (_check, "Read every example; report counts and statistics.", "cifar10"),
}


def _name(text: str) -> str:
  if text in DATASETS and text not in PREPARED:
    raise argparse.ArgumentTypeError(
      f"{text!r} is made as needed; expected one of {', '.join(PREPARED)}"
    )
  return text


def _parser() -> argparse.ArgumentParser:
  parser = command_line.parser(
    "data",
    "List, prepare, import, convert, cache and check data sets.",
    "python -m convex_jax data prepare cifar10 --data_dir=~/data",
  )
  subparsers, commands = parser.add_subparsers(required=True, metavar="COMMAND"), {}
  for name, (action, summary, example) in COMMANDS.items():
    commands[name] = command = subparsers.add_parser(
      name,
      help=summary,
      description=summary,
      epilog=f"example:\n  python -m convex_jax data {name} {example}",
      formatter_class=parser.formatter_class,
      allow_abbrev=False,
    )
    command.set_defaults(action=action)
    if name != "list":
      known = PREPARED if name == "prepare" else None
      words = "of your own, new" if name == "import" else ", ".join(PREPARED)
      words += "" if name in ("import", "prepare") else ", or one of your own"
      command.add_argument("name", choices=known, type=_name, metavar="NAME", help=words)
    command.add_argument(
      "--data_dir",
      type=command_line.path,
      help="folder of data sets (default: TFDS's own)",
    )
  commands["prepare"].add_argument(
    "--manual_dir", type=command_line.path, help="folder of the archives"
  )
  commands["prepare"].add_argument(
    "--from",
    dest="source",
    type=command_line.path,
    help="copy it from a bucket in which it is prepared, gs://BUCKET/FOLDER; an interrupted copy goes"
    " on",
  )
  commands["import"].add_argument(
    "--from",
    dest="source",
    type=command_line.path,
    required=True,
    help="folder of the images, JPEGs or PNGs; they are copied unchanged",
  )
  commands["convert"].add_argument(
    "--to", type=command_line.path, required=True, help="folder of the copy"
  )
  for name, needed in (("cache", True), ("check", False)):
    commands[name].add_argument(
      "--image_size",
      type=command_line.integer(1),
      default=0,
      required=needed,
      help="side of the cached images, in px",
    )
  commands["cache"].add_argument(
    "--to",
    type=command_line.path,
    help="write the cache to this folder instead, for data that are read-only; it links to them,"
    " and can be used as --data_dir",
  )
  commands["cache"].add_argument(
    "--workers", type=command_line.integer(-1), default=-1, help="-1: one per core"
  )
  return parser


def main(argv: list[str] | None = None) -> int:
  """Runs the command; returns its exit code."""
  args = _parser().parse_args(argv)
  logging.set_verbosity(logging.ERROR)  # TFDS warns about every absent folder.
  return command_line.exit_code(_act, args)


def _act(args: argparse.Namespace) -> int:
  for option in ("data_dir", "manual_dir", "source", "to"):  # Not all commands have them.
    setattr(args, option, getattr(args, option, None) or "")
  for option in ("manual_dir", "to"):  # --data_dir is looked at later.
    files.refuse_url(f"--{option}", getattr(args, option))
  args.action(args)
  return 0
