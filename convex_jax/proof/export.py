"""A proved function inside a convex program, in CVXPY.

Each operation that is not affine becomes a vector t of new variables, bounded on the side that the
proof needs: t >= g(u) where g is convex, t <= g(u) where it is concave. What lies between is one
sparse matrix for each pair of such vectors, read off the graph by differentiation; between two
dense maps stands a vector too, as their product would be larger than both. The output y then lies
on or above f(x), and at the optimum of what DCP allows to be done with it, on f(x):

    f(x) = min y  subject to the constraints                        elementwise,

all outputs at once (Grant and Boyd 2008, "Graph Implementations for Nonsmooth Convex Programs").
That each vector is bounded on the right side for what is made of it is checked again here, by the
signs of the matrices.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import cvxpy as cp
import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jax import lax

from convex_jax.proof import affine_maps, conic
from convex_jax.proof.affine_maps import Input, Matrix, is_affine
from convex_jax.proof.certificate import proved
from convex_jax.proof.exponents import exponents
from convex_jax.proof.values import Known, Operation, Value

_DENSE = {"dot_general", "conv_general_dilated"}
_WINDOW = ("window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation")
# Which entries an extreme is taken over: those that this sum adds.
_EXTREMES: dict[str, Callable[[Operation, jax.Array], jax.Array]] = {
  "reduce_m": lambda op, u: u.sum(op.params["axes"]),
  "cumm": lambda op, u: lax.cumsum(u, op.params["axis"], op.params["reverse"]),
  "reduce_window_m": lambda op, u: lax.reduce_window(
    u, 0.0, lax.add, *(op.params[k] for k in _WINDOW)
  ),
}


@dataclasses.dataclass(frozen=True, eq=False)
class ConvexProgram:
  """A proved function y = f(x), as CVXPY sees it.

  `y` is convex to CVXPY, so that its rules refuse it where a convex expression may not stand: it
  may be minimised, be an argument of a convex non-decreasing function, or stand on the small side
  of <=. If f is affine, so is `y`.

  Attributes:
    x: the input's entries, flat in C order, as `numpy.ravel` has them.
    y: the outputs, flat likewise.
    constraints: of x, y and the variables between them; a problem needs them all.
  """

  x: cp.Variable
  y: cp.Expression
  constraints: list[cp.Constraint]
  _steps: list[Callable[[], None]]

  def evaluate(self, x: np.ndarray) -> np.ndarray:
    """Gives every variable the value that f's computation has at x; returns y = f(x), flat."""
    self.x.value = np.ravel(x)
    for step in self._steps:
      step()
    return np.asarray(self.y.value)


def export_cvxpy(f: Callable[..., jax.Array], *args: Any, argnums: int = -1) -> ConvexProgram:
  """The function `f(*args)` of one of its arguments as CVXPY expressions and constraints.

  Args:
    f: any JAX function that returns one array.
    *args: its arguments, as for `certify`. Of the input, only shape and dtype matter.
    argnums: which argument is the input; by default the last.

  Returns:
    The program, whose weights are float64. For a concave f, export `lambda *args: -f(*args)`.

  Raises:
    convex_jax.proof.NotProved: some output is not proved convex.
    ValueError: an operation is proved and has no conic form here; the message says where it is. Or
      the function returns no number.
  """
  output = proved(f, *args, argnums=argnums)
  if not math.prod(output.shape):
    raise ValueError(
      f"the function returns an array of shape {output.shape}; expected some entries"
    )
  export = _Export(output, math.prod(args[argnums].shape))
  y = export.affine([output])
  if (y.below | y.infinite).any():
    raise ValueError(export.reason_of(y) or "the signs of its weights do not bound every output")
  expression = y.expression
  if y.above.any():  # One that CVXPY knows to be convex.
    expression = cp.max(cp.reshape(expression, (y.size, 1), order="C"), axis=1)
  bounds = export.bounds
  return ConvexProgram(export.x.variable, expression, bounds.constraints, bounds.steps)


