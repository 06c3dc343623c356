"""CycleMLP-B1 on images of 32 px: shifts and dense layers, against deformable convolution.

    python -m experiments.cycle_fc.run [--rounds=12] [--batch_size=64]

One forward and backward pass of ours and of the published structure in torch, whose CycleFC
is torchvision's `deform_conv2d`, in turn in one process on the same cores. Needs the parity
extra. Writes results.csv beside this file.
"""

import argparse
import csv
import os
import pathlib
import statistics
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch

from configs import cycle_mlp
from convex_jax import models, step
from tests.test_parity import CycleMLP


def ours(images, labels):
  """A function that makes one pass, by JAX."""
  model = models.build(cycle_mlp.get_config().model, 10)
  shape = images.shape[1:]
  weights = nn.meta.unbox(jax.jit(lambda: step.init_variables(model, jax.random.key(0), shape))())

  def loss(params, images, labels):
    logits = step.apply(model, {**weights, "params": params}, images)
    return step.cross_entropy(logits, labels).mean()

  gradient = jax.jit(jax.value_and_grad(loss))
  x, y = jnp.asarray(images), jnp.asarray(labels)
  return lambda: jax.block_until_ready(gradient(weights["params"], x, y))


def theirs(images, labels):
  """The same, by torch."""
  net = CycleMLP(10)
  for p in net.parameters():
    torch.nn.init.normal_(p, std=0.02)
  x = torch.as_tensor(np.moveaxis(images, -1, 1).copy())
  y = torch.as_tensor(labels)

  def run():
    net.zero_grad()
    torch.nn.functional.cross_entropy(net(x), y).backward()

  return run


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("--rounds", type=int, default=12)
  parser.add_argument("--batch_size", type=int, default=64)
  args = parser.parse_args()
  rng = np.random.default_rng(0)
  images = rng.standard_normal((args.batch_size, 32, 32, 3)).astype(np.float32)
  labels = rng.integers(0, 10, args.batch_size)
  passes = {"shifts (ours)": ours(images, labels), "deform_conv2d (torch)": theirs(images, labels)}
  seconds = {name: [] for name in passes}
  for _ in range(args.rounds + 1):
    for name, run in passes.items():
      start = time.perf_counter()
      run()
      seconds[name].append(time.perf_counter() - start)
  rows = [["form", "images_per_second", "ratio_median"]]
  first = seconds["deform_conv2d (torch)"][1:]  # The first round compiles.
  for name, mine in seconds.items():
    rate = args.batch_size / statistics.median(mine[1:])
    ratio = statistics.median(b / a for a, b in zip(mine[1:], first, strict=True))
    rows.append([name, f"{rate:.0f}", f"{ratio:.2f}"])
    print(f"{name}: {rate:.0f} images/s, {ratio:.2f} x")
  with open(pathlib.Path(__file__).parent / "results.csv", "w", newline="") as file:
    csv.writer(file).writerows(rows)
  print(f"{os.cpu_count()} cores, jax {jax.__version__}, torch {torch.__version__}")


if __name__ == "__main__":
  main()
