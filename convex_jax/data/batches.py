"""The batches of a split on a mesh: the interface, and the choice between its two kinds."""

import functools
import math
from collections.abc import Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from convex_jax import mesh as meshes
from convex_jax.data.datasets import Examples
from convex_jax.data.in_memory import InMemory, is_resident
from convex_jax.data.photos.chunks import default_workers
from convex_jax.data.photos.stream import Stream
from convex_jax.data.splits import Split


class Batches(Protocol):
  """The batches of one split, as plans from which `batch_of` makes a batch inside jit.

  The rows of a plan are split over the devices; each process prepares its own rows only.
  """

  arrays: dict[str, jax.Array] | None  # The split itself, where it is on the devices.

  def train_plan(self, steps: range, batch_size: int, seed: int) -> dict[str, jax.Array]:
    """The plans of several training steps, stacked: columns of shape (steps, B, ...)."""
    ...

  def eval_plans(self, batch_size: int, limit: int) -> Iterator[dict[str, jax.Array]]:
    """Plans that show the first `limit` examples (0: all) once each, in order.

    The last batch is filled up; "mask" is False for rows that do not count.
    """
    ...

  def close(self) -> None:
    """Ends the processes that prepare batches, if there are any."""


def batches_of(examples: Examples, mesh: Mesh, config: Any) -> Batches:
  """The batches of a split under `config.data`: decoded in memory, or streamed photographs."""
  if isinstance(examples, Split):
    return InMemory(examples, mesh, is_resident(config.loader, examples), config.repeats)
  workers = config.workers if config.workers >= 0 else default_workers()
  return Stream(examples, mesh, workers, config.max_unreadable, config.repeats)


def shapes_of(
  examples: Examples, mesh: Mesh, resident: bool, rows: tuple[int, ...]
) -> tuple[dict[str, Any] | None, dict[str, Any]]:
  """The shapes, types and shardings of a split's `arrays` and of a plan, without any data.

  `rows` is (steps, B) for a plan of training, (B,) for one of evaluation.
  """

  def column(dtype, rows, *tail):
    sharding = meshes.sharded(mesh, len(rows) - 1)
    return jax.ShapeDtypeStruct((*rows, *tail), dtype, sharding=sharding)

  def both(rows):
    return {
      "image": column(jnp.uint8, rows, *examples.image_shape),
      "label": column(jnp.int32, rows),
    }

  plan = {"position": column(jnp.uint32, rows)} if len(rows) > 1 else {"mask": column(bool, rows)}
  if not resident:
    return None, plan | both(rows)
  padded = -(-len(examples) // mesh.size) * mesh.size
  return both((padded,)), plan | {"index": column(jnp.int32, rows)}


def batch_of(
  arrays: dict[str, jax.Array] | None, plan: dict[str, jax.Array], mesh: Mesh
) -> dict[str, jax.Array]:
  """The batch of a plan: gathered from resident `arrays`, or the plan itself. Call inside jit."""
  if arrays is None:
    return plan
  rest = {name: column for name, column in plan.items() if name != "index"}
  if mesh.size == 1:
    return {name: array[plan["index"]] for name, array in arrays.items()} | rest
  apart, alike = P(meshes.AXES), P()
  pick = jax.shard_map(_pick, mesh=mesh, in_specs=(apart, alike), out_specs=apart)
  return pick(arrays, plan["index"]) | rest


def _sum_apart(found: jax.Array) -> jax.Array:
  """The sum over the devices, of which each gets its rows; one term at most is not 0.

  Pixels four to a word, which cannot carry then: of bytes a TPU would make a sum of words, four
  times as much, and give each device the whole of it.
  """
  shape = found.shape
  add = functools.partial(jax.lax.psum_scatter, axis_name=meshes.AXES, tiled=True)
  if found.dtype != jnp.uint8 or math.prod(shape[1:]) % 4:
    return add(found)
  words = jax.lax.bitcast_convert_type(found.reshape(len(found), -1, 4), jnp.uint32)
  return jax.lax.bitcast_convert_type(add(words), jnp.uint8).reshape(-1, *shape[1:])


def _pick(arrays: dict[str, jax.Array], index_B: jax.Array) -> dict[str, jax.Array]:
  """Each device's rows of the batch: every device adds the rows it holds, zeros for the rest."""

  def one(array):
    row_B = index_B - jax.lax.axis_index(meshes.AXES) * len(array)
    here_B = (row_B >= 0) & (row_B < len(array))
    found = array[jnp.clip(row_B, 0, len(array) - 1)]
    here = here_B.reshape(-1, *[1] * (array.ndim - 1))
    return _sum_apart(jnp.where(here, found, 0))

  return jax.tree.map(one, arrays)
