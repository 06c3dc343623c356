"""A network's variables: {"params", "stats"}, where Flax says "params" and "batch_stats"."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def apply(model: nn.Module, weights: dict[str, Any], images: jax.Array) -> jax.Array:
  """Logits of the network at inference."""
  variables = {"params": weights["params"], "batch_stats": weights["stats"]}
  return model.apply(variables, images)  # pyright: ignore[reportReturnType]


def init_variables(model: nn.Module, key: jax.Array, image_shape: tuple[int, ...]) -> Any:
  """Fresh variables, the parameters still in their constraint boxes."""
  variables = dict(model.init(key, jnp.zeros((1, *image_shape))))
  return {"params": variables["params"], "stats": variables.get("batch_stats", {})}
