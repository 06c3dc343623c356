"""Why the report's IOC-DenseNet failed on ImageNet: 10 %, against 75 % of its base.

Three suspects, one at a time: features that are all alike at initialisation (the architecture's
own initial weights, clamped, compared with log-normal ones with passthrough), a learning rate that
never decayed (the report's plateau rule waits longer than most of its 30 epochs: "constant"), and
the constraint itself (base).
"""

import itertools

from convex_jax.studies.jobs import Job

TITLE = "What keeps a deep convex DenseNet from learning"
SCHEDULES = {
  "short": "digits, blocks of 6, 12, 24 and 16 layers as in DenseNet-121, growth 12; 20 epochs.",
  "full": "CIFAR-10, DenseNet-121 with the stem for 32 px, 100 epochs.",
}
NAIVE = {"model.parts": "ioc", "model.log_normal_init": False, "model.passthrough": False}
VARIANTS = {
  "base": {"model.parts": "base"},
  "naive": NAIVE,
  "naive, with passthrough": NAIVE | {"model.passthrough": True},
  "ours, no passthrough": {"model.parts": "ioc", "model.passthrough": False},
  "ours": {"model.parts": "ioc"},
}
RATES = {"step": {"optimizer.schedule": "step"}, "constant": {"optimizer.schedule": "constant"}}


def get_sweep(schedule):
  short = schedule == "short"
  common = {"model.blocks": (6, 12, 24, 16), "epochs": 20 if short else 100}
  common |= {"eval.every_epochs": 2.0 if short else 5.0}
  common |= {"model.growth": 12 if short else 32}
  data = "digits" if short else "cifar10"
  return [
    Job(
      f"DenseNet of 121 layers on {data}",
      f"{name}, {rate} rate",
      f"configs/densenet.py:{data}",
      common | changed | RATES[rate],
      seed,
    )
    for (name, changed), rate, seed in itertools.product(VARIANTS.items(), RATES, range(3))
  ]
