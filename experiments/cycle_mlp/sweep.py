"""CycleMLP-B1 on CIFAR-10 and CIFAR-100 (the report's Tables 2 and 3, Figures 1 to 4)."""

import itertools

from convex_jax.studies.jobs import TWINS, Job

TITLE = "CycleMLP-B1 on CIFAR-10 and CIFAR-100 (the report's Tables 2 and 3)"
SCHEDULES = {
  "short": "20,000 images of CIFAR-10, 6 epochs; the other settings as in the full schedule.",
  "full": "300 epochs of AdamW at 5e-4, cosine, label smoothing 0.1, flips and crops, 32 px.",
}
SOURCE = {
  ("cifar10", "base"): (0.9971, 0.8287),
  ("cifar10", "ioc"): (0.8142, 0.7226),
  ("cifar100", "base"): (0.9969, 0.5198),
  ("cifar100", "ioc"): (0.7998, 0.3956),
}


def get_sweep(schedule):
  common, data, seeds = {"eval.every_epochs": 5.0}, ("cifar10", "cifar100"), range(3)
  if schedule == "short":
    common, data, seeds = {"epochs": 6, "data.train_fraction": 0.4}, ("cifar10",), range(1)
  return [
    Job(
      f"CycleMLP-B1 on {name.upper().replace('CIFAR', 'CIFAR-')}",
      variant,
      f"configs/cycle_mlp.py:{name}",
      common | changed,
      seed,
      SOURCE[name, "base" if variant == "base" else "ioc"],
    )
    for name, (variant, changed), seed in itertools.product(data, TWINS.items(), seeds)
  ]
