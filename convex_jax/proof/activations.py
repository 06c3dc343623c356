"""Curvature of a scalar function with kinks, found from how it is computed.

ELU is `where(z > 0, z, alpha expm1(where(z > 0, 0, z)))`. Neither the choice nor `expm1` of a
choice has a curvature that a rule could state. But between the kinks, the numbers with which z is
compared, every choice is made, and the rest has derivatives (`jets`). A continuous function whose
second derivative is nowhere negative, and whose slope falls at no kink, is convex on the whole line.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from convex_jax.proof.enclosures import add, divide, multiply, negative, subtract
from convex_jax.proof.jets import LEFT, RIGHT, ZERO, NoRuleError, ends_at, slope_change
from convex_jax.proof.parameters import is_plain
from convex_jax.proof.pieces import (
  COMPARISONS,
  ELEMENTWISE,
  LOGIC,
  STEPS,
  pieces_between,
  signature,
)
from convex_jax.proof.tails import bounds
from convex_jax.proof.values import (
  Known,
  Masks,
  Operation,
  ScalarFunction,
  Value,
  composed,
  overlap,
)

# What an activation may end in. A function of one lost value, as exp or a factor, mends nothing.
ENDS = {"abs", "add", "sub", "mul", "max", "min", "select_n", "square", "integer_pow"}
LIMIT = 200  # Operations that are searched for the kinks of a value.
REMEMBERED = 500  # Scalar functions that are not looked at again.
MOST = 8  # Earlier values that are tried.


def look(op: Operation, masks: Masks) -> tuple[Masks, Operation]:
  """The masks of a value, better where it is a scalar function of an earlier one; and it."""
  found, value = None, Value(*masks, op)
  if op.primitive in ("add", "sub", "mul") and any(isinstance(x, Known) for x in op.inputs):
    return masks, op
  for root, kinks in _candidates(value):
    if found is not None and root.is_lost:
      continue
    try:
      with np.errstate(all="ignore"):
        f = _remembered(value, root, _reached(root, kinks))
    except NoRuleError:
      continue
    curved = composed(root, f.convex, f.concave, f.rising, f.falling)
    if found is None or not (curved[0] & curved[1]).all():
      bent = not np.all(f.convex | f.concave) and op.primitive in ("select_n", "add")
      note = f.note if bent else ""
      found = curved, dataclasses.replace(op, scalar=(root, f), note=note)
    if not overlap(curved):
      break
  return (masks, op) if found is None else found


def _remembered(value: Value, root: Value, ends: list[np.ndarray]) -> ScalarFunction:
  """`_judged`, once for all values that are the same function: a network has many alike."""
  key = signature(value, root)
  if key is None:
    return _judged(value, root, ends)
  key = key, tuple((end.shape, end.tobytes()) for end in ends)
  if key not in _functions:
    if len(_functions) >= REMEMBERED:
      _functions.pop(next(iter(_functions)))
    try:
      _functions[key] = _judged(value, root, ends)
    except NoRuleError as error:
      _functions[key] = error
  found = _functions[key]
  if isinstance(found, NoRuleError):
    raise NoRuleError
  return found


_functions: dict[Any, ScalarFunction | NoRuleError] = {}


def kinks_of(value: Value, root: Value) -> list[np.ndarray]:
  """Where a value, as a function of an earlier one, may have kinks, in rising order."""
  return next((kinks for z, kinks in _candidates(value, most=None) if z is root), [])


def judged(value: Value, root: Value) -> ScalarFunction:
  """What is proved of a value as a function of an earlier one, on the whole line.

  Raises:
    NoRuleError: it is not one, as far as can be seen.
  """
  infinite = np.full((1,) * len(value.shape), np.inf)
  ends = _rising([-infinite, *kinks_of(value, root), infinite])
  with np.errstate(all="ignore"):
    return _remembered(value, root, ends)


def _reached(root: Value, kinks: list[np.ndarray]) -> list[np.ndarray]:
  """The ends of the pieces of the line in which a value may be."""
  infinite, least = np.full_like(kinks[0], np.inf), np.full_like(kinks[0], _least(root))
  return _rising([least, *(k for k in kinks if not np.all(k <= least)), infinite])


def _rising(ends: list[np.ndarray]) -> list[np.ndarray]:
  """Ends of one shape, if in every element each is above the last."""
  if not all(np.all(low < high) for low, high in itertools.pairwise(ends)):
    raise NoRuleError
  return list(np.broadcast_arrays(*ends))


def _judged(value: Value, root: Value, ends: list[np.ndarray]) -> ScalarFunction:
  """What is proved of a value as a function of an earlier one, between these ends."""
  pieces = pieces_between(root, ends)
  jets = [piece.of(value) for piece in pieces]
  falls, rises, note = np.False_, np.False_, ""
  for k, left, right in zip(ends[1:-1], jets[:-1], jets[1:], strict=True):
    up, down = slope_change(left, right)
    falls, rises = falls | ~up, rises | ~down
    if not note and not np.all(up):
      slopes = (ends_at(x.steepness, i)[0] for x, i in ((left, RIGHT), (right, LEFT)))
      numbers = [f"{float(np.ravel(x)[0]):g}" for x in (*slopes, k)]
      note = "its slope goes from {} to {} at {}".format(*numbers)
  continuous = functools.reduce(np.logical_and, [x.is_continuous for x in jets])
  if not np.all(continuous):
    note = f"it jumps at {float(np.ravel(ends[-2])[0]):g}"
  slopes, seconds = zip(*(bounds(piece, value) for piece in pieces), strict=True)
  least = functools.reduce(np.minimum, [low for low, _ in slopes])
  most = functools.reduce(np.maximum, [high for _, high in slopes])

  def everywhere(*tests: Any) -> Any:
    return functools.reduce(np.logical_and, tests, continuous)

  return ScalarFunction(
    convex=everywhere(~falls, *(low >= 0 for low, _ in seconds)),
    concave=everywhere(~rises, *(high <= 0 for _, high in seconds)),
    least=np.where(continuous & ~np.isnan(least), least, -np.inf),
    most=np.where(continuous & ~np.isnan(most), most, np.inf),
    ends=ends,
    note=note,
  )


def _least(root: Value) -> float:
  """A lower bound of an earlier value: 0 for magnitudes and the like."""
  op = root.made_by
  if op is None or not is_plain(op):
    return -np.inf
  even = op.primitive == "integer_pow" and op.params["y"] > 0 and op.params["y"] % 2 == 0
  positive = op.primitive == "max" and any(
    isinstance(k, Known) and np.all(k.low >= 0) for k in op.inputs
  )
  return 0.0 if even or positive or op.primitive in ("abs", "sqrt", "square") else -np.inf


def _candidates(value: Value, most: int | None = MOST) -> Iterator[tuple[Value, list[np.ndarray]]]:
  """Earlier values, and where `value`, as a function of them, may have kinks, in rising order."""
  rank = len(value.shape)
  roots: dict[int, tuple[Value, list[np.ndarray]]] = {}
  for node, number in _compared(value):
    for root, kink in _solved(node, number):
      kink = np.reshape(kink, (1,) * (rank - np.ndim(kink)) + np.shape(kink))
      kinks = roots.setdefault(id(root), (root, []))[1]
      if not any(np.array_equal(kink, k) for k in kinks):
        kinks.append(kink)
  for root, kinks in list(roots.values())[:most]:
    yield root, list(np.sort(np.stack(np.broadcast_arrays(*kinks)), 0))


def _compared(value: Value) -> Iterator[tuple[Value, np.ndarray]]:
  """Pairs (z, c): values that are compared with known numbers on the way to `value`."""
  todo, seen = collections.deque[Any]([value]), set()
  while todo and len(seen) < LIMIT:  # Breadth first: the nearest comparison comes first.
    node = todo.popleft()
    if id(node) in seen or not isinstance(node, Value) or node.made_by is None:
      continue
    seen.add(id(node))
    op = node.made_by
    if op.primitive in ("abs", "sign") and isinstance(op.inputs[0], Value):
      yield op.inputs[0], np.array(0.0)
    if op.primitive in COMPARISONS or op.primitive in ("max", "min"):
      for z, c in (op.inputs, op.inputs[::-1]):
        if isinstance(z, Value) and isinstance(c, Known) and _is_number(c):
          yield z, c.low
    if op.primitive in {*ELEMENTWISE, *STEPS, *COMPARISONS, *LOGIC}:
      todo.extend(op.inputs)


def _is_number(k: Known) -> bool:
  return k.is_float and k.is_exact and not k.not_finite.any()


def _solved(node: Value, number: np.ndarray) -> Iterator[tuple[Value, np.ndarray]]:
  """Pairs (z, c): `node` = `number` only at z = c. Back through what can be solved exactly."""
  yield node, number
  op = node.made_by
  if op is None or op.primitive not in ELEMENTWISE:
    return
  point, solutions = (number, number), []
  values = [x for x in op.inputs if isinstance(x, Value)]
  others = [(k.low, k.high) for k in op.inputs if isinstance(k, Known) and k.is_float]
  if len(values) != 1 or len(others) != len(op.inputs) - 1:
    return
  k = others[0] if others else ZERO
  with np.errstate(all="ignore"):
    if op.primitive == "neg" or (op.primitive == "sub" and values[0] is op.inputs[1]):
      solutions = [subtract(k, point)]
    elif op.primitive in ("add", "sub"):
      solutions = [subtract(point, k) if op.primitive == "add" else add(point, k)]
    elif op.primitive == "mul" or (op.primitive == "div" and values[0] is op.inputs[0]):
      solutions = [divide(point, k) if op.primitive == "mul" else multiply(point, k)]
    elif op.primitive == "abs":
      solutions = [point, negative(point)] if np.all(number > 0) else []
    elif op.primitive in ("max", "min"):
      beyond = number > k[1] if op.primitive == "max" else number < k[0]
      solutions = [point] if np.all(beyond) else []
  for low, high in solutions:
    if np.all(np.equal(low, high)) and np.all(np.isfinite(low)):
      yield from _solved(values[0], low)
