"""Imports public weights: `load_public(model, path, image_shape)`.

`files` reads a file's arrays. A rule of the architecture (`NAMES`) turns a public
module's name into ours; the leaf's name and the rank of the array determine the rest: torch
keeps (out, in) and OIHW, we keep (in, out) and HWIO.

Some facts are not in a file and are left to the caller: how pixels were scaled in training (to
-1..1 for the official Mixer), and the `variant` of timm's EfficientNets, whose tf_ forms use the
names of the others. The LayerNorms of the report's own Mixer have epsilon 1e-5, ours 1e-6.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from convex_jax import files
from convex_jax.errors import UserError
from convex_jax.models import catalog
from convex_jax.models.constraints import FREE, PROJECTIONS, constraints_of
from convex_jax.models.parts import Parts
from convex_jax.models.public import all_cnn, cycle_mlp, densenet, efficientnet, mixer, mlp
from convex_jax.models.public.files import Arrays, read
from convex_jax.models.public.names import Names
from convex_jax.models.variables import init_variables

HEAD = "params/head/"
NAMES: dict[str, Names] = {  # By `config.model.name`.
  "all_cnn": all_cnn.NAMES,
  "cycle_mlp": cycle_mlp.NAMES,
  "densenet": densenet.NAMES,
  "efficientnet": efficientnet.NAMES,
  "mixer": mixer.NAMES,
  "mlp": mlp.NAMES,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Public:
  """Weights from a public file, and where each came from."""

  weights: dict[str, Any]  # {"params", "stats"} of numpy arrays.
  mapped: dict[str, str]  # Our leaf: the file's key.
  fresh: tuple[str, ...]  # Leaves at their initial values: a twin's own, or another head.
  unused: tuple[str, ...]  # Keys without a place in this twin, such as those of a gate.

  def __str__(self) -> str:
    lines = [f"{len(self.mapped)} arrays imported"]
    lines += [f"re-initialised: {', '.join(self.fresh)}"] if self.fresh else []
    lines += [f"not in this twin: {', '.join(self.unused)}"] if self.unused else []
    return "; ".join(lines)


def load_public(
  model: nn.Module, path: str, image_shape: tuple[int, int, int], seed: int = 0
) -> Public:
  """The weights of a public file for a network of `convex_jax.models`.

  In a twin, weights that the base has too come from the file and are projected where they are
  constrained; the others keep their initial values. So does a head of another number of classes.

  Args:
    model: the network.
    path: a file that `files.read` can read.
    image_shape: (H, W, C) of the network's input, px.
    seed: of the initial values.

  Raises:
    UserError: a file that cannot be read; unknown keys, missing weights and shapes that do not
      fit, each by name; a file of a network that differs from `model` in something that has no
      weights, such as its GELU or padding.
    ValueError: `model` is not an architecture of `convex_jax.models`.
  """
  name, path = catalog.name_of(model), files.expand(path)
  arrays = _weights(NAMES[name], model, path)

  def variables(network: nn.Module) -> Any:
    return init_variables(network, jax.random.key(seed), image_shape)

  boxed = jax.eval_shape(lambda: variables(model))
  kinds = _flat({"params": constraints_of(boxed["params"])})
  ours, base = _flat(nn.meta.unbox(boxed)), model.clone(parts=Parts())
  theirs = _flat(nn.meta.unbox(jax.eval_shape(lambda: variables(base))))
  taken, mapped, other_head, unused, wrong = {}, {}, False, [], []
  for key, array in arrays.items():
    leaf = _our_leaf(NAMES[name], key, array)
    if leaf is None or leaf not in theirs:
      wrong.append(f"  {key} {array.shape}: unknown key")
    elif leaf not in ours:
      unused.append(key)
    elif leaf in mapped:
      wrong.append(f"  {key}: {leaf} is already taken from {mapped[leaf]}")
    else:
      value = _as_ours(NAMES[name], key, array, ours[leaf].ndim, image_shape)
      mapped[leaf] = key
      if value.shape == ours[leaf].shape:
        taken[leaf] = np.asarray(PROJECTIONS[kinds.get(leaf, FREE)](jnp.asarray(value)))
      elif leaf.startswith(HEAD) and value.shape[:-1] == ours[leaf].shape[:-1]:
        other_head = True
      else:
        wrong.append(f"  {key} {array.shape}: expected {ours[leaf].shape}, for {leaf}")
  lacking = sorted((theirs.keys() & ours.keys()) - mapped.keys())
  wrong += [f"  {leaf} {ours[leaf].shape}: missing from the file" for leaf in lacking]
  if wrong:
    raise UserError(
      f"{path} does not fit model {name!r}:\n" + "\n".join(wrong) + "\n"
      "  expected a file of exactly this architecture and size; see config.model.size"
    )
  if other_head:  # All of it: a head of two halves would be wrong.
    mapped = {leaf: key for leaf, key in mapped.items() if not leaf.startswith(HEAD)}
  fresh = tuple(sorted(ours.keys() - mapped.keys()))
  initial = _flat(nn.meta.unbox(variables(model))) if fresh else {}
  taken |= {leaf: np.asarray(initial[leaf]) for leaf in fresh}
  tree = traverse_util.unflatten_dict({leaf: taken[leaf] for leaf in ours}, sep="/")
  weights = {"params": tree["params"], "stats": tree.get("stats", {})}
  return Public(weights, mapped, fresh, tuple(sorted(unused)))


def _flat(tree: Any) -> dict[str, Any]:
  return traverse_util.flatten_dict(tree, sep="/")


def _weights(names: Names, model: Any, path: str) -> Arrays:
  """The file's weights, without constants; checks those, and the fields that the file implies."""
  arrays, (pattern, is_ours) = read(path), names.constants
  for key in [key for key in arrays if re.fullmatch(pattern, key)]:
    if not is_ours(key, arrays.pop(key)):
      raise UserError(f"{path}: the constants in {key} are those of another architecture")
  implied: Mapping[str, Any] = names.fields(model, path, arrays)
  for field, value in implied.items():
    if getattr(model, field) != value:
      raise UserError(
        f"{path} is of a network with {field}={value!r}, and config.model.{field} is"
        f" {getattr(model, field)!r}; set --config.model.{field}={value}"
      )
  return arrays


