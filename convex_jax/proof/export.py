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
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import cvxpy as cp
import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jax import lax

from convex_jax.proof import affine_maps, jets, pieces
from convex_jax.proof.affine_maps import Input, Matrix, is_affine
from convex_jax.proof.certificate import proved
from convex_jax.proof.exponents import exponents
from convex_jax.proof.float64 import float64
from convex_jax.proof.values import Known, Operation, ScalarFunction, Value

LARGEST = 10**8  # Entries of the second derivatives of a product of two affine values.
ROUNDING = 1e-9  # Relative; how far below 0 an eigenvalue of a convex form may be computed.

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
_EXPONENTIALS: dict[str, Callable[[Any], Any]] = {
  "exp": cp.exp,
  "exp2": lambda u: cp.exp(math.log(2) * u),
  "expm1": lambda u: cp.exp(u) - 1,
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
    The program, whose weights are float64. A concave f is exported as -f.

  Raises:
    convex_jax.proof.certificate.NotProved: some output is not proved convex.
    ValueError: an operation is proved and has no conic form here; the message says where it is.
  """
  output = proved(f, *args, argnums=argnums)
  export = _Export(output, math.prod(args[argnums].shape))
  y = export.affine([output])
  if (y.below | y.infinite).any():
    raise ValueError(export.reason_of(y) or "the signs of its weights do not bound every output")
  expression = y.expression
  if y.above.any():  # One that CVXPY knows to be convex.
    expression = cp.max(cp.reshape(expression, (y.size, 1), order="C"), axis=1)
  return ConvexProgram(export.x.variable, expression, export.constraints, export.steps)


@dataclasses.dataclass(frozen=True, eq=False)
class _Vector:
  """A flat CVXPY variable: the input, or the results of an operation that is not affine.

  A feasible entry may lie above the number that it stands for, or below it. One that may do both
  says nothing: the operation has no conic form, for this `reason`.
  """

  variable: cp.Variable
  above: np.ndarray
  below: np.ndarray
  reason: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class _Affine:
  """sum of matrix @ vector + offset, flat; and whether an entry may lie above or below its own."""

  terms: list[tuple[Matrix, _Vector]]
  offset: np.ndarray  # May be infinite: an entry that never is the maximum, say.
  above: np.ndarray
  below: np.ndarray

  @property
  def size(self) -> int:
    return len(self.offset)

  @property
  def infinite(self) -> np.ndarray:
    return ~np.isfinite(self.offset)

  @property
  def is_exact(self) -> bool:
    return not (self.above.any() or self.below.any())

  @functools.cached_property
  def expression(self) -> cp.Expression:
    """In CVXPY; 0 in place of an offset that is not finite."""
    terms = [matrix @ vector.variable for matrix, vector in self.terms if matrix.nnz]
    offset = cp.Constant(np.where(np.isfinite(self.offset), self.offset, 0.0))
    return functools.reduce(cp.Expression.__add__, terms, offset)

  def rows(self, chosen: np.ndarray) -> "_Affine":
    terms = [(matrix[chosen], vector) for matrix, vector in self.terms]
    return _Affine(terms, self.offset[chosen], self.above[chosen], self.below[chosen])


class _NoConicFormError(Exception):
  """An operation that cannot be written as a cone's constraints here."""


class _Export:
  """Variables and constraints for each value on the way to an output, in order."""

  def __init__(self, output: Value, size: int):
    no = np.zeros(size, bool)
    self.x = _Vector(cp.Variable(size), no, no)
    self.constraints: list[cp.Constraint] = []
    self.steps: list[Callable[[], None]] = []
    self._plans: dict[int, _Plan] = {}  # Of each value that is neither affine nor the input.
    self._vectors: dict[int, _Vector] = {}
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

  def affine(self, inputs: Iterable[Input]) -> _Affine:
    """The entries of some values, one after the other, in terms of the variables so far."""
    offset, terms = affine_maps.read_off(inputs, lambda value: id(value) in self._vectors)
    above = below = np.isnan(offset)
    known = [(matrix, self._vectors[id(value)]) for matrix, value in terms]
    for matrix, vector in known:
      plus, minus = (matrix > 0).astype(float), (matrix < 0).astype(float)
      above = above | (plus @ vector.above + minus @ vector.below > 0)
      below = below | (plus @ vector.below + minus @ vector.above > 0)
    return _Affine(known, offset, above, below)

  def reason_of(self, u: _Affine) -> str:
    """Why some entries of `u` say nothing: the first operation that has no conic form."""
    for matrix, vector in u.terms:
      if vector.reason and matrix[:, vector.above & vector.below].nnz:
        return vector.reason
    return ""

  def _equal(self, value: Value) -> _Vector:
    """Variables for an affine value: the product of two dense maps would be larger than both."""
    op = value.made_by
    assert op is not None
    u, t = self.affine([value]), cp.Variable(math.prod(value.shape))
    self.constraints.append(t == u.expression)
    self.define(t, lambda: u.expression.value)
    return _Vector(t, u.above | u.infinite, u.below | u.infinite, self.reason_of(u))

  def _vector(self, value: Value, plan: "_Plan") -> _Vector:
    """The variables of the results of an operation, with their constraints."""
    op, t = value.made_by, cp.Variable(math.prod(value.shape))
    assert op is not None
    u = self.affine(plan.inputs)
    try:
      bad = plan.build(self, t, u)
    except _NoConicFormError:
      bad = np.ones(t.size, bool)
    masks = value.not_convex, value.not_concave
    bad = bad | np.ravel(masks[0] if plan.sign > 0 else masks[1])
    yes = np.ones(t.size, bool)
    reason = self.reason_of(u) or f"{op.primitive} has no conic form, in {op.place}"
    above, below = (yes, bad) if plan.sign > 0 else (bad, yes)
    return _Vector(t, above, below, reason if bad.any() else "")

  def define(self, variable: cp.Variable, value: Callable[[], Any]) -> None:
    self.steps.append(lambda: variable.save_value(np.asarray(value())))

  # How the results t of an operation are bounded by its arguments u. Each returns which results
  # have no valid bound.

  def extreme(self, t: cp.Variable, u: _Affine, members: Matrix, sign: int):
    """t_i >= u_j for each member j of i (sign 1), or <= (sign -1)."""
    of, part = _present(u, members, -sign * np.inf)
    self.constraints.append(sign * (t[of] - part.expression) >= 0)

    def value():
      out = np.full(t.size, -np.inf)
      np.maximum.at(out, of, sign * _number(part.expression))
      return sign * out

    self.define(t, value)
    return _any(t.size, of, part.infinite | (part.below if sign > 0 else part.above))

  def log_sum_exp(self, t: cp.Variable, u: _Affine, members: Matrix):
    """t_i >= log(sum of exp(u_j) over the members j of i): sum of exp(u_j - t_i) <= 1."""
    of, part = _present(u, members, -np.inf)
    total = _matrix(of, np.arange(len(of)), (t.size, len(of)))
    self.constraints.append(total @ cp.exp(part.expression - t[of]) <= 1)

    def value():
      numbers, peak = _number(part.expression), np.full(t.size, -np.inf)
      np.maximum.at(peak, of, numbers)
      return peak + np.log(total @ np.exp(numbers - peak[of]))

    self.define(t, value)
    return _any(t.size, of, part.infinite | part.below)

  def increasing(self, t: cp.Variable, u: _Affine, g: Callable[[Any], Any]):
    """t >= g(u), for a convex non-decreasing g."""
    bound = g(u.expression)
    self.constraints.append(t >= bound)
    self.define(t, lambda: bound.value)
    return u.below | u.infinite

  def even(self, t: cp.Variable, u: _Affine, g: Callable[[Any], Any], sums: Any = None):
    """t >= g(|u|), or sums of it, for a g that is convex and non-decreasing above 0."""
    bound = g(self._size(u))
    bad = (u.above & u.below) | u.infinite
    if sums is not None:
      bound, bad = sums @ bound, sums @ bad > 0
    self.constraints.append(t >= bound)
    self.define(t, lambda: bound.value)
    return bad

  def norm(self, t: cp.Variable, u: _Affine, weights: Matrix, offset: np.ndarray):
    """t_i >= sqrt(sum of weights_ij u_j^2 + offset_i), weights and offset >= 0."""
    length = 1 + int(np.diff(weights.indptr).max())  # Of the longest row, and the offset.
    rows = np.repeat(np.arange(t.size), np.diff(weights.indptr))
    places = rows * length + np.arange(len(rows)) - weights.indptr[rows]
    scales = scipy.sparse.csr_array(
      (np.sqrt(weights.data), (places, weights.indices)), (t.size * length, u.size)
    )
    last = np.zeros((t.size, length))
    last[:, -1] = np.sqrt(offset)
    entries = scales @ self._size(u) + last.ravel()
    bound = cp.norm(cp.reshape(entries, last.shape, order="C"), 2, axis=1)
    self.constraints.append(t >= bound)
    self.define(t, lambda: bound.value)
    return weights @ ((u.above & u.below) | u.infinite) > 0

  def quadratic(self, t: cp.Variable, u: _Affine, op: Operation):
    """t >= a quadratic form, the product of two affine values, by factorisation."""
    left, right = op.inputs
    terms = [(matrix, vector.variable) for matrix, vector in u.terms if matrix.nnz]
    if not u.is_exact or u.infinite.any() or not terms:
      raise _NoConicFormError
    x = cp.hstack([variable for _, variable in terms])
    if t.size * x.size**2 > LARGEST:
      raise _NoConicFormError
    matrix = scipy.sparse.hstack([m for m, _ in terms]).toarray()
    cut = math.prod(left.shape)

    def product(point):
      flat = matrix @ point + u.offset
      parts = flat[:cut].reshape(left.shape), flat[cut:].reshape(right.shape)
      return jnp.ravel(affine_maps.apply(op, list(parts)))

    with float64():
      origin = jnp.zeros(x.size)
      at, slope = (np.asarray(g(origin)) for g in (product, jax.jacrev(product)))
      curvature, axes = np.linalg.eigh(np.asarray(jax.hessian(product)(origin)) / 2)
    if (curvature < -ROUNDING * np.abs(curvature).max()).any():
      raise _NoConicFormError
    roots = np.sqrt(np.maximum(curvature, 0))[:, None] * axes
    roots = np.swapaxes(roots, 1, 2).reshape(-1, x.size)
    sums = _matrix(
      np.repeat(np.arange(t.size), x.size), np.arange(len(roots)), (t.size, len(roots))
    )
    bound = sums @ cp.square(roots @ x) + slope @ x + at
    self.constraints.append(t >= bound)
    self.define(t, lambda: bound.value)
    return np.zeros(t.size, bool)

  def _size(self, u: _Affine) -> Any:
    """A bound on |u|: where the proof allows u to be convex, it is >= 0; where concave, <= 0."""
    if u.is_exact:
      return u.expression
    size, parts = cp.Variable(u.size, nonneg=True), []
    for sign, wrong in ((1, u.below), (-1, u.above)):
      rows = np.flatnonzero(~wrong)
      parts.append((rows, sign * u.rows(rows).expression))
    self.constraints += [size[rows] >= part for rows, part in parts if len(rows)]

    def value():
      out = np.zeros(u.size)
      for rows, part in parts:
        np.maximum.at(out, rows, _number(part))
      return out

    self.define(size, value)
    return size

  def kinked(self, t: cp.Variable, z: _Affine, reading: "_Reading", f: ScalarFunction, sign: int):
    """t >= f(z), f convex (sign 1), or t <= f(z), f concave (sign -1), with kinks c_1 < ... < c_n.

    If all pieces are affine, f is their maximum. Otherwise it is the least of

        f_0(z - b_1) + f_1(c_1 + b_1 - b_2) + ... + f_n(c_n + b_n) - f(c_1) - ... - f(c_n)

    over b >= 0 that leave each argument in its piece, as slopes do not fall at the kinks and no
    arguments with the sum z + c_1 + ... + c_n are closer together than z and the kinks; for a
    concave f, the greatest. The bound of a single kink holds by itself where the right piece is
    affine and continues the slope of the left one, as ELU's does: left, convex beyond c, then lies
    above right there. Solvers are faster without it.
    """
    if z.size != t.size:
      raise _NoConicFormError
    u, last = z.expression, len(reading.pieces) - 1
    kinks = [_flat(k, reading.shape) for k in f.ends[1:-1]]
    if reading.is_affine:
      sides = [reading.of(u, i) for i in range(last + 1)]
      constraints = [sign * (t - side) >= 0 for side in sides]
      self.define(t, lambda: sign * np.max([sign * _number(side) for side in sides], 0))
    else:
      b = [cp.Variable(z.size, nonneg=True) for _ in kinks]
      low = [u, *(k + above for k, above in zip(kinks, b, strict=True))]
      at = [x - above for x, above in zip(low, b, strict=False)] + low[last:]
      bound = functools.reduce(operator.add, (reading.of(x, i) for i, x in enumerate(at)))
      bound -= sum(_number(reading.of(cp.Constant(k), i)) for i, k in enumerate(kinks))
      constraints = [sign * (t - bound) >= 0]
      if last > 1 or not reading.ends_smoothly:
        constraints += [x <= k for x, k in zip(at, kinks, strict=False)]
      constraints += [x >= y for x, y in itertools.pairwise(b)]
      for k, above in zip(kinks, b, strict=True):
        self.define(above, lambda k=k: np.maximum(_number(u) - k, 0.0))
      self.define(t, lambda: bound.value)
    if not all(constraint.is_dcp() for constraint in constraints):
      raise _NoConicFormError
    self.constraints += constraints
    rising, falling = (_flat(x, reading.shape) for x in (f.rising, f.falling))
    too_low, too_high = (z.below, z.above) if sign > 0 else (z.above, z.below)
    curved = _flat(f.convex if sign > 0 else f.concave, reading.shape)
    bad = np.where(rising, too_low, np.where(falling, too_high, too_low | too_high))
    return bad | ~curved | z.infinite


@dataclasses.dataclass(frozen=True, eq=False)
class _Plan:
  """What an operation is made of, and how its results are bounded."""

  inputs: tuple[Input, ...]
  build: Callable[[_Export, cp.Variable, _Affine], np.ndarray]
  sign: int = 1  # 1: bounded from below, as convex functions are; -1: from above.


def _plan(op: Operation) -> _Plan:
  """How to bound the results of an operation that is not affine."""
  name, inputs = op.primitive, op.inputs
  if op.scalar is not None:
    z, f = op.scalar
    sign = 1 if np.any(f.convex) else -1
    build = functools.partial(_Export.kinked, reading=_Reading(op, z, f), f=f, sign=sign)
    return _Plan((z,), build, sign)
  if (found := exponents(op)) is not None:
    u, axes = found
    members = affine_maps.members(lambda x: x.sum(axes), u.shape)
    return _Plan((u,), functools.partial(_Export.log_sum_exp, members=members))
  if name in ("logaddexp", "max", "min"):
    both = tuple(_wide(x, op.shape) for x in inputs)
    members = _pairs(op.shape)
    if name == "logaddexp":
      return _Plan(both, functools.partial(_Export.log_sum_exp, members=members))
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
  if name in _EXPONENTIALS:
    return _Plan(inputs, functools.partial(_Export.increasing, g=_EXPONENTIALS[name]))
  if name == "abs":
    return _Plan(inputs, functools.partial(_Export.even, g=cp.abs))
  if name == "cosh":
    return _Plan(inputs, functools.partial(_Export.even, g=lambda u: (cp.exp(u) + cp.exp(-u)) / 2))
  if name in ("integer_pow", "pow") and (power := _power(op)) > 1:
    return _Plan(inputs[:1], functools.partial(_Export.even, g=lambda u: cp.power(u, power)))
  if (u := _squared(op)) is not None:
    sums = affine_maps.members(functools.partial(_apply_squared, op), u.shape)
    return _Plan((u,), functools.partial(_Export.even, g=cp.square, sums=sums))
  if name in ("dot_general", "mul"):
    return _Plan(inputs, functools.partial(_Export.quadratic, op=op))
  if name == "sqrt":
    return _norm(op)
  return _Plan((), _no_form)


def _no_form(*_: Any):
  raise _NoConicFormError


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
    _Export.norm, weights=scipy.sparse.hstack(weights, "csr"), offset=offset
  )
  return _Plan(tuple(inputs), build)


