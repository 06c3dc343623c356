"""Architectures: one file each, all twins; the file's name is `config.model.name`.

A file has `Model`, `SIZES` (name: fields), `image_size(size)`, `PAPER_BREAKS` (what keeps
the `paper` twin from being convex) and, where fields can clash, `check(fields, image_size)`.
"""

import dataclasses
import importlib
import pkgutil
from types import ModuleType
from typing import Any

import flax.linen as nn

from convex_jax.layers import Head, Parts, make_parts

# Keys of `config.model` that are not fields of an architecture.
OF_PARTS = (
  "constraint",
  "passthrough",
  "log_normal_init",
  "branch_scales",
  "norm",
  "convex_from",
  "head_depth",
  "head_width",
  "one_logit",
  "remat",
)
SHARED = ("name", "size", "parts", *OF_PARTS)


def names() -> list[str]:
  """The architectures that exist: the files of this folder."""
  found = (module.name for module in pkgutil.iter_modules(__path__))
  return sorted(name for name in found if not name.startswith("_"))


def module_of(name: str) -> ModuleType:
  """The file of an architecture."""
  return importlib.import_module(f"{__name__}.{name}")


def fields(name: str) -> dict[str, dataclasses.Field]:
  """What an architecture lets a config choose: its `Model`'s fields."""
  ours = ("classes", "parts", "parent", "name")
  return {f.name: f for f in dataclasses.fields(module_of(name).Model) if f.name not in ours}


def fields_of(model: Any) -> dict[str, Any]:
  """A `config.model`'s size by name, with the fields that it overrides."""
  own = {key: value for key, value in model.items() if key not in SHARED and value is not None}
  return {**module_of(model["name"]).SIZES[model["size"]], **own}


def parts_of(model: Any, **parts_fields) -> Parts:
  """The `Parts` that `config.model` describes."""
  return make_parts(model["parts"], **{key: model[key] for key in OF_PARTS}, **parts_fields)


def build(model: Any, classes: int, **parts_fields) -> nn.Module:
  """The network that `config.model` describes.

  `parts_fields`: `dtype` of the computation and `axis_name` (see `layers.Parts`).
  """
  parts = parts_of(model, **parts_fields)
  return module_of(model["name"]).Model(classes=classes, parts=parts, **fields_of(model))


def build_head(model: Any, classes: int, **parts_fields) -> nn.Module:
  """Its head alone, on features (B, D), of params["head"]; needs `head_depth` > 0.

  What is convex where `convex_from` is "head".
  """
  assert model["head_depth"], "a linear head is no network of its own"
  return Head(classes, parts_of(model, **parts_fields))
