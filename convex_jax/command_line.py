"""What every command of `python -m convex_jax` has in common."""

import argparse
import importlib.util
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

from convex_jax import config_files, files, signals, streams
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
  """The type of an option that is a path; see `files.expand`.

  An empty one is refused, since it may be a variable that is not set; where a path may be left out,
  the default is None.
  """
  if not text:
    raise argparse.ArgumentTypeError("'' given; expected a path")
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
    type=lambda text: int(text) if text.isdecimal() else text,
    help="checkpoint: a step, latest or best (default: latest)",
  )


def with_overrides(
  parser: argparse.ArgumentParser,
  action: Callable[[argparse.Namespace, list[str]], int],
  argv: list[str] | None,
) -> int:
  """The exit code of `action(args, overrides)`; overrides are the options --config.KEY=VALUE."""
  overrides, others = config_files.split(sys.argv[1:] if argv is None else argv)
  args = parser.parse_args(others)
  return exit_code(action, args, overrides, console_patience=streams.PATIENCE)


def exit_code(action: Callable[..., int], *args: Any, console_patience: float | None = None) -> int:
  """What `action` returns; after an end that has a name, its exit code.

  That is an `Ended`, an OSError, Ctrl-C, a missing extra, too little memory, or a platform that
  JAX cannot start. Prints why. An end that threads could delay for ever (`Ended.at_once`) ends
  the process.

  `console_patience`: seconds that a console which takes no text may delay the action; None:
  no limit. See `streams.careful`.
  """
  with streams.careful(console_patience), signals.ending_the_command():
    return _exit_code(action, *args)


def _exit_code(action: Callable[..., int], *args: Any) -> int:
  try:
    return action(*args)
  except KeyboardInterrupt:
    print("Interrupted", file=sys.stderr)
    return 128 + signal.SIGINT
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
  except Exception as error:
    if isinstance(error, OSError) and error.filename is not None:
      why = f"{error.filename}: {error.strerror}"
    elif (why := _no_memory(error) or _no_platform()) is None:
      raise
    print(why, file=sys.stderr)
    return UserError.code


def _no_memory(error: Exception) -> str | None:
  """What to do about an error that says that memory is full; None for another one."""
  reason = (str(error).splitlines() or ["MemoryError"])[0]
  if not isinstance(error, MemoryError) and not _FULL.match(reason):
    return None
  frames = traceback.walk_tb(error.__traceback__)
  places = [(f.f_globals.get("__name__", ""), f.f_code.co_name) for f, _ in frames]
  ours = [".".join(place) for place in places if place[0].startswith("convex_jax.")]
  return (
    f"Memory is full in {ours[-1] if ours else 'this command'}: {_FULL.sub('', reason).rstrip('.')}\n"
    "  expected a program that fits. Training takes less with, in another --workdir, a smaller"
    " --config.batch_size\n  (and --config.optimizer.accumulate=K for updates of K batches),"
    " --config.model.remat=True, or\n  --config.dtype=bfloat16, and with --config.fsdp on several"
    " devices. Where a GPU\n  is full, JAX_PLATFORMS=cpu computes on the CPU."
  )


_FULL = re.compile(r"(INTERNAL: )?RESOURCE_EXHAUSTED: ")  # As XLA says it.


def _no_platform() -> str | None:
  """Why JAX cannot compute on the platform that was asked for; None if it can, or was not asked."""
  if "jax" not in sys.modules:
    return None
  import jax  # Not for `--help`.

  try:
    jax.devices()
    return None
  except Exception as error:  # An AssertionError without words, for one.
    asked = getattr(jax.config, "jax_platforms", None) or "a device"
    reason = (str(error).splitlines() or ["there is no such device"])[0]
    reason = reason.partition(" (set JAX")[0].rstrip(".")
    return (
      f"JAX cannot start {asked!r} (JAX_PLATFORMS): {reason}; expected the platform of a device of"
      " this machine, for example JAX_PLATFORMS=cpu"
    )
