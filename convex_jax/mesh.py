"""The devices of a run: one axis, "batch". States are replicated, batches sharded.

The same program runs on one CPU, one GPU or every chip of a pod; only the mesh differs.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def make_mesh(devices: Sequence[Any] | None = None) -> Mesh:
  """`devices`, or all devices of all processes, in one axis.

  Auto: the compiler places the collectives. `make_mesh` has defaulted to Explicit
  axes since jax 0.9, under which ordinary model code does not trace.
  """
  count = jax.device_count() if devices is None else len(devices)
  return jax.make_mesh((count,), ("batch",), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
  """Every device holds the whole array."""
  return NamedSharding(mesh, P())


def sharded(mesh: Mesh, axis: int) -> NamedSharding:
  """Axis number `axis` of an array is split over the devices."""
  return NamedSharding(mesh, P(*[None] * axis, "batch"))


def place(
  sharding: NamedSharding, shape: tuple[int, ...], part: Callable[[Any], np.ndarray]
) -> jax.Array:
  """A global array of which each process computes only the parts it holds.

  `part(index)` returns the block at `index`, a tuple of slices into `shape`.
  """
  return jax.make_array_from_callback(shape, sharding, part)


def replicate(mesh: Mesh, tree: Any) -> Any:
  """Host arrays, equal in every process, on every device."""
  return jax.tree.map(
    lambda a: place(replicated(mesh), np.shape(a), lambda index: np.asarray(a)[index]), tree
  )
