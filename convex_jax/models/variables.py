"""The variables of a network, {"params", "stats"}; Flax calls them "params" and "batch_stats"."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def apply(model: nn.Module, weights: dict[str, Any], images: jax.Array) -> jax.Array:
  """Logits (B, classes) at inference of normalised images (B, H, W, C)."""
  variables = {"params": weights["params"], "batch_stats": weights["stats"]}
  return model.apply(variables, images)  # pyright: ignore[reportReturnType]


def init_variables(model: nn.Module, key: jax.Array, image_shape: tuple[int, ...]) -> Any:
  """Initial variables for images (H, W, C), with the parameters in their constraint boxes."""
  variables = dict(model.init(key, jnp.zeros((1, *image_shape))))
  return {"params": variables["params"], "stats": variables.get("batch_stats", {})}