def _split(key: str) -> tuple[str, str]:
  """The module and the leaf of a public key; "kernel1" of older files is ("1", "kernel")."""
  module, _, leaf = key.replace("/", ".").rpartition(".")
  numbered = re.fullmatch(r"(kernel|bias)([12])", leaf)
  return (f"{module}.{numbered[2]}", numbered[1]) if numbered else (module, leaf)


_LEAVES = {"weight": "kernel", "running_mean": "mean", "running_var": "var"}


def _our_leaf(names: Names, key: str, array: np.ndarray) -> str | None:
  """Our path of a public key, or None if no rule matches it."""
  module, leaf = _split(key)
  for pattern, ours in names.rules:
    if match := re.fullmatch(pattern, module):
      norm = array.ndim == 1 and leaf == "weight"
      leaf = "scale" if norm else _LEAVES.get(leaf, leaf)
      kind = "stats" if leaf in ("mean", "var") else "params"
      try:
        return f"{kind}/{ours(match)}/{leaf}"
      except (IndexError, ValueError):  # A layer that the blocks of this architecture lack.
        return None
  return None


def _as_ours(
  names: Names, key: str, array: np.ndarray, rank: int, image_shape: tuple[int, ...]
) -> np.ndarray:
  """The array in our layout, for a leaf with `rank` axes."""
  if not key.endswith("weight"):  # Flax's own layout, or a vector.
    return array.squeeze() if array.ndim > rank else array
  if array.ndim == 4 and rank == 2 and array.shape[2:] == (1, 1):
    array = array.reshape(array.shape[:2])  # A 1x1 convolution that is a dense layer here.
  if array.ndim == 4:
    return array.transpose(2, 3, 1, 0)
  return names.reorder(key, array.T, image_shape) if array.ndim == 2 else array
