"""What every command of `python -m convex_jax` has in common."""

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any

from convex_jax import files
from convex_jax.errors import Ended, UserError


def parser(command: str, summary: str, example: str) -> argparse.ArgumentParser:
  """A parser whose help says in `summary` what the command does, and ends with an example."""
  return argparse.ArgumentParser(
    f"python -m convex_jax {command}",
    description=summary,
    epilog=f"example:\n  {example}",
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )


def path(text: str) -> str:
  """The type of an option that is a path; see `files.expand`."""
  try:
    return files.expand(text)
  except UserError as error:
    raise argparse.ArgumentTypeError(str(error)) from error


def integer(low: int) -> Callable[[str], int]:
  """The type of an option that is an integer from `low`."""

  def read(text: str) -> int:
    try:
      value = int(text)
    except ValueError:
      value = low - 1
    if value < low:
      raise argparse.ArgumentTypeError(f"{text!r} given; expected an integer >= {low}")
    return value

  return read


def add_run_options(parser: argparse.ArgumentParser) -> None:
  """Adds --workdir and --step, which say which checkpoint of which run is meant."""
  parser.add_argument("--workdir", type=path, required=True, help="folder of the run")
  parser.add_argument(
    "--step",
    default="latest",
    type=lambda text: int(text) if text.isdigit() else text,
    help="checkpoint: a step, latest or best (default: latest)",
  )


def exit_code(action: Callable[..., int], *args: Any) -> int:
  """What `action` returns; after an `Ended`, an OSError or a missing extra, its exit code.

  Prints why. An end that threads could delay for ever (`Ended.at_once`) ends the process.
  """
  try:
    return action(*args)
  except Ended as end:
    print(end, file=sys.stderr, flush=True)
    if end.at_once:
      os._exit(end.code)
    return end.code
  except ModuleNotFoundError as error:
    if importlib.util.find_spec("flax"):  # The extra is installed: something else is wrong.
      raise
    print(f"{error.name} is not installed: pip install 'convex_jax[train]'", file=sys.stderr)
    return UserError.code
  except OSError as error:
    if error.filename is None:
      raise
    print(f"{error.filename}: {error.strerror}", file=sys.stderr)
    return UserError.code
