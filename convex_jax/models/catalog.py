"""The architectures, and the network that a config describes.

An architecture is a module of this package, with all of its twins in one text. It defines

- `Model(classes, parts, ...)`, whose further fields are keys of `config.model`;
- `SIZES`, the fields of each size by its name;
- `IMAGE_SIZE`, the side in px of the images that each size was published for;
- `PAPER_BREAKS`, what keeps the `paper` twin from being convex;
- `check(fields, image_size)`, errors in these fields, if fields can clash;
- `PUBLISHED`, fields that the published number of operations depends on, if there are any.
"""

import dataclasses
import numbers
from collections.abc import Collection, Iterable
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from convex_jax import config_files
from convex_jax.errors import nearest
from convex_jax.models import all_cnn, cycle_mlp, densenet, efficientnet, mixer, mlp
from convex_jax.models.constraints import FREE, PROJECTIONS
from convex_jax.models.parts import CONVEX_FROM, GATES, NORMS, TWINS, Head, Parts, make_parts

ARCHITECTURES: dict[str, ModuleType] = {  # By `config.model.name`.
  "all_cnn": all_cnn,
  "cycle_mlp": cycle_mlp,
  "densenet": densenet,
  "efficientnet": efficientnet,
  "mixer": mixer,
  "mlp": mlp,
}
# What some keys of `config.model` may hold. Of the constraints, `shift` is a head's alone.
CHOICES: dict[str, Collection[str]] = {
  "constraint": [name for name in PROJECTIONS if name not in (FREE, "shift")],
  "norm": NORMS,
  "gates": GATES,
  "convex_from": CONVEX_FROM,
}


def names() -> list[str]:
  """The names of all architectures."""
  return list(ARCHITECTURES)


def module_of(name: str) -> ModuleType:
  """The module of an architecture."""
  return ARCHITECTURES[name]


def name_of(model: nn.Module) -> str:
  """The name of a network's architecture. Raises `ValueError` for a module of the user's own."""
  for name, module in ARCHITECTURES.items():
    if isinstance(model, module.Model):
      return name
  raise ValueError(
    f"{type(model).__module__}.{type(model).__qualname__} is not an architecture of convex_jax;"
    f" expected a Model of {', '.join(ARCHITECTURES)}"
  )


def fields(name: str) -> dict[str, dataclasses.Field]:
  """The fields of an architecture's `Model` that a config may set."""
  ours = ("classes", "parts", "parent", "name")
  return {f.name: f for f in dataclasses.fields(module_of(name).Model) if f.name not in ours}


def fields_of(model: Any) -> dict[str, Any]:
  """The fields of a `config.model`: those of its size, and those that override them."""
  known, name = fields(model["name"]), model["name"]
  own = {key: value for key, value in model.items() if key in known and value is not None}
  return {**module_of(name).SIZES[model["size"]], **own}


def parts_of(model: Any, **numerics) -> Parts:
  """The `Parts` of a `config.model`: all keys that are not the architecture's."""
  others = {"name", "size", "parts", *fields(model["name"])}
  own = {key: value for key, value in model.items() if key not in others}
  return make_parts(model["parts"], **own, **numerics)


def build(model: Any, classes: int, **numerics) -> nn.Module:
  """The network of a `config.model`; `numerics` are fields of `parts.Numerics`, such as `dtype`."""
  parts = parts_of(model, **numerics)
  return module_of(model["name"]).Model(classes=classes, parts=parts, **fields_of(model))


def build_head(model: Any, classes: int, **numerics) -> nn.Module:
  """The head alone of a `config.model` with `head_depth` > 0.

  It maps features (B, D) to logits, with the weights in params["head"]. Where `convex_from` is
  "head", it is the part of the network that is convex.
  """
  assert model["head_depth"], "a linear head is no network of its own"
  return Head(classes, parts_of(model, **numerics))


def shared_keys() -> dict[str, Any]:
  """The keys of `config.model` that all architectures share, with their defaults."""
  paths = config_files.defaults().items()
  return {p.removeprefix("model."): value for p, value in paths if p.startswith("model.")}


def _require(what: str, value: Any, known: Iterable[str], of: str = "") -> None:
  """Raises `ValueError` with the expected names and the nearest one, if `value` is not known."""
  if value not in (known := sorted(known)):
    words = f"expected one of {', '.join(known)}{nearest(value, known)}"
    raise ValueError(f"Unknown {what} {value!r}{of}; {words}")


def model_config(name: str, size: str, twin: str = "base", **changes: Any) -> dict[str, Any]:
  """A `config.model` of the defaults and `changes`; arguments and errors as of `create_model`."""
  _require("architecture", name, ARCHITECTURES)
  _require("size", size, module_of(name).SIZES, f" of {name!r}")
  _require("twin", twin, TWINS)
  keys = shared_keys()
  for key in changes:
    _require("key", key, {*keys, *fields(name)} - {"name", "size", "parts"}, f" of {name!r}")
  for key, known in CHOICES.items():
    _require(key, changes.get(key, keys[key]), known)
  return {**keys, "name": name, "size": size, "parts": twin, **changes}


def create_model(
  name: str,
  size: str,
  twin: str = "base",
  classes: int = 1000,
  dtype: Any = jnp.float32,
  **changes: Any,
) -> nn.Module:
  """Creates a network by name: `create_model("mixer", size="S/16", twin="ioc", classes=10)`.

  Args:
    name: the architecture; `python -m convex_jax models` lists all of them with their sizes.
    size: one of its sizes.
    twin: "base" (as published), "ioc" (exactly convex) or "paper" (the report's).
    classes: the number of logits.
    dtype: of the computation; parameters are float32.
    **changes: further keys of `config.model`, and fields of the architecture.

  Returns:
    A Flax module. `init(key, images)` creates its variables; `apply(variables, images)` maps
    normalised images (B, H, W, C) to logits (B, classes).

  Raises:
    ValueError: an unknown architecture, size, twin or key, or a value that it cannot have.
  """
  if not (isinstance(classes, numbers.Integral) and classes >= 1):
    raise ValueError(f"classes is {classes!r}; expected an integer >= 1")
  return build(model_config(name, size, twin, **changes), classes, dtype=dtype)
