"""The collectives of a compiled program, read from its text: how many, and what they send."""

import math
import re
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


class Collectives(NamedTuple):
  """Those of one kind in a program; bytes are per device."""

  number: int
  size: float  # Bytes of their results.
  sent: float  # Bytes that a device sends, in rings of the devices that take part.


_ARRAY = re.compile(r"\b(pred|bf16|[a-z]\d+)[a-z0-9]*\[([\d,]*)\]")
# An asynchronous collective counts where it is done: its result there is no more than the data.
_COLLECTIVE = re.compile(rf"([\w.-]+) = (.*?) ({'|'.join(KINDS)})(-start|-done)?\((.*)")
# [number of groups, size of a group]<=..., or the groups themselves.
_GROUPS = re.compile(r"replica_groups=(?:\[\d+,(\d+)\]<=|\{(\{[^=]*?\})\})")
# Or the sides of a mesh, and the axes, or parts of axes 'NAME':(...)SIZE, along which groups lie.
_MESH = re.compile(r"replica_groups=mesh\[(.*?)\][^{]*\{(.*?)\}")


def collectives(hlo: str, devices: int) -> dict[str, Collectives]:
  """The collectives of each kind in a compiled program for so many devices."""
  found: dict[str, Collectives] = {}
  started: dict[str, int] = {}  # The size of the groups, by name.
  for line in hlo.splitlines():
    if (match := _COLLECTIVE.search(line)) is None:
      continue
    name, result, kind, part, rest = match.groups()
    if part == "-start":
      started[name] = _group_size(rest, devices)
      continue
    if part == "-done":
      group = next((started[n] for n in re.findall(r"[\w.-]+", rest) if n in started), devices)
    else:
      group = _group_size(rest, devices)
    size = sum(map(_bytes, _ARRAY.findall(result)))
    before = found.get(kind, Collectives(0, 0.0, 0.0))
    found[kind] = Collectives(
      before.number + 1, before.size + size, before.sent + _sent(kind, group) * size
    )
  return {kind: found[kind] for kind in KINDS if kind in found}


def _group_size(attributes: str, devices: int) -> int:
  """The number of devices that take part together; without groups, all."""
  if match := _MESH.search(attributes):
    sides = dict(re.findall(r"'(.*?)'=(\d+)", match[1]))
    axes = re.findall(r"'(.*?)'(?::\(\d+\)(\d+))?", match[2])
    return math.prod(int(part or sides[axis]) for axis, part in axes)
  if (match := _GROUPS.search(attributes)) is None:
    return devices
  if match[1]:
    return int(match[1])
  return max(len(group.split(",")) for group in re.findall(r"\{([\d, ]+)\}", match[2]))


def _sent(kind: str, group: int) -> float:
  """What a device of a ring sends, as a multiple of its result."""
  around = (group - 1) / group  # A share of the whole array for each other device.
  return {
    "all-reduce": 2 * around,
    "reduce-scatter": group - 1.0,  # The result is one share.
    "collective-permute": 1.0,
  }.get(kind, around)


def _bytes(array: tuple[str, str]) -> float:
  """Of an array, given as ("f32", "8,128")."""
  kind, sides = array
  bits = 8 if kind == "pred" else int(re.sub(r"^\D+", "", kind))
  return bits / 8 * math.prod(int(n) for n in sides.split(",") if n)
