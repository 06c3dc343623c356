"""A decoded split on a mesh: resident on the devices, or sent batch by batch."""

import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from convex_jax import mesh as meshes
from convex_jax.data.sampling import examples_at, positions
from convex_jax.data.splits import Split


class InMemory:
  """`Batches` of a decoded split.

  Resident, each device holds an equal part of the split (`arrays`) and a plan is a column of
  indices; otherwise a plan holds the images and labels themselves.
  """

  def __init__(self, split: Split, mesh: Mesh, resident: bool, repeats: int = 1):
    self.split, self.mesh, self._repeats = split, mesh, repeats
    self.arrays = None
    if resident:
      self.arrays = {
        "image": self._resident(split.take, split.image_shape),
        "label": self._resident(split.labels.__getitem__, ()),
      }

  def _resident(self, rows: Any, shape: tuple[int, ...]) -> jax.Array:
    """All examples in equal parts, padded with zeros; each process reads only its own parts."""
    n, parts = len(self.split), self.mesh.size
    total = -(-n // parts) * parts

    def part(at):
      start, stop, _ = at[0].indices(total)
      found = rows(slice(start, min(stop, n)))
      return np.pad(found, [(0, stop - start - len(found))] + [(0, 0)] * len(shape))

    return jax.make_array_from_callback((total, *shape), meshes.sharded(self.mesh, 0), part)

  def _plan(self, index: np.ndarray, **columns: np.ndarray) -> dict[str, jax.Array]:
    """The plan of the examples at `index`, shape (..., B), with further columns."""
    sharding = meshes.sharded(self.mesh, index.ndim - 1)

    def column(values, tail=()):
      return jax.make_array_from_callback((*index.shape, *tail), sharding, values)

    plan: dict[str, jax.Array]
    plan = {name: column(values.__getitem__) for name, values in columns.items()}
    if self.arrays is not None:
      return {**plan, "index": column(index.astype(np.int32).__getitem__)}
    take, labels = self.split.take, self.split.labels
    plan["image"] = column(lambda at: take(index[at[: index.ndim]]), self.split.image_shape)
    plan["label"] = column(lambda at: labels[index[at]])
    return plan

  def train_plan(self, steps: range, batch_size: int, seed: int) -> dict[str, jax.Array]:
    """See `Batches.train_plan`; a plan also has each row's "position" in the run."""
    position = positions(steps, batch_size)
    index = examples_at(position, seed, len(self.split), self._repeats)
    return self._plan(index, position=position.astype(np.uint32))

  def eval_plans(self, batch_size: int, limit: int) -> Iterator[dict[str, jax.Array]]:
    """See `Batches.eval_plans`."""
    n = min(limit, len(self.split)) if limit else len(self.split)
    for start in range(0, n, batch_size):
      index = np.arange(start, start + batch_size)
      yield self._plan(np.minimum(index, n - 1), mask=index < n)

  def close(self) -> None:
    """Does nothing: no process works for it."""


def is_resident(loader: str, split: Split, memory: float | None = None) -> bool:
  """Whether to keep a split on the devices: as `loader` says, or for "auto" where it fits.

  It fits where it takes at most a quarter of `memory`, the bytes of all devices together; by
  default those of this process's devices, or of the hosts where a device does not tell.
  """
  if loader != "auto":
    return loader == "resident"
  return split.nbytes <= (_memory() if memory is None else memory) / 4


def _memory() -> float:
  stats = jax.local_devices()[0].memory_stats()
  if stats and "bytes_limit" in stats:
    return stats["bytes_limit"] * jax.device_count()
  host_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  return host_bytes * jax.device_count() / jax.local_device_count()
