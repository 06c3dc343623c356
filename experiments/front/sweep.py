"""The front of accuracy against certified radius, between free weights and weights >= 0.

`base` with penalties on what makes the common term of its convexified logits, `ioc` at the other
end, and both with a penalty on the Jacobian. `experiments.front.run` measures the radii.
"""

import itertools

from convex_jax.studies.jobs import Job

TITLE = "Accuracy against certified radius"
SCHEDULES = {
  "digits": "the embedded digits, 40 epochs of Adam at 1e-3, cosine: a laptop's check.",
  "short": "10 epochs of Adam at 1e-3, cosine, batches of 128; flips (CIFAR-10) and crops.",
}
PENALTIES = (0.0, 0.3, 1.0, 3.0, 10.0, 30.0)
JACOBIAN = 0.01
DATA = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST", "cifar10": "CIFAR-10"}
VARIANTS = {f"penalty {p:g}": {"model.common_penalty": p} for p in PENALTIES}
VARIANTS["ioc"] = {"model.parts": "ioc"}
VARIANTS |= {f"{v}, Jacobian": c | {"jacobian_penalty": JACOBIAN} for v, c in VARIANTS.items()}


def get_sweep(schedule):
  data, common, seeds = {"digits": "the digits"}, {}, 1
  if schedule == "short":
    data, seeds = DATA, 3
    common = {"epochs": 10, "batch_size": 128, "eval.every_epochs": 5.0}
    common |= {"optimizer.learning_rate": 1e-3, "optimizer.schedule": "cosine"}
  return [
    Job(f"MLP on {data[name]}", variant, f"configs/mlp.py:{name}", common | changed, seed)
    for name, (variant, changed), seed in itertools.product(data, VARIANTS.items(), range(seeds))
  ]
