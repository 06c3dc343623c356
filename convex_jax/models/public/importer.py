"""Public checkpoints into our trees: `load_public(model, path, image_shape)`.

A rule turns a public module's name into ours; the leaf and the array's rank say the rest:
torch keeps (out, in) and OIHW, we keep (in, out) and HWIO. `public_files` reads the files.

What a file cannot tell is the caller's to set: pixels scaled as its network was trained
(the official Mixer's to -1..1), `variant` of timm's EfficientNets, whose tf_ forms have the
others' names. The report's own Mixer has LayerNorms of epsilon 1e-5, ours of 1e-6.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from convex_jax.errors import UserError
from convex_jax.models import layers
from convex_jax.models.constraints import FREE, PROJECTIONS, constraints_of
from convex_jax.models.public.files import Arrays, read
from convex_jax.models.variables import init_variables

Rule = tuple[str, Callable[[re.Match], str]]  # A public module's name, and ours.


def _fixed(**names: str) -> list[Rule]:
  return [(re.escape(theirs), lambda _, ours=ours: ours) for ours, theirs in names.items()]


def _minus_one(number: str) -> int:
  return int(number) - 1


_MIXER: list[Rule] = [
  # The official .npz, which names modules as Flax numbers them.
  (r"MixerBlock_(\d+)\.LayerNorm_(\d)", lambda m: f"block_{m[1]}/norm_{m[2]}"),
  (
    r"MixerBlock_(\d+)\.(token|channel)_mixing\.Dense_(\d)",
    lambda m: f"block_{m[1]}/{m[2]}_mixing/dense_{m[3]}",
  ),
  *_fixed(stem="stem", norm="pre_head_layer_norm", head="head"),
  # Its older naming; `_split` takes the digit off "kernel1".
  (r"Mixer\.encoderblock_(\d+)\.LayerNorm_(\d)", lambda m: f"block_{m[1]}/norm_{m[2]}"),
  (
    r"Mixer\.encoderblock_(\d+)\.(token|channel)_mixing_phase_0\.([12])",
    lambda m: f"block_{m[1]}/{m[2]}_mixing/dense_{_minus_one(m[3])}",
  ),
  *_fixed(stem="embedding", norm="Mixer.encoder_norm"),
  # timm.
  (r"blocks\.(\d+)\.norm([12])", lambda m: f"block_{m[1]}/norm_{_minus_one(m[2])}"),
  (
    r"blocks\.(\d+)\.mlp_(token|channel)s\.fc([12])",
    lambda m: f"block_{m[1]}/{m[2]}_mixing/dense_{_minus_one(m[3])}",
  ),
  *_fixed(stem="stem.proj", norm="norm"),
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
  *_fixed(stem="to_patch_embedding.0", norm="layer_norm", head="final_fc.0"),
]

_CYCLE_BRANCHES = {"sfc_h": "along_width", "sfc_w": "along_height", "mlp_c": "along_channels"}


def _cycle_block(match: re.Match) -> str:
  """Even entries of `network` are stages."""
  return f"stage_{int(match[1]) // 2}_block_{match[2]}"


_CYCLE_MLP: list[Rule] = [
  *_fixed(stem="patch_embed.proj", norm="norm", head="head"),
  (r"network\.([135])\.proj", lambda m: f"down_{(int(m[1]) + 1) // 2}"),
  (
    r"network\.([0246])\.(\d+)\.norm([12])",
    lambda m: f"{_cycle_block(m)}/norm_{_minus_one(m[3])}",
  ),
  (
    r"network\.([0246])\.(\d+)\.mlp\.fc([12])",
    lambda m: f"{_cycle_block(m)}/dense_{_minus_one(m[3])}",
  ),
  (
    r"network\.([0246])\.(\d+)\.attn\.(sfc_h|sfc_w|mlp_c)",
    lambda m: f"{_cycle_block(m)}/mix/{_CYCLE_BRANCHES[m[3]]}",
  ),
  (
    r"network\.([0246])\.(\d+)\.attn\.reweight\.fc([12])",
    lambda m: f"{_cycle_block(m)}/mix/gate/dense_{_minus_one(m[3])}",
  ),
  (r"network\.([0246])\.(\d+)\.attn\.proj", lambda m: f"{_cycle_block(m)}/mix/proj"),
]

_DENSENET: list[Rule] = [
  *_fixed(stem="features.conv0", stem_norm="features.norm0", norm="features.norm5"),
  *_fixed(norm="features.norm_final", head="classifier"),
  (
    # Files of old say norm.1 for norm1.
    r"features\.denseblock(\d+)\.denselayer(\d+)\.(norm|conv)\.?([12])",
    lambda m: f"block_{_minus_one(m[1])}_layer_{_minus_one(m[2])}/{m[3]}_{_minus_one(m[4])}",
  ),
  (r"features\.transition(\d+)\.norm", lambda m: f"transition_{m[1]}_norm"),
  (r"features\.transition(\d+)\.conv", lambda m: f"transition_{m[1]}"),
]

_ALL_CNN: list[Rule] = [
  (r"conv(\d)", lambda m: f"conv_{_minus_one(m[1])}"),
  *_fixed(head="class_conv"),
]

_MLP: list[Rule] = [  # A torch.nn.Sequential: flatten, then thrice (linear, norm, activation).
  (r"(?:model\.)?10", lambda _: "head"),
  (r"(?:model\.)?([147])", lambda m: f"dense_{int(m[1]) // 3}"),
  (r"(?:model\.)?([258])", lambda m: f"norm_{int(m[1]) // 3}"),
]

# The layers of an inverted bottleneck in order; the first stage's do not expand.
_EXPANDING, _PLAIN = ("expand", "depthwise", "project"), ("depthwise", "project")
_SQUEEZE = {"conv_reduce": "reduce", "conv_expand": "expand", "fc1": "reduce", "fc2": "expand"}


def _timm_layer(stage: int, entry: str) -> str:
  """Timm's conv_pw, bn1, conv_dw, bn2, conv_pwl, bn3; conv_dw, bn1, conv_pw, bn2 in stage 0."""
  names = _EXPANDING if stage else _PLAIN
  if entry.startswith("bn"):
    return f"{names[_minus_one(entry[2:])]}/norm"
  order = ("conv_pw", "conv_dw", "conv_pwl") if stage else ("conv_dw", "conv_pw")
  return f"{names[order.index(entry)]}/conv"