def _extreme(inputs, members: Matrix, name: str) -> _Plan:
  sign = 1 if name.endswith("max") else -1
  return _Plan(inputs, functools.partial(_Export.extreme, members=members, sign=sign), sign)


class _Reading:
  """A scalar function on each of its pieces, as a CVXPY expression of its argument."""

  def __init__(self, op: Operation, root: Value, f: ScalarFunction):
    self.shape = op.shape
    self._value, self._root = Value(*Known.exactly(np.zeros(op.shape)).masks, op), root
    with np.errstate(all="ignore"):
      self.pieces = pieces.pieces_between(root, f.ends)
      read = [piece.of(self._value) for piece in self.pieces]
      self.is_affine = all(jet.is_affine for jet in read)
      smooth = len(read) > 1 and all(map(np.all, jets.slope_change(*read[-2:])))
      self.ends_smoothly = smooth and read[-1].is_affine

  def of(self, at: cp.Expression, piece: int) -> cp.Expression:
    """The function, continued beyond the piece's ends."""
    return self._node(self._value, at, self.pieces[piece])

  def _node(self, start: Value | Known, at, piece: pieces.Piece) -> Any:
    with np.errstate(all="ignore"):
      node, _ = piece.settled(start)
    if node is self._root:
      return at
    if isinstance(node, Known):
      return cp.Constant(_flat(node.array, self.shape))
    op = node.made_by
    assert op is not None
    name, inputs = op.primitive, op.inputs
    if name in pieces.STEPS:
      with np.errstate(all="ignore"):
        return cp.Constant(_flat(piece.of(node).value[0], self.shape))
    parts = [self._node(x, at, piece) for x in inputs]
    if name in _EXPONENTIALS:
      return _EXPONENTIALS[name](*parts)
    if name == "abs":
      with np.errstate(all="ignore"):
        return parts[0] if piece.sign(inputs[0]) > 0 else -parts[0]
    if name in ("add", "sub"):
      return parts[0] + (parts[1] if name == "add" else -parts[1])
    if name == "neg":
      return -parts[0]
    if name == "mul":
      return cp.square(parts[0]) if inputs[0] is inputs[1] else cp.multiply(*parts)
    if name == "square" or (name == "integer_pow" and op.params["y"] == 2):
      return cp.square(parts[0])
    if name == "div" and isinstance(inputs[1], Known):
      return cp.multiply(1 / parts[1].value, parts[0])
    raise _NoConicFormError


