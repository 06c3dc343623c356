"""Trains one network: `python -m convex_jax.main --config=configs/mixer_ioc.py`.

Options and exit codes only; what happens is in `training.loop.run`, where notebooks and tests
can import it. Nothing here imports JAX before the options are read.
"""

import argparse
import os
import sys
from typing import Any

from convex_jax import command_line, files, signals
from convex_jax.errors import UserError


def main(argv: list[str] | None = None) -> int:
  """Trains; returns the exit code, or ends the process where threads would wait for ever."""
  return command_line.with_overrides(_parser(), _train, argv)


def _parser() -> argparse.ArgumentParser:
  parser = command_line.parser(
    "train",
    "Train a network, or resume its training: the same command resumes a run that was\n"
    "interrupted. Any key of the config can be set by --config.KEY=VALUE; configs/base.py\n"
    "lists them.\n"
    "Exit codes: 0 done; 2 invalid input; 3 diverged; 74 a checkpoint could not be written;\n"
    "75 stopped and saved, or another process was lost (run the same command again).",
    "python -m convex_jax train --config=configs/mixer_ioc.py:cifar10 --workdir=runs/mixer \\\n"
    "      --config.optimizer.learning_rate=3e-4",
  )
  parser.add_argument("--config", help="config file, and after a colon a data set", metavar="FILE")
  parser.add_argument(
    "--workdir",
    type=command_line.path,
    help="folder of the run (default: runs/<config>_<data set>)",
  )
  ahead = parser.add_argument_group("nothing is trained: what the run would take elsewhere")
  ahead.add_argument(
    "--compile_for",
    help="compile for a machine that need not be here, such as v5e-256 or h100-8; exit code 2 if"
    " the run does not fit in its memory",
    metavar="MACHINE",
  )
  ahead.add_argument(
    "--make_fit", action="store_true", help="if it does not fit, try what takes less memory"
  )
  ahead.add_argument(
    "--largest_batch", action="store_true", help="look for the largest batch that fits"
  )
  several = parser.add_argument_group(
    "several processes (found: Slurm, Open MPI, Cloud TPU slices)"
  )
  several.add_argument("--distributed", default="auto", choices=["auto", "on", "off"])
  several.add_argument("--coordinator", help="address of process 0", metavar="HOST:PORT")
  several.add_argument(
    "--num_processes", type=command_line.integer(1), help="number of processes", metavar="N"
  )
  several.add_argument(
    "--process_id", type=command_line.integer(0), help="this process, from 0", metavar="I"
  )
  several.add_argument(
    "--join_timeout",
    type=command_line.integer(1),
    default=300,
    help="seconds to wait for the others (default: 300)",
  )
  return parser


def configure(file: str | None, overrides: list[str]) -> Any:
  """A checked config, in a process that is prepared to compute with JAX.

  Raises `UserError` with everything that is wrong with the config.
  """
  if not file:
    raise UserError("Missing option --config, for example --config=configs/mixer_ioc.py:digits")
  files.refuse_url("--config", file)
  # From here on what the extra `train` installs is needed; `--help` works without it.
  from absl import logging

  from convex_jax.training import runtime

  logging.set_verbosity(logging.ERROR)  # TFDS and Orbax talk at length below that.
  runtime.keep_compiled_programs()
  runtime.tune_cpu()
  from convex_jax.training import loading, schema

  config = loading.load_config(file, overrides)
  schema.check(config)
  return config


def _refuse_unused(args: argparse.Namespace) -> None:
  """Raises `UserError` for options of training, which `--compile_for` would ignore."""
  given = {
    "--workdir": args.workdir is not None,
    "--distributed=on": args.distributed == "on",
    "--coordinator": args.coordinator is not None,
    "--num_processes": args.num_processes is not None,
    "--process_id": args.process_id is not None,
  }
  if unused := [option for option, is_given in given.items() if is_given]:
    raise UserError(
      f"--compile_for trains nothing and writes nothing; expected no {' and no '.join(unused)}"
      " with it"
    )


def _train(args: argparse.Namespace, overrides: list[str]) -> int:
  if args.compile_for is not None:
    return _compile(args, overrides)
  if args.make_fit or args.largest_batch:
    raise UserError("--make_fit and --largest_batch need --compile_for=MACHINE")
  # From here on: until training begins seconds pass, in which there is nothing to save.
  with signals.sent_to(signals.stop, signals.STOP_SIGNALS):
    # Checked before the others are waited for; `loop.run` checks its own callers'.
    config = configure(args.config, overrides)
    from convex_jax import cluster
    from convex_jax.runs import checkpoints
    from convex_jax.training import loop

    checkpoints.quieten_orbax()
    where = (args.coordinator, args.num_processes, args.process_id)
    here, note = cluster.place(args.distributed, *where)
    if note:
      print(note, file=sys.stderr)
    if here is not None:
      cluster.join(here, args.join_timeout)
    name, _ = os.path.splitext(os.path.basename(args.config.partition(":")[0]))
    loop.run(config, args.workdir or os.path.join("runs", f"{name}_{config.data.name}"))
  return 0


def _compile(args: argparse.Namespace, overrides: list[str]) -> int:
  """For a machine that need not be here."""
  from convex_jax.training import machines

  _refuse_unused(args)
  machines.check(args.compile_for)
  machines.prepare_process(args.compile_for)
  config = configure(args.config, overrides)
  from convex_jax.training import compile_ahead

  return compile_ahead.command(config, args.compile_for, args.largest_batch, args.make_fit)


if __name__ == "__main__":
  sys.exit(main())