def _torchvision_layer(stage: int, entry: str, part: str) -> str:
  """Torchvision's numbered entries, of which the last but one is the squeeze-excite."""
  names = _EXPANDING if stage else _PLAIN
  index = int(entry) - (int(entry) == len(names))
  return f"{names[index]}/{('conv', 'norm')[int(part)]}"


_EFFICIENTNET: list[Rule] = [
  *_fixed(**{"stem/conv": "conv_stem", "stem/norm": "bn1"}),
  *_fixed(**{"top/conv": "conv_head", "top/norm": "bn2", "head": "classifier"}),
  (
    r"blocks\.(\d)\.(\d+)\.(conv_pw|conv_dw|conv_pwl|bn[123])",
    lambda m: f"stage_{m[1]}_block_{m[2]}/{_timm_layer(int(m[1]), m[3])}",
  ),
  (
    r"blocks\.(\d)\.(\d+)\.se\.(conv_reduce|conv_expand)",
    lambda m: f"stage_{m[1]}_block_{m[2]}/squeeze_excite/{_SQUEEZE[m[3]]}",
  ),
  # torchvision counts stages from 1, after the stem.
  *_fixed(**{"stem/conv": "features.0.0", "stem/norm": "features.0.1"}),
  *_fixed(**{"top/conv": "features.8.0", "top/norm": "features.8.1", "head": "classifier.1"}),
  (
    r"features\.([1-7])\.(\d+)\.block\.(\d)\.([01])",
    lambda m: (
      f"stage_{_minus_one(m[1])}_block_{m[2]}/{_torchvision_layer(_minus_one(m[1]), m[3], m[4])}"
    ),
  ),
  (
    r"features\.([1-7])\.(\d+)\.block\.[12]\.(fc1|fc2)",
    lambda m: f"stage_{_minus_one(m[1])}_block_{m[2]}/squeeze_excite/{_SQUEEZE[m[3]]}",
  ),
]

