"""The size of the term that makes logits convex, against depth and width, before training.

    python -m experiments.price.growth [--data_dir=FOLDER]

t's standard deviation over that of the logits less their mean over classes, in float64: He-initialised
MLPs on Gaussian inputs by depth and width, then with other activations, and the architectures of
convex_jax on CIFAR-10 at their initial weights. Each is certified. Writes growth.csv and growth.png
next to this file; the figure also shows the trained MLPs of price.csv.
"""

import argparse
import csv
import itertools
import pathlib
import sys
import time
from collections.abc import Callable, Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from configs import base
from convex_jax import command_line
from convex_jax.data import datasets, preprocess
from convex_jax.models import catalog
from convex_jax.models.variables import apply
from convex_jax.proof import convexify
from experiments.price import run

FOLDER = pathlib.Path(__file__).parent
PIXELS, CLASSES, EXAMPLES = 3072, 10, 64  # Inputs of the MLPs: as many as CIFAR-10 has.
DEPTHS, WIDTHS, SEEDS = (1, 2, 4, 8, 16, 32), (64, 256, 1024), 3
ACTIVATIONS = {"ReLU": jax.nn.relu, "ELU": jax.nn.elu, "GELU": jax.nn.gelu, "tanh": jnp.tanh}
STATISTICS = 64  # Images of which the statistics in BatchNorms are.
SLOPE = 1.1  # t grows by about this times sqrt(width) a layer.
ARCHITECTURES = {  # Title: (name, size, fields); without products of two values.
  "All-CNN-C": ("all_cnn", "c", {}),
  "Mixer": ("mixer", "seed", dict(patch=4, norm="batch")),
  "CycleMLP-B1": ("cycle_mlp", "B1", dict(norm="batch", gates="static")),
  "EfficientNet-B0": (
    "efficientnet",
    "B0",
    dict(stem_stride=1, variant="torch", gates="static"),
  ),
  "DenseNet-BC-100-12": ("densenet", "BC-100-12", {}),
}
FIELDS = ("network", "activation", "depth", "width", "seed", "logits", "common", "ratio")
FIELDS += ("verdict", "reason", "seconds")


def measure(f: Callable[..., jax.Array], weights, inputs: np.ndarray) -> dict:
  """The sizes of logits and common term over inputs (N, ...) in float64, and the verdict."""
  start = time.perf_counter()
  convexified = convexify(f, weights, jax.ShapeDtypeStruct((1, *inputs.shape[1:]), jnp.float64))

  @jax.jit
  @jax.vmap
  def both(x):
    return convexified.logits(x[None])[0], convexified.common(x[None])[0]

  g, t = map(np.asarray, both(jnp.asarray(inputs)))
  logits, common = np.std(g - g.mean(-1, keepdims=True)), np.std(t)
  certificate = convexified.certificate
  found = {"logits": logits, "common": common, "ratio": common / logits}
  found |= {"verdict": certificate.verdict, "reason": certificate.reason or ""}
  return found | {"seconds": time.perf_counter() - start}


def mlp(activation, weights, x):
  *hidden, last = weights
  for matrix in hidden:
    x = activation(x @ matrix)
  return x @ last


def mlps(cases, examples: int = EXAMPLES) -> Iterator[dict]:
  for activation, width, depth, seed in cases:
    rng = np.random.default_rng(seed)
    sizes = [PIXELS, *[width] * depth, CLASSES]
    weights = [
      jnp.asarray(rng.standard_normal((m, n)) * np.sqrt(2 / m))
      for m, n in itertools.pairwise(sizes)
    ]
    f = jax.tree_util.Partial(mlp, ACTIVATIONS[activation])
    row = {"network": "MLP", "activation": activation, "depth": depth, "width": width, "seed": seed}
    yield row | measure(f, weights, rng.standard_normal((examples, PIXELS)))


