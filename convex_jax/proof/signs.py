"""Signs, infinities and repetitions of values, looked up on demand, back through the graph."""

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from convex_jax.proof.in_numpy import as_rows
from convex_jax.proof.linear import LINEAR, MOVES, carried, over_axes
from convex_jax.proof.values import Known, Masks, Operation, Value, either, swapped, uniform

DEPTH = 30  # Operations back from a value at which the search is given up.
LARGE = 2**22  # Elements of the largest array that is made in a search.
NON_NEGATIVE = {"exp", "exp2", "abs", "square", "cosh", "logistic", "sqrt", "erfc"}
SAME_SIGN = {"tanh", "erf", "sinh", "asinh", "atan", "cbrt", "sign", "expm1", "log1p"}
SAME_SIGN |= {"floor", "ceil", "round"}


def sign(x: Value | Known, depth: int = DEPTH) -> Masks:
  """Where a number, if it is one, is not known to be >= 0, and not known to be <= 0."""
  if isinstance(x, Known):
    return ~(x.low >= 0), ~(x.high <= 0)
  if x not in _signs:
    op, found = x.made_by, None
    if op is not None and op.eqn is not None and x.is_real and depth > 0:
      found = _sign(op, lambda y: sign(y, depth - 1))
    _signs[x] = found or (uniform(True, x.shape), uniform(True, x.shape))
  return _signs[x]


_signs: "weakref.WeakKeyDictionary[Value, Masks]" = weakref.WeakKeyDictionary()


def _sign(op: Operation, of: Callable[[Any], Masks]) -> Masks | None:
  """The masks of a result, by those of the operation's inputs; None: nothing is known."""
  name, inputs = op.primitive, op.inputs
  no, yes = uniform(False, op.shape), uniform(True, op.shape)
  values = [x for x in inputs if isinstance(x, Value)]
  if name in NON_NEGATIVE:
    return no, yes
  if name in SAME_SIGN:
    return of(inputs[0])
  if name in ("integer_pow", "pow"):
    return _power(op, of)
  if name in ("max", "min", "clamp", "logaddexp"):  # logaddexp is above the maximum.
    return _bounded(op, of)
  if name in ("reduce_max", "reduce_min") and 0 not in inputs[0].shape:
    turn = swapped if name == "reduce_min" else tuple
    above, below = turn(of(inputs[0]))
    return turn((~over_axes(op, ~above), over_axes(op, below)))
  if name == "select_n" and isinstance(inputs[0], Value):
    cases = [_case(inputs[0], i, x, of) for i, x in enumerate(inputs[1:])]
    return either(*(above for above, _ in cases)), either(*(below for _, below in cases))
  if name == "mul" and len(values) == 2:
    (p, n), (q, m) = map(of, inputs)
    return (p | q) & (n | m) & ~squares(op), (p | m) & (n | q)
  if name == "dot_general" and len(values) == 2:
    a, b = map(of, inputs)
    alike = any(not (p.any() or q.any()) for p, q in zip(a, b, strict=True))
    return no if alike else ~squares(op), yes
  if name == "log":
    return _logarithm(values[0], of), yes
  return carried(op, of) if name in LINEAR else None


def _bounded(op: Operation, of: Callable[[Any], Masks]) -> Masks | None:
  """A maximum is >= 0 where either number is, and <= 0 where both are."""
  yes = uniform(True, op.shape)
  if op.primitive == "clamp":
    low, x, high = map(of, op.inputs)
    return yes & ((low[0] & x[0]) | high[0]), yes & ((low[1] | x[1]) & high[1])
  turn = swapped if op.primitive == "min" else tuple
  for x in op.inputs:  # Where a bound decides, the graph behind the other is left alone.
    if isinstance(x, Known) and not turn(of(x))[0].any():
      return turn((~yes, yes))
  (p, n), (q, m) = (turn(of(x)) for x in op.inputs)
  if op.primitive == "logaddexp":
    return yes & p & q, yes
  return turn((yes & p & q, yes & (n | m)))


