"""What a training step asks of a machine, and what limits it.

    python -m experiments.scale.run [--programs=mixer,densenet_ioc]

Compiles the update of each imagenet2012 config (its published recipe, bfloat16) for this
machine's CPU at two batch sizes and takes FLOPs and bytes from XLA's own cost analysis of the
compiled program: what grows with the batch, and what does not. With the peak rates in `MACHINES`
they give the time of a step of the config's batch by each resource. Writes programs.csv,
roofline.csv and roofline.png next to this file; programs already there are not compiled again.
"""

import argparse
import csv
import dataclasses
import functools
import importlib
import math
import pathlib

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
from rich.console import Console
from rich.progress import track
from rich.table import Table

from convex_jax.data import augment, preprocess
from convex_jax.data.catalog import IMAGENET
from convex_jax.models import catalog, constraints
from convex_jax.models.variables import init_variables
from convex_jax.training import optimizer, step

FOLDER = pathlib.Path(__file__).parent
BATCHES = (4, 12)  # Images; the cost of a step is linear in them.
PROGRAMS = {
  name: (config.partition(":")[0], config.partition(":")[2])
  for name, config in {
    "mixer": "mixer:imagenet2012",
    "mixer_ioc": "mixer_ioc:imagenet2012",
    "mixer S/16": "mixer:imagenet2012,S/16",
    "mixer_ioc S/16": "mixer_ioc:imagenet2012,S/16",
    "mixer B/16": "mixer:imagenet2012,B/16",
    "mixer_ioc B/16": "mixer_ioc:imagenet2012,B/16",
    "cycle_mlp": "cycle_mlp:imagenet2012",
    "cycle_mlp_ioc": "cycle_mlp_ioc:imagenet2012",
    "densenet": "densenet:imagenet2012",
    "densenet_ioc": "densenet_ioc:imagenet2012",
    "efficientnet": "efficientnet:imagenet2012",
    "efficientnet_ioc": "efficientnet_ioc:imagenet2012",
  }.items()
}


@dataclasses.dataclass(frozen=True)
class Machine:
  """Peak rates of a chip, and the number of host cores that feed all chips."""

  chips: int
  flops: float  # FLOP/s, bfloat16, dense.
  memory: float  # B/s
  link: float  # B/s out of a chip over all links, one direction; for the all-reduce.
  cores: int  # On all hosts.


# NVIDIA's H100 SXM data sheet; cloud.google.com/tpu/docs/v4 and v5e (a v4-8 is 4 chips on one
# host of 240 cores; v5e in hosts of 4 chips and 112 cores).
MACHINES = {
  "H100": Machine(1, 989e12, 3.35e12, math.inf, 16),
  "v4-8": Machine(4, 275e12, 1.2e12, 150e9, 240),
  "v5e-256": Machine(256, 197e12, 0.819e12, 100e9, 64 * 112),
}


def compiled(config, batch_size: int):
  """The update, compiled from shapes alone, and its number of parameters."""
  size, dtype = config.data.image_size, jnp.dtype(config.dtype)
  model = catalog.build(config.model, classes=1000, dtype=dtype)
  shape, key = (size, size, 3), jax.random.key(0)
  boxed = jax.eval_shape(lambda: init_variables(model, key, shape))
  tags = constraints.constraints_of(boxed["params"])
  tx = optimizer.make_optimizer(config.optimizer, 1000, tags)
  average = config.ema_decay > 0
  state = jax.eval_shape(lambda: step.init_state(model, tx, key, shape, average))
  prepare = preprocess.make_prepare(size, *IMAGENET, crop=True)
  stored = max(size, config.data.cache_size)
  update = functools.partial(
    step.train_step,
    model=model,
    tx=tx,
    augment=augment.make_augment(config.data, prepare),
    mix=augment.make_mix(config.mixup, config.cutmix, config.data.repeats),
    key=key,
    label_smoothing=config.label_smoothing,
    ema_decay=config.ema_decay,
  )
  batch = {
    "image": jax.ShapeDtypeStruct((batch_size, stored, stored, 3), jnp.uint8),
    "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    "position": jax.ShapeDtypeStruct((batch_size,), jnp.uint32),
  }
  count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params))
  return jax.jit(update, donate_argnums=0).lower(state, batch).compile(), count


