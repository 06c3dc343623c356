"""Quadratic forms: products of affine values whose matrix is positive semidefinite.

x' A x is convex if and only if A + A' is positive semidefinite (Boyd and Vandenberghe 2004, 3.1.4).
No product in it need be convex: the matrix belongs to the sum. A value that is made of products of
two affine values, by linear operations, has one for each of its elements; it is read off by
evaluating the graph at pairs of unit vectors. Matrices whose entries are exact numbers are judged in
exact arithmetic, so that singular ones are seen, others by a Cholesky factorisation in floating
point that succeeds only if the matrix is positive definite (Rump 2006, "Verification of positive
definiteness").
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import numpy as np

from convex_jax.proof.constants import fold, number
from convex_jax.proof.equations import Unknown
from convex_jax.proof.float64 import float64
from convex_jax.proof.linear import LINEAR, WEIGHTED
from convex_jax.proof.values import Known, Masks, Operation, Value, uniform

VARIABLES = 256  # Most variables of a form ...
ENTRIES = 2**18  # ... and entries of all matrices of a value: more would take seconds.
BLOCK = 2**22  # Elements of the largest array while they are computed.
STEPS = 200  # Operations that are searched.
EXACT = 96  # Size up to which matrices are judged in exact arithmetic.
PRIMITIVES = {*LINEAR, "square", "integer_pow"}
PRIMITIVES -= {"gather", "scatter", "scatter-add", "scatter-mul"}
PRIMITIVES -= {"triangular_solve"}


class _NoFormError(Exception):
  """The value is not quadratic in affine values, as far as can be seen."""


def curvature(x: Value) -> Masks | None:
  """Masks of a value that is a quadratic form in the input; None if it is not seen to be one."""
  form = _form(x, shifts=True)
  if form is None:
    return None
  low, high = form
  return _indefinite(low, high), _indefinite(-high, -low)


def not_norm(x: Value) -> np.ndarray:
  """Where a value is not known to be the square of a Euclidean norm of affine numbers."""
  form = _form(x, shifts=False)
  return uniform(True, x.shape) if form is None else _indefinite(*form)


def _form(x: Value, shifts: bool) -> tuple[np.ndarray, np.ndarray] | None:
  """Enclosures of the matrices (n, n, ...) of a value; None if it is not quadratic.

  With `shifts`, known numbers that are added are ignored, and the variables are mostly the
  input. Without, a sum with a known number is a variable, and where the value adds one, it is no
  form.
  """
  try:
    return _Form(x, shifts).matrices()
  except _NoFormError:
    return None


class _Form:
  """A value as a function of two vectors of variables, linear in each, and symmetric."""

  def __init__(self, x: Value, shifts: bool):
    self._x, self._shifts = x, shifts
    self._starts: dict[int, int] = {}  # Where each variable, by `id`, begins.
    self._degrees: dict[int, int] = {}
    self._weights: dict[int, Known] = {}
    self._size = self._largest = 0
    if self._degree(x) != 2:
      raise _NoFormError
    n = self._size
    if n == 0:  # Of arrays without elements.
      raise _NoFormError
    if n * n * x.not_convex.size > ENTRIES or n * self._largest > BLOCK:
      raise _NoFormError

  def _degree(self, x: Value) -> int:
    """1 of a linear function of variables, 2 of a form; finds the variables and the weights."""
    if id(x) not in self._degrees:
      if len(self._degrees) > STEPS or not x.is_real:
        raise _NoFormError
      self._degrees[id(x)] = self._read(x)
      self._largest = max(self._largest, x.not_convex.size)
    return self._degrees[id(x)]

  def _read(self, x: Value) -> int:
    op = x.made_by
    values = [y for y in op.inputs if isinstance(y, Value)] if op else []
    if op is None or not self._fits(op) or (x.is_affine and not all(v.is_affine for v in values)):
      return self._variable(x)
    degrees = [self._degree(v) for v in values]
    if not degrees:
      raise _NoFormError
    if op.primitive in _SQUARES:
      degrees *= 2
    degree = sum(degrees) if op.primitive in (*_SQUARES, *_PRODUCTS) else max(degrees)
    if degree > 2 or not (self._shifts or max(degrees) == min(degrees)):
      raise _NoFormError
    return degree

  def _fits(self, op: Operation) -> bool:
    """Whether an operation is linear, or a product, with known numbers that may be in it."""
    if op.eqn is None or op.primitive not in PRIMITIVES or op.params.get("y", 2) != 2:
      return False
    known = {id(y): y for y in op.inputs if isinstance(y, Known)}
    if any(y.not_finite.any() or not (y.is_float or y.is_exact) for y in known.values()):
      return False
    if op.primitive in WEIGHTED:
      self._weights |= known
      if op.primitive == "div":
        return isinstance(op.inputs[1], Known)
      return bool(known) or op.primitive in _PRODUCTS
    zeros = all(not (y.low.any() or y.high.any()) for y in known.values() if y.is_float)
    return self._shifts or zeros

  def _variable(self, x: Value) -> int:
    if not x.is_affine:
      raise _NoFormError
    self._starts[id(x)] = self._size
    self._size += x.not_convex.size
    if self._size > VARIABLES:
      raise _NoFormError
    return 1

  def matrices(self) -> tuple[np.ndarray, np.ndarray]:
    """Enclosures of the value at all pairs of unit vectors, some rows at a time."""
    unit, weights = np.eye(self._size), list(self._weights.values())
    step, ends = max(1, BLOCK // (self._size * self._largest)), []
    for first in range(0, self._size, step):
      vectors = [Known(a, a, varies=True) for a in (unit[first : first + step], unit)]
      ends.append(_enclosed(self._pairs, [*vectors, *weights]))
    low, high = (np.concatenate(parts) for parts in zip(*ends, strict=True))
    return low, high

  def _pairs(self, some, unit, *weights):
    known = dict(zip(self._weights, weights, strict=True))
    pair = functools.partial(self._pair, known)
    return jax.vmap(lambda e: jax.vmap(lambda f: pair((e, f)))(unit))(some)

  def _pair(self, known: dict[int, Any], vectors: tuple[Any, Any]):
    """The value at a pair of vectors."""
    read: dict[tuple[int, int], Any] = {}

    def of(x: Value, end: int):
      """A form at the pair, a linear function at one of the vectors."""
      if (id(x), end) not in read:
        read[id(x), end] = compute(x, end)
      return read[id(x), end]

    def compute(x, end):
      if id(x) in self._starts:
        start = self._starts[id(x)]
        return vectors[end][start : start + x.not_convex.size].reshape(x.shape)
      op: Any = x.made_by
      values = [y for y in op.inputs if isinstance(y, Value)]
      if self._degrees[id(x)] == 1 or max(self._degrees[id(v)] for v in values) == 2:
        return apply(op, [part(op, y, end, self._degrees[id(x)]) for y in op.inputs])
      a, b = values * (3 - len(values))  # Those of a product, or the base of a square twice.
      return (apply(op, [of(a, 0), of(b, 1)]) + apply(op, [of(a, 1), of(b, 0)])) / 2

    def part(op, y, end, degree):
      """An operand of a linear operation; what adds nothing of this degree is 0."""
      if isinstance(y, Value):
        return of(y, end) if self._degrees[id(y)] == degree else np.zeros(y.shape)
      if not y.is_float:
        return y.low
      return known[id(y)] if op.primitive in WEIGHTED else np.zeros(y.shape)

    def apply(op, operands):
      if op.primitive in _SQUARES:
        return operands[0] * operands[1]
      double = {"preferred_element_type": np.dtype(np.float64)}
      return op.bind(*operands, **(double if "preferred_element_type" in op.params else {}))

    return of(self._x, 0)


_PRODUCTS = {"mul", "dot_general"}
_SQUARES = {"square", "integer_pow"}


def _enclosed(function: Callable[..., Any], inputs: Sequence[Known]) -> tuple[Any, Any]:
  """The enclosure of a function's one output."""
  with float64():
    closed = jax.make_jaxpr(function)(*(x.low for x in inputs))
  jaxpr, known = closed.jaxpr, dict(zip(closed.jaxpr.invars, inputs, strict=True))
  known |= zip(jaxpr.constvars, (_exactly(x) for x in closed.consts), strict=True)

  def read(var):
    return _exactly(var.val) if isinstance(var, jex.Literal) else known[var]

  try:
    for eqn in jaxpr.eqns:
      known.update(zip(eqn.outvars, fold(eqn, list(map(read, eqn.invars))), strict=True))
  except Unknown as e:
    raise _NoFormError from e
  output = read(jaxpr.outvars[0])
  return output.low, output.high


