"""All-CNN and DenseNet on CIFAR-10 (Table 2 and appendix C of the 2021 paper).

Their convex networks leave BatchNorm's scales free; here these are constrained, and the
networks certified.
"""

import itertools

from convex_jax.jobs import Job

TITLE = "All-CNN and DenseNet on CIFAR-10"
SCHEDULES = {
  "short": "5,000 images of CIFAR-10, 8 epochs; one seed.",
  "full": "350 epochs (All-CNN-C), 300 epochs (DenseNet-BC(100,12)); five seeds.",
}
PARTS = ("base", "paper", "ioc")
SOURCE = {  # Appendix C: means of five runs.
  ("all_cnn", "base"): (0.9912, 0.9221),
  ("all_cnn", "ioc"): (0.9261, 0.9034),
  ("densenet", "base"): (0.9908, 0.9386),
  ("densenet", "ioc"): (0.9380, 0.9043),
}
NAMES = {"all_cnn": "All-CNN-C", "densenet": "DenseNet-BC(100,12)"}


def get_sweep(schedule):
  common, seeds = {"eval.every_epochs": 10.0}, range(5)
  if schedule == "short":
    common, seeds = {"epochs": 8, "data.train_fraction": 0.1}, range(1)
  return [
    Job(
      f"{NAMES[model]} on CIFAR-10",
      parts,
      f"configs/{model}.py",
      {**common, "model.parts": parts},
      seed,
      SOURCE[model, "base" if parts == "base" else "ioc"],
    )
    for model, parts, seed in itertools.product(NAMES, PARTS, seeds)
  ]
