"""What architectures there are, and the network that a config describes.

An architecture is a module of this package, all twins in one text. It has `Model`, `SIZES`
(name: fields), `image_size(size)`, `PAPER_BREAKS` (what keeps the `paper` twin from being
convex) and, where fields can clash, `check(fields, image_size)`.
"""

import dataclasses
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from convex_jax import config_files
from convex_jax.models import all_cnn, cycle_mlp, densenet, efficientnet, mixer, mlp
from convex_jax.models.layers import Head, Parts, make_parts

ARCHITECTURES: dict[str, ModuleType] = {  # By `config.model.name`.
  "all_cnn": all_cnn,
  "cycle_mlp": cycle_mlp,
  "densenet": densenet,
  "efficientnet": efficientnet,
  "mixer": mixer,
  "mlp": mlp,
}


def names() -> list[str]:
  """The architectures that there are."""
  return list(ARCHITECTURES)


def module_of(name: str) -> ModuleType:
  """The module of an architecture."""
  return ARCHITECTURES[name]


def fields(name: str) -> dict[str, dataclasses.Field]:
  """What an architecture lets a config choose: its `Model`'s fields."""
  ours = ("classes", "parts", "parent", "name")
  return {f.name: f for f in dataclasses.fields(module_of(name).Model) if f.name not in ours}


def fields_of(model: Any) -> dict[str, Any]:
  """A `config.model`'s size by name, with the fields that it overrides."""
  known, name = fields(model["name"]), model["name"]
  own = {key: value for key, value in model.items() if key in known and value is not None}
  return {**module_of(name).SIZES[model["size"]], **own}


def parts_of(model: Any, **parts_fields) -> Parts:
  """The `Parts` that `config.model` describes: all of its keys that are not the architecture's."""
  others = {"name", "size", "parts", *fields(model["name"])}
  own = {key: value for key, value in model.items() if key not in others}
  return make_parts(model["parts"], **own, **parts_fields)


def build(model: Any, classes: int, **parts_fields) -> nn.Module:
  """The network that `config.model` describes.

  `parts_fields`: `dtype` of the computation and `axis_name` (see `layers.Parts`).
  """
  parts = parts_of(model, **parts_fields)
  return module_of(model["name"]).Model(classes=classes, parts=parts, **fields_of(model))


def model_config(name: str, size: str, twin: str = "base", **changes: Any) -> dict[str, Any]:
  """A `config.model` with every key that is not in `changes` at its default.

  Raises `ValueError` for an architecture, a size or a key that there is not.
  """
  if name not in ARCHITECTURES:
    raise ValueError(f"unknown architecture {name!r}; expected one of {', '.join(ARCHITECTURES)}")
  if size not in (sizes := module_of(name).SIZES):
    raise ValueError(f"unknown size {size!r} of {name!r}; expected one of {', '.join(sizes)}")
  keys = {
    path.removeprefix("model."): value
    for path, value in config_files.defaults().items()
    if path.startswith("model.")
  }
  if unknown := changes.keys() - keys.keys() - fields(name).keys():
    known = ", ".join(sorted(keys.keys() | fields(name).keys()))
    raise ValueError(f"unknown key {', '.join(sorted(unknown))}; expected some of {known}")
  return {**keys, "name": name, "size": size, "parts": twin, **changes}


def create_model(
  name: str,
  size: str,
  twin: str = "base",
  classes: int = 1000,
  dtype: Any = jnp.float32,
  **changes: Any,
) -> nn.Module:
  """A network by its name: `create_model("mixer", size="S/16", twin="ioc", classes=10)`.

  Args:
    name: the architecture; `python -m convex_jax models` lists all, with their sizes.
    size: one of its sizes.
    twin: "base" (as published), "ioc" (exactly convex) or "paper" (the report's).
    classes: number of logits.
    dtype: of the computation; parameters are float32.
    **changes: further keys of `config.model`, and fields of the architecture.

  Returns:
    A Flax module: `init(key, images)`, `apply(variables, images, train=False)` of normalised
    images (B, H, W, C) gives logits (B, classes).

  Raises:
    ValueError: an architecture, a size or a key that there is not.
  """
  return build(model_config(name, size, twin, **changes), classes, dtype=dtype)


def build_head(model: Any, classes: int, **parts_fields) -> nn.Module:
  """Its head alone, on features (B, D), of params["head"]; needs `head_depth` > 0.

  What is convex where `convex_from` is "head".
  """
  assert model["head_depth"], "a linear head is no network of its own"
  return Head(classes, parts_of(model, **parts_fields))
