"""How fast a network can change: bounds that its computation graph gives.

Convex networks with weights W_2, ..., W_L >= 0 and activations of slopes in [0, 1] obey

    |y(x + d) - y(x)| <= W_L ... W_2 |W_1| |d|      elementwise,

which is a product of non-negative matrices, with no loss of signs in between. `magnitude`
reads the same bound off any graph that `curvature.analyse` returns: every known weight by
its magnitude, every scalar function by its steepest slope. It is linear in |d|, so that
its transpose gives the bound of each entry of the input (`sensitivities`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from convex_jax.proof.rules import Known, Operation, Value

_MOVES = {
  "broadcast_in_dim",
  "concatenate",
  "dynamic_slice",
  "expand_dims",
  "gather",
  "pad",
  "reduce_sum",
  "reduce_window_sum",
  "reshape",
  "rev",
  "slice",
  "squeeze",
  "stack",
  "tile",
  "transpose",
  "cumsum",
}


def steepest(shape: Any) -> np.ndarray:
  """Largest |slope| of a convex or concave scalar function (`piecewise.Shape`).

  Raises:
    ValueError: the slope has no bound that its two halves show.
  """
  left, right = shape.slopes
  up = shape.convex & shape.rising & shape.right_affine
  down = shape.concave & shape.rising & shape.left_affine
  if np.all(up):
    return np.asarray(right)
  if np.all(down):
    return np.asarray(left)
  raise ValueError("a scalar function without a bound on its slope")


def magnitude(output: Value) -> Callable[[jax.Array], jax.Array]:
  """The function |d| to a bound on |output(x + d) - output(x)|, for every x; linear.

  Raises:
    ValueError: an operation on the way has no bound.
  """

  def bound(size: jax.Array) -> jax.Array:
    return _Bound(size).of(output)

  return bound


class _Bound:
  """Evaluates the bound for one |d|, each value once."""

  def __init__(self, size: jax.Array):
    self._size, self._done = size, {}

  def of(self, x: Value | Known) -> jax.Array:
    if isinstance(x, Known):
      return jnp.zeros(x.shape, self._size.dtype)
    if id(x) not in self._done:
      self._done[id(x)] = self._size if x.made_by is None else self._apply(x.made_by, x.shape)
    return self._done[id(x)]

  def _apply(self, op: Operation, shape) -> jax.Array:
    name, inputs = op.primitive, op.inputs
    if op.scalar is not None:
      root, scalar = op.scalar
      return jnp.broadcast_to(
        jnp.asarray(steepest(scalar), self._size.dtype) * self.of(root), shape
      )
    if name in ("add", "add_any", "sub", "max", "min", "custom_jvp_call"):
      # The larger of two changes by no more than the sum; log(e^a + e^b) likewise.
      return jnp.broadcast_to(self.of(inputs[0]) + self.of(inputs[1]), shape)
    if name in ("neg", "abs"):
      return self.of(inputs[0])
    if name in ("mul", "div", "dot_general", "conv_general_dilated"):
      return self._weighted(op, shape)
    if name in ("reduce_max", "reduce_min"):
      return self.of(inputs[0]).sum(op.eqn.params["axes"])
    if name in ("reduce_window_max", "reduce_window_min"):
      p = op.eqn.params
      keys = ("window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation")
      return lax.reduce_window(self.of(inputs[0]), 0.0, lax.add, *(p[k] for k in keys))
    if name == "select_n" and isinstance(inputs[0], Known):
      return self._bind(op, [inputs[0].array, *map(self.of, inputs[1:])])
    if name in _MOVES:
      whole = [x.array for x in inputs if isinstance(x, Known) and x.array.dtype != np.float64]
      data = [self.of(x) for x in inputs if isinstance(x, Value) or x.array.dtype == np.float64]
      return self._bind(op, [*data, *whole])  # Indices come last.
    raise ValueError(f"{name} has no bound on how fast it changes, in {op.place}")

  def _weighted(self, op: Operation, shape) -> jax.Array:
    a, b = op.inputs
    if isinstance(a, Value) and isinstance(b, Value):
      raise ValueError(f"a product of two values has no bound, in {op.place}")
    a, b = (
      self.of(x) if isinstance(x, Value) else jnp.abs(jnp.asarray(x.array, self._size.dtype))
      for x in (a, b)
    )
    if op.primitive == "mul":
      return jnp.broadcast_to(a * b, shape)
    if op.primitive == "div":
      return jnp.broadcast_to(a / b, shape)
    return self._bind(op, [a, b], preferred_element_type=self._size.dtype)

  def _bind(self, op: Operation, arrays, **changed) -> jax.Array:
    params = {**op.eqn.params, **changed}
    if "fill_value" in params:
      params["fill_value"] = 0.0
    return op.eqn.primitive.bind(*map(jnp.asarray, arrays), **params)


def linear_end(output: Value) -> tuple[Value, np.ndarray] | None:
  """(h, W) where the output is h W + b over the last axis, W and b known; None elsewhere."""
  op = output.made_by
  while op is not None and op.primitive in ("add", "sub", "reshape"):
    values = [x for x in op.inputs if isinstance(x, Value)]
    if len(values) != 1:
      return None
    op = values[0].made_by
  if op is None or op.primitive != "dot_general":
    return None
  h, weights = op.inputs
  dims = op.eqn.params["dimension_numbers"]
  plain = ((h.shape and len(h.shape) - 1,), (0,))
  if not isinstance(h, Value) or not isinstance(weights, Known) or dims[1] != ((), ()):
    return None
  if tuple(map(tuple, dims[0])) != plain or weights.array.ndim != 2:
    return None
  return h, weights.array


def sensitivities(output: Value, shape: tuple[int, ...], alone: bool = False) -> np.ndarray:
  """Bounds b (K, K, D): |(y_k - y_j)(x + d) - (y_k - y_j)(x)| <= b[k, j] . |d| for all x, d.

  With `alone`, (K, D): of each y_k itself.

  `output` holds the K logits of one example, `shape` is the input's, of D entries. Where
  the logits end in a matrix W, it is the columns' difference |w_k - w_j| that counts.
  """
  end = linear_end(output)
  value, weights = (output, np.eye(int(np.prod(output.shape)))) if end is None else end
  rows = np.abs(weights.T)
  if not alone:
    rows = np.abs(weights.T[:, None] - weights.T[None])
  function = magnitude(value)
  with jax.enable_x64(True):
    like = jax.ShapeDtypeStruct(shape, jnp.float64)
    transpose = jax.jit(lambda c: jax.linear_transpose(function, like)(c.reshape(value.shape))[0])
    out = [np.ravel(transpose(jnp.asarray(row))) for row in rows.reshape(-1, rows.shape[-1])]
  return np.stack(out).reshape(*rows.shape[:-1], -1)
