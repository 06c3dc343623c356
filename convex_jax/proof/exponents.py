"""Whether operations spell out log(sum(exp(u))), of which a conic form needs the u themselves.

The proof reads more spellings (`log_sum_exp`), but by their curvature alone.
"""

from typing import Any

import numpy as np

from convex_jax.proof.constants import fold
from convex_jax.proof.forms import MOVES
from convex_jax.proof.linear import is_total
from convex_jax.proof.parameters import is_plain
from convex_jax.proof.values import Known, Operation, Value

_RESHAPES = ("reshape", "broadcast_in_dim", "squeeze")


def exponents(op: Operation) -> tuple[Value, tuple[int, ...]] | None:
  """(u, axes) where the operation completes log(sum(exp(u))), the sum over `axes`."""
  if not is_plain(op):
    return None
  if op.primitive == "log":
    found = _exponents(op.inputs[0])
    return found and (found[0], found[1] or ())
  return _shifted_exponents(*op.inputs) if op.primitive == "add" else None


def _shifted_exponents(a, b) -> tuple[Value, tuple[int, ...]] | None:
  """The same for log(sum(exp(u - c))) + c, which is log(sum(exp(u))) for finite c."""
  for log, shift in ((a, b), (b, a)):
    op = _made_by(log)
    inner = _exponents(op.inputs[0]) if op is not None and op.primitive == "log" else None
    if inner is None:
      continue
    (exponent, axes), difference = inner, _made_by(inner[0])
    if axes is None or difference is None or difference.primitive != "sub":
      continue
    u, c = difference.inputs
    if not isinstance(u, Value) or u.shape != exponent.shape or not is_total(c):
      continue
    kept = tuple(n for i, n in enumerate(exponent.shape) if i not in axes)
    if _same_along(c, shift, exponent.shape, axes, kept):
      return u, axes
  return None


def _exponents(x: Any) -> tuple[Value, tuple[int, ...] | None] | None:
  """(u, axes) where x is the sum over axes of exp(u)."""
  axes = None
  while (op := _made_by(x)) is not None:
    if axes is None and op.primitive in _RESHAPES:  # Axes are those of the exponents.
      if np.prod(x.shape) != np.prod(op.inputs[0].shape):
        return None  # It repeats elements.
    elif op.primitive == "reduce_sum" and axes is None and 0 not in op.inputs[0].shape:
      axes = tuple(op.params["axes"])
    elif op.primitive == "exp" and isinstance(op.inputs[0], Value):
      return op.inputs[0], axes
    elif op.primitive != "abs" or axes is not None:  # |exp(u)| is exp(u).
      return None
    x = op.inputs[0]
  return None


def _same_along(c, shift, shape, axes, kept) -> bool:
  """Whether c, seen in `shape`, is `shift` repeated along `axes`."""
  (root_c, index_c), (root_shift, index_shift) = _indices(c), _indices(shift)
  if root_c is not root_shift or index_shift.size != np.prod(kept, dtype=int):
    return False
  expected = np.expand_dims(index_shift.reshape(kept), axes)
  return bool((np.broadcast_to(index_c, shape) == expected).all())


def _indices(x: Any) -> tuple[Any, np.ndarray]:
  """(root, which of its elements each element of x is), back through moves of elements."""
  moves = []
  while (op := _made_by(x)) is not None and op.primitive in MOVES:
    moves.append(op)
    x = op.inputs[0]
  index = Known.exactly(np.arange(int(np.prod(x.shape))).reshape(x.shape))
  for op in reversed(moves):
    (index,) = fold(op.eqn, [index])
  return x, index.low


def _made_by(x: Any) -> Operation | None:
  """The operation that made a value, if every parameter is taken into account here."""
  op = x.made_by if isinstance(x, Value) else None
  return op if op is not None and is_plain(op) else None