def _exactly(constant: Any) -> Known:
  return number(constant, np.asarray(constant).dtype)


def _indefinite(low: np.ndarray, high: np.ndarray) -> np.ndarray:
  """Which of the matrices (n, n, ...) are not known to be positive semidefinite."""
  flat = [a.reshape(*a.shape[:2], -1) for a in (low, high)]
  pairs = (([*np.moveaxis(a, -1, 0)]) for a in flat)
  return np.array([not _is_semidefinite(*p) for p in zip(*pairs, strict=True)], bool).reshape(
    low.shape[2:]
  )


def _is_semidefinite(low: np.ndarray, high: np.ndarray) -> bool:
  low, high = np.maximum(low, low.T), np.minimum(high, high.T)  # It is symmetric.
  used = (low != 0).any(0) | (high != 0).any(0)
  low, high = low[used][:, used], high[used][:, used]
  middle = low + (high - low) / 2
  if not np.isfinite(middle).all() or (np.diag(high) < 0).any():
    return False
  if not middle.size or _has_cholesky(middle, (high - low).sum(0).max() / 2):
    return True
  if (low != high).any() or len(low) > EXACT:
    return False
  least = np.linalg.eigvalsh(middle)[0]
  return least > -1e-9 * np.trace(middle) and _has_pivots(low)


