"""Seconds to certify a convex twin at its published size, in a fresh process and once more.

    python -m experiments.speed.certificates [--only=DenseNet]

The weights are drawn: a proof takes as long with any that are non-negative where they have to be.
Writes certificates.csv next to this file, with the part that JAX takes to trace the program. Exit
code 1 where a twin is not proved.
"""

import argparse
import csv
import functools
import multiprocessing
import pathlib
import sys
import time

import flax.linen as nn
import jax
import numpy as np
from rich.progress import track

from convex_jax import certify, command_line
from convex_jax.models import catalog, overview
from convex_jax.models.constraints import FREE, constraints_of
from convex_jax.models.variables import apply, init_variables
from convex_jax.proof import interpreter

NETWORKS = {  # Name and size in the catalogue, pixels, classes.
  "MLP 3x800": ("mlp", "800x3", 32, 10),
  "Mixer seed": ("mixer", "seed", 72, 10),
  "Mixer-S/16": ("mixer", "S/16", 224, 1000),
  "Mixer-B/16": ("mixer", "B/16", 224, 1000),
  "CycleMLP-B1": ("cycle_mlp", "B1", 224, 1000),
  "CycleMLP-B5": ("cycle_mlp", "B5", 224, 1000),
  "DenseNet-BC(100,12)": ("densenet", "BC-100-12", 32, 10),
  "DenseNet-121": ("densenet", "121", 224, 1000),
  "All-CNN-C": ("all_cnn", "c", 32, 10),
  "EfficientNet-B0": ("efficientnet", "B0", 224, 1000),
}
COLUMNS = ("network", "parameters", "first_s", "again_s", "of_which_tracing_s", "verdict")


def weights_of(model: nn.Module, image_shape: tuple[int, int, int]) -> dict:
  """Normal weights, or their magnitudes where they are constrained; averages of 0.3 to 2."""
  boxed = jax.eval_shape(lambda: init_variables(model, jax.random.key(0), image_shape))
  rng = np.random.default_rng(0)

  def draw(leaf, kind):
    values = rng.standard_normal(leaf.shape, np.float32) * (leaf.shape[-1] / leaf.size) ** 0.5
    return values if kind == FREE else np.abs(values)

  params = jax.tree.map(draw, nn.meta.unbox(boxed["params"]), constraints_of(boxed["params"]))
  stats = jax.tree.map(lambda a: rng.uniform(0.3, 2, a.shape).astype(np.float32), boxed["stats"])
  return {"params": params, "stats": stats}


def seconds(call) -> tuple[float, object]:
  start = time.perf_counter()
  result = call()
  return time.perf_counter() - start, result


def row_of(name: str) -> list:
  """A row of the table; in a process of its own."""
  architecture, size, px, classes = NETWORKS[name]
  model = catalog.create_model(architecture, size, "ioc", classes)
  weights = weights_of(model, (px, px, 3))
  count, _ = overview.describe(architecture, size, "ioc", classes, px)
  arguments = (
    functools.partial(apply, model),
    weights,
    jax.ShapeDtypeStruct((1, px, px, 3), "float32"),
  )
  (first, certificate), (again, _) = (
    seconds(lambda: certify(*arguments, search_steps=0)) for _ in range(2)
  )
  tracing, _ = seconds(lambda: interpreter.trace(*arguments))
  times = (f"{s:.2f}" for s in (first, again, tracing))
  return [name, count, *times, certificate.verdict]


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--only", default="", help="networks whose name holds this")
  only = parser.parse_args().only
  names = [name for name in NETWORKS if only in name]
  if not names:
    parser.error(f"--only={only}: no such network; expected part of {', '.join(NETWORKS)}")
  rows = []
  with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
    for row in track(pool.imap(row_of, names), "certifying", len(names)):
      print(*row)
      rows.append(row)
  if not only:
    with open(pathlib.Path(__file__).parent / "certificates.csv", "w", newline="") as file:
      csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
  return int(any(row[-1] != "PROVED" for row in rows))


if __name__ == "__main__":
  sys.exit(command_line.exit_code(main))
