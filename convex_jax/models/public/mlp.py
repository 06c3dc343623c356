"""MLP: a torch.nn.Sequential of a flatten, then three times (linear, norm, activation)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from convex_jax.models.public.names import Names, Rule, Shape

RULES: list[Rule] = [
  (r"10", lambda _: "head"),
  (r"([147])", lambda m: f"dense_{int(m[1]) // 3}"),
  (r"([258])", lambda m: f"norm_{int(m[1]) // 3}"),
]


def _reorder(key: str, kernel: np.ndarray, image_shape: Sequence[int]) -> np.ndarray:
  """Of the first layer: torch flattens images (C, H, W), we flatten (H, W, C)."""
  h, w, c = image_shape
  if key != "1.weight" or len(kernel) != h * w * c:
    return kernel
  return kernel.reshape(c, h, w, -1).transpose(1, 2, 0, 3).reshape(h * w * c, -1)


def _image_size(model: Any, channels: int, shapes: Mapping[str, Shape]) -> int | None:
  """The side of the square images that the first layer takes."""
  del model
  shape = shapes.get("params/dense_0/kernel")
  return math.isqrt(shape[0] // channels) if shape else None


NAMES = Names(RULES, reorder=_reorder, image_size=_image_size)
