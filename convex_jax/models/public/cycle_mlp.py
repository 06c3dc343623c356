"""CycleMLP: the files of its authors."""

import re

import numpy as np

from convex_jax.models.public.names import Names, Rule, fixed, minus_one

_BRANCHES = {"sfc_h": "along_width", "sfc_w": "along_height", "mlp_c": "along_channels"}


def _block(match: re.Match) -> str:
  """Even entries of `network` are stages."""
  return f"stage_{int(match[1]) // 2}_block_{match[2]}"


RULES: list[Rule] = [
  *fixed(stem="patch_embed.proj", norm="norm", head="head"),
  (r"network\.([135])\.proj", lambda m: f"down_{(int(m[1]) + 1) // 2}"),
  (r"network\.([0246])\.(\d+)\.norm([12])", lambda m: f"{_block(m)}/norm_{minus_one(m[3])}"),
  (r"network\.([0246])\.(\d+)\.mlp\.fc([12])", lambda m: f"{_block(m)}/dense_{minus_one(m[3])}"),
  (
    r"network\.([0246])\.(\d+)\.attn\.(sfc_h|sfc_w|mlp_c)",
    lambda m: f"{_block(m)}/mix/{_BRANCHES[m[3]]}",
  ),
  (
    r"network\.([0246])\.(\d+)\.attn\.reweight\.fc([12])",
    lambda m: f"{_block(m)}/mix/gate/dense_{minus_one(m[3])}",
  ),
  (r"network\.([0246])\.(\d+)\.attn\.proj", lambda m: f"{_block(m)}/mix/proj"),
]


def _is_cycle(key: str, offset: np.ndarray) -> bool:
  """Whether the pairs (dy, dx) are CycleFC's: (c + 1) mod 3 - 1 for channel c, 0 across."""
  if offset.size % 2:
    return False
  pairs = offset.reshape(-1, 2)
  want = np.zeros_like(pairs)
  want[:, 1 if ".sfc_h." in key else 0] = (np.arange(len(pairs)) + 1) % 3 - 1
  return np.array_equal(pairs, want)


_OFFSETS = r"network\.[0246]\.\d+\.attn\.sfc_[hw]\.offset"
NAMES = Names(RULES, pixels=lambda _: "imagenet", constants=(_OFFSETS, _is_cycle))
