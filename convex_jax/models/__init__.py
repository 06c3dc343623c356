"""Architectures: one file each, all twins; the file's name is `config.model.name`."""

import importlib
import pkgutil
from types import ModuleType
from typing import Any

import flax.linen as nn

from convex_jax.layers import make_parts

# Keys of `config.model` that are not fields of an architecture.
SHARED = ("name", "size", "parts", "constraint", "passthrough")


def names() -> list[str]:
  """The architectures that exist: the files of this folder."""
  return sorted(module.name for module in pkgutil.iter_modules(__path__))


def module_of(name: str) -> ModuleType:
  """The file of an architecture: its `Model`, its `SIZES`, and `check` where it has one."""
  return importlib.import_module(f"{__name__}.{name}")


def fields_of(model: Any) -> dict[str, int]:
  """A `config.model`'s size by name, with the fields that it overrides."""
  own = {key: value for key, value in model.items() if key not in SHARED and value is not None}
  return {**module_of(model["name"]).SIZES[model["size"]], **own}


def build(model: Any, classes: int, **parts_fields) -> nn.Module:
  """The network that `config.model` describes.

  `parts_fields`: `dtype` of the computation and `axis_name` (see `layers.Parts`).
  """
  parts = make_parts(model["parts"], model["constraint"], model["passthrough"], **parts_fields)
  return module_of(model["name"]).Model(classes=classes, parts=parts, **fields_of(model))
