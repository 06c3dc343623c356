"""Networks that are convex only in the head (report, section 6), and IOC-EfficientNet."""

import itertools

from convex_jax.studies.jobs import TWINS, Job

TITLE = "Convex only in the head; EfficientNet's convex twin"
SCHEDULES = {
  "short": "Mixer: 10,000 images of CIFAR-10 at 32 px, 10 epochs, cosine. EfficientNet: digits, 30 epochs.",
  "full": "Mixer: the report's recipe, 100 epochs. EfficientNet: CIFAR-10, its config's recipe.",
}
HEAD = {"model.head_depth": 2}
MIXERS = {
  "base, linear head": {"model.parts": "base"},
  "base, deep head": {"model.parts": "base"} | HEAD,
  "ioc in the head": {"model.parts": "ioc", "model.convex_from": "head"} | HEAD,
  "ioc in all": {"model.parts": "ioc"} | HEAD,
}


def get_sweep(schedule):
  common, data = {}, "cifar10"
  if schedule == "short":
    common = {"epochs": 10, "optimizer.schedule": "cosine", "optimizer.warmup_steps": 100}
    common |= {"batch_size": 128, "data.train_fraction": 0.2}
    common |= {"data.image_size": 32, "model.patch": 4}
    data = "digits"
  mixers = [
    Job("Mixer on CIFAR-10", name, "configs/mixer.py", common | changed, seed)
    for (name, changed), seed in itertools.product(MIXERS.items(), range(3))
  ]
  return mixers + [
    Job(
      f"EfficientNet-B0 on {data}",
      variant,
      f"configs/efficientnet.py:{data}",
      changed,
      seed,
    )
    for (variant, changed), seed in itertools.product(TWINS.items(), range(3))
  ]
