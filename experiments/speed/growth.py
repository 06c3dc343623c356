"""How a training step grows with a network: depth, width, pixels, classes.

    python -m experiments.speed.growth

One size at a time is varied around the seed Mixer and a narrow CycleMLP, both `ioc`; steps
of all sizes take turns. Writes growth.csv (seconds and FLOPs per step) and growth.png, whose slopes
are exponents, next to this file.
"""

import argparse
import csv
import dataclasses
import pathlib
import statistics
import sys
import time

import matplotlib.pyplot as plt
import numpy as np
from rich.progress import track

from convex_jax import command_line
from convex_jax.training import runtime
from experiments.speed.cases import CASES, Case
from experiments.speed.jax_worker import Ours, model_flops

FOLDER = pathlib.Path(__file__).parent
BATCH, ROUNDS = 32, 7
MIXER = dataclasses.replace(CASES["Mixer seed, 128"], batch=BATCH)
CYCLE = Case(
  "cycle_mlp", dict(size="B1", depths=(1, 1), widths=(64, 96), ratios=(4, 4)), "", BATCH, 32
)
SWEEPS = {  # (network, what grows): [(its size, the changed fields)]
  ("Mixer", "depth"): [(n, dict(depth=n)) for n in (2, 4, 8, 16)],
  ("Mixer", "width"): [(n, dict(channels=n, channels_hidden=n)) for n in (64, 128, 256, 512)],
  ("Mixer", "pixels"): [(n**2, dict(px=n)) for n in (36, 72, 144, 216)],
  ("CycleMLP", "pixels"): [(n**2, dict(px=n)) for n in (32, 64, 128, 192)],
  ("CycleMLP", "depth"): [(2 * n, dict(depths=(n, n))) for n in (1, 2, 4, 8)],
  ("Mixer", "classes"): [(n, dict(classes=n)) for n in (10, 100, 1000, 10_000)],
}


def case_of(network: str, changes: dict) -> Case:
  case = MIXER if network == "Mixer" else CYCLE
  px = changes.get("px", case.px)
  model = {k: v for k, v in changes.items() if k not in ("px", "classes")}
  return dataclasses.replace(case, px=px, model={**case.model, **model, "drop_path": 0.0})


def exponent(sizes: list[float], values: list[float]) -> float:
  """The slope of the last half of a log-log curve."""
  half = slice(len(sizes) // 2 - 1, None)
  return float(np.polyfit(np.log(sizes[half]), np.log(values[half]), 1)[0])


def main() -> None:
  argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
  runtime.tune_cpu()
  rows = []
  for (network, what), sizes in track(SWEEPS.items(), "growing"):
    nets = [
      Ours(case_of(network, changes), "ioc", changes.get("classes", 10)) for _, changes in sizes
    ]
    for net in nets:
      net.train(1)
    seconds = [[] for _ in nets]
    for _ in range(ROUNDS):
      for net, mine in zip(nets, seconds, strict=True):
        start = time.perf_counter()
        net.train(2)
        mine.append((time.perf_counter() - start) / 2)
    for (size, changes), net, mine in zip(sizes, nets, seconds, strict=True):
      flops = BATCH * model_flops(net.case, "ioc", changes.get("classes", 10))
      row = {"network": network, "grows": what, "size": size}
      rows.append(row | {"seconds": statistics.median(mine), "flops": flops})
  with open(FOLDER / "growth.csv", "w", newline="") as file:
    writer = csv.DictWriter(file, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
  draw(rows)


def draw(rows: list[dict]) -> None:
  figure, panels = plt.subplots(2, 3, figsize=(9, 5.4), layout="constrained")
  for axes, (network, what) in zip(panels.flat, SWEEPS, strict=True):
    mine = [row for row in rows if (row["network"], row["grows"]) == (network, what)]
    sizes, seconds = [row["size"] for row in mine], [row["seconds"] for row in mine]
    flops = [row["flops"] for row in mine]
    scale = seconds[-1] / flops[-1]
    axes.loglog(sizes, seconds, "o-", color="black", label="step")
    axes.loglog(sizes, [f * scale for f in flops], "--", color="0.5", label="FLOPs, scaled")
    time_grows, flops_grow = exponent(sizes, seconds), exponent(sizes, flops)
    axes.set_title(f"{network}: exponent {time_grows:.2f}, FLOPs {flops_grow:.2f}", fontsize=8)
    axes.set_xlabel(what.capitalize(), fontsize=8)
    axes.set_ylabel("Seconds per step", fontsize=8)
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.set_ylim(min(1e-2, min(seconds) / 1.5), max(1e-1, 1.5 * max(seconds)))
    axes.tick_params(labelsize=7)
    print(f"{network}, {what}: seconds {time_grows:.2f}, FLOPs {flops_grow:.2f}")
  panels.flat[0].legend(fontsize=7)
  figure.savefig(FOLDER / "growth.png", dpi=110)


if __name__ == "__main__":
  sys.exit(command_line.exit_code(main))