def initialised(model: nn.Module, images: jax.Array, seed: int):
  """Weights {"params", "stats"} in float64, with the statistics of these images in BatchNorms.

  A head that starts from 0 is drawn: its logits would be 0 as well.
  """
  keys = {
    name: jax.random.fold_in(jax.random.key(seed), i)
    for i, name in enumerate(("params", "dropout"))
  }
  variables = nn.meta.unbox(jax.jit(model.init)(keys, images[:1]))
  params, rng = variables["params"], np.random.default_rng(seed)

  def draw(leaf):
    if leaf.ndim < 2 or np.any(leaf):
      return np.asarray(leaf, np.float64)
    return rng.standard_normal(leaf.shape) / np.sqrt(leaf.size // leaf.shape[-1])

  params = jax.tree.map(draw, params)
  stats = variables.get("batch_stats", {})

  @jax.jit
  def step(params, images, value):  # m value + (1 - m) statistic, of momentum m.
    filled = jax.tree.map(lambda s: jnp.full(s.shape, value), stats)
    batch = {"params": params, "batch_stats": filled}
    _, changed = model.apply(batch, images, train=True, mutable=["batch_stats"], rngs=keys)
    return changed.get("batch_stats", {})

  low, high = (step(params, images, value) for value in (0.0, 1.0))
  stats = jax.tree.map(lambda a, b: a / (1 - (b - a)), low, high)
  return {"params": params, "stats": stats}


def architectures(data_dir: str, examples: int = 16, seed: int = 0) -> Iterator[dict]:
  config = base.get_config()
  config.data.dir = data_dir
  split = datasets.load_test(config.data)
  prepare = preprocess.make_prepare(32, *split.statistics())
  images = jnp.asarray(prepare(jnp.asarray(split.images[:STATISTICS])), jnp.float64)
  for title, (name, size, fields) in ARCHITECTURES.items():
    model = catalog.create_model(name, size, "base", CLASSES, jnp.float64, **fields)
    weights = initialised(model, images, seed)
    f = jax.tree_util.Partial(apply, model)
    yield {"network": title, "seed": seed} | measure(f, weights, np.asarray(images[:examples]))


def measured(found: Iterator[dict]) -> list[dict]:
  """The rows, computed in float64, and printed as they come."""
  rows = []
  with jax.enable_x64(True):
    for row in found:
      name = [str(row[key]) for key in ("network", "activation", "width", "depth") if key in row]
      print(f"{' '.join(name)}: {row['ratio']:.3g}, {row['verdict']}, {row['seconds']:.1f} s")
      rows.append(row)
  return rows


def write(rows: list[dict], folder: pathlib.Path) -> None:
  with open(folder / "growth.csv", "w", newline="") as file:
    writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: run.text(value) for key, value in row.items()} for row in rows)


def draw(rows: list[dict], trained: list[dict[str, str]], folder: pathlib.Path) -> None:
  figure = Figure(figsize=(10.5, 3.8), layout="constrained")
  growth, others, bars = figure.subplots(1, 3)
  of_mlps = [row for row in rows if row["network"] == "MLP"]
  relu = [row for row in of_mlps if row["activation"] == "ReLU"]
  widths = sorted({row["width"] for row in relu})
  for width, colour in zip(widths, ("0.55", "tab:red", "navy"), strict=False):
    line(growth, [r for r in relu if r["width"] == width], "o-", colour, f"width {width:,}")
    depths = sorted({row["depth"] for row in relu})
    slope = [(SLOPE * width**0.5) ** depth for depth in depths]
    growth.plot(depths, slope, ":", color=colour)
  growth.plot([], [], ":", color="black", label=r"$(1.1\,\sqrt{\mathrm{width}})^{\mathrm{depth}}$")
  of_trained = [row for row in trained if row["depth"] and row["common"]]
  places = [int(row["depth"]) for row in of_trained]
  ratios = [float(row["common"]) / float(row["logits"]) for row in of_trained]
  if of_trained:
    growth.plot(places, ratios, "*", color="goldenrod", ms=9, mec="black", mew=0.5, label="trained")
  growth.set_title("ReLU", fontsize="medium")
  width = max(
    w for w in widths if any(r["width"] == w for r in of_mlps if r["activation"] != "ReLU")
  )
  for activation, marker in zip(ACTIVATIONS, "osD^", strict=True):
    mine = [r for r in of_mlps if (r["activation"], r["width"]) == (activation, width)]
    line(others, mine, f"{marker}-", None, activation)
  others.set_title(f"Width {width:,}", fontsize="medium")
  for axes in (growth, others):
    axes.set(yscale="log", xlabel="Hidden layers", xlim=(0, None), ylim=(0.1, None))
    axes.legend(fontsize="x-small", frameon=False)
  growth.set_ylabel("Deviation of t / deviation of the logits")
  named = {row["network"]: row["ratio"] for row in rows if row["network"] != "MLP"}
  bars.barh(list(named), list(named.values()), color="0.55")
  bars.set(xscale="log", xlim=(1, None), xlabel="Deviation of t / deviation of the logits")
  bars.set_title("Architectures, untrained", fontsize="medium")
  for axes in figure.axes:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
  figure.savefig(folder / "growth.png", dpi=110)


def line(axes, rows: list[dict], style: str, colour, label: str) -> None:
  """The geometric mean over seeds, against depth."""
  depths = sorted({row["depth"] for row in rows})
  logs = [[np.log(r["ratio"]) for r in rows if r["depth"] == depth] for depth in depths]
  axes.plot(depths, np.exp([np.mean(x) for x in logs]), style, color=colour, ms=4, label=label)


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--data_dir", default="")
  args = parser.parse_args()
  cases = [
    *itertools.product(["ReLU"], WIDTHS, DEPTHS, range(SEEDS)),
    *itertools.product([name for name in ACTIVATIONS if name != "ReLU"], [256], DEPTHS, range(1)),
  ]
  rows = measured(itertools.chain(mlps(cases), architectures(args.data_dir)))
  write(rows, FOLDER)
  draw(rows, list(run.read(FOLDER).values()), FOLDER)


if __name__ == "__main__":
  sys.exit(command_line.exit_code(main))