def costs(name: str) -> dict[str, str]:
  """The costs of a program: a part that is the same for every batch, and one per image."""
  module, dataset = PROGRAMS[name]
  config = importlib.import_module(f"configs.{module}").get_config(dataset)
  config.dtype = "bfloat16"
  found = {"flops": [], "bytes accessed": []}
  for batch_size in BATCHES:
    program, count = compiled(config, batch_size)
    for key, values in found.items():
      values.append(program.cost_analysis()[key])
  row = {"program": name, "parameters": str(count), "batch": str(config.batch_size)}
  row["px"] = str(config.data.image_size)
  for key, (low, high) in found.items():
    per_image = (high - low) / (BATCHES[1] - BATCHES[0])
    unit = key.split()[0]
    row[f"{unit}_an_image"] = f"{per_image:.4g}"
    row[f"{unit}_a_step"] = f"{max(0.0, low - BATCHES[0] * per_image):.4g}"
  return row


def decode_rates() -> dict[int, float]:
  """Images per second and core, by size, as `experiments.input` measured them (2 cores)."""
  with open(FOLDER.parent / "input" / "results.csv") as file:
    rows = [row for row in csv.DictReader(file) if row["way"] == "stream, 2 threads"]
  return {int(row["px"]): float(row["images_per_second"]) / 2 for row in rows}


def roofline(row: dict[str, str], machine: Machine, decode: float) -> dict[str, float]:
  """Seconds of a step by each resource alone."""
  images = int(row["batch"]) / machine.chips
  around = 2 * (machine.chips - 1) / machine.chips  # A ring's reduce-scatter and all-gather.

  def total(unit):
    return float(row[f"{unit}_a_step"]) + images * float(row[f"{unit}_an_image"])

  return {
    "compute": total("flops") / machine.flops,
    "memory": total("bytes") / machine.memory,
    "links": around * 4 * int(row["parameters"]) / machine.link,
    "host": int(row["batch"]) / (decode * machine.cores),
  }


def read_programs() -> dict[str, dict[str, str]]:
  path = FOLDER / "programs.csv"
  if not path.exists():
    return {}
  with open(path) as file:
    return {row["program"]: row for row in csv.DictReader(file)}


def write(name: str, rows: list[dict[str, str]]) -> None:
  with open(FOLDER / name, "w", newline="") as file:
    writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def draw(programs: list[dict[str, str]]) -> None:
  """Draws FLOPs per byte against the ceiling of each chip."""
  figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
  intensity = [2**i for i in range(0, 12)]
  for (name, machine), style in zip(MACHINES.items(), ("-", "--", ":"), strict=True):
    ceiling = [min(machine.flops, machine.memory * i) / 1e12 for i in intensity]
    axes.plot(intensity, ceiling, style, color="black", label=f"{name}, one chip")
  for i, row in enumerate(programs):
    x = float(row["flops_an_image"]) / float(row["bytes_an_image"])
    machine = MACHINES["H100"]
    y = min(machine.flops, machine.memory * x) / 1e12
    twin = "_ioc" in row["program"]  # Follows its base.
    face, marker = ("none" if twin else "tab:blue"), "os^vDP"[i // 2 % 6]
    style = {"color": "tab:blue", "markerfacecolor": face, "linestyle": ""}
    axes.plot(x, y, marker, label=row["program"], **style)
  axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte (CPU fusion: a lower bound)")
  axes.set_ylabel("Attainable TFLOP/s (bfloat16)")
  figure.legend(loc="outside right upper", fontsize=7)
  figure.savefig(FOLDER / "roofline.png", dpi=120)


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--programs", default=",".join(PROGRAMS))
  names = parser.parse_args().programs.split(",")
  known, console = read_programs(), Console()
  for name in track([n for n in names if n not in known], "compiling", console=console):
    known[name] = costs(name)
    write("programs.csv", [known[n] for n in PROGRAMS if n in known])
  rows, decode = [], decode_rates()
  table = Table(title="milliseconds per step, by each resource alone")
  for column in ("program", "machine", "compute", "memory", "links", "host", "bottleneck"):
    table.add_column(column, no_wrap=True)
  for name in names:
    for label, machine in MACHINES.items():
      times = roofline(known[name], machine, decode[int(known[name]["px"])])
      binds = max(times, key=lambda key: times[key])
      cells = {key: f"{1e3 * value:.3g}" for key, value in times.items()}
      rate = int(known[name]["batch"]) / times[binds]
      row = {"program": name, "machine": label} | cells | {"binds": binds}
      rows.append(row | {"images_per_second_at_most": f"{rate:.3g}"})
      table.add_row(name, label, *cells.values(), binds)
  console.print(table)
  write("roofline.csv", rows)
  draw([known[name] for name in names])


if __name__ == "__main__":
  main()
