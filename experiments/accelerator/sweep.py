"""Runs for a quarter of an hour of one GPU: All-CNN, CycleMLP-B1 and DenseNet-BC on CIFAR-10.

A schedule is a network and its epochs; `experiments.accelerator.run` takes the longest that fits
into the time that is left. Table 1's Mixer is in experiments/mixer.
"""

import itertools

from convex_jax.studies.jobs import TWINS, Job

TITLE = "Convolutions and CycleMLP on CIFAR-10, on one GPU"
EPOCHS = {"all_cnn": (100, 30, 10), "cycle_mlp": (300, 100, 30, 10), "densenet": (300, 100, 30, 10)}
NETWORKS = {  # The 2021 paper's All-CNN has norms; the others are the configs' own.
  "all_cnn": ("All-CNN", {"model.size": "ioc_paper", "optimizer.learning_rate": 1e-3}),
  "cycle_mlp": ("CycleMLP-B1", {}),
  "densenet": ("DenseNet-BC(100,12)", {}),
}
SCHEDULES = {
  f"{model}_{epochs}": f"{NETWORKS[model][0]}, {epochs} epochs in bfloat16; the recipe of"
  f" configs/{model}.py otherwise."
  for model, several in EPOCHS.items()
  for epochs in several
}
SCHEDULES["tiny"] = "Small networks, four steps on digits: a check of the commands."
TINY = {
  "mixer": ("Mixer", {"model.channels": 8, "model.depth": 1}),
  "all_cnn": ("All-CNN", {"model.width": 6}),
  "cycle_mlp": ("CycleMLP-B1", {"model.depths": (1, 1), "model.widths": (8, 12)}),
  "densenet": ("DenseNet-BC(100,12)", {"model.blocks": (2, 1)}),
}
PAIR = {name: TWINS[name] for name in ("base", "ioc")}


def get_sweep(schedule):
  if schedule == "tiny":
    networks, data = TINY, "digits"
    common = {"steps": 4, "batch_size": 16, "optimizer.warmup_steps": 0}
  else:
    model, _, epochs = schedule.rpartition("_")
    networks, data = {model: NETWORKS[model]}, "cifar10"
    common = {"epochs": int(epochs), "dtype": "bfloat16", "eval.every_epochs": 5.0}
  return [
    Job(f"{name} on {data}", variant, f"configs/{model}.py:{data}", common | changes | twin)
    for (model, (name, changes)), (variant, twin) in itertools.product(
      networks.items(), PAIR.items()
    )
  ]
