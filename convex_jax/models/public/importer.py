"""Imports public weights: `load_public(model, path, image_shape)`.

`files` reads a file's arrays, `networks` finds among them those of the network. A rule of the
architecture (`NAMES`) turns a public module's name into ours; the leaf's name and the rank of the
array determine the rest: torch keeps (out, in) and OIHW, we keep (in, out) and HWIO.

Some facts are not in a file. What its network was trained with by those who publish under its
names is assumed, and said: how pixels were scaled (`Public.pixels`), and whatever else networks
with the same names differ in (`Public.notes`).
"""

import dataclasses
import re
from collections.abc import Collection, Mapping
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
from convex_jax.models.public.networks import Network, find_network
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
  pixels: str  # How the network saw its pixels: a value of `config.data.normalise`.
  notes: tuple[str, ...]  # What else there is to know, a line each.

  def __str__(self) -> str:
    lines = [f"{len(self.mapped)} arrays imported"]
    lines += [f"re-initialised: {', '.join(self.fresh)}"] if self.fresh else []
    lines += [f"not in this twin: {', '.join(self.unused)}"] if self.unused else []
    return "\n  ".join(["; ".join(lines), *self.notes])


def load_public(
  model: nn.Module, path: str, image_shape: tuple[int, int, int], seed: int = 0
) -> Public:
  """The weights of a public file for a network of `convex_jax.models`.

  In a twin, weights that the base has too come from the file and are projected where they are
  constrained; the others keep their initial values. So does a head of another number of classes,
  or one that the file lacks.

  Args:
    model: the network.
    path: a file that `files.read` can read.
    image_shape: (H, W, C) of the network's input, px.
    seed: of the initial values.

  Raises:
    UserError: a file that cannot be read, or holds no network or several; unknown keys, missing
      weights and shapes that do not fit, each by name; a file of a network that differs from
      `model` in something that has no weights, such as its GELU or padding.
    ValueError: `model` is not an architecture of `convex_jax.models`.
  """
  name, path = catalog.name_of(model), files.expand(path)
  names, slots = NAMES[name], _Slots(model, image_shape, seed)

  def leaf_of(key: str, array: np.ndarray) -> str | None:
    if re.fullmatch(names.constants[0], key):
      return f"constants/{key}"
    leaf = _our_leaf(names, key, array)
    return leaf if leaf in slots.base else None

  network = find_network(path, read(path), leaf_of, f"model {name!r}", len(slots.base))
  arrays = _weights(names, model, path, network)
  found = _filled(slots, names, network.prefix, arrays)
  if found.wrong:
    lines = "\n".join(found.wrong)
    cure = _cure(slots, names, found.shapes)
    raise UserError(f"{path} does not fit model {name!r}:\n{lines}\n  {cure}")
  fresh = tuple(sorted(slots.own.keys() - found.values.keys()))
  leaves = found.values | slots.drawn(fresh)
  tree = traverse_util.unflatten_dict({leaf: leaves[leaf] for leaf in slots.own}, sep="/")
  return Public(
    weights={"params": tree["params"], "stats": tree.get("stats", {})},
    mapped={leaf: found.keys[leaf] for leaf in found.values},
    fresh=fresh,
    unused=tuple(sorted(found.unused)),
    pixels=names.pixels(arrays),
    notes=tuple(dict.fromkeys([*network.notes, *found.notes, *names.untold(model, arrays)])),
  )


class _Slots:
  """The leaves that a file is to fill, by path: those of a network, and those of its base."""

  def __init__(self, model: nn.Module, image_shape: tuple[int, ...], seed: int):
    self.model, self._base = model, model.clone(parts=Parts())
    self.image_shape, self._seed = image_shape, seed
    boxed = jax.eval_shape(lambda: self._init(model, image_shape))
    self.own = _flat(nn.meta.unbox(boxed))
    self.base = self.base_for(image_shape)  # What public files hold.
    self._kinds = _flat({"params": constraints_of(boxed["params"])})

  def _init(self, network: nn.Module, shape: tuple[int, ...]) -> Any:
    return init_variables(network, jax.random.key(self._seed), shape)

  def base_for(self, image_shape: tuple[int, ...]) -> dict[str, Any]:
    """The shapes of the base's leaves for images of any shape."""
    boxed = jax.eval_shape(lambda: self._init(self._base, image_shape))
    return _flat(nn.meta.unbox(boxed))

  def projected(self, leaf: str, value: np.ndarray) -> np.ndarray:
    """The nearest value that the leaf's constraint allows."""
    kind = self._kinds.get(leaf, FREE)
    return value if kind == FREE else np.asarray(PROJECTIONS[kind](jnp.asarray(value)))

  def drawn(self, leaves: Collection[str]) -> dict[str, np.ndarray]:
    """Initial values."""
    if not leaves:
      return {}

    def draw():
      every = _flat(nn.meta.unbox(self._init(self.model, self.image_shape)))
      return {leaf: every[leaf] for leaf in leaves}

    # Compiled: the network itself is then left out, and what is drawn is not drawn one by one.
    return {leaf: np.asarray(value) for leaf, value in jax.jit(draw)().items()}


