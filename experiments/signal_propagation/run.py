"""Feature correlation and effective rank at initialisation, layer by layer.

    python -m experiments.signal_propagation.run [--data_dir=FOLDER]

Writes results.csv and propagation.png next to this file; README.md says what is measured.
"""

import argparse
import csv
import pathlib
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from configs import base
from convex_jax import command_line
from convex_jax.data import datasets, preprocess
from convex_jax.models import catalog, layers
from convex_jax.models.parts import Parts, ioc

HERE = pathlib.Path(__file__).parent
CASES = {  # Title: (name, size, px, fields)
  "MLP 3 x 800": ("mlp", "800x3", 32, {}),
  "Mixer, 4 blocks": ("mixer", "seed", 72, {}),
  "CycleMLP-B1": ("cycle_mlp", "B1", 32, {}),
  "DenseNet-BC-100-12": ("densenet", "BC-100-12", 32, {}),
  "DenseNet-121": ("densenet", "121", 64, {}),
  "All-CNN-C": ("all_cnn", "c", 32, {}),
  "EfficientNet-B0": ("efficientnet", "B0", 32, {"stem_stride": 1, "variant": "torch"}),
}
WIRINGS = {
  "naive": Parts(ioc(principled=False, branch_scales=False, passthrough=False)),
  "ours": Parts(ioc()),
}
SAMPLES = 4096  # Pairs of image and position.


def measure(features: jax.Array, seed: int) -> tuple[float, float, int]:
  """(mean absolute correlation, effective rank, features) of an array (..., D)."""
  x = np.asarray(features, np.float64).reshape(-1, features.shape[-1])
  x = np.random.default_rng(seed).permutation(x)[:SAMPLES]
  deviation = x.std(0)
  x = (x - x.mean(0))[:, deviation > 1e-9] / deviation[deviation > 1e-9]
  count = x.shape[1]
  correlation = np.abs(x.T @ x) / len(x)
  mean = (correlation.sum() - count) / max(count * (count - 1), 1)
  singular = np.linalg.svd(x, compute_uv=False)
  p = singular / singular.sum()
  rank = np.exp(-(p * np.log(np.maximum(p, 1e-300))).sum())
  return float(mean), float(rank), features.shape[-1]


def layer_outputs(model: nn.Module, images: jax.Array, seed: int) -> list[tuple[str, jax.Array]]:
  """(path, output) of every dense layer and convolution, in the order of execution."""
  found = []

  def watch(following, args, kwargs, context):
    out = following(*args, **kwargs)
    watched = isinstance(context.module, nn.Dense | nn.Conv | layers.Dense)
    path = "/".join(context.module.path)
    if watched and context.method_name == "__call__" and "passthrough" not in path:
      found.append((path, out))
    return out

  keys = {"params": jax.random.key(seed), "dropout": jax.random.key(seed)}
  variables = model.init(keys, images[:2])
  with nn.intercept_methods(watch):
    model.apply(nn.meta.unbox(variables), images, train=True, mutable=["batch_stats"], rngs=keys)
  return found


def rows(data_dir: str, seed: int = 0) -> list[dict]:
  config = base.get_config()
  config.data.dir = data_dir
  split = datasets.load_test(config.data)
  out = []
  for title, (name, size, px, fields) in CASES.items():
    prepare = preprocess.make_prepare(px, *split.statistics())
    images = prepare(jnp.asarray(split.images[:128]))
    module = catalog.module_of(name)
    for wiring, parts in WIRINGS.items():
      model = module.Model(classes=10, parts=parts, **{**module.SIZES[size], **fields})
      outputs = layer_outputs(model, images, seed)
      for i, (path, features) in enumerate(outputs[:-1], 1):  # The last are the logits.
        correlation, rank, width = measure(features, seed)
        row = dict(model=title, wiring=wiring, layer=i, path=path, features=width)
        row |= dict(correlation=f"{correlation:.4f}", effective_rank=f"{rank:.1f}")
        out.append(row)
      print(f"{title}, {wiring}: {out[-1]['correlation']} at layer {out[-1]['layer']}")
  return out


def draw(table: list[dict]) -> None:
  figure, panels = plt.subplots(
    2, len(CASES), figsize=(2.1 * len(CASES), 4.4), sharey="row", layout="constrained"
  )
  for column, title in enumerate(CASES):
    for wiring, color, line in (("naive", "0.5", "--"), ("ours", "C3", "-")):
      mine = [r for r in table if r["model"] == title and r["wiring"] == wiring]
      layer = [r["layer"] for r in mine]
      correlation = [float(r["correlation"]) for r in mine]
      rank = [float(r["effective_rank"]) / r["features"] for r in mine]
      panels[0, column].plot(layer, correlation, line, color=color, label=wiring)
      panels[1, column].plot(layer, rank, line, color=color, label=wiring)
    panels[0, column].set_title(title, fontsize="small")
    panels[1, column].set_xlabel("Layer")
    for panel in panels[:, column]:
      panel.set_ylim(0, 1.02)
      panel.grid(alpha=0.3)
  panels[0, 0].set_ylabel("Mean |correlation|\nof two features")
  panels[1, 0].set_ylabel("Effective rank\n/ features")
  panels[0, 0].legend(fontsize="small")
  figure.savefig(HERE / "propagation.png", dpi=110)


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--data_dir", default="")
  table = rows(parser.parse_args().data_dir)
  with open(HERE / "results.csv", "w", newline="") as file:
    writer = csv.DictWriter(file, list(table[0]))
    writer.writeheader()
    writer.writerows(table)
  draw(table)


if __name__ == "__main__":
  sys.exit(command_line.exit_code(main))