def _has_cholesky(matrix: np.ndarray, radius: float) -> bool:
  """Whether every symmetric matrix this close to `matrix` is positive definite.

  Floating-point Cholesky factors A + E with |E| <= (n + 2) eps trace(A), so that it succeeds only
  if no eigenvalue of A is below minus that; A is `matrix` less a multiple of 1 that exceeds the
  radius and, several times, this bound and the rounding of A.
  """
  n, size = len(matrix), max(np.trace(matrix), np.abs(matrix).sum(0).max())
  shift = 8 * (n + 2) * np.finfo(np.float64).eps * size + 1.001 * radius + n * 1e-290
  try:
    np.linalg.cholesky(matrix - shift * np.eye(n))
  except np.linalg.LinAlgError:
    return False
  return True


def _has_pivots(matrix: np.ndarray) -> bool:
  """Whether a symmetric matrix is positive semidefinite, in exact arithmetic.

  Elimination in integers (Bareiss 1968): its pivots are those of L D L' times positive numbers. A
  pivot of 0 is allowed where the rest of its row is 0.
  """
  ratios = [[x.as_integer_ratio() for x in row] for row in matrix.tolist()]
  scale = max(q for row in ratios for _, q in row)  # Powers of 2.
  rest, last = [[p * (scale // q) for p, q in row] for row in ratios], 1
  while rest:
    (pivot, *row), *below = rest
    if pivot < 0 or (pivot == 0 and any(row)):
      return False
    rest = [r[1:] for r in below]
    if pivot > 0:
      rest = [
        [(pivot * x - a * b) // last for b, x in zip(row, r, strict=True)]
        for a, r in zip(row, rest, strict=True)
      ]
      last = pivot
  return True
