"""All-CNN and DenseNet on CIFAR-10 (Table 2 and appendix C of the 2021 paper).

Their convex networks leave BatchNorm's scales free; here the scales are constrained, and the
networks certified.
"""

import itertools

from convex_jax.studies.jobs import TWINS, Job

TITLE = "All-CNN and DenseNet (the 2021 paper's Table 2 and appendix C)"
SCHEDULES = {
  "short": "digits: All-CNN of width 32, 40 epochs; DenseNet of two blocks of 4 layers, 30 epochs.",
  "full": "350 epochs (All-CNN), 300 epochs (DenseNet: SGD at 0.1, step decay); five seeds.",
}
SOURCE = {  # Appendix C: means of five runs.
  ("all_cnn", "base"): (0.9912, 0.9221),
  ("all_cnn", "ioc"): (0.9261, 0.9034),
  ("densenet", "base"): (0.9908, 0.9386),
  ("densenet", "ioc"): (0.9380, 0.9043),
}
NAMES = {"all_cnn": "All-CNN", "densenet": "DenseNet"}

# The networks of that paper's code. Its All-CNN has norms; without them the exponentiated twin
# stayed at chance on digits.
THEIRS = {
  "all_cnn": {"model.size": "ioc_paper", "optimizer.learning_rate": 1e-3},
  "densenet": {"model.size": "ioc_paper"},
}


def get_sweep(schedule):
  full = schedule == "full"
  data, common = ("cifar10", {"eval.every_epochs": 10.0}) if full else ("digits", {})
  networks = THEIRS if full else THEIRS | {"densenet": {}}
  return [
    Job(
      f"{NAMES[model]} on {'CIFAR-10' if full else data}",
      variant,
      f"configs/{model}.py:{data}",
      common | network | changed,
      seed,
      SOURCE[model, "base" if variant == "base" else "ioc"] if full else Job.source,
    )
    for (model, network), (variant, changed), seed in itertools.product(
      networks.items(), TWINS.items(), range(5 if full else 3)
    )
  ]