class _Export:
  """Variables and constraints for each value on the way to an output, in order."""

  def __init__(self, output: Value, size: int):
    no = np.zeros(size, bool)
    self.x, self.bounds = conic.Vector(cp.Variable(size), no, no), conic.Bounds()
    self._plans: dict[int, _Plan] = {}  # Of each value that is neither affine nor the input.
    self._vectors: dict[int, conic.Vector] = {}
    mixed = set()  # Values with one dense map between the vectors so far and them.
    for value in affine_maps.in_order([output], self._inputs_of):
      op = value.made_by
      if op is None:
        self._vectors[id(value)] = self.x
      elif id(value) in self._plans:
        self._vectors[id(value)] = self._vector(value, self._plans[id(value)])
      elif op.primitive in _DENSE:
        for x in op.inputs:
          if isinstance(x, Value) and id(x) in mixed:
            self._vectors[id(x)] = self._equal(x)
            mixed.remove(id(x))
        mixed.add(id(value))
      elif any(id(x) in mixed for x in op.inputs):
        mixed.add(id(value))

  def _inputs_of(self, value: Value) -> Sequence[Input]:
    """What the program makes a value of."""
    if value.made_by is None or is_affine(value.made_by):
      return value.made_by.inputs if value.made_by else ()
    self._plans[id(value)] = plan = _plan(value.made_by)
    return plan.inputs

  def affine(self, inputs: Iterable[Input]) -> conic.Affine:
    """The entries of some values, one after the other, in terms of the variables so far."""
    offset, terms = affine_maps.read_off(inputs, lambda value: id(value) in self._vectors)
    above = below = np.isnan(offset)
    known = [(matrix, self._vectors[id(value)]) for matrix, value in terms]
    for matrix, vector in known:
      plus, minus = (matrix > 0).astype(float), (matrix < 0).astype(float)
      above = above | (plus @ vector.above + minus @ vector.below > 0)
      below = below | (plus @ vector.below + minus @ vector.above > 0)
    return conic.Affine(known, offset, above, below)

  def reason_of(self, u: conic.Affine) -> str:
    """Why some entries of `u` say nothing: the first operation that has no conic form."""
    for matrix, vector in u.terms:
      if vector.reason and matrix[:, vector.above & vector.below].nnz:
        return vector.reason
    return ""

  def _equal(self, value: Value) -> conic.Vector:
    """Variables for an affine value: the product of two dense maps would be larger than both."""
    op = value.made_by
    assert op is not None
    u, t = self.affine([value]), cp.Variable(math.prod(value.shape))
    self.bounds.equal(t, u)
    return conic.Vector(t, u.above | u.infinite, u.below | u.infinite, self.reason_of(u))

  def _vector(self, value: Value, plan: "_Plan") -> conic.Vector:
    """The variables of the results of an operation, with their constraints."""
    op, t = value.made_by, cp.Variable(math.prod(value.shape))
    assert op is not None
    u = self.affine(plan.inputs)
    try:
      bad = plan.build(self.bounds, t, u)
    except conic.NoConicFormError:
      bad = np.ones(t.size, bool)
    masks = value.not_convex, value.not_concave
    bad = bad | np.ravel(masks[0] if plan.sign > 0 else masks[1])
    yes = np.ones(t.size, bool)
    reason = self.reason_of(u) or f"{op.primitive} has no conic form, in {op.place}"
    above, below = (yes, bad) if plan.sign > 0 else (bad, yes)
    return conic.Vector(t, above, below, reason if bad.any() else "")


@dataclasses.dataclass(frozen=True, eq=False)
class _Plan:
  """What an operation is made of, and how its results are bounded."""

  inputs: tuple[Input, ...]
  build: Callable[[conic.Bounds, cp.Variable, conic.Affine], np.ndarray]
  sign: int = 1  # 1: bounded from below, as convex functions are; -1: from above.


