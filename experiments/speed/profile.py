"""Where the time of a training step goes: the ten longest operations of each network.

    python -m experiments.speed.profile [--cases='Mixer seed, 128'] [--parts=base,ioc]

Traces some steps of our program with JAX's profiler and adds up what XLA ran, by the module and
the primitive that it was compiled from. Operations overlap on the cores, so fractions are of the sum
of their times, not of the step. Updates the chosen cases in profile.csv next to this file.
"""

import argparse
import collections
import pathlib
import re
import sys
import tempfile

import jax
from rich.console import Console
from rich.progress import track

from convex_jax import command_line
from convex_jax.training import runtime
from experiments.speed.cases import CASES, names_of
from experiments.speed.jax_worker import Ours
from experiments.speed.run import update

STEPS = 4


def traced(net: Ours) -> collections.Counter:
  """Nanoseconds of some steps, by HLO operation."""
  total = collections.Counter()
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      net.train(STEPS)
    for file in pathlib.Path(folder).rglob("*.xplane.pb"):
      for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
          for event in line.events:
            if "hlo_op" in (stats := dict(event.stats)):
              total[stats["hlo_op"]] += event.duration_ns
  return total


def sources(net: Ours) -> dict[str, str]:
  """{HLO operation: "forward" or "backward", its module, and the primitive it came from}."""
  plan = net.program.batches(range(1))
  program = net.program._train_call.lower(
    net.state, net.program.splits["train"].arrays, plan
  ).compile()
  found = {}
  for line in program.as_text().splitlines():
    name = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = ", line)
    source = re.search(r'op_name="([^"]*)"', line)
    if name and source:
      found[name[1]] = described(source[1])
  return found


def described(op_name: str) -> str:
  """`jit(train_call)/transpose(jvp(Model))/block_0/norm/mul`: "backward block_*/norm mul"."""
  way = "backward" if "transpose(" in op_name else "forward" if "jvp(" in op_name else "update"
  parts = [part for part in op_name.split("/") if "(" not in part]
  inside = [re.sub(r"\d+", "*", part) for part in parts if part != "while"]
  return f"{way} {'/'.join(inside[:-1])} {inside[-1] if inside else ''}".strip()


def rows_of(name: str, parts: str) -> list[dict[str, str]]:
  net = Ours(CASES[name], parts)
  net.train(2)
  times, where = traced(net), sources(net)
  total, groups = sum(times.values()), collections.Counter()
  for op, nanoseconds in times.items():
    groups[where.get(op, f"update {re.sub(r'[.0-9]+$', '', op)}")] += nanoseconds
  return [
    {
      "case": name,
      "parts": parts,
      "operation": operation,
      "share": f"{nanoseconds / total:.3f}",
      "milliseconds": f"{nanoseconds / STEPS / 1e6:.2f}",
    }
    for operation, nanoseconds in groups.most_common(10)
  ]


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--cases", type=names_of, default=";".join(CASES), help="separated by ;")
  parser.add_argument("--parts", default="base,ioc")
  args = parser.parse_args()
  runtime.tune_cpu()
  console = Console()
  for name in track(args.cases, "tracing", console=console):
    rows = [row for parts in args.parts.split(",") for row in rows_of(name, parts)]
    update(pathlib.Path(__file__).parent / "profile.csv", rows)
    for row in rows:
      console.print(" ".join(row.values()))


if __name__ == "__main__":
  sys.exit(command_line.exit_code(main))
