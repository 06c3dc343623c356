"""The affine parts of a graph as matrices.

A value of the graph is an affine map of earlier ones as long as only moves of elements, sums and
products with known numbers lie between. Its matrix is the derivative of these operations, which
are evaluated in float64.
"""

import graphlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jax import lax

from convex_jax.proof.exponents import exponents
from convex_jax.proof.float64 import float64
from convex_jax.proof.values import Known, Operation, Value

BATCH = 256  # Rows of a matrix that are computed together.

Input = Value | Known | np.ndarray
Matrix = Any  # A `scipy.sparse.csr_array`, of which type checkers know too little.

MOVES = {"broadcast_in_dim", "concatenate", "dynamic_slice", "dynamic_update_slice", "gather"}
MOVES |= {"expand_dims", "pad", "reshape", "rev", "scan", "scatter-add"}
MOVES |= {"select_n", "slice", "split", "squeeze", "stack", "tile", "transpose"}
SUMS = {"add", "add_any", "sub", "neg", "reduce_sum", "reduce_window_sum", "cumsum"}
BILINEAR = {"mul", "dot_general", "conv_general_dilated"}


def is_affine(op: Operation) -> bool:
  """Whether the operation is an affine map of the inputs that are not known."""
  values = [x for x in op.inputs if isinstance(x, Value)]
  name = op.primitive
  if not all(x.is_exact for x in op.inputs if isinstance(x, Known) and not x.is_float):
    return False  # Rounding decides which element it takes.
  if op.scalar is not None or not all(x.is_real for x in values):
    return False
  if name == "add" and exponents(op) is not None:
    return False
  if name == "integer_pow":
    return op.params["y"] == 1
  if name == "div":
    return isinstance(op.inputs[1], Known)
  if name in ("max", "min", "clamp"):  # With bounds that do not bind.
    bounds = [x.array for x in op.inputs if isinstance(x, Known)]
    return len(values) == 1 and all(np.isinf(bound).all() for bound in bounds)
  return name in MOVES or name in SUMS or (name in BILINEAR and len(values) == 1)


def apply(op: Operation, arrays: list[jax.Array], dtype: Any = np.float64) -> jax.Array:
  """An affine operation on arrays of a dtype."""
  if op.primitive == "scan":  # The border of an unrolled loop.
    return jnp.stack(arrays) if op.index is None else arrays[0][op.index]
  if op.primitive == "scatter-add":  # Whose body computes in the program's dtype.
    options = {k: v for k, v in op.params.items() if not k.startswith("update_")}
    add: Any = lax.scatter_add
    return add(*arrays, **options)
  changed: dict[str, Any] = {}
  if "precision" in op.params and dtype != np.float64:
    changed["precision"] = op.params["precision"]
  if op.params.get("preferred_element_type") is not None:
    changed["preferred_element_type"] = np.dtype(dtype)
  out = op.bind(*arrays, **changed)
  return out[op.index] if op.primitive == "split" else out


def in_order(
  outputs: Iterable[Input], inputs_of: Callable[[Value], Sequence[Input]]
) -> list[Value]:
  """Outputs and what they are made of, each value after its inputs."""
  found, graph, todo = {}, {}, [x for x in outputs if isinstance(x, Value)]
  while todo:
    value = todo.pop()
    if id(value) not in found:
      found[id(value)] = value
      inputs = [x for x in inputs_of(value) if isinstance(x, Value)]
      graph[id(value)] = [id(x) for x in inputs]
      todo += inputs
  return [found[key] for key in graphlib.TopologicalSorter(graph).static_order()]


def read_off(
  outputs: Iterable[Input], is_leaf: Callable[[Value], bool]
) -> tuple[np.ndarray, list[tuple[Matrix, Value]]]:
  """Flat outputs as offset + sum of matrix @ leaf, all operations between being affine."""
  outputs = list(outputs)

  def operation(value) -> Operation:
    return value.made_by

  values = in_order(outputs, lambda v: () if is_leaf(v) else operation(v).inputs)
  leaves = [v for v in values if is_leaf(v)]

  def compute(*arrays):
    numbers = {id(v): array for v, array in zip(leaves, arrays, strict=True)}

    def read(x):
      return numbers[id(x)] if isinstance(x, Value) else jnp.asarray(getattr(x, "array", x))

    for value in values:
      if id(value) not in numbers:
        op = operation(value)
        numbers[id(value)] = apply(op, [read(x) for x in op.inputs])
    return jnp.concatenate([jnp.zeros(0), *(jnp.ravel(read(x)) for x in outputs)])

  offset, matrices = matrices_of(compute, [leaf.shape for leaf in leaves])
  return offset, list(zip(matrices, leaves, strict=True))


def matrices_of(
  f: Callable[..., jax.Array], shapes: Sequence[tuple[int, ...]]
) -> tuple[np.ndarray, list[Matrix]]:
  """(f(0), its matrix for each argument), for an affine f of float64 arrays to flat ones."""

  def pulled(units, *arrays):
    out, pull = jax.vjp(f, *arrays)
    return out, jax.vmap(pull)(units)

  with float64():
    zeros = [jnp.zeros(shape, jnp.float64) for shape in shapes]
    count, rows = jax.eval_shape(f, *zeros).size, jax.jit(pulled)
    offset, blocks = np.zeros(0), []
    for start in range(0, count, BATCH):
      units = np.eye(min(count, BATCH), count, start)  # Rows past the end are 0.
      offset, dense = rows(units, *zeros)
      flat = [np.reshape(d, (len(units), -1)) for d in dense]
      blocks.append([scipy.sparse.csr_array(d) for d in flat])
  stacked: Any = [scipy.sparse.vstack(column, "csr") for column in zip(*blocks, strict=True)]
  return np.array(offset), [matrix[:count] for matrix in stacked]


def members(add: Callable[[jax.Array], jax.Array], shape) -> Matrix:
  """Which entries each entry of a sum adds, (results, arguments)."""
  return matrices_of(lambda u: jnp.ravel(add(u)), [shape])[1][0]
