"""Training labels redrawn at random (Table 3 of the 2021 paper), with the control it lacks.

The paper compares a convex network with a free one of the same size. A fair baseline has the same
train accuracy: the base, stopped early at that of `ioc`, which is a column of the report. Further
controls are a base with weight decay and a narrower base.
"""

import itertools

from convex_jax.studies.jobs import Job

TITLE = "Label noise"
SCHEDULES = {
  "short": "MLP, 5,000 images of CIFAR-10, 30 epochs of Adam at 1e-3, cosine, no augmentation.",
  "full": "All-CNN-C on CIFAR-10, 350 epochs, its own recipe.",
}
SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
SOURCE = {  # Table 3, at convergence; "train" is measured on the noisy labels.
  ("base", 0.2): (0.9873, 0.7631),
  ("base", 0.4): (0.9796, 0.6183),
  ("base", 0.6): (0.9780, 0.4671),
  ("base", 0.8): (0.9783, 0.2775),
  ("base", 1.0): (0.9780, 0.1010),
  ("ioc", 0.2): (0.7022, 0.8361),
  ("ioc", 0.4): (0.5463, 0.8101),
  ("ioc", 0.6): (0.3931, 0.7175),
  ("ioc", 0.8): (0.2380, 0.5620),
  ("ioc", 1.0): (0.1021, 0.0994),
}
UNKNOWN = (float("nan"), float("nan"))


def get_sweep(schedule):
  short = schedule == "short"
  common = {"eval.every_epochs": 2.0, "data.train_fraction": 0.1, "epochs": 30}
  common |= {"batch_size": 128, "data.flip": False, "data.crop_padding": 0}
  common |= {"optimizer.learning_rate": 1e-3, "optimizer.schedule": "cosine"}
  common |= {"optimizer.name": "adamw"}
  narrow, decay = {"model.width": 100}, {"optimizer.weight_decay": 1.0}
  if not short:
    common = {"eval.every_epochs": 5.0, "optimizer.name": "adamw"}
    narrow, decay = {"model.width": 24}, {"optimizer.weight_decay": 0.1}
  variants = {
    "base": {"model.parts": "base"},
    "base, weight decay": {"model.parts": "base"} | decay,
    "base, narrow": {"model.parts": "base"} | narrow,
    "ioc": {"model.parts": "ioc"},
  }
  model = "mlp" if short else "all_cnn"
  return [
    Job(
      f"{100 * share:.0f} % of the labels random",
      name,
      f"configs/{model}.py",
      {**common, **changed, "data.label_noise": share},
      seed,
      SOURCE.get((name, share), UNKNOWN),
    )
    for share, (name, changed), seed in itertools.product(SHARES, variants.items(), range(3))
  ]
