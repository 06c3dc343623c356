"""The networks that are timed, ours and PyTorch's, each at one batch size."""

import argparse
import dataclasses
import importlib
from typing import Any

from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class Case:
  """One network at one size: our config and the torch network that computes the same."""

  config: str  # A file of configs/.
  model: dict[str, Any]  # Replaces its `model` keys; dropout is off in both.
  peer: str  # A key of `torch_worker.PEERS`.
  batch: int
  px: int
  convolutional: bool = False  # Then torch is also timed with channels last.
  dtype: str = "float32"  # Of the computation; parameters are float32.


def _mixer(size, px, batch):
  return Case("mixer", dict(size=size, drop_path=0.0), f"mixer {size}", batch, px)


def _cycle(px, batch):
  return Case("cycle_mlp", dict(size="B1", drop_path=0.0), "cycle_mlp", batch, px)


def _conv(config, peer, px, batch, **model):
  return Case(config, model, peer, batch, px, convolutional=True)


CASES = {
  "MLP 3x800": Case("mlp", dict(), "mlp", 128, 32),
  "Mixer seed, 128": _mixer("seed", 72, 128),
  "Mixer seed, 512": _mixer("seed", 72, 512),
  "Mixer-S/16": _mixer("S/16", 224, 16),
  "Mixer-B/16": _mixer("B/16", 224, 8),
  "CycleMLP-B1, 32 px": _cycle(32, 64),
  "CycleMLP-B1, 224 px": _cycle(224, 8),
  "DenseNet-121": _conv("densenet", "densenet 121", 224, 8, size="121", dropout=0.0),
  "DenseNet-BC(100,12)": _conv(
    "densenet", "densenet BC-100-12", 32, 64, size="BC-100-12", dropout=0.0
  ),
  "All-CNN-C": _conv("all_cnn", "all_cnn", 32, 128, size="c", dropout=0.0),
  "EfficientNet-B0": _conv(
    "efficientnet",
    "efficientnet",
    224,
    16,
    size="B0",
    variant="torch",
    stem_stride=2,
    dropout=0.0,
    drop_path=0.0,
  ),
}

# Each at the batch it is trained with (at 224 px a part of it), and at a larger one. Six programs
# of a network share the device's memory.
ON_ACCELERATORS = {
  f"{name}, bfloat16, batch {batch}": dataclasses.replace(
    CASES[name], batch=batch, dtype="bfloat16"
  )
  for name, batches in {
    "Mixer seed, 512": (512, 4096),
    "MLP 3x800": (64, 8192),
    "All-CNN-C": (64, 1024),
    "CycleMLP-B1, 32 px": (128, 1024),
    "DenseNet-121": (64, 128),
    "DenseNet-BC(100,12)": (64, 512),
    "Mixer-B/16": (64, 128),
    "CycleMLP-B1, 224 px": (64, 128),
  }.items()
  for batch in batches
}
EVERY = CASES | ON_ACCELERATORS


def names_of(text: str) -> list[str]:
  """The type of the option --cases: names of `CASES`, separated by semicolons."""
  names = text.split(";")
  if unknown := [name for name in names if name not in CASES]:
    expected = f"expected some of {';'.join(CASES)}"
    raise argparse.ArgumentTypeError(f"{unknown[0]!r} given; {expected}")
  return names


def config_of(case: Case, parts: str) -> ConfigDict:
  """Our config of a case: Adam at 1e-3, no augmentation, one step per call, as in PyTorch."""
  config = importlib.import_module(f"configs.{case.config}").get_config()
  config.model.update({**case.model, "parts": parts})
  config.batch_size, config.data.image_size = case.batch, case.px
  config.dtype = case.dtype
  config.data.flip, config.data.crop_padding = False, 0
  config.label_smoothing = config.ema_decay = config.optimizer.weight_decay = 0.0
  config.optimizer.name, config.optimizer.schedule = "adam", "constant"
  config.optimizer.warmup_steps, config.optimizer.clip_norm = 0, 0.0
  config.optimizer.learning_rate = 1e-3
  config.steps = 1_000_000
  return config
