"""The devices of a run: a mesh of two axes, "batch" and "fsdp".

Batches are split over both axes. The training state is replicated along "batch"; along "fsdp"
its large arrays are split (fully sharded data parallelism, ZeRO stage 3 of Rajbhandari et al.
2020) and the compiler gathers each weight where it is used. With fsdp = 1, the default, every
device holds the whole state. The same program runs on one CPU, one GPU or a whole TPU pod.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from convex_jax.errors import UserError

AXES = ("batch", "fsdp")
LEAST = 2**14  # Smaller arrays (in elements) are not worth splitting.


def make_mesh(devices: Sequence[Any] | None = None, fsdp: int = 1) -> Mesh:
  """A mesh of `devices`, by default all devices of all processes.

  The parts of a weight are on neighbouring devices, where need be along a part of an axis of the
  slice: some have no axis, or product of axes, of that length. With several TPU slices each row lies
  within one. Axes of the mesh are Auto, so that the compiler places the collectives: under Explicit ones
  ordinary model code does not trace.

  Raises `UserError` where a weight's parts would be on several slices, or slices differ in size.
  """
  devices = jax.devices() if devices is None else devices
  tpus = [device for device in devices if device.platform == "tpu"]
  sizes = collections.Counter(getattr(device, "slice_index", 0) for device in tpus)
  slices, each = len(sizes), max(sizes.values(), default=0)
  if slices > 1:
    if set(sizes.values()) != {each}:
      raise UserError(
        f"The slices have {sorted(sizes.values())} devices; expected the same number in each"
      )
    if each % fsdp:
      raise UserError(
        f"config.fsdp is {fsdp} on {slices} slices of {each} devices; expected a divisor of {each}"
      )
    placed = mesh_utils.create_hybrid_device_mesh(
      (each // fsdp, fsdp), (slices, 1), devices, allow_split_physical_axes=True
    )
  else:
    shape = (len(devices) // fsdp, fsdp)
    placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def traced_on(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
  """`function`, which while it is traced knows that its program is for this mesh: `target`."""

  @functools.wraps(function)
  def traced(*args):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return function(*args)

  return traced


def traced_for(platform: str, function: Callable[..., Any]) -> Callable[..., Any]:
  """`function`, which is traced as for one device of a platform ("cpu", "gpu", "tpu"), here or not."""
  one = make_mesh(jax.local_devices()[:1]).abstract_mesh
  assert one.abstract_device is not None
  device = dataclasses.replace(one.abstract_device, platform=platform)
  there = AbstractMesh(one.axis_sizes, one.axis_names, one.axis_types, abstract_device=device)

  @functools.wraps(function)
  def traced(*args):
    with jax.sharding.use_abstract_mesh(there):
      return function(*args)

  return traced


def target() -> tuple[str, int]:
  """The platform and the number of the devices that a program is traced for.

  Those of the mesh of `traced_on`, which may be elsewhere; without one JAX's default devices.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.abstract_device is None:
    return jax.default_backend(), jax.device_count()
  return mesh.abstract_device.platform, mesh.size


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding in which every device holds the whole array."""
  return NamedSharding(mesh, P())


def sharded(mesh: Mesh, axis: int) -> NamedSharding:
  """The sharding in which axis number `axis` of an array is split over all devices."""
  return NamedSharding(mesh, P(*[None] * axis, AXES))


def layout(mesh: Mesh, tree: Any) -> Any:
  """Shardings of a training state, given as arrays or as shapes.

  A large array is split over "fsdp" along its longest axis that divides evenly. A weight, its
  average and its moments have the same shape and so are split alike: an update moves nothing.
  """

  def one(leaf):
    parts = mesh.shape["fsdp"]
    axes = [i for i, n in enumerate(leaf.shape) if n % parts == 0]
    if parts == 1 or not axes or math.prod(leaf.shape) < LEAST:
      return replicated(mesh)
    longest = max(axes, key=lambda i: leaf.shape[i])
    return NamedSharding(mesh, P(*[None] * longest, "fsdp"))

  return jax.tree.map(one, tree)


def put_like(like: Any, tree: Any) -> Any:
  """Host arrays, equal in every process, with the shardings of the arrays of `like`."""

  # `jax.device_put` would broadcast every array first, to compare it between processes.
  def put(old, new):
    return jax.make_array_from_callback(np.shape(new), old.sharding, np.asarray(new).__getitem__)

  return jax.tree.map(put, like, tree)


def check_equal_hosts(owners: list[int]) -> None:
  """Raises `UserError` unless every process has as many devices; `owners` are process numbers.

  JAX's own synchronisation of processes, which checkpoints need, assumes it.
  """
  counts = collections.Counter(owners)
  if len(set(counts.values())) > 1:
    listed = ", ".join(f"process {i}: {n}" for i, n in sorted(counts.items()))
    raise UserError(
      f"Processes have different numbers of devices ({listed}); expected the same number each"
    )


def check_divisible(devices: int, batch_size: int, fsdp: int) -> None:
  """Raises `UserError` when the batch or the weights cannot be split evenly over the devices."""
  if devices % fsdp:
    divisors = ", ".join(str(n) for n in range(1, devices + 1) if devices % n == 0)
    raise UserError(f"config.fsdp is {fsdp} on {devices} devices; expected one of {divisors}")
  if batch_size % devices:
    words = f"config.batch_size is {batch_size} on {devices} devices"
    raise UserError(f"{words}; expected a multiple of {devices}")


# XLA raises a JaxRuntimeError when a collective fails, or a ValueError (jax 0.10, Gloo).
_STATUS = re.compile(
  r"(ABORTED|CANCELLED|DEADLINE_EXCEEDED|INTERNAL|UNAVAILABLE|UNKNOWN): (?!RESOURCE_EXHAUSTED)"
)


# How Orbax words whatever fails at a barrier, also where another process is gone.
_BARRIER = "Timeout waiting at barrier"


def is_collective_error(error: Exception) -> bool:
  """Whether XLA or Orbax raised this error because an operation across processes failed."""
  if isinstance(error, TimeoutError):
    return str(error).startswith(_BARRIER)
  return isinstance(error, ValueError | RuntimeError) and bool(_STATUS.match(str(error)))