def _case(test: Value, i: int, x: Any, of: Callable[[Any], Masks]) -> Masks:
  """The sign of what a choice returns where it takes its case `i`: x > 0 says it of x."""
  above, below = of(x)
  op = test.made_by
  if op is None or op.primitive not in ("gt", "ge", "lt", "le"):
    return above, below
  for z, c, turned in ((*op.inputs, False), (*op.inputs[::-1], True)):
    if z is x and isinstance(c, Known):
      greater = (op.primitive in ("gt", "ge")) != turned
      if greater == (i == 1):
        return above & ~(c.low >= 0), below
      return above, below & ~(c.high <= 0)
  return above, below


def _logarithm(x: Value, of: Callable[[Any], Masks]) -> np.ndarray:
  """log(1 + u) is >= 0 where u is."""
  op = x.made_by
  for one, u in (op.inputs, op.inputs[::-1]) if op and op.primitive == "add" else ():
    if isinstance(one, Known):
      return uniform(False, x.shape) | ~(one.low >= 1) | of(u)[0]
  return uniform(True, x.shape)


def exponent_of(op: Operation) -> Known | Value:
  """The exponent of a power; 2 of a product of equal numbers."""
  if op.primitive == "integer_pow":
    return Known.exactly(np.float64(op.params["y"]))
  return op.inputs[1] if op.primitive == "pow" else Known.exactly(np.float64(2))


def is_multiple(y: Known, n: int, rest: int = 0) -> np.ndarray:
  """Where an exponent is an integer that leaves this rest when divided by n."""
  with np.errstate(invalid="ignore"):
    return (y.low == y.high) & (y.low % n == rest)


def _power(op: Operation, of: Callable[[Any], Masks]) -> Masks:
  """x^y is >= 0 where x is, and where y is even; it has the sign of x where y is odd."""
  y, yes = exponent_of(op), uniform(True, op.shape)
  above, below = of(op.inputs[0])
  if isinstance(y, Value):
    return yes & above, yes
  return yes & above & ~is_multiple(y, 2), yes & ~(is_multiple(y, 2, 1) & ~below)


# Infinities.


def infinite(x: Value | Known) -> Masks:
  """Where a number is not known to be minus infinity, and not known to be infinity."""
  if isinstance(x, Known):
    return ~(x.high == -np.inf), ~(x.low == np.inf)
  op, unknown = x.made_by, uniform(True, x.shape)
  if op is None or op.eqn is None or op.primitive not in (*MOVES, "neg"):
    return unknown, unknown
  if op.primitive != "gather":
    return carried(op, infinite)
  of, indices = op.inputs
  if not isinstance(indices, Known) or not indices.is_exact:
    return unknown, unknown
  # The 0 that a gather may fill in is finite.
  above, below = (op.bind(mask, indices.low, fill_value=True) for mask in infinite(of))
  return np.asarray(above), np.asarray(below)


# Repetitions.


_REARRANGING = {"broadcast_in_dim", "reshape", "transpose", "squeeze", "rev", "slice"}


def _source(x: Any) -> tuple[Value, list[Operation]]:
  """The value whose elements x has, and the moves by which it has them, the last one first."""
  moves = []
  while x.made_by is not None and x.made_by.primitive in _REARRANGING:
    moves.append(x.made_by)
    x = x.made_by.inputs[0]
  return x, moves


def same_elements(a: Any, b: Any) -> tuple[np.ndarray, np.ndarray] | None:
  """Two arrays of a's and of b's shape, equal where the elements are; None: nowhere."""
  (root, moves), (other, others) = _source(a), _source(b)
  if root is not other:
    return None

  def numbers(moves):
    index = np.arange(np.prod(root.shape, dtype=int), dtype=np.int32).reshape(root.shape)
    for op in reversed(moves):
      index = op.move(index)
    return index

  return numbers(moves), numbers(others)


def squares(op: Operation) -> np.ndarray:
  """Where a `mul` or a `dot_general` of two values sums squares: pairs of equal elements."""
  a, b = op.inputs
  found = same_elements(a, b)
  if found is None:
    return uniform(False, op.shape)
  if op.primitive == "mul":
    return np.broadcast_to(np.equal(*found), op.shape)
  left, right = as_rows(op.params["dimension_numbers"], *found)
  if left.size * right.shape[1] > LARGE:
    return uniform(False, op.shape)
  return (left[:, :, None] == right[:, None]).all(-1).reshape(op.shape)
