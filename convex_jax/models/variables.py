"""The variables of a network, {"params", "stats"}; Flax calls them "params" and "batch_stats"."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def apply(model: nn.Module, weights: dict[str, Any], images: jax.Array) -> jax.Array:
  """Logits (B, classes) at inference of normalised images (B, H, W, C).

  Of images in V views, (B, V, H, W, C), the means over the views.
  """
  variables = {"params": weights["params"], "batch_stats": weights["stats"]}
  if images.ndim == 5:
    logits_NxK = model.apply(variables, images.reshape(-1, *images.shape[2:]))
    return logits_NxK.reshape(*images.shape[:2], -1).mean(1)  # pyright: ignore
  return model.apply(variables, images)  # pyright: ignore[reportReturnType]


def init_variables(model: nn.Module, key: jax.Array, image_shape: tuple[int, ...]) -> Any:
  """Initial variables for images (H, W, C), with the parameters in their constraint boxes."""
  variables = dict(model.init(key, jnp.zeros((1, *image_shape))))
  return {"params": variables["params"], "stats": variables.get("batch_stats", {})}
