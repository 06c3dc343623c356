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
  "views": "`longer`, whose logits are means over 8 views of an image: moved by 2 px in both axes, and"
  " mirrored.",
  "report_size": "the report's network with a dense readout, in the views of `views`: 40 epochs of Adam,"
  " cosine, batches of 256; flips and crops; the rates of `readout`.",
  "full": "the report's: 100 epochs of Adam at 1e-3, batches of 512, flips, 72 px.",
}
VARIANTS = {
  "base": TWINS["base"],
  "base, BatchNorm": {"model.parts": "base", "model.norm": "batch"},
  "paper": TWINS["paper"],
  "ioc": TWINS["ioc"],
}
# The report's rate is 1e-3; convex twins prefer a higher one.
PANEL, READOUT = "Mixer on CIFAR-10", "Mixer with a dense readout on CIFAR-10"
FAST = {"optimizer.learning_rate": 0.01}
SOURCE = {"base": (0.8572, 0.711), "paper": (0.7857, 0.6797), "ioc": (0.7857, 0.6797)}
UNKNOWN = (float("nan"), float("nan"))

SMALL = {"data.image_size": 32, "model.patch": 4}
OFTEN = {"eval.every_epochs": 2.0}
COSINE = {"optimizer.schedule": "cosine", "optimizer.warmup_steps": 100}
SHORT = SMALL | {"epochs": 10, "batch_size": 128, "data.train_fraction": 0.2}
LONGER = SMALL | COSINE | OFTEN
LONGER |= {"epochs": 20, "batch_size": 256, "optimizer.learning_rate": 5e-3}
LONGER |= {"data.crop_padding": 4, "data.whiten": True, "model.overlap": 2}
LONGER |= {"model.depth": 2, "model.channels_hidden": 512, "model.parallel": True}
LONGER |= {"model.dense_readout": True, "model.cells": 2}
VIEWS = {"data.eval_shifts": (-2, 2), "data.eval_flip": True, "eval.every_epochs": 10.0}
REPORT_SIZE = SMALL | COSINE | VIEWS | {"epochs": 40, "batch_size": 256}
REPORT_SIZE |= {"data.crop_padding": 4, "model.dense_readout": True}


def _only(*names):
  return {name: VARIANTS[name] for name in names}


FAIR = _only("base, BatchNorm", "ioc")
# With a dense readout.
AT_OWN_RATES = {
  name: FAIR[name] | {"optimizer.learning_rate": rate}
  for name, rate in {"base, BatchNorm": 0.001, "ioc": 0.003}.items()
}

# By schedule: what all of its runs have, its variants, its panels, the number of seeds.
PLANS = {
  "short": (SHORT | COSINE, VARIANTS, {PANEL: {}, f"{PANEL}, rate 0.01": FAST}, 3),
  "longer": (LONGER, _only("base, BatchNorm", "ioc", "paper"), {READOUT: {}}, 1),
  "table_1": (SMALL | OFTEN, VARIANTS, {PANEL: {}}, 3),
  "pixels": (OFTEN | {"epochs": 10}, _only("base", "ioc"), {"Mixer at 72 px": {}}, 1),
  "readout_rates": (
    SHORT | {"model.dense_readout": True},
    FAIR,
    {f"{READOUT}, rate {r}": {"optimizer.learning_rate": r} for r in (0.001, 0.003, 0.01)},
    1,
  ),
  "readout": (
    SMALL | OFTEN | {"model.dense_readout": True},
    AT_OWN_RATES,
    {READOUT: {}},
    1,
  ),
  "views": (LONGER | VIEWS, FAIR, {READOUT: {}}, 1),
  "report_size": (
    REPORT_SIZE,
    AT_OWN_RATES,
    {READOUT: {}},
    1,
  ),
  "full": ({}, VARIANTS, {PANEL: {}, f"{PANEL}, rate 0.01": FAST}, 3),
}


def get_sweep(schedule):
  common, variants, panels, seeds = PLANS[schedule]
  return [
    Job(
      panel,
      name,
      "configs/mixer.py",
      common | changed | rate,
      seed,
      SOURCE.get(name, UNKNOWN) if panel == PANEL else UNKNOWN,
    )
    for seed, (panel, rate), (name, changed) in itertools.product(
      range(seeds), panels.items(), variants.items()
    )
  ]
