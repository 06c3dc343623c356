"""MLP 3 x 800: base, the 2021 paper's twin, ours, and ours without its passthrough.

`paper` is the network of Sivaprasad et al. 2021 (ELU, BatchNorm, exponentiated weights);
`ioc, no passthrough` differs from it in clamping, log-normal initial weights and a shifted head.
`ioc` is the ablation that the paper omits: ELU with passthrough.
"""

import itertools

from convex_jax.studies.jobs import TWINS, Job

TITLE = "MLP 3 x 800 and its convex twins"
SCHEDULES = {
  "digits": "the embedded digits, 40 epochs of Adam at 1e-3, cosine: a laptop's check.",
  "short": "10,000 images of CIFAR-10, 20 epochs of Adam at 1e-3, cosine, batches of 128; flips and"
  " crops.",
  "epochs_200": "200 of the 1,300 epochs of `full`, without the variant that has no passthrough.",
  "augmented": "3 x 1600 on CIFAR-10, 100 epochs of AdamW at 1e-3 (decay 0.02), cosine, batches of 256,"
  " labels smoothed by 0.1; flips, crops and one operation of RandAugment at magnitude 5; at inference"
  " means over 8 views: moved by 2 px in both axes, and mirrored; one seed.",
  "full": "the 2021 paper's: Adam at 1e-4, batches of 64, 1,300 epochs; flips and crops.",
}
VARIANTS = {
  "base": TWINS["base"],
  "paper": TWINS["paper"],
  "ioc, no passthrough": {"model.parts": "ioc", "model.passthrough": False},
  "ioc": TWINS["ioc"],
}
DATA = {"cifar10": "CIFAR-10", "fashion_mnist": "Fashion-MNIST", "mnist": "MNIST"}
AUGMENTED = {"model.width": 1600, "model.norm": "batch", "epochs": 100, "batch_size": 256}
AUGMENTED |= {"optimizer.name": "adamw", "optimizer.weight_decay": 0.02}
AUGMENTED |= {"optimizer.learning_rate": 1e-3, "optimizer.schedule": "cosine"}
AUGMENTED |= {"optimizer.warmup_steps": 200, "label_smoothing": 0.1, "eval.every_epochs": 10.0}
AUGMENTED |= {"data.randaugment": (1, 5.0), "data.eval_shifts": (-2, 2), "data.eval_flip": True}
SOURCE = {  # Table 1 and appendix C of the 2021 paper: train and test accuracy.
  ("cifar10", "base"): (0.9799, 0.6383),
  ("cifar10", "paper"): (0.7327, 0.6989),
  ("fashion_mnist", "base"): (0.9480, 0.9061),
  ("fashion_mnist", "paper"): (0.9041, 0.9058),
  ("mnist", "base"): (0.9934, 0.9916),
  ("mnist", "paper"): (0.9877, 0.9925),
}


def get_sweep(schedule):
  if schedule == "digits":
    jobs = itertools.product(VARIANTS.items(), range(5))
    return [Job("MLP on digits", name, "configs/mlp.py:digits", v, s) for (name, v), s in jobs]
  if schedule == "augmented":
    panel, config = "MLP 3 x 1600 on CIFAR-10", "configs/mlp.py:cifar10"
    return [Job(panel, name, config, AUGMENTED | TWINS[name]) for name in ("base", "ioc")]
  common = {"epochs": 1300, "eval.every_epochs": 10.0}
  if schedule == "short":
    common = {"epochs": 20, "batch_size": 128, "optimizer.learning_rate": 1e-3}
    common |= {"optimizer.schedule": "cosine", "data.train_fraction": 0.2, "eval.every_epochs": 2.0}
  data, variants = ("cifar10",) if schedule == "short" else tuple(DATA), VARIANTS
  if schedule == "epochs_200":
    common["epochs"], data = 200, tuple(reversed(DATA))  # The fastest first.
    variants = {name: changed for name, changed in VARIANTS.items() if name in TWINS}
  return [
    Job(
      f"MLP on {DATA[name]}",
      variant,
      f"configs/mlp.py:{name}",
      common | changed,
      seed,
      SOURCE[name, "base" if variant == "base" else "paper"],
    )
    for seed, name, (variant, changed) in itertools.product(range(3), data, variants.items())
  ]