def _plan(op: Operation) -> _Plan:
  """How to bound the results of an operation that is not affine."""
  name, inputs = op.primitive, op.inputs
  if op.scalar is not None:
    z, f = op.scalar
    sign = 1 if np.any(f.convex) else -1
    build = functools.partial(conic.Bounds.kinked, reading=conic.Reading(op, z, f), f=f, sign=sign)
    return _Plan((z,), build, sign)
  if (found := exponents(op)) is not None:
    u, axes = found
    members = affine_maps.members(lambda x: x.sum(axes), u.shape)
    return _Plan((u,), functools.partial(conic.Bounds.log_sum_exp, members=members))
  if name in ("logaddexp", "max", "min"):
    both = tuple(_wide(x, op.shape) for x in inputs)
    members = _pairs(op.shape)
    if name == "logaddexp":
      return _Plan(both, functools.partial(conic.Bounds.log_sum_exp, members=members))
    return _extreme(both, members, name)
  if name == "clamp":
    low, x, high = inputs
    if isinstance(low, Known) and isinstance(high, Known):
      bound, sign = (low, "max") if np.isposinf(high.array).all() else (high, "min")
      if sign == "max" or np.isneginf(low.array).all():
        return _extreme((x, _wide(bound, op.shape)), _pairs(op.shape), sign)
  for prefix, add in _EXTREMES.items():
    if name in (f"{prefix}ax", f"{prefix}in"):
      shape = inputs[0].shape
      return _extreme(inputs, affine_maps.members(functools.partial(add, op), shape), name)
  if name in conic.EXPONENTIALS:
    return _Plan(inputs, functools.partial(conic.Bounds.increasing, g=conic.EXPONENTIALS[name]))
  if name == "abs":
    return _Plan(inputs, functools.partial(conic.Bounds.even, g=cp.abs))
  if name == "cosh":
    return _Plan(
      inputs, functools.partial(conic.Bounds.even, g=lambda u: (cp.exp(u) + cp.exp(-u)) / 2)
    )
  if name in ("integer_pow", "pow") and (power := _power(op)) > 1:
    return _Plan(inputs[:1], functools.partial(conic.Bounds.even, g=lambda u: cp.power(u, power)))
  if (u := _squared(op)) is not None:
    sums = affine_maps.members(functools.partial(_apply_squared, op), u.shape)
    return _Plan((u,), functools.partial(conic.Bounds.even, g=cp.square, sums=sums))
  if name in ("dot_general", "mul"):
    return _Plan(inputs, functools.partial(conic.Bounds.quadratic, op=op))
  if name == "sqrt":
    return _norm(op)
  return _Plan((), _no_form)


def _no_form(*_: Any):
  raise conic.NoConicFormError


def _power(op: Operation) -> float:
  """The exponent of a power; 0 where it is not one known number."""
  if op.primitive == "integer_pow":
    return op.params["y"]
  y = op.inputs[1]
  return float(y.array.flat[0]) if isinstance(y, Known) and np.ptp(y.array) == 0 else 0.0


def _squared(op: Operation) -> Value | None:
  """The value whose squares, or sums of them, are the operation's results."""
  u = op.inputs[0]
  if op.primitive == "square" or (op.primitive == "integer_pow" and op.params["y"] == 2):
    return u if isinstance(u, Value) else None
  if op.primitive not in ("mul", "dot_general") or u is not op.inputs[1]:
    return None
  if op.primitive == "dot_general":  # No row meets another.
    (left, right), (batch, same) = op.params["dimension_numbers"]
    if (tuple(left), tuple(batch)) != (tuple(right), tuple(same)):
      return None
    if len(left) + len(batch) < len(u.shape):
      return None
  return u if isinstance(u, Value) else None


def _apply_squared(op: Operation, squares: jax.Array) -> jax.Array:
  """The results of such an operation, from the squares."""
  return (
    affine_maps.apply(op, [squares, jnp.ones_like(squares)])
    if op.primitive == "dot_general"
    else squares
  )


def _norm(op: Operation) -> _Plan:
  """The root of a sum of squares, weights >= 0 included, and a number >= 0."""
  offset, terms = affine_maps.read_off(
    op.inputs, lambda v: v.made_by is None or not is_affine(v.made_by)
  )
  inputs, weights = [], []
  for matrix, value in terms:
    operation = value.made_by
    u = _squared(operation) if operation else None
    if matrix.nnz and (u is None or matrix.min() < 0):
      return _Plan((), _no_form)
    if operation is not None and u is not None:
      inputs.append(u)
      weights.append(
        matrix @ affine_maps.members(functools.partial(_apply_squared, operation), u.shape)
      )
  if not inputs or not ((offset >= 0) & np.isfinite(offset)).all():
    return _Plan((), _no_form)
  build = functools.partial(
    conic.Bounds.norm, weights=scipy.sparse.hstack(weights, "csr"), offset=offset
  )
  return _Plan(tuple(inputs), build)


def _extreme(inputs, members: Matrix, name: str) -> _Plan:
  sign = 1 if name.endswith("max") else -1
  return _Plan(inputs, functools.partial(conic.Bounds.extreme, members=members, sign=sign), sign)


def _pairs(shape: tuple[int, ...]) -> Matrix:
  """Entry i of each of two arrays of a shape as the members of i."""
  return scipy.sparse.hstack([scipy.sparse.eye_array(math.prod(shape))] * 2, "csr")


def _wide(x: Value | Known, shape: tuple[int, ...]) -> Value | np.ndarray:
  return x if isinstance(x, Value) else np.broadcast_to(x.array, shape)
