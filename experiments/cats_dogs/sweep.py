"""Cats against dogs, learnt by heart by one convex logit; what of the recipe is needed for it.

Two hidden layers of 256 ELU units on whitened images, the first of free sign, and weights >= 0 after
it. One change each: without whitening; without the passthrough, the affine map of the image to the
second layer; with one hidden layer; dogs as the class on which the logit is positive; labels drawn
at random. `base` is a free network of the same size, with BatchNorm, on the same schedule.
"""

import math

from convex_jax.studies.jobs import TWINS, Job

TITLE = "Cats against dogs, one convex logit"
SCHEDULES = {
  "memorise": "all 10,000 images, no augmentation, 40 epochs of Adam at 1e-3, cosine, batches of 250.",
}
CONFIG = "configs/mlp.py:cifar10"
COMMON = TWINS["ioc"] | {
  "data.classes": ("cat", "dog"),
  "data.flip": False,
  "data.crop_padding": 0,
  "data.whiten": True,
  "model.one_logit": True,
  "model.width": 256,
  "model.depth": 2,
  "batch_size": 250,
  "epochs": 40,
  "optimizer.learning_rate": 1e-3,
  "optimizer.schedule": "cosine",
  "eval.every_epochs": 10.0,
}
CHANGES = {
  "ioc": {},
  "ioc, dogs first": {"data.classes": ("dog", "cat")},
  "ioc, random labels": {"data.label_noise": 1.0},
  "ioc, no passthrough": {"model.passthrough": False},
  "ioc, one hidden layer": {"model.depth": 1},
  "ioc, not whitened": {"data.whiten": False},
  "base": {"model.parts": "base", "model.norm": "batch"},
}
SOURCE = {"ioc": (0.734, math.nan)}  # Pfrommer et al. 2023: the training accuracy of their network.
NONE = (math.nan, math.nan)


def get_sweep(schedule):
  assert schedule in SCHEDULES
  return [
    Job(TITLE, variant, CONFIG, COMMON | changed, seed, SOURCE.get(variant, NONE))
    for variant, changed in CHANGES.items()
    for seed in range(3 if variant == "ioc" else 1)
  ]