@dataclasses.dataclass(eq=False)
class _Filled:
  """What the arrays of a file are for a network, by our leaf."""

  values: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  keys: dict[str, str] = dataclasses.field(default_factory=dict)  # In the file.
  shapes: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)  # In the file.
  unused: list[str] = dataclasses.field(default_factory=list)  # Keys.
  notes: list[str] = dataclasses.field(default_factory=list)
  wrong: list[str] = dataclasses.field(default_factory=list)  # A line each.


def _filled(slots: _Slots, names: Names, prefix: str, arrays: Arrays) -> _Filled:
  found, own = _Filled(), slots.own
  for key, array in arrays.items():
    whole_key, leaf = prefix + key, _our_leaf(names, key, array)
    if leaf is None or leaf not in slots.base:
      found.wrong.append(f"  {whole_key} {array.shape}: unknown key")
    elif leaf not in own:
      found.unused.append(whole_key)
    elif leaf in found.keys:
      found.wrong.append(f"  {whole_key}: {leaf} is already taken from {found.keys[leaf]}")
    else:
      value = _as_ours(names, key, array, own[leaf].ndim, slots.image_shape)
      found.keys[leaf], found.shapes[leaf] = whole_key, value.shape
      if value.shape == own[leaf].shape:
        found.values[leaf] = slots.projected(leaf, value)
      elif leaf.startswith(HEAD) and value.shape[:-1] == own[leaf].shape[:-1]:
        found.notes.append(f"the head is a new one: the file's has {value.shape[-1]} classes")
      else:
        found.wrong.append(f"  {whole_key} {array.shape}: expected {own[leaf].shape}, for {leaf}")
  wanted = slots.base.keys() & own.keys()
  head = {leaf for leaf in wanted if leaf.startswith(HEAD)}
  if head and not head & found.keys.keys():
    found.notes.append("the head is a new one: the file has none")
    wanted -= head
  lacking = sorted(wanted - found.keys.keys())
  found.wrong += [f"  {leaf} {own[leaf].shape}: missing from the file" for leaf in lacking]
  if head - found.values.keys():  # All of it: a head of two halves would be wrong.
    found.values = {leaf: value for leaf, value in found.values.items() if leaf not in head}
  return found


def _cure(slots: _Slots, names: Names, shapes: Mapping[str, tuple[int, ...]]) -> str:
  """What to do about a file that does not fit, whose leaves have these shapes."""
  advice = "expected a file of exactly this architecture and size; see config.model.size"
  ours, _, channels = slots.image_shape
  side = names.image_size(slots.model, channels, shapes)
  if side is None:
    return advice
  fits = slots.base_for((side, side, channels))
  if side != ours and all(
    shape == fits[leaf].shape for leaf, shape in shapes.items() if not leaf.startswith(HEAD)
  ):
    return (
      f"its network takes images of {side} px and this one of {ours} px; set"
      f" --config.data.image_size={side}"
    )
  return f"{advice} and config.data.image_size"


def _flat(tree: Any) -> dict[str, Any]:
  return traverse_util.flatten_dict(tree, sep="/")


def _weights(names: Names, model: Any, path: str, network: Network) -> Arrays:
  """A network's weights in float32, without counters and constants.

  Raises `UserError` for values that are no weights, for other constants than ours, and where a
  field that the file implies is another one.
  """
  arrays, (pattern, is_ours) = {}, names.constants
  for key, array in network.arrays.items():
    if re.fullmatch(pattern, key):
      if not is_ours(key, array):
        raise UserError(
          f"{path}: the constants in {network.prefix}{key} are those of another architecture"
        )
    elif not (
      key.endswith(".num_batches_tracked") or (array.ndim == 0 and array.dtype.kind in "iu")
    ):
      arrays[key] = _float32(f"{path}: {network.prefix}{key}", array)
  implied: Mapping[str, Any] = names.fields(model, path, arrays)
  for field, value in implied.items():
    if getattr(model, field) != value:
      raise UserError(
        f"{path} is of a network with {field}={value!r}, and config.model.{field} is"
        f" {getattr(model, field)!r}; set --config.model.{field}={value}"
      )
  return arrays


def _float32(where: str, array: np.ndarray) -> np.ndarray:
  if not np.issubdtype(array.dtype, np.floating):
    raise UserError(f"{where} holds {array.dtype}; expected floating-point numbers")
  with np.errstate(over="ignore"):
    array = array.astype(np.float32)
  if not np.isfinite(array).all():
    raise UserError(f"{where} holds values that are not finite in float32")
  return array


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
