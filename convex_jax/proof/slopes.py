"""Bounds on how fast a network can change, read off its computation graph.

Convex networks with weights W_2, ..., W_L >= 0 and activations of slopes in [0, 1] obey

    |y(x + d) - y(x)| <= W_L ... W_2 |W_1| |d|      elementwise,

a product of non-negative matrices in which no signs are lost between layers. `magnitude` reads
the same bound off any graph that `interpreter.analyse` returns: a known weight counts by its
magnitude, a scalar function by its steepest slope. The bound is linear in |d|, so its transpose
bounds the effect of each entry of the input (`sensitivities`).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from convex_jax.proof.enclosures import magnitude as magnitude_of
from convex_jax.proof.float64 import float64
from convex_jax.proof.values import Known, Operation, ScalarFunction, Value

# Primitives by how they pass changes on. The larger of two numbers changes by no more than the
# sum of both changes, and log(e^a + e^b), which the pattern `log_sum_exp` names, likewise.
_SUMS = {"add", "add_any", "sub", "max", "min", "logaddexp"}
_WEIGHTED = {"mul", "div", "dot_general", "conv_general_dilated"}
_EXTREMES = {"reduce_max", "reduce_min"}
_WINDOW_EXTREMES = {"reduce_window_max", "reduce_window_min"}
_MOVES = {"broadcast_in_dim", "concatenate", "dynamic_slice", "gather", "pad", "reshape", "rev"}
_MOVES |= {"slice", "squeeze", "stack", "tile", "transpose"}
_MOVES |= {"reduce_sum", "reduce_window_sum", "cumsum"}  # Sums of non-negative changes.
PRIMITIVES = {*_SUMS, "neg", "abs", *_WEIGHTED, *_EXTREMES, *_WINDOW_EXTREMES, *_MOVES, "select_n"}


def steepest(f: ScalarFunction) -> np.ndarray:
  """The largest |slope| of a scalar function.

  Raises:
    ValueError: no bound is known.
  """
  if not np.isfinite(f.steepest).all():
    raise ValueError("a scalar function without a bound on its slope")
  return np.asarray(f.steepest)


def magnitude(output: Value) -> Callable[[jax.Array], jax.Array]:
  """The linear function from |d| to a bound on |output(x + d) - output(x)| for every x.

  Raises:
    ValueError: an operation on the way has no bound.
  """
  return lambda size: _Bound(size).of(output)


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
      z, f = op.scalar
      return jnp.broadcast_to(jnp.asarray(steepest(f), self._size.dtype) * self.of(z), shape)
    if name in _SUMS:
      return jnp.broadcast_to(self.of(inputs[0]) + self.of(inputs[1]), shape)
    if name in ("neg", "abs"):
      return self.of(inputs[0])
    if name in _WEIGHTED:
      return self._weighted(op, shape)
    if name in _EXTREMES:
      return self.of(inputs[0]).sum(op.params["axes"])
    if name in _WINDOW_EXTREMES:
      keys = ("window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation")
      window = (op.params[k] for k in keys)
      return lax.reduce_window(self.of(inputs[0]), 0.0, lax.add, *window)
    if name == "select_n" and isinstance(inputs[0], Known) and inputs[0].is_exact:
      return op.bind(inputs[0].low, *map(self.of, inputs[1:]))
    if name in _MOVES:
      whole = [x.low for x in inputs if isinstance(x, Known) and not x.is_float]
      data = [self.of(x) for x in inputs if isinstance(x, Value) or x.is_float]
      return op.bind(*data, *whole)  # Indices come last.
    raise ValueError(f"{name} has no bound on how fast it changes, in {op.place}")

  def _weighted(self, op: Operation, shape) -> jax.Array:
    a, b = op.inputs
    if isinstance(a, Value) and isinstance(b, Value):
      raise ValueError(
        f"a product of two values that depend on the input has no bound, in {op.place}"
      )
    end = 0 if op.primitive == "div" else 1  # Of the known magnitude, the worse.
    a, b = (
      self.of(x)
      if isinstance(x, Value)
      else jnp.asarray(magnitude_of((x.low, x.high))[end], self._size.dtype)
      for x in (a, b)
    )
    if op.primitive in ("mul", "div"):
      return jnp.broadcast_to(a * b if op.primitive == "mul" else a / b, shape)
    return op.bind(a, b, preferred_element_type=self._size.dtype)


def linear_end(output: Value) -> tuple[Value, np.ndarray] | None:
  """(h, W) where the output is h W + b over the last axis, with known W and b; else None."""
  op = output.made_by
  while op is not None and op.primitive in ("add", "sub", "reshape"):
    values = [x for x in op.inputs if isinstance(x, Value)]
    if len(values) != 1:
      return None
    op = values[0].made_by
  if op is None or op.primitive != "dot_general":
    return None
  h, weights = op.inputs
  if not isinstance(h, Value) or not isinstance(weights, Known) or weights.low.ndim != 2:
    return None
  if np.prod(h.shape) != len(weights.low):
    return None  # Of several rows h, each of which makes some of the outputs.
  if not weights.is_exact:
    return None  # Differences of its columns are known only to within rounding.
  contracted, batched = op.params["dimension_numbers"]
  plain = [tuple(axes) for axes in contracted] == [(len(h.shape) - 1,), (0,)]
  return (h, weights.low) if plain and batched == ((), ()) else None


def sensitivities(output: Value, shape: tuple[int, ...], alone: bool = False) -> np.ndarray:
  """Bounds b (K, K, D): |(y_k - y_j)(x + d) - (y_k - y_j)(x)| <= b[k, j] . |d| for all x, d.

  With `alone`, bounds (K, D) of each y_k itself.

  `output` holds the K logits of one example; `shape` is that of the input, with D entries. Where
  the logits end in a matrix W, the difference of its columns, |w_k - w_j|, is what counts.

  Raises:
    ValueError: an operation on the way has no bound.
  """
  end = linear_end(output)
  value, weights = (output, np.eye(int(np.prod(output.shape)))) if end is None else end
  rows = np.abs(weights.T)
  if not alone:
    rows = np.abs(weights.T[:, None] - weights.T[None])
  function = magnitude(value)
  with float64():
    like = jax.ShapeDtypeStruct(shape, jnp.float64)
    transpose = jax.jit(lambda c: jax.linear_transpose(function, like)(c.reshape(value.shape))[0])
    out = [np.ravel(transpose(jnp.asarray(row))) for row in rows.reshape(-1, rows.shape[-1])]
  return np.stack(out).reshape(*rows.shape[:-1], -1)
