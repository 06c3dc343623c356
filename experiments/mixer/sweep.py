"""The report's Mixer on CIFAR-10 (its Table 1): base, the report's twin, ours.

`base, BatchNorm` is the fair baseline of `ioc`: unconstrained, with the norm of `ioc`. The
schedule `longer` asks how far a convex Mixer can get, with whitened images, overlapping patches and
a head that sees every hidden unit.
"""

import itertools

from convex_jax.studies.jobs import TWINS, Job

TITLE = "MLP-Mixer on CIFAR-10 (the report's Table 1)"
SCHEDULES = {
  "short": "10,000 images, 10 epochs of Adam, cosine, batches of 128; flips; 32 px, patches of 4.",
  "longer": "20 epochs of Adam at 5e-3, cosine, batches of 256; flips and crops; 32 px, patches of"
  " 4; whitened; 2 blocks, the first parallel, 512 units of channels, overlap 2, 2 x 2 cells,"
  " dense readout; one seed.",
  "table_1": "the report's 100 epochs of Adam at 1e-3, batches of 512, flips; 32 px and patches"
  " of 4, which are as many tokens as 72 px and patches of 9.",
  "pixels": "the first 10 epochs of `full` at 72 px, to be compared with those of `table_1`.",
  "readout_rates": "`short` with a dense readout and constant rates; one seed.",
  "readout": "`table_1` with a dense readout, at the rates that `readout_rates` favours.",
  "full": "the report's: 100 epochs of Adam at 1e-3, batches of 512, flips, 72 px.",
}
VARIANTS = {
  "base": TWINS["base"],
  "base, BatchNorm": {"model.parts": "base", "model.norm": "batch"},
  "paper": TWINS["paper"],
  "ioc": TWINS["ioc"],
}
RATES = {"Mixer on CIFAR-10": {}}  # The report's, 1e-3. Convex twins prefer a higher one:
RATES["Mixer on CIFAR-10, rate 0.01"] = {"optimizer.learning_rate": 0.01}
SOURCE = {"base": (0.8572, 0.711), "paper": (0.7857, 0.6797), "ioc": (0.7857, 0.6797)}
UNKNOWN = (float("nan"), float("nan"))
SMALL = {"data.image_size": 32, "model.patch": 4, "optimizer.schedule": "cosine"}
SMALL |= {"optimizer.warmup_steps": 100}
OWN_RATES = {"base, BatchNorm": 0.001, "ioc": 0.003}  # With a dense readout.
READOUT = "Mixer with a dense readout on CIFAR-10"


def get_sweep(schedule):
  common, variants, rates, seeds = {}, VARIANTS, RATES, range(3)
  if schedule == "short":
    common = SMALL | {"epochs": 10, "batch_size": 128, "data.train_fraction": 0.2}
  if schedule == "longer":
    common = SMALL | {"epochs": 20, "batch_size": 256, "data.crop_padding": 4}
    common |= {"optimizer.learning_rate": 5e-3, "eval.every_epochs": 2.0}
    common |= {"data.whiten": True, "model.overlap": 2, "model.parallel": True}
    common |= {"model.dense_readout": True, "model.cells": 2}
    common |= {"model.depth": 2, "model.channels_hidden": 512}
    variants = {name: VARIANTS[name] for name in ("base, BatchNorm", "ioc", "paper")}
    rates, seeds = {READOUT: {}}, range(1)
  if schedule in ("table_1", "readout"):
    common = {"data.image_size": 32, "model.patch": 4, "eval.every_epochs": 2.0}
    rates = {"Mixer on CIFAR-10": {}}
  if schedule == "pixels":
    common, rates, seeds = {"epochs": 10, "eval.every_epochs": 2.0}, {"Mixer at 72 px": {}}, (0,)
    variants = {name: VARIANTS[name] for name in ("base", "ioc")}
  if schedule == "readout_rates":
    common = {"epochs": 10, "batch_size": 128, "data.train_fraction": 0.2, "data.image_size": 32}
    common |= {"model.patch": 4, "model.dense_readout": True}
    variants = {name: VARIANTS[name] for name in ("base, BatchNorm", "ioc")}
    every = (0.001, 0.003, 0.01)
    rates = {f"{READOUT}, rate {rate}": {"optimizer.learning_rate": rate} for rate in every}
    seeds = (0,)
  if schedule == "readout":
    common |= {"model.dense_readout": True}
    rates, seeds = {READOUT: {}}, (0,)
    variants = {
      name: VARIANTS[name] | {"optimizer.learning_rate": rate} for name, rate in OWN_RATES.items()
    }
  return [
    Job(
      panel,
      name,
      "configs/mixer.py",
      common | changed | rate,
      seed,
      SOURCE.get(name, UNKNOWN) if panel == "Mixer on CIFAR-10" else UNKNOWN,
    )
    for seed, (panel, rate), (name, changed) in itertools.product(
      seeds, rates.items(), variants.items()
    )
  ]
