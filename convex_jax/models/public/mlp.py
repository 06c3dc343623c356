"""MLP: a torch.nn.Sequential of a flatten, then three times (linear, norm, activation)."""

import re
from collections.abc import Sequence

import numpy as np

from convex_jax.models.public.names import Names, Rule

RULES: list[Rule] = [
  (r"(?:model\.)?10", lambda _: "head"),
  (r"(?:model\.)?([147])", lambda m: f"dense_{int(m[1]) // 3}"),
  (r"(?:model\.)?([258])", lambda m: f"norm_{int(m[1]) // 3}"),
]


def _reorder(key: str, kernel: np.ndarray, image_shape: Sequence[int]) -> np.ndarray:
  """Of the first layer: torch flattens images (C, H, W), we flatten (H, W, C)."""
  h, w, c = image_shape
  if not re.fullmatch(r"(?:model\.)?1\.weight", key) or len(kernel) != h * w * c:
    return kernel
  return kernel.reshape(c, h, w, -1).transpose(1, 2, 0, 3).reshape(h * w * c, -1)


NAMES = Names(RULES, reorder=_reorder)
