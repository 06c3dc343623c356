"""What `config.init_from` means for a run: its first weights, and how pixels are scaled."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from convex_jax.data.datasets import Data
from convex_jax.errors import UserError
from convex_jax.models import catalog
from convex_jax.models.public.importer import Public, load_public


def network_of(config: Any, examples: Data) -> tuple[nn.Module, tuple[int, int, int]]:
  """The network of a config for these data, and the (H, W, C) of its input, px."""
  side, classes = config.data.image_size, len(examples.class_names)
  model = catalog.build(config.model, classes=classes, dtype=jnp.dtype(config.dtype))
  return model, (side, side, examples.train.image_shape[-1])


def start(config: Any, examples: Data) -> tuple[Public, Data]:
  """The weights of `config.init_from`, and the data scaled as `config.data.normalise` says.

  Raises `UserError`, see `load_public` and `Data.scaled`.
  """
  if config.init_optimizer:
    raise UserError(
      f"config.init_optimizer is True, but {config.init_from} is no run; expected the folder of one in"
      " config.init_from: files of public weights hold no optimizer state"
    )
  model, image_shape = network_of(config, examples)
  public = load_public(model, config.init_from, image_shape, config.seed)
  normalise = config.data.normalise
  return public, examples.scaled(public.pixels if normalise == "auto" else normalise)


def words(config: Any, public: Public, examples: Data) -> str:
  """Where the weights come from and how pixels are scaled, in a few lines."""
  mean, std = (", ".join(f"{value:.4g}" for value in numbers) for numbers in examples.statistics)
  why = f"as config.data.normalise={config.data.normalise} has it"
  if config.data.normalise == "auto":
    why = "as published networks with these names saw them"
    if public.pixels == "own":
      why = "the data set's own; the file cannot tell what its network saw"
  return (
    f"Weights from {config.init_from}: {public}\n"
    f"  pixels in 0..1 are scaled by mean {mean} and deviation {std}: {why}"
  )
