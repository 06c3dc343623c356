"""MLP-Mixer: the official `.npz` files, old and new, timm's, and the report's own code."""

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from convex_jax.models.public.names import Names, Rule, Shape, fixed, minus_one


def _dense(match: re.Match) -> str:
  return f"block_{match[1]}/{match[2]}_mixing/dense_{minus_one(match[3])}"


RULES: list[Rule] = [
  # The official .npz, with modules as Flax numbers them.
  (r"MixerBlock_(\d+)\.LayerNorm_(\d)", lambda m: f"block_{m[1]}/norm_{m[2]}"),
  (
    r"MixerBlock_(\d+)\.(token|channel)_mixing\.Dense_(\d)",
    lambda m: f"block_{m[1]}/{m[2]}_mixing/dense_{m[3]}",
  ),
  *fixed(stem="stem", norm="pre_head_layer_norm", head="head"),
  # Its older naming; the importer turns "kernel1" into module "1" and leaf "kernel".
  (r"Mixer\.encoderblock_(\d+)\.LayerNorm_(\d)", lambda m: f"block_{m[1]}/norm_{m[2]}"),
  (r"Mixer\.encoderblock_(\d+)\.(token|channel)_mixing_phase_0\.([12])", _dense),
  *fixed(stem="embedding", norm="Mixer.encoder_norm"),
  # timm.
  (r"blocks\.(\d+)\.norm([12])", lambda m: f"block_{m[1]}/norm_{minus_one(m[2])}"),
  (r"blocks\.(\d+)\.mlp_(token|channel)s\.fc([12])", _dense),
  *fixed(stem="stem.proj", norm="norm"),
  # The report's own code.
  (
    r"mixer_blocks\.(\d+)\.(token|channel)_mix\.0",
    lambda m: f"block_{m[1]}/norm_{int(m[2] == 'channel')}",
  ),
  (
    r"mixer_blocks\.(\d+)\.(?:token_mix\.2|channel_mix\.1)\.net\.([02])",
    lambda m: (
      f"block_{m[1]}/{'token' if '.token_mix.' in m[0] else 'channel'}_mixing/dense_{int(m[2]) // 2}"
    ),
  ),
  *fixed(stem="to_patch_embedding.0", norm="layer_norm", head="final_fc.0"),
]


def _any(pattern: str, keys: Collection[str]) -> bool:
  return any(re.match(pattern, key) for key in keys)


def _fields(model: Any, path: str, keys: Collection[str]) -> dict[str, Any]:
  """GELU has the tanh form in the official code and the erf form in torch code."""
  del path
  gelu = {}
  if model.parts.twin.activation is None:
    gelu |= {"gelu": "tanh"} if _any(r"MixerBlock_|Mixer/", keys) else {}
    gelu |= {"gelu": "erf"} if _any(r"(mixer_)?blocks\.", keys) else {}
  return {"parallel": False, **gelu}


def _pixels(keys: Collection[str]) -> str:
  """-1..1 in the official code, and so in timm's copies of its files."""
  return "own" if _any(r"mixer_blocks\.", keys) else "half"


def _untold(model: Any, keys: Collection[str]) -> list[str]:
  del model
  if _any(r"mixer_blocks\.", keys):
    return ["its LayerNorms have epsilon 1e-5, those here 1e-6"]
  if _any(r"blocks\.", keys):
    return ["pixels of those with miil in their name are scaled by --config.data.normalise=unit"]
  return []


def _image_size(model: Any, channels: int, shapes: Mapping[str, Shape]) -> int | None:
  """The side of the square of patches that the first token mixing takes."""
  del channels
  shape = shapes.get("params/block_0/token_mixing/dense_0/kernel")
  return model.patch * math.isqrt(shape[0]) if shape else None


NAMES = Names(RULES, fields=_fields, pixels=_pixels, untold=_untold, image_size=_image_size)