RULES: dict[str, list[Rule]] = {
  "all_cnn": _ALL_CNN,
  "cycle_mlp": _CYCLE_MLP,
  "densenet": _DENSENET,
  "efficientnet": _EFFICIENTNET,
  "mixer": _MIXER,
  "mlp": _MLP,
}


@dataclasses.dataclass(frozen=True)
class Public:
  """Weights from a public file, and where each came from."""

  weights: dict[str, Any]  # {"params", "stats"} of numpy arrays.
  mapped: dict[str, str]  # Our leaf: the file's key.
  fresh: tuple[str, ...]  # Leaves that stay as initialised: a twin's own, or another head.
  unused: tuple[str, ...]  # Keys that this twin has no place for: a gate's, say.

  def __str__(self) -> str:
    lines = [f"{len(self.mapped)} arrays mapped"]
    lines += [f"initialised anew: {', '.join(self.fresh)}"] if self.fresh else []
    lines += [f"not in this twin: {', '.join(self.unused)}"] if self.unused else []
    return "; ".join(lines)


def load_public(
  model: nn.Module, path: str, image_shape: tuple[int, int, int], seed: int = 0
) -> Public:
  """The weights of a public file for `model`, a network of `convex_jax.models`.

  `image_shape` (H, W, C) of the network's input, px. Of a twin, weights that the base has
  too come from the file and are projected where they are constrained; the others keep
  their initial values, drawn with `seed`. A head of another number of classes does too.

  Raises `UserError`, a `ValueError`: a file that cannot be read, keys that no rule knows,
  weights that the file lacks, shapes that do not fit, each by name; a file of a network
  that differs from `model` in what has no weights (its GELU, its padding).
  """
  name = type(model).__module__.rsplit(".", 1)[-1]
  public = read(path)
  _check_fields(name, model, path, public)
  boxed = init_variables(model, jax.random.key(seed), image_shape)
  kinds = _flat(constraints_of(boxed["params"]))
  ours = {k: np.asarray(v) for k, v in _flat(nn.meta.unbox(boxed)).items()}
  base = model.clone(parts=layers.base())
  shapes = jax.eval_shape(lambda: init_variables(base, jax.random.key(0), image_shape))
  theirs = _flat(nn.meta.unbox(shapes))
  taken, mapped, other_head, unused, wrong = dict(ours), {}, set(), [], []
  for key, array in public.items():
    leaf = _our_leaf(name, key, array)
    if leaf is None or leaf not in theirs:
      wrong.append(f"  {key} {array.shape}: no place for it")
    elif leaf not in ours:
      unused.append(key)
    elif leaf in mapped:
      wrong.append(f"  {key}: {mapped[leaf]} is {leaf} already")
    else:
      value = _as_ours(name, key, array, len(ours[leaf].shape), image_shape)
      mapped[leaf] = key
      if value.shape == ours[leaf].shape:
        kind = kinds.get(leaf.removeprefix("params/"), FREE)
        taken[leaf] = np.asarray(PROJECTIONS[kind](jnp.asarray(value)))
      elif leaf.startswith("params/head/") and value.shape[:-1] == ours[leaf].shape[:-1]:
        other_head.add(leaf)
      else:
        wrong.append(f"  {key} {array.shape}: {leaf} is {ours[leaf].shape}")
  lacking = sorted((theirs.keys() & ours.keys()) - mapped.keys())
  wrong += [f"  {leaf} {ours[leaf].shape}: not in the file" for leaf in lacking]
  if wrong:
    raise UserError(
      f"{path} does not fit model {name!r}:\n" + "\n".join(wrong) + "\n"
      "  allowed: the file of this very architecture and size; see config.model.size"
    )
  if other_head:  # All of it: half a head is no head.
    other_head = {leaf for leaf in ours if leaf.startswith("params/head/")}
    taken |= {leaf: ours[leaf] for leaf in other_head}
  mapped = {leaf: key for leaf, key in mapped.items() if leaf not in other_head}
  tree = traverse_util.unflatten_dict(taken, sep="/")
  return Public(
    weights={"params": tree["params"], "stats": tree.get("stats", {})},
    mapped=mapped,
    fresh=tuple(sorted(ours.keys() - mapped.keys())),
    unused=tuple(sorted(unused)),
  )


