"""`python -m convex_jax certify`: prove that a trained network is convex."""

import argparse

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from convex_jax import command_line, files
from convex_jax.errors import NOT_PROVED, UserError
from convex_jax.proof.certificate import KINDS
from convex_jax.runs import certified, radii_command
from convex_jax.runs.run import load


def main(argv: list[str] | None = None) -> int:
  """Certifies a run; returns 0 where everything is proved, 4 where not, 2 for invalid input."""
  parser = command_line.parser(
    "certify",
    "Prove, logit by logit, that a trained network is convex in its input, or name the first\n"
    "operation that breaks convexity. Writes certificate.json into the run's folder; where that\n"
    "is read-only, and for another --kind or --step, the verdict is only printed. With --radii=l1\n"
    "also the certified radii of test images, as `radii` prints and writes them, once all is proved.\n"
    "Exit code 0: everything is proved; 4: not proved; 2: invalid input.",
    "python -m convex_jax certify --workdir=runs/mixer_ioc_digits",
  )
  command_line.add_run_options(parser)
  parser.add_argument("--kind", default="convex", choices=list(KINDS), help="what to prove")
  parser.add_argument(
    "--search_steps",
    type=command_line.integer(0),
    default=200,
    help="gradient steps of the search for a counterexample; 0: no search (default: 200)",
  )
  parser.add_argument(
    "--radii", help="norms of radii to certify: some of l1,l2,linf (default: none)"
  )
  radii_command.add_options(parser)
  return command_line.exit_code(_certify, parser.parse_args(argv))


def _certify(args: argparse.Namespace) -> int:
  norms = () if args.radii is None else radii_command.norms_of(args.radii, "--radii")
  if args.arithmetic != certified.REALS and not norms:
    raise UserError(
      f"--arithmetic={args.arithmetic} is an option of radii; expected --radii=l1 with it"
    )
  if norms and args.kind != "convex":
    raise UserError(f"--radii={args.radii} with --kind={args.kind}; expected --kind=convex")
  console = Console()
  run = load(args.workdir, args.step)
  is_own = args.kind == "convex" and args.step == "latest"  # As certificate.json is.
  content, counterexample = certified.certify_run(run, args.kind, args.search_steps, is_own)
  table = Table("logit", f"{content['kind']}?")
  for name, verdict in content["logits"].items():
    colour = {"PROVED": "green", "REFUTED": "red"}.get(verdict, "yellow")
    table.add_row(escape(name), f"[{colour}]{verdict}[/]")
  console.print(content["of"], table, sep="\n")
  console.print(certified.summary(content), markup=False, highlight=False)
  if is_own:
    files.try_to_write(certified.write, run, content, counterexample)
  if content["verdict"] != "PROVED":
    return NOT_PROVED
  if norms:
    radii_command.report(run, norms, args)
  return 0
