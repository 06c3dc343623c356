"""What convexity costs: free networks, whose logits a common term makes convex, and convex twins.

The Mixer's runs are those of experiments/mixer, schedule `longer`.
"""

import itertools

from convex_jax.studies.jobs import TWINS, Job

TITLE = "What convexity costs"
SCHEDULES = {
  "check": "MNIST, 3 epochs of Adam at 1e-3, cosine, batches of 128, one seed: whether the"
  " accuracies agree, not what they come to.",
  "depth": "free MLPs of 1 to 8 hidden layers on digits, 20 epochs of Adam at 1e-3, cosine, one"
  " seed: how the common term grows with depth in trained networks.",
  "mlp": "all images, 20 epochs of Adam at 1e-3, cosine, batches of 128; on CIFAR-10 flips and"
  " crops, else crops; three seeds.",
  "networks": "10,000 images of CIFAR-10, 4 epochs, one seed; the other settings as in the configs.",
}
DATA = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST", "cifar10": "CIFAR-10"}
MLP = {"batch_size": 128, "optimizer.learning_rate": 1e-3, "optimizer.schedule": "cosine"}
FREE = {"model.parts": "base", "model.norm": "batch", "model.gates": "static"}
NETWORKS = {  # The forms with BatchNorm of the 2021 paper's code, and CycleMLP without its products.
  "All-CNN": ("all_cnn", {"model.size": "ioc_paper", "optimizer.learning_rate": 1e-3}, "base"),
  "DenseNet": ("densenet", {"model.size": "ioc_paper"}, "base"),
  "CycleMLP-B1": ("cycle_mlp", {}, "base, BatchNorm, static gates"),
}


def mlps(data, epochs, seeds):
  common = MLP | {"epochs": epochs}
  return [
    Job(f"MLP on {DATA[name]}", variant, f"configs/mlp.py:{name}", common | changed, seed)
    for seed, name, (variant, changed) in itertools.product(range(seeds), data, TWINS.items())
  ]


def get_sweep(schedule):
  if schedule == "check":
    return mlps(("mnist",), epochs=3, seeds=1)
  if schedule == "mlp":
    return mlps(DATA, epochs=20, seeds=3)
  if schedule == "depth":
    sizes = itertools.product((64, 256), (1, 2, 4, 8))
    return [
      Job(
        "MLP on digits",
        f"{depth} x {width}",
        "configs/mlp.py:digits",
        TWINS["base"] | {"epochs": 20, "model.width": width, "model.depth": depth},
      )
      for width, depth in sizes
    ]
  common = {"epochs": 4, "data.train_fraction": 0.2, "eval.every_epochs": 2.0}
  return [
    Job(f"{panel} on CIFAR-10", variant, f"configs/{name}.py:cifar10", common | fields | changed)
    for panel, (name, fields, free) in NETWORKS.items()
    for variant, changed in {
      free: TWINS["base"] if free == "base" else FREE,
      "paper": TWINS["paper"],
      "ioc": TWINS["ioc"],
    }.items()
  ]
