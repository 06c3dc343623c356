"""Evaluates public weights: `python -m convex_jax evaluate`.

Options only, as in `main`: nothing here imports JAX before they are read.
"""

import argparse

from convex_jax import command_line, files
from convex_jax import main as train
from convex_jax.errors import UserError


def main(argv: list[str] | None = None) -> int:
  """Evaluates a file of public weights; returns 0, or 2 for invalid input."""
  return command_line.with_overrides(_parser(), _evaluate, argv)


def _parser() -> argparse.ArgumentParser:
  parser = command_line.parser(
    "evaluate",
    "Evaluate a file of public weights on the test split of a data set, without training.\n"
    "--config.init_from names the file. Pixels are scaled as its network saw them, or as\n"
    "--config.data.normalise says. Any key of the config can be set by --config.KEY=VALUE.\n"
    "Exit codes: 0 done; 2 invalid input.",
    "python -m convex_jax evaluate --config=configs/densenet.py:imagenet2012 \\\n"
    "      --config.init_from=densenet121.pth",
  )
  parser.add_argument("--config", help="config file, and after a colon a data set", metavar="FILE")
  return parser


def _evaluate(args: argparse.Namespace, overrides: list[str]) -> int:
  config = train.configure(args.config, overrides)
  if not config.init_from:
    raise UserError("config.init_from is ''; expected a file of public weights")
  files.refuse_url("--config.init_from", config.init_from)
  # Of the extra `train`.
  from rich.console import Console
  from rich.table import Table

  from convex_jax.data import datasets
  from convex_jax.training import evaluation, pretrained

  public, examples = pretrained.start(config, datasets.load(config.data, config.seed))
  console = Console(soft_wrap=True, highlight=False)
  console.print(pretrained.words(config, public, examples), markup=False)
  figures = evaluation.evaluate(config, public, examples)
  table = Table("images", "top-1 accuracy", "top-5 accuracy", "loss (nats)", "calibration error")
  one, five, error = (
    f"{100 * figures[key]:.2f} %" for key in ("accuracy", "top5_accuracy", "calibration_error")
  )
  table.add_row(f"{len(examples.test):,}", one, five, f"{figures['loss']:.4f}", error)
  table.title = f"{config.model.name} {config.model.size} on the test split of {config.data.name}"
  console.print(table)
  return 0
