"""A decoded split on a mesh, and the batches that training and evaluation take of it."""

import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from convex_jax import mesh as meshes
from convex_jax.data.order import examples_at, positions
from convex_jax.data.splits import Examples, Split


class Feed:
  """A split on a mesh, either resident on every device or sent batch by batch.

  `arrays` and what `plan` returns go into a jitted function, where `take` makes a
  batch of them: by a gather from the resident split, or as it came.
  """

  def __init__(self, split: Split, mesh: Mesh, resident: bool, repeats: int = 1):
    self.split, self.mesh, self._repeats = split, mesh, repeats
    self.arrays = None
    if resident:
      everything = split.take(slice(None))
      self.arrays = meshes.replicate(mesh, {"image": everything, "label": split.labels})

  def plan(self, index: np.ndarray, **columns: np.ndarray) -> dict[str, jax.Array]:
    """Examples at `index`, shape (..., B), with further columns; B over the devices.

    Each process touches only the examples of its own devices.
    """
    sharding = meshes.sharded(self.mesh, index.ndim - 1)

    def column(values, tail=()):
      return meshes.place(sharding, (*index.shape, *tail), values)

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


def take(arrays: dict[str, jax.Array] | None, plan: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """The batch that a plan stands for; called inside jit."""
  if arrays is None:
    return plan
  rest = {name: column for name, column in plan.items() if name != "index"}
  return {name: array[plan["index"]] for name, array in arrays.items()} | rest


def is_resident(loader: str, split: Split) -> bool:
  """Whether a split lives on the devices: as asked, or where it takes a quarter at most."""
  if loader != "auto":
    return loader == "resident"
  stats = jax.local_devices()[0].memory_stats()
  if stats and "bytes_limit" in stats:
    return split.images.nbytes <= stats["bytes_limit"] / 4
  host_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  return split.images.nbytes * jax.local_device_count() <= host_bytes / 4


def feed_of(examples: Examples, mesh: Mesh, config: Any) -> Any:
  """The feed of a split, as `config.loader` and what the split is ask for."""
  if isinstance(examples, Split):
    return Feed(examples, mesh, is_resident(config.loader, examples), config.repeats)
  from convex_jax.data import stream  # Grain: only whoever streams need wait for it.

  workers = config.workers if config.workers >= 0 else stream.default_workers()
  return stream.Stream(examples, mesh, workers, config.max_unreadable, config.repeats)
