"""`python -m convex_jax checkpoint`: verify, or seal, the checkpoints of a run."""

import argparse
import os

from convex_jax import command_line
from convex_jax.errors import UserError
from convex_jax.runs import manifest
from convex_jax.runs.workdir import Workdir


def main(argv: list[str] | None = None) -> int:
  """Verifies or seals; returns 0 where all checkpoints are intact, 2 where one is not."""
  parser = command_line.parser(
    "checkpoint",
    "Verify every file of every checkpoint of a run against its manifest of SHA-256 digests\n"
    "(verify), or write the manifests of checkpoints that have none and that you trust (seal).\n"
    "Exit code 0: all are intact; 2: one is damaged or unfinished.",
    "python -m convex_jax checkpoint verify runs/mixer_ioc_digits",
  )
  parser.add_argument("action", choices=["verify", "seal"])
  parser.add_argument("workdir", type=command_line.path, help="folder of the run")
  return command_line.exit_code(_act, parser.parse_args(argv))


def _act(args: argparse.Namespace) -> int:
  folder = Workdir(args.workdir).checkpoints
  steps = manifest.steps_in(folder)
  if not steps:
    raise UserError(f"{args.workdir} has no checkpoints: none in {folder}")
  for step in steps if args.action == "seal" else []:
    path = os.path.join(folder, str(step))
    if not manifest.is_sealed(path):
      manifest.seal(path, step, accuracy=None)
  found = manifest.faults(folder)
  for step, reason in found.items():
    print(f"step {step}: {reason or 'intact'}")
  if words := manifest.left_alone(folder, found):
    print(words)
  return UserError.code if any(found.values()) else 0
