"""Ablation: constraint x initialisation x passthrough x residual scale x norm.

Every combination, on a small Mixer: 8 blocks of 64 features, 16 patches of 8 x 8 pixels.
"""

import itertools

from convex_jax.studies.jobs import Job

TITLE = "What a convex Mixer needs"
SCHEDULES = {
  "short": "8 blocks of width 64, 5,000 images of CIFAR-10, 10 epochs of Adam at 1e-3, cosine.",
  "full": "8 blocks of width 64, CIFAR-10, 100 epochs of Adam at 1e-3, cosine.",
}
FACTORS = {
  "model.constraint": ("clamp", "exponentiate"),
  "model.log_normal_init": (True, False),
  "model.passthrough": (True, False),
  "model.branch_scales": (True, False),
  "model.norm": ("batch", "affine"),
}
WORDS = {
  "model.constraint": {"clamp": "clamp", "exponentiate": "exp"},
  "model.log_normal_init": {True: "log-normal", False: "own init"},
  "model.passthrough": {True: "passthrough", False: "none"},
  "model.branch_scales": {True: "scales", False: "no scales"},
  "model.norm": {"batch": "BatchNorm", "affine": "Affine"},
}
SIZE = {"model.depth": 8, "model.channels": 64, "model.tokens_hidden": 64}
SIZE |= {"model.channels_hidden": 128, "model.patch": 8, "data.image_size": 32}


def get_sweep(schedule):
  common = SIZE | {"batch_size": 128, "optimizer.schedule": "cosine", "optimizer.warmup_steps": 50}
  common |= {"data.crop_padding": 4}
  common |= {"epochs": 100}
  if schedule == "short":
    common |= {"epochs": 10, "data.train_fraction": 0.1, "eval.every_epochs": 5.0}
  variants = {"base": {"model.parts": "base"}}
  variants["base, BatchNorm"] = {"model.parts": "base", "model.norm": "batch"}
  for values in itertools.product(*FACTORS.values()):
    changed = dict(zip(FACTORS, values, strict=True))
    name = ", ".join(WORDS[key][value] for key, value in changed.items())
    variants[name] = {"model.parts": "ioc"} | changed
  return [
    Job("Mixer of 8 blocks on CIFAR-10", name, "configs/mixer.py", common | changed, seed)
    for (name, changed), seed in itertools.product(variants.items(), range(2))
  ]
