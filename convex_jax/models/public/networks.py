"""Finds the network in a file: below which prefix of the keys its weights stand.

Training code wraps what it saves: in a dict, next to the optimizer and an epoch number, or in a
module, whose name then precedes every key. `files.read` joins the keys of nested dicts, so that
either is a prefix: "state_dict.model.blocks.0.norm1.weight". The architecture's rules tell where
a prefix ends: at the first of its dots or slashes after which a rule knows the rest.
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Iterable

import numpy as np

from convex_jax.errors import UserError
from convex_jax.models.public.files import Arrays

Leaf = Callable[[str, np.ndarray], str | None]  # (key, array) -> our path; None: no weight.

# Words of a prefix: an optimizer's averages of gradients, say, have the names of the weights.
_OPTIMIZER = re.compile(r"(?i)(^|[./])(opt|optim|optimizers?|opt_state|optimizer_states?)[./]")
_AVERAGE = re.compile(r"(?i)(?<![a-z])(ema|swa|avg|averaged?)(?![a-z])")


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
  """The arrays of a network, by key without `prefix`, and what else its file holds, in words."""

  prefix: str
  arrays: Arrays
  notes: tuple[str, ...]


def find_network(path: str, arrays: Arrays, leaf_of: Leaf, what: str, size: int) -> Network:
  """The network in a file; where it has one and an average of it, the average.

  Args:
    path: of the file, for messages.
    arrays: all that it holds.
    leaf_of: our path of a key without prefix.
    what: the architecture, for messages.
    size: the number of leaves of the network that is wanted.

  Raises:
    UserError: no network, several, or one whose parts stand under different prefixes.
  """
  found: dict[str, dict[str, str]] = collections.defaultdict(dict)  # {prefix: {our leaf: key}}.
  for key, array in arrays.items():
    for end in (0, *(match.end() for match in re.finditer(r"[./]", key))):
      if (leaf := leaf_of(key[end:], array)) is not None:
        if not _OPTIMIZER.search(key[:end]):
          found[key[:end]].setdefault(leaf, key)
        break
  most = max(map(len, found.values()), default=0)
  if not most or (2 * most < size and 2 * most < len(arrays)):
    raise UserError(
      f"{path} holds no {what}: no rule knows {_few(arrays.keys() - _keys(found.values()))};"
      " expected the published names of this architecture, see config.model.name"
    )
  whole = [prefix for prefix, leaves in found.items() if 2 * len(leaves) > most]
  prefix, notes = _chosen(path, whole, found)
  others = {p: leaves for p, leaves in found.items() if not p.startswith(prefix)}
  parts = {p: leaves for p, leaves in others.items() if leaves.keys() - found[prefix].keys()}
  if parts and not set(whole) & parts.keys():
    raise UserError(
      f"{path}: {_few(_keys(parts.values()))} stand outside {prefix!r}, the prefix of the other"
      " weights; expected one prefix for all"
    )
  outside = [key for key in arrays if not key.startswith(prefix)]
  if left := sorted({_branch(key, prefix) for key in outside if not _is_below(key, whole)}):
    notes.append(f"not read: {', '.join(left)}")
  inside = {key.removeprefix(prefix): a for key, a in arrays.items() if key.startswith(prefix)}
  return Network(prefix, inside, tuple(notes))


def _chosen(path: str, whole: list[str], found: dict[str, dict[str, str]]) -> tuple[str, list[str]]:
  """The prefix of one of several networks, and what to say of the choice."""
  if len(whole) == 1:
    return whole[0], []
  averages = [prefix for prefix in whole if _AVERAGE.search(prefix)]
  if len(whole) > 2 or len(averages) != 1:
    each = ", ".join(f"{prefix!r} ({len(found[prefix])})" for prefix in whole)
    raise UserError(
      f"{path} holds weights under several prefixes: {each}; expected one network. Save the one"
      " that is meant in a file of its own"
    )
  average, (raw,) = averages[0], set(whole) - set(averages)
  if found[raw].keys() - found[average].keys():
    return raw, [f"taken from {raw!r}, since the average {average!r} lacks arrays"]
  return average, [f"taken from the average {average!r}, not from {raw!r}"]


def _keys(groups: Iterable[dict[str, str]]) -> set[str]:
  return {key for leaves in groups for key in leaves.values()}


def _few(keys: Iterable[str]) -> str:
  """The first keys, and how many there are."""
  keys = sorted(keys)
  return ", ".join(keys[:3]) + (f" ... ({len(keys)} keys)" if len(keys) > 3 else "")


def _is_below(key: str, prefixes: list[str]) -> bool:
  return any(key.startswith(prefix) for prefix in prefixes)


def _branch(key: str, prefix: str) -> str:
  """The start of a key, up to where it leaves a prefix."""
  for match in re.finditer(r"[./]", key):
    if not prefix.startswith(key[: match.end()]):
      return key[: match.start()]
  return key
