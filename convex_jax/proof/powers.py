"""Powers and roots, and so norms.

x^y is convex for even y, and for every y >= 1 where x >= 0. There it rises, so that the power of a
value that is convex and >= 0 is convex, which is known of relu(x), |x| or exp(x) (`signs`).

A norm is a root of powers: (sum_i |a_i|^q)^(1/p) is convex where every |a_i| is and q >= p >= 1,
by Minkowski's inequality (Boyd and Vandenberghe 2004, 3.1.3), as is that of |a|^q + c, c >= 0.
"""

from fractions import Fraction
from typing import Any

import numpy as np

from convex_jax.proof import quadratic
from convex_jax.proof.in_numpy import as_rows
from convex_jax.proof.linear import LINEAR, carried, lost, over_axes
from convex_jax.proof.signs import exponent_of, is_multiple, sign, squares
from convex_jax.proof.values import Known, Masks, Operation, Value, composed, either, uniform


def _is_power(op: Operation, x: Value, y: Known) -> Masks:
  """x^y, y known."""
  even, odd = (is_multiple(y, 2, rest) & (y.low > 0) for rest in (0, 1))
  if x.is_affine and even.all():
    return composed(x, convex=True, concave=False, rising=False, falling=False)
  above, below = (~mask for mask in sign(x))
  one = (y.low == 1) & (y.high == 1)
  return composed(
    x,
    convex=even | one | (above & (y.low >= 1)),
    concave=one | (below & odd) | (above & (y.low > 0) & (y.high <= 1)),
    rising=above | odd,
    falling=below,
  )


def power(op: Operation, x: Any, *_: Any) -> Masks:
  """`integer_pow`, `square`, `pow`; a^x is exp(x log a) for a known a > 0."""
  y: Any = exponent_of(op)
  if isinstance(x, Value):
    return lost(op) if isinstance(y, Value) or y.not_finite.any() else _is_power(op, x, y)
  if not (x.low > 0).all() or not np.isfinite(x.high).all():
    return lost(op)
  convex = uniform(True, op.shape) | False
  return composed(y, convex, (x.low == 1) & (x.high == 1), x.low >= 1, x.high <= 1)


def absolute(op: Operation, x: Value) -> Masks:
  """|x|, which is x or -x where the sign is known."""
  if x.is_affine:
    return composed(x, convex=True, concave=False, rising=False, falling=False)
  above, below = (~mask for mask in sign(x))
  return composed(x, uniform(True, x.shape) | False, above | below, above, below)


def product(op: Operation, a: Any, b: Any) -> Masks:
  """`mul` and `dot_general`: linear where one side is known, else squares where both are equal."""
  if isinstance(a, Known) or isinstance(b, Known):
    return LINEAR[op.primitive](op, a, b)
  equal = squares(op)
  if not equal.any():
    return lost(op)
  not_convex: np.ndarray = absolute(op, a)[0]
  if op.primitive == "dot_general":
    rows, columns = as_rows(op.params["dimension_numbers"], not_convex, b.not_convex)
    some = np.broadcast_to(
      np.asarray(rows.any(-1))[:, :, None], (*rows.shape[:2], columns.shape[1])
    )
    not_convex = some.reshape(op.shape)
  return not_convex | ~equal, uniform(True, op.shape)


def root(op: Operation, x: Value, *exponent: Any) -> Masks:
  """`sqrt`, `cbrt`, and `pow` below 1, of what is a power of a convex number."""
  masks = power(op, x) if exponent else lost(op)
  y = exponent[0] if exponent else None
  if isinstance(x, Known) or isinstance(y, Value) or not masks[0].any():
    return masks
  if y is not None and (y.not_finite.any() or not (y.low > 0).all()):
    return masks
  least = float(y.low.min(initial=1)) if y is not None else 0
  p = 1 / Fraction(least) if exponent else Fraction({"sqrt": 2, "cbrt": 3}[op.primitive])
  return masks[0] & _not_root(x, p), masks[1]


def _not_root(x: Any, p: Fraction, depth: int = 30) -> np.ndarray:
  """Where x^(1/p) is not known to be defined, >= 0 and convex.

  What second looks show of x is not of use: of a square they may show that it is convex, though the
  magnitude of its base is not.
  """
  if isinstance(x, Known):
    return ~(x.low >= 0) | x.not_finite
  op, yes = x.made_by, uniform(True, x.shape)
  if op is None or op.eqn is None or depth == 0:
    return yes
  name, inputs = op.primitive, op.inputs

  def of(y):
    return _not_root(y, p, depth - 1)

  if name == "exp":
    return inputs[0].not_convex
  if name == "sqrt":
    return _not_root(inputs[0], 2 * p, depth - 1)
  if name in ("square", "integer_pow", "pow"):
    y, base = exponent_of(op), inputs[0]
    if isinstance(base, Known) or isinstance(y, Value) or y.not_finite.any():
      return yes
    fits = (y.low >= p) & (is_multiple(y, 2) | ~sign(base)[0])
    return absolute(op, base)[0] | ~fits
  if name == "max":  # A known number may be negative: the other is not.
    return either(*(of(y) if isinstance(y, Value) else ~(y.high < np.inf) for y in inputs))
  if name == "reduce_max" and 0 not in inputs[0].shape:
    return over_axes(op, of(inputs[0]))
  if name in ("mul", "dot_general") and all(isinstance(y, Value) for y in inputs):
    bad = product(op, *inputs)[0] if p <= 2 else yes
  else:
    bad = carried(op, lambda y: (of(y), uniform(True, y.shape)))[0] if name in LINEAR else yes
  return bad & quadratic.not_norm(x) if p <= 2 and bad.any() else bad
