"""Sums that are convex together, though none of their terms is.

max(a - b, 0) + b is convex wherever a and b are: the first term falls in b, but no faster than the
second rises. A value is read here as

    c . v + sum of c_j f_j(z_j),    z_j = d_j . v,

with earlier values v, scalar functions f_j of slopes in [m_j, M_j], and known numbers c, d. If
every c_j f_j is convex it is a convex function of v, and if c + sum of c_j d_j [m_j, M_j] is
nowhere negative, a non-decreasing one, so that the convexity of v passes through (Boyd and
Vandenberghe 2004, "Convex Optimization", 3.2.4, vector composition).
"""

import contextlib
import dataclasses
import functools
import heapq
from typing import Any

import numpy as np

from convex_jax.proof import activations
from convex_jax.proof.enclosures import ONE, Ends, add, divide, multiply, negative
from convex_jax.proof.jets import NoRuleError
from convex_jax.proof.linear import has_no_zero, is_defined
from convex_jax.proof.parameters import is_plain
from convex_jax.proof.pieces import softened
from convex_jax.proof.values import Known, Masks, Operation, ScalarFunction, Value, thin

UNARY = {"exp", "exp2", "expm1"}  # Convex functions that no second look is for.
ENDS = {"add", "add_any", "sub"}  # What such a sum may end in.
LIMIT = 1000  # Values that are looked at.


@dataclasses.dataclass(frozen=True, eq=False)
class _Sum:
  """c . v + sum of c_j f_j(z_j), element by element."""

  terms: dict[int, tuple[Ends, Value]]  # By the identity of v.
  functions: list[tuple[Ends, Value, ScalarFunction]]


class _UnreadError(Exception):
  """More values than are looked at, or in no order."""


def curvature(value: Value) -> Masks | None:
  """The masks of a value that is a sum; None if it shows nothing here."""
  try:
    total = _read(value, functions=True)
    if not total.functions:
      return None
    with np.errstate(all="ignore"):
      return _judged(total, value.shape)
  except _UnreadError:
    return None


def _read(start: Value, functions: bool) -> _Sum:
  """A value as a sum; without `functions` as a linear one, in which they are earlier values."""
  total, read = _Sum({}, []), set[int]()
  factors, nodes = {id(start): ONE}, {id(start): start}
  latest = [(0, id(start))]  # Each value is read when all sums that it is in have been.
  for _ in range(LIMIT):
    if not latest:
      return total
    _, key = heapq.heappop(latest)
    factor, node = factors[key], nodes[key]
    read.add(key)
    if functions and node is not start and (found := _scalar(node)) is not None:
      total.functions.append((factor, *found))
      continue
    parts = _parts(node, whole=node is start)
    if parts is None:
      total.terms[key] = factor, node
    for k, x in parts or ():
      if id(x) not in nodes:
        nodes[id(x)], factors[id(x)] = x, multiply(factor, k)
        heapq.heappush(latest, (-x.made_by.order if x.made_by else 1, id(x)))
      elif id(x) in read:
        raise _UnreadError
      else:
        factors[id(x)] = add(factors[id(x)], multiply(factor, k))
  raise _UnreadError


def _scalar(x: Value) -> tuple[Value, ScalarFunction] | None:
  """(z, f) of a value f(z) without a curvature of its own, for an f on the whole line."""
  op = x.made_by
  if op is None or not x.is_lost:
    return None
  scalar = op.scalar
  both = softened(x)
  root = both[0] if both else op.inputs[0] if op.primitive in UNARY else None
  if scalar is None and isinstance(root, Value):
    with contextlib.suppress(NoRuleError):
      scalar = root, activations.judged(x, root)
  if scalar is None or not scalar[1].ends:
    return None
  first, last = scalar[1].ends[0], scalar[1].ends[-1]
  return scalar if np.all(np.isneginf(first)) and np.all(np.isposinf(last)) else None


def _parts(x: Value, whole: bool) -> list[tuple[Ends, Value]] | None:
  """(factor, value) of all that a linear operation adds up; None of any other.

  What has a curvature that its parts lack was seen as a whole, and stays one; but for the sum
  itself (`whole`).
  """
  op = x.made_by
  if op is None or not is_plain(op) or not is_defined("", op.inputs):
    return None
  values = [v for v in op.inputs if isinstance(v, Value)]
  if not whole and (op.scalar is not None or (any(v.is_lost for v in values) and not x.is_lost)):
    return None
  if any(v.shape != x.shape or not v.is_real for v in values):
    return None
  factors = _factors(op)
  if factors is None:
    return None
  return [(k, v) for k, v in zip(factors, op.inputs, strict=True) if isinstance(v, Value)]


def _factors(op: Operation) -> list[Ends] | None:
  """The known factor of each input of a linear operation."""
  if op.primitive in ("add", "add_any", "sub"):
    return [ONE, negative(ONE) if op.primitive == "sub" else ONE]
  if op.primitive == "neg":
    return [negative(ONE)]
  known = [x for x in op.inputs if isinstance(x, Known)]
  if op.primitive == "mul" and len(known) == 1:
    return [(known[0].low, known[0].high)] * 2
  if op.primitive == "div" and op.inputs[1:] == tuple(known) and has_no_zero(known[0]):
    return [divide(ONE, (known[0].low, known[0].high))] * 2
  return None


def _judged(total: _Sum, shape: tuple[int, ...]) -> Masks:
  slopes = {key: factor for key, (factor, _) in total.terms.items()}
  values = {key: v for key, (_, v) in total.terms.items()}
  convex, concave = [], []
  for factor, z, f in total.functions:
    up, down = factor[0] >= 0, factor[1] <= 0
    convex.append((up & f.convex) | (down & f.concave))
    concave.append((up & f.concave) | (down & f.convex))
    steepness = multiply(factor, (f.least, f.most))
    for key, (inner, v) in _read(z, functions=False).terms.items():
      slope = multiply(steepness, inner)
      slopes[key] = add(slopes[key], slope) if key in slopes else slope
      values[key] = v
  for key, (low, high) in slopes.items():
    not_convex, not_concave = map(thin, values[key].masks)
    rises, falls, affine = low >= 0, high <= 0, ~not_convex & ~not_concave
    convex.append(affine | (rises & ~not_convex) | (falls & ~not_concave))
    concave.append(affine | (falls & ~not_convex) | (rises & ~not_concave))
  masks: list[Any] = [~functools.reduce(np.logical_and, tests) for tests in (convex, concave)]
  return np.broadcast_to(masks[0], shape), np.broadcast_to(masks[1], shape)
