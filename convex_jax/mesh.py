"""The devices of a run: a mesh of two axes, "batch" and "fsdp".

A batch is split over both. A state is the same on every device along "batch"; along "fsdp"
its large arrays are split (fully sharded data parallelism, Rajbhandari et al. 2020: ZeRO stage
3), and the compiler gathers a weight where it is used. With fsdp = 1, the default, every
device holds all. The same program runs on one CPU, one GPU or every chip of a pod.
"""

import collections
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from convex_jax.errors import UserError

AXES = ("batch", "fsdp")
LEAST = 2**14  # Elements of an array that is worth splitting.


def make_mesh(devices: Sequence[Any] | None = None, fsdp: int = 1) -> Mesh:
  """`devices`, or all devices of all processes; neighbours share the parts of a weight.

  Auto: the compiler places the collectives. `make_mesh` has defaulted to Explicit
  axes since jax 0.9, under which ordinary model code does not trace.
  """
  count = jax.device_count() if devices is None else len(devices)
  kinds = (AxisType.Auto,) * len(AXES)
  return jax.make_mesh((count // fsdp, fsdp), AXES, axis_types=kinds, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
  """Every device holds the whole array."""
  return NamedSharding(mesh, P())


def sharded(mesh: Mesh, axis: int) -> NamedSharding:
  """Axis number `axis` of an array is split over all devices."""
  return NamedSharding(mesh, P(*[None] * axis, AXES))


def layout(mesh: Mesh, tree: Any) -> Any:
  """How a state lies on the mesh: shardings, for arrays or their shapes.

  A large array is split over "fsdp" along the longest of its axes that divides, so that
  a weight, its averages and its moments, which have one shape, are split alike.
  """

  def one(leaf):
    parts = mesh.shape["fsdp"]
    axes = [i for i, n in enumerate(leaf.shape) if n % parts == 0]
    if parts == 1 or not axes or math.prod(leaf.shape) < LEAST:
      return replicated(mesh)
    longest = max(axes, key=lambda i: leaf.shape[i])
    return NamedSharding(mesh, P(*[None] * longest, "fsdp"))

  return jax.tree.map(one, tree)


def make_global_array(
  sharding: Any, shape: tuple[int, ...], part: Callable[[Any], np.ndarray]
) -> jax.Array:
  """A global array of which each process computes only the parts it holds.

  `part(index)` returns the block at `index`, a tuple of slices into `shape`.
  """
  return jax.make_array_from_callback(shape, sharding, part)


def put_like(like: Any, tree: Any) -> Any:
  """Host arrays, equal in every process, laid out as the arrays of `like`."""
  return jax.tree.map(
    lambda old, new: make_global_array(old.sharding, np.shape(new), lambda at: np.asarray(new)[at]),
    like,
    tree,
  )


def check_equal_hosts(owners: list[int]) -> None:
  """Raises `UserError` unless each process has as many devices; `owners` are their processes.

  JAX's own synchronisation of hosts, which checkpoints need, takes that for granted.
  """
  counts = collections.Counter(owners)
  if len(set(counts.values())) > 1:
    listed = ", ".join(f"process {i}: {n}" for i, n in sorted(counts.items()))
    raise UserError(f"processes have unlike numbers of devices ({listed}); allowed: as many each")


def check_divisible(devices: int, batch_size: int, fsdp: int) -> None:
  """Raises `UserError` when batch or weights cannot be split evenly over the devices."""
  if devices % fsdp:
    allowed = ", ".join(str(n) for n in range(1, devices + 1) if devices % n == 0)
    raise UserError(f"config.fsdp is {fsdp} on {devices} devices; allowed: {allowed}")
  if batch_size % devices:
    raise UserError(
      f"config.batch_size is {batch_size} on {devices} devices; allowed: multiples of {devices}"
    )


# Of what XLA raises where a collective fails: a JaxRuntimeError, or a ValueError (jax 0.10, Gloo).
_STATUS = re.compile(r"(ABORTED|CANCELLED|DEADLINE_EXCEEDED|INTERNAL|UNAVAILABLE|UNKNOWN): ")


def is_collective_error(error: Exception) -> bool:
  """Whether an error is XLA's, about what several processes do together."""
  return isinstance(error, ValueError | RuntimeError) and bool(_STATUS.match(str(error)))
