"""What bounds a training step on larger machines: compute, memory, gradients, or decoding.

    python -m experiments.scale.run [--batch_size=32]

Compiles one training step of each network (nothing is run), takes FLOPs and bytes from the
compiled program's own cost analysis, and divides them by what the data sheets of four machines
promise. Writes results.csv beside this file.
"""

import argparse
import csv
import dataclasses
import functools
import importlib
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from convex_jax import augment, constraints, models, optimizer, step

FOLDER = pathlib.Path(__file__).parent
NETWORKS = {  # Config, and what differs from it.
  "MLP 3 x 800, 32 px": ("mlp", "cifar10", {}),
  "Mixer seed, 72 px": ("mixer", "imagenet2012", {}),
  "Mixer-S/16": ("mixer", "imagenet2012", {"size": "S/16"}),
  "Mixer-B/16": ("mixer", "imagenet2012", {"size": "B/16"}),
  "CycleMLP-B1": ("cycle_mlp", "imagenet2012", {}),
  "DenseNet-121": ("densenet", "imagenet2012", {}),
  "EfficientNet-B0": ("efficientnet", "imagenet2012", {}),
}
DECODED = {72: 790, 224: 490, 32: 1000}  # Images/s and core, measured (experiments/input).


@dataclasses.dataclass(frozen=True)
class Machine:
  """Peak figures of the makers' data sheets; a core decodes as ours do."""

  chips: int
  flops: float  # Dense bfloat16, a chip.
  memory: float  # Bytes/s, a chip.
  link: float  # Bytes/s that a chip sends to the others.
  cores: int  # Of all hosts together.


MACHINES = {
  "1 H100": Machine(1, 989e12, 3.35e12, float("inf"), 16),
  "8 H100": Machine(8, 989e12, 3.35e12, 450e9, 128),
  "TPU v4-8": Machine(4, 275e12, 1.2e12, 300e9, 240),
  "TPU v5e-256": Machine(256, 197e12, 819e9, 200e9, 32 * 224),
}
IMAGES = 1_281_167  # An epoch of ImageNet.


def cost(name: str, dataset: str, changes: dict, parts: str, batch_size: int) -> dict[str, float]:
  """FLOPs and bytes of one step of `batch_size` images in bfloat16; weights."""
  config: ConfigDict = importlib.import_module(f"configs.{name}").get_config(dataset)
  config.model.update({**changes, "parts": parts})
  if config.model.size in ("S/16", "B/16"):
    config.data.image_size, config.data.cache_size = 224, 0
  px, classes = config.data.image_size, 10 if dataset == "cifar10" else 1000
  model = models.build(config.model, classes, dtype=jnp.bfloat16)
  boxed = jax.eval_shape(lambda: step.init_variables(model, jax.random.key(0), (px, px, 3)))
  tx = optimizer.make_optimizer(
    config.optimizer, 10_000, constraints.constraints_of(boxed["params"])
  )
  state = jax.eval_shape(
    lambda: step.init_state(model, tx, jax.random.key(0), (px, px, 3), average=False)
  )
  prepare = augment.make_prepare(px, (0.5,) * 3, (0.25,) * 3, crop=True)
  update = functools.partial(
    step.train_step,
    model=model,
    tx=tx,
    augment=lambda _, x: prepare(x),
    key=jax.random.key(0),
    label_smoothing=0.1,
    ema_decay=0.0,
  )
  batch = {
    "image": jax.ShapeDtypeStruct((batch_size, px, px, 3), jnp.uint8),
    "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    "position": jax.ShapeDtypeStruct((batch_size,), jnp.uint32),
  }
  found = jax.jit(update, donate_argnums=0).lower(state, batch).compile().cost_analysis()
  weights = sum(leaf.size for leaf in jax.tree.leaves(nn.meta.unbox(boxed["params"])))
  return {
    "px": px,
    "weights": weights,
    "gflop_an_image": found["flops"] / batch_size / 1e9,
    "mb_an_image": found["bytes accessed"] / batch_size / 1e6,
    "batch_size": config.batch_size,
  }


def bounds(network: dict[str, float], machine: Machine) -> dict[str, float]:
  """Images/s that each resource allows, on all chips together, at the config's batch."""
  share = 2 * (machine.chips - 1) / machine.chips
  exchange = share * 4 * network["weights"] / machine.link  # Seconds a step; float32.
  return {
    "compute": machine.chips * machine.flops / (network["gflop_an_image"] * 1e9),
    "memory": machine.chips * machine.memory / (network["mb_an_image"] * 1e6),
    "gradients": network["batch_size"] / exchange if exchange else float("inf"),
    "decoding": machine.cores * DECODED[int(network["px"])],
  }


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--batch_size", type=int, default=32)
  args = parser.parse_args()
  console, rows = Console(), []
  table = Table("network", "parts", "GFLOP", "MB", *MACHINES, title="images/s at most, and why")
  for name, (config, dataset, changes) in NETWORKS.items():
    for parts in ("base", "ioc"):
      with console.status(f"compiling {name} {parts}"):
        network = cost(config, dataset, changes, parts, args.batch_size)
      cells = []
      for machine_name, machine in MACHINES.items():
        limits = bounds(network, machine)
        which = min(limits, key=lambda k: limits[k])
        cells.append(f"{limits[which]:,.0f} {which}")
        found = {key: f"{value:.4g}" for key, value in limits.items()}
        epoch = f"{IMAGES / limits[which]:.3g}"
        figures = [f"{v:.5g}" for v in network.values()]
        rows.append([name, parts, *figures, machine_name, *found.values(), which, epoch])
      numbers = f"{network['gflop_an_image']:.3g}", f"{network['mb_an_image']:.3g}"
      table.add_row(name, parts, *numbers, *cells)
  console.print(table)
  header = ["network", "parts", "px", "weights", "gflop_an_image", "mb_an_image", "batch_size"]
  header += ["machine", "compute", "memory", "gradients", "decoding", "binds", "seconds_an_epoch"]
  with open(FOLDER / "results.csv", "w", newline="") as file:
    csv.writer(file).writerows([header, *rows])


if __name__ == "__main__":
  main()
