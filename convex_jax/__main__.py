"""`python -m convex_jax COMMAND`, which is also the console script `convex-jax`."""

import importlib
import sys

from convex_jax import command_line

COMMANDS = {  # Name: (module, whose `main(argv)` returns the exit code; what it does).
  "train": ("convex_jax.main", "train a network, or resume its training"),
  "evaluate": ("convex_jax.evaluate", "accuracy of public weights on a data set"),
  "certify": ("convex_jax.runs.certify_command", "prove that a trained network is convex"),
  "convexify": (
    "convex_jax.runs.convexify_command",
    "make a free network's logits convex, and prove it",
  ),
  "radii": ("convex_jax.runs.radii_command", "certified radii of a proved network's test images"),
  "report": ("convex_jax.studies.report", "compare runs: tables, figures, one HTML page"),
  "sweep": ("convex_jax.studies.sweep", "train and compare many networks"),
  "data": ("convex_jax.data.command", "list, prepare, import, convert, cache and check data sets"),
  "models": ("convex_jax.models.overview", "list the architectures and their sizes"),
  "checkpoint": ("convex_jax.runs.checkpoint_command", "verify or seal the checkpoints of a run"),
}


def usage() -> str:
  """The list of commands."""
  commands = "\n".join(f"  {name:10}  {what}" for name, (_, what) in COMMANDS.items())
  return f"""Train networks whose logits are convex in the image, and prove that they are.

usage: python -m convex_jax COMMAND ...

{commands}

python -m convex_jax COMMAND --help describes one of them.

example:
  python -m convex_jax train --config=configs/mixer_ioc.py:digits"""


def main(argv: list[str] | None = None) -> int:
  """Runs a command; returns its exit code."""
  argv = sys.argv[1:] if argv is None else argv
  if not argv or argv[0] in ("-h", "--help", "help"):
    print(usage())
    return 0 if argv else 2
  if argv[0] not in COMMANDS:
    print(f"unknown command {argv[0]!r}\n\n{usage()}", file=sys.stderr)
    return 2
  module, _ = COMMANDS[argv[0]]
  return command_line.exit_code(lambda: importlib.import_module(module).main(argv[1:]))


if __name__ == "__main__":
  sys.exit(main())