def _pairs(shape: tuple[int, ...]) -> Matrix:
  """Entry i of each of two arrays of a shape as the members of i."""
  return scipy.sparse.hstack([scipy.sparse.eye_array(math.prod(shape))] * 2, "csr")


def _present(u: _Affine, members: Matrix, absent: float) -> tuple[np.ndarray, _Affine]:
  """(i, u_j) of all pairs, j a member of i, without members that are the constant `absent`."""
  of, rows = members.nonzero()
  kept = u.offset[rows] != absent
  if not kept.any():
    raise _NoConicFormError
  return of[kept], u.rows(rows[kept])


def _any(size: int, of: np.ndarray, bad: np.ndarray) -> np.ndarray:
  """Which results have a bad member, or none at all."""
  out = np.ones(size, bool)
  out[of] = False
  out[of[bad]] = True
  return out


def _matrix(rows, columns, shape) -> Matrix:
  return scipy.sparse.csr_array((np.ones(len(rows)), (rows, columns)), shape)


def _number(expression: cp.Expression) -> np.ndarray:
  return np.asarray(expression.value)


def _flat(x: Any, shape: tuple[int, ...]) -> np.ndarray:
  return np.broadcast_to(np.asarray(x), shape).ravel()


def _wide(x: Value | Known, shape: tuple[int, ...]) -> Value | np.ndarray:
  return x if isinstance(x, Value) else np.broadcast_to(x.array, shape)
