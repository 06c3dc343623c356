"""How far the certificate can be trusted: mutants, random programs, planted counterexamples.

    python -m experiments.certificate.run [--networks=600] [--programs=1000]

Writes mutants.csv (a row for each mutant), oracle.csv (a row for each network), planted.csv (a row
for each planted counterexample), convex.csv (a row for each convex function) and summary.csv next
to this file. Ten minutes on two cores. Needs the test extra (hypothesis, cvxpy).
"""

import argparse
import collections
import csv
import pathlib
import sys
import time

import hypothesis
import jax
import jax.numpy as jnp
from rich.progress import track

from convex_jax import command_line
from convex_jax.models import catalog
from convex_jax.proof import certify
from tests.proof import test_interpreter
from tests.support import convex, mutants, oracle, planted

FOLDER = pathlib.Path(__file__).parent
EXAMPLE = jax.ShapeDtypeStruct((1, *mutants.SHAPE), jnp.float32)


def write(name, header, rows):
  with open(FOLDER / name, "w", newline="") as file:
    csv.writer(file).writerows([header, *rows])


def judge(mutant):
  """The verdict on a mutant; one that is proved although it should break is also sampled."""
  start = time.perf_counter()
  certificate = certify(mutant.function, mutant.weights, EXAMPLE, search_steps=0)
  seconds = time.perf_counter() - start
  gap = mutants.worst_gap(mutant) if certificate and not mutant.keeps else None
  return [
    mutant.architecture,
    mutant.kind,
    mutant.where,
    "convex" if mutant.keeps else "broken",
    "PROVED" if certificate else "not proved",
    "" if gap is None else f"{gap:.1e}",
    f"{seconds:.2f}",
    certificate.reason or "",
  ]


def all_mutants():
  header = ["architecture", "mutation", "where", "by_construction", "verdict"]
  header += ["largest_gap_sampled", "seconds", "reason"]
  found = [judge(m) for name in track(catalog.names(), "mutants") for m in mutants.mutants(name)]
  write("mutants.csv", header, found)
  killed = sum(r[3] == "broken" and r[4] != "PROVED" for r in found)
  survivors = [r for r in found if r[3] == "broken" and r[4] == "PROVED"]
  kept = [r for r in found if r[3] == "convex"]
  yield "mutants meant to break", killed + len(survivors)
  yield "killed", killed
  yield "survivors", len(survivors)
  yield "survivors with a midpoint too high (float64)", sum(float(r[5]) > 1e-12 for r in survivors)
  yield "mutants convex by construction", len(kept)
  yield "of these still proved", sum(r[4] == "PROVED" for r in kept)


def all_networks(count):
  rows = oracle.compare(range(count))
  lines = [
    [
      r["seed"],
      int(r["broken"]),
      *(int(v) for side in ("ours", "theirs") for k in r[side] for v in k),
    ]
    for r in rows
  ]
  names = [
    f"{who}_{kind}_{i}"
    for who in ("ours", "cvxpy")
    for kind in ("convex", "concave")
    for i in range(oracle.UNITS)
  ]
  write("oracle.csv", ["seed", "broken", *names], lines)
  yield "random networks", len(rows)
  yield "of these with a wrong sign", sum(r["broken"] for r in rows)
  yield "whose verdicts CVXPY shares, output by output", sum(r["ours"] == r["theirs"] for r in rows)
  yield "with all outputs proved convex", sum(all(r["ours"][0]) for r in rows)


def all_programs(count):
  verdicts = collections.Counter()

  @hypothesis.settings(
    max_examples=count,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(hypothesis.HealthCheck),
  )
  @hypothesis.given(test_interpreter.compositions())
  def check(steps):
    verdicts[test_interpreter.check_composition(steps)] += 1  # Raises where a gap is found.

  check()
  yield "random programs", sum(verdicts.values())
  yield "with a curvature proved", sum(n for v, n in verdicts.items() if v != "00")
  yield "of these with a midpoint on the wrong side", 0


def all_planted():
  rows = []
  for case in track(list(planted.cases()), "planted"):
    dtype = jnp.dtype(case.dtype).name
    rows.append([case.family, case.name, dtype, f"{planted.gap(case):.1e}", planted.verdict(case)])
  header = ["family", "name", "dtype", "gap_over_rounding", "verdict"]
  write("planted.csv", header, rows)
  yield "planted counterexamples", len(rows)
  yield "whose pair violates the inequality (long double)", sum(float(r[3]) > 1 for r in rows)
  yield "of these proved", sum(r[4] == "PROVED" for r in rows)


def all_convex():
  rows = []
  for case in track(list(convex.cases()), "convex"):
    sampled = convex.largest_gap(case)
    assert sampled < convex.tolerance(case), case
    rows.append([case.family, case.name, case.kind, f"{sampled:.1e}", planted.verdict(case)])
  write("convex.csv", ["family", "name", "kind", "largest_gap_sampled", "verdict"], rows)
  yield "convex functions of these families", len(rows)
  yield "of these proved to be so", sum(r[4] == "PROVED" for r in rows)


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("--networks", type=int, default=600)
  parser.add_argument("--programs", type=int, default=1000)
  args = parser.parse_args()
  rows = [*all_mutants(), *all_networks(args.networks), *all_programs(args.programs)]
  rows += [*all_planted(), *all_convex()]
  write("summary.csv", ["what", "count"], rows)
  for what, number in rows:
    print(f"{number:6d}  {what}")


if __name__ == "__main__":
  sys.exit(command_line.exit_code(main))
