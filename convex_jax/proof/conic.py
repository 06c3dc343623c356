"""How an operation's results are bounded by its arguments, in CVXPY: the conic form of each kind.

A bound is one-sided: t >= g(u) where g is convex, t <= g(u) where it is concave. Which kind an
operation is, and of which values it is made, `export` says.
"""

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Callable
from typing import Any

import cvxpy as cp
import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse

from convex_jax.proof import affine_maps, jets, pieces
from convex_jax.proof.affine_maps import Matrix
from convex_jax.proof.float64 import float64
from convex_jax.proof.values import Known, Operation, ScalarFunction, Value

LARGEST = 10**8  # Entries of the second derivatives of a product of two affine values.
ROUNDING = 1e-9  # Relative; how far below 0 an eigenvalue of a convex form may be computed.

EXPONENTIALS: dict[str, Callable[[Any], Any]] = {
  "exp": cp.exp,
  "exp2": lambda u: cp.exp(math.log(2) * u),
  "expm1": lambda u: cp.exp(u) - 1,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Vector:
  """A flat CVXPY variable: the input, or the results of an operation that is not affine.

  A feasible entry may lie above the number that it stands for, or below it. One that may do both
  says nothing: the operation has no conic form, for this `reason`.
  """

  variable: cp.Variable
  above: np.ndarray
  below: np.ndarray
  reason: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Affine:
  """sum of matrix @ vector + offset, flat; and whether an entry may lie above or below its own."""

  terms: list[tuple[Matrix, Vector]]
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

  def rows(self, chosen: np.ndarray) -> "Affine":
    """The chosen entries."""
    terms = [(matrix[chosen], vector) for matrix, vector in self.terms]
    return Affine(terms, self.offset[chosen], self.above[chosen], self.below[chosen])


class NoConicFormError(Exception):
  """An operation that cannot be written as a cone's constraints here."""


class Bounds:
  """Constraints, and how each of their variables gets its value.

  The methods after `equal` bound the results t of an operation by its arguments u. Each returns
  which results have no valid bound, and raises `NoConicFormError` if none has.
  """

  def __init__(self):
    self.constraints: list[cp.Constraint] = []
    self.steps: list[Callable[[], None]] = []

  def define(self, variable: cp.Variable, value: Callable[[], Any]) -> None:
    """`value()` is the variable's, once those before it have theirs."""
    self.steps.append(lambda: variable.save_value(np.asarray(value())))

  def equal(self, t: cp.Variable, u: Affine) -> None:
    """t = u: all of `u` that is finite."""
    self.constraints.append(t == u.expression)
    self.define(t, lambda: u.expression.value)

  def extreme(self, t: cp.Variable, u: Affine, members: Matrix, sign: int):
    """t_i >= u_j for each member j of i (sign 1), or <= (sign -1)."""
    of, part = _present(u, members, -sign * np.inf)
    self.constraints.append(sign * (t[of] - part.expression) >= 0)

    def value():
      out = np.full(t.size, -np.inf)
      np.maximum.at(out, of, sign * _number(part.expression))
      return sign * out

    self.define(t, value)
    return _any(t.size, of, part.infinite | (part.below if sign > 0 else part.above))

  def log_sum_exp(self, t: cp.Variable, u: Affine, members: Matrix):
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

  def increasing(self, t: cp.Variable, u: Affine, g: Callable[[Any], Any]):
    """t >= g(u), for a convex non-decreasing g."""
    bound = g(u.expression)
    self.constraints.append(t >= bound)
    self.define(t, lambda: bound.value)
    return u.below | u.infinite

  def even(self, t: cp.Variable, u: Affine, g: Callable[[Any], Any], sums: Any = None):
    """t >= g(|u|), or sums of it, for a g that is convex and non-decreasing above 0."""
    bound = g(self._size(u))
    bad = (u.above & u.below) | u.infinite
    if sums is not None:
      bound, bad = sums @ bound, sums @ bad > 0
    self.constraints.append(t >= bound)
    self.define(t, lambda: bound.value)
    return bad

  def norm(self, t: cp.Variable, u: Affine, weights: Matrix, offset: np.ndarray):
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

  def quadratic(self, t: cp.Variable, u: Affine, op: Operation):
    """t >= a quadratic form, the product of two affine values, by factorisation."""
    left, right = op.inputs
    terms = [(matrix, vector.variable) for matrix, vector in u.terms if matrix.nnz]
    if not u.is_exact or u.infinite.any() or not terms:
      raise NoConicFormError
    x = cp.hstack([variable for _, variable in terms])
    if t.size * x.size**2 > LARGEST:
      raise NoConicFormError
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
      raise NoConicFormError
    roots = np.sqrt(np.maximum(curvature, 0))[:, None] * axes
    roots = np.swapaxes(roots, 1, 2).reshape(-1, x.size)
    sums = _matrix(
      np.repeat(np.arange(t.size), x.size), np.arange(len(roots)), (t.size, len(roots))
    )
    bound = sums @ cp.square(roots @ x) + slope @ x + at
    self.constraints.append(t >= bound)
    self.define(t, lambda: bound.value)
    return np.zeros(t.size, bool)

  def _size(self, u: Affine) -> Any:
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

  def kinked(self, t: cp.Variable, z: Affine, reading: "Reading", f: ScalarFunction, sign: int):
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
      raise NoConicFormError
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
      raise NoConicFormError
    self.constraints += constraints
    rising, falling = (_flat(x, reading.shape) for x in (f.rising, f.falling))
    too_low, too_high = (z.below, z.above) if sign > 0 else (z.above, z.below)
    curved = _flat(f.convex if sign > 0 else f.concave, reading.shape)
    bad = np.where(rising, too_low, np.where(falling, too_high, too_low | too_high))
    return bad | ~curved | z.infinite


class Reading:
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
    if name in EXPONENTIALS:
      return EXPONENTIALS[name](*parts)
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
    raise NoConicFormError


def _present(u: Affine, members: Matrix, absent: float) -> tuple[np.ndarray, Affine]:
  """(i, u_j) of all pairs, j a member of i, without members that are the constant `absent`."""
  of, rows = members.nonzero()
  kept = u.offset[rows] != absent
  if not kept.any():
    raise NoConicFormError
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
