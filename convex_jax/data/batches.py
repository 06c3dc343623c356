"""A decoded split on a mesh, and the batches that training and evaluation take of it."""

import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from convex_jax import mesh as meshes
from convex_jax.data.datasets import Examples
from convex_jax.data.sampling import examples_at, positions
from convex_jax.data.splits import Split


class Feed:
  """A split on a mesh, either resident, a part on each device, or sent batch by batch.

  `arrays` and what `plan` returns go into a jitted function, where `batch_of` makes a
  batch of them: by a gather from the resident split, or as it came.
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
    """All examples, as many on each device; each process reads those of its own."""
    n, parts = len(self.split), self.mesh.size
    total = -(-n // parts) * parts

    def part(at):
      start, stop, _ = at[0].indices(total)
      found = rows(slice(start, min(stop, n)))
      return np.pad(found, [(0, stop - start - len(found))] + [(0, 0)] * len(shape))

    return meshes.make_global_array(meshes.sharded(self.mesh, 0), (total, *shape), part)

  def plan(self, index: np.ndarray, **columns: np.ndarray) -> dict[str, jax.Array]:
    """Examples at `index`, shape (..., B), with further columns; B over the devices.

    Each process touches only the examples of its own devices.
    """
    sharding = meshes.sharded(self.mesh, index.ndim - 1)

    def column(values, tail=()):
      return meshes.make_global_array(sharding, (*index.shape, *tail), values)

    plan = {name: column(values.__getitem__) for name, values in columns.items()}
    if self.arrays is not None:
      return {**plan, "index": column(index.astype(np.int32).__getitem__)}
    take, labels = self.split.take, self.split.labels
    plan["image"] = column(lambda at: take(index[at[: index.ndim]]), self.split.image_shape)
    plan["label"] = column(lambda at: labels[index[at]])
    return plan

  def train_plan(self, steps: range, batch_size: int, seed: int) -> dict[str, jax.Array]:
    """The batches of several steps, stacked: columns of shape (steps, B)."""
    position = positions(steps, batch_size)
    index = examples_at(position, seed, len(self.split), self._repeats)
    return self.plan(index, position=position.astype(np.uint32))

  def close(self) -> None:
    """Nothing runs beside it."""

  def eval_plans(self, batch_size: int, limit: int) -> Iterator[dict[str, jax.Array]]:
    """Each of the first `limit` examples once; the last batch is filled and masked."""
    n = min(limit, len(self.split)) if limit else len(self.split)
    for start in range(0, n, batch_size):
      index = np.arange(start, start + batch_size)
      yield self.plan(np.minimum(index, n - 1), mask=index < n)


def batch_of(
  arrays: dict[str, jax.Array] | None, plan: dict[str, jax.Array], mesh: Mesh
) -> dict[str, jax.Array]:
  """The batch that a plan stands for; called inside jit."""
  if arrays is None:
    return plan
  rest = {name: column for name, column in plan.items() if name != "index"}
  if mesh.size == 1:
    return {name: array[plan["index"]] for name, array in arrays.items()} | rest
  apart, alike = P(meshes.AXES), P()
  pick = jax.shard_map(_pick, mesh=mesh, in_specs=(apart, alike), out_specs=apart)
  return pick(arrays, plan["index"]) | rest


def _pick(arrays: dict[str, jax.Array], index_B: jax.Array) -> dict[str, jax.Array]:
  """Of each device's rows those of the batch, the rest zeros; their sum, a share to each."""

  def one(array):
    row_B = index_B - jax.lax.axis_index(meshes.AXES) * len(array)
    here_B = (row_B >= 0) & (row_B < len(array))
    found = array[jnp.clip(row_B, 0, len(array) - 1)]
    here = here_B.reshape(-1, *[1] * (array.ndim - 1))
    return jax.lax.psum_scatter(jnp.where(here, found, 0), meshes.AXES, tiled=True)

  return jax.tree.map(one, arrays)


def is_resident(loader: str, split: Split) -> bool:
  """Whether a split lives on the devices: as asked, or where its parts take a quarter at most."""
  if loader != "auto":
    return loader == "resident"
  stats = jax.local_devices()[0].memory_stats()
  if stats and "bytes_limit" in stats:
    return split.nbytes / jax.device_count() <= stats["bytes_limit"] / 4
  host_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  here = jax.local_device_count() / jax.device_count()
  return split.nbytes * here <= host_bytes / 4


def feed_of(examples: Examples, mesh: Mesh, config: Any) -> Any:
  """The feed of a split, as `config.loader` and what the split is ask for."""
  if isinstance(examples, Split):
    return Feed(examples, mesh, is_resident(config.loader, examples), config.repeats)
  from convex_jax.data.photos import stream  # Grain: only whoever streams need wait for it.

  workers = config.workers if config.workers >= 0 else stream.default_workers()
  return stream.Stream(examples, mesh, workers, config.max_unreadable, config.repeats)