def _flat(tree: Any) -> dict[str, Any]:
  return traverse_util.flatten_dict(tree, sep="/")


def _split(key: str) -> tuple[str, str]:
  """A public key's module and leaf: "kernel1" of the older Mixer files is "1" and "kernel"."""
  module, _, leaf = key.replace("/", ".").rpartition(".")
  numbered = re.fullmatch(r"(kernel|bias)([12])", leaf)
  return (f"{module}.{numbered[2]}", numbered[1]) if numbered else (module, leaf)


_LEAVES = {"weight": "kernel", "running_mean": "mean", "running_var": "var"}


def _our_leaf(name: str, key: str, array: np.ndarray) -> str | None:
  """Our path of a public key, or None where no rule knows it."""
  module, leaf = _split(key)
  for pattern, ours in RULES[name]:
    if match := re.fullmatch(pattern, module):
      norm = array.ndim == 1 and leaf == "weight"
      leaf = "scale" if norm else _LEAVES.get(leaf, leaf)
      kind = "stats" if leaf in ("mean", "var") else "params"
      try:
        return f"{kind}/{ours(match)}/{leaf}"
      except (IndexError, ValueError):  # An entry that this architecture's blocks lack.
        return None
  return None


def _as_ours(
  name: str, key: str, array: np.ndarray, rank: int, image_shape: tuple[int, ...]
) -> np.ndarray:
  """The array as we keep it, where our own has that many axes."""
  if not key.endswith("weight"):  # Flax's own layout, or no matrix.
    return array.squeeze() if array.ndim > rank else array
  if array.ndim == 4 and rank == 2 and array.shape[2:] == (1, 1):
    array = array.reshape(array.shape[:2])  # A 1x1 convolution, a dense layer here.
  if array.ndim == 4:
    return array.transpose(2, 3, 1, 0)
  if array.ndim == 2:
    array = array.T
    if name == "mlp" and re.fullmatch(r"(?:model\.)?1\.weight", key):
      h, w, c = image_shape  # It flattens (C, H, W), we flatten (H, W, C).
      if len(array) == h * w * c:
        array = array.reshape(c, h, w, -1).transpose(1, 2, 0, 3).reshape(h * w * c, -1)
  return array


def _check_fields(name: str, model: Any, path: str, public: Arrays) -> None:
  """Raises `UserError` where a file's names tell of a field that `model` has otherwise."""
  want: dict[str, object] = {}
  starts = {re.split(r"[./]", key)[0] for key in public}
  if name == "mixer":
    want = {"parallel": False}
    if model.parts.activation is None:
      want["gelu"] = "erf" if starts & {"blocks", "mixer_blocks"} else "tanh"
  if name == "efficientnet" and "features" in starts:
    want = {"variant": "torch"}
    if model.width >= 1.6:
      raise UserError(
        f"{path} is torchvision's EfficientNet B5, B6 or B7, whose BatchNorm epsilon of 1e-3 with"
        " even padding no variant here has; allowed: timm's file"
      )
  for field, value in want.items():
    if getattr(model, field) != value:
      raise UserError(
        f"{path} is of a network with {field}={value!r}, config.model.{field} is"
        f" {getattr(model, field)!r}; give --config.model.{field}={value}"
      )
