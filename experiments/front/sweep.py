"""The front of accuracy against certified radius, between free weights and weights >= 0.

All runs are of one architecture, `ioc`'s, from its initial weights: ELU, BatchNorm, passthrough of the
image's affine part. With `model.constraint=penalised` its weights are of any sign, and what is negative
of them is penalised: 0 is a free network, and the limit of large penalties is `ioc`. So the front
joins its end. Schedule `radius` trains `ioc` with a penalty on the Jacobian. `experiments.front.run`
measures the radii.
"""

import itertools
from typing import Any

from convex_jax.studies.jobs import Job

TITLE = "Accuracy against certified radius"
SCHEDULES = {
  "digits": "the embedded digits, 40 epochs of Adam at 1e-3, cosine: a laptop's check.",
  "quick": "2 layers of 256, 5 epochs of Adam at 2e-3, cosine, batches of 256; flips (CIFAR-10) and"
  " crops; three seeds.",
  "radius": "CIFAR-10, 2 layers of 512, 20 epochs of Adam at 2e-3, cosine, batches of 256; flips and"
  " crops; one seed.",
  "short": "3 layers of 800, 10 epochs of Adam at 1e-3, cosine, batches of 128; flips (CIFAR-10) and"
  " crops; three seeds.",
}
PENALTIES = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)
JACOBIAN = 0.01
DATA = {"mnist": "MNIST", "cifar10": "CIFAR-10", "fashion_mnist": "Fashion-MNIST"}
PENALISED = {"model.parts": "ioc", "model.constraint": "penalised"}
VARIANTS = {f"penalty {p:g}": PENALISED | {"model.common_penalty": p} for p in PENALTIES}
VARIANTS["ioc"] = {"model.parts": "ioc"}
WITH_JACOBIAN = {f"{v}, Jacobian": c | {"jacobian_penalty": JACOBIAN} for v, c in VARIANTS.items()}

ADAM = {"optimizer.schedule": "cosine", "eval.every_epochs": 5.0}
QUICK = ADAM | {"epochs": 5, "batch_size": 256, "optimizer.learning_rate": 2e-3}
QUICK |= {"model.width": 256, "model.depth": 2}
RADIUS = ADAM | {"epochs": 20, "batch_size": 256, "optimizer.learning_rate": 2e-3}
RADIUS |= {"model.width": 512, "model.depth": 2, "model.parts": "ioc"}
JACOBIANS = {f"ioc, Jacobian {j:g}": {"jacobian_penalty": j} for j in (0.0, 0.01, 0.03, 0.1)}
SHORT = ADAM | {"epochs": 10, "batch_size": 128, "optimizer.learning_rate": 1e-3}


def jobs(data, common: dict[str, Any], variants: dict[str, dict[str, Any]], seeds: int):
  return [
    Job(f"MLP on {data[name]}", variant, f"configs/mlp.py:{name}", common | changed, seed)
    for seed, name, (variant, changed) in itertools.product(range(seeds), data, variants.items())
  ]


def get_sweep(schedule):
  if schedule == "digits":
    return jobs({"digits": "the digits"}, {}, VARIANTS | WITH_JACOBIAN, 1)
  if schedule == "quick":
    return jobs(DATA, QUICK, VARIANTS, 3)
  if schedule == "radius":
    return jobs({"cifar10": "CIFAR-10"}, RADIUS, JACOBIANS, 1)
  return jobs(DATA, SHORT, VARIANTS | WITH_JACOBIAN, 3)
