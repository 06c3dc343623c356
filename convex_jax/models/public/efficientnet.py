"""EfficientNet: timm's and torchvision's files."""

from collections.abc import Collection
from typing import Any

from convex_jax.errors import UserError
from convex_jax.models.public.names import Names, Rule, fixed, minus_one

# The layers of an inverted bottleneck in order; those of the first stage do not expand.
_EXPANDING, _PLAIN = ("expand", "depthwise", "project"), ("depthwise", "project")
_SQUEEZE = {"conv_reduce": "reduce", "conv_expand": "expand", "fc1": "reduce", "fc2": "expand"}


def _timm_layer(stage: int, entry: str) -> str:
  """timm's conv_pw, bn1, conv_dw, bn2, conv_pwl, bn3; conv_dw, bn1, conv_pw, bn2 in stage 0."""
  names = _EXPANDING if stage else _PLAIN
  if entry.startswith("bn"):
    return f"{names[minus_one(entry[2:])]}/norm"
  order = ("conv_pw", "conv_dw", "conv_pwl") if stage else ("conv_dw", "conv_pw")
  return f"{names[order.index(entry)]}/conv"


def _torchvision_layer(stage: int, entry: str, part: str) -> str:
  """torchvision's numbered entries, the last but one of which is the squeeze-excite."""
  names = _EXPANDING if stage else _PLAIN
  index = int(entry) - (int(entry) == len(names))
  return f"{names[index]}/{('conv', 'norm')[int(part)]}"


RULES: list[Rule] = [
  *fixed(**{"stem/conv": "conv_stem", "stem/norm": "bn1"}),
  *fixed(**{"top/conv": "conv_head", "top/norm": "bn2", "head": "classifier"}),
  (
    r"blocks\.(\d)\.(\d+)\.(conv_pw|conv_dw|conv_pwl|bn[123])",
    lambda m: f"stage_{m[1]}_block_{m[2]}/{_timm_layer(int(m[1]), m[3])}",
  ),
  (
    r"blocks\.(\d)\.(\d+)\.se\.(conv_reduce|conv_expand)",
    lambda m: f"stage_{m[1]}_block_{m[2]}/squeeze_excite/{_SQUEEZE[m[3]]}",
  ),
  # torchvision counts stages from 1, after the stem.
  *fixed(**{"stem/conv": "features.0.0", "stem/norm": "features.0.1"}),
  *fixed(**{"top/conv": "features.8.0", "top/norm": "features.8.1", "head": "classifier.1"}),
  (
    r"features\.([1-7])\.(\d+)\.block\.(\d)\.([01])",
    lambda m: (
      f"stage_{minus_one(m[1])}_block_{m[2]}/{_torchvision_layer(minus_one(m[1]), m[3], m[4])}"
    ),
  ),
  (
    r"features\.([1-7])\.(\d+)\.block\.[12]\.(fc1|fc2)",
    lambda m: f"stage_{minus_one(m[1])}_block_{m[2]}/squeeze_excite/{_SQUEEZE[m[3]]}",
  ),
]


def _is_torchvisions(keys: Collection[str]) -> bool:
  return any(key.startswith("features.") for key in keys)


def _fields(model: Any, path: str, keys: Collection[str]) -> dict[str, Any]:
  """torchvision's networks pad evenly; a file of timm's may be of either variant."""
  if not _is_torchvisions(keys):
    if model.variant is None:
      raise UserError(
        f"{path} does not tell which network of timm's it is of: tf_efficientnet_* and efficientnet_*"
        " name their weights alike and differ in padding and norms; expected"
        " --config.model.variant=tf for the former, --config.model.variant=torch for the latter"
      )
    return {}
  if model.width >= 1.6:
    raise UserError(
      f"{path} is torchvision's EfficientNet B5, B6 or B7, with a BatchNorm epsilon of 1e-3 and even"
      " padding, which no variant here combines; expected timm's file"
    )
  return {"variant": "torch"}


def _untold(model: Any, keys: Collection[str]) -> list[str]:
  """timm's files of either variant, and those with blurred strides, have the same names."""
  if _is_torchvisions(keys):
    return []
  name = {"tf": "tf_efficientnet_*", "torch": "efficientnet_*"}[model.variant]
  return [
    f"read as timm's {name}, by config.model.variant={model.variant}; efficientnet_blur_* is another"
    " network, whose file looks the same",
    "pixels of those with ap_in1k, ra4_e3600 or pruned in their name are scaled by"
    " --config.data.normalise=half",
  ]


NAMES = Names(RULES, fields=_fields, pixels=lambda _: "imagenet", untold=_untold)
