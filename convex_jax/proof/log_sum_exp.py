"""Log-sum-exp, a convex function that no single operation shows.

log(sum(exp(u))) is convex and non-decreasing in each u (Boyd and Vandenberghe 2004, 3.1.5), so
it is convex where every u is. Programs write it in three ways: as the logarithm of a sum of
exponentials, with a shift that is subtracted before and added after (`jax.nn.logsumexp`), and
as `jnp.logaddexp`. A pattern looks back through the operations that made a value; where it
does not recognise them, it returns None.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convex_jax.proof.constants import broadcast
from convex_jax.proof.linear import is_total
from convex_jax.proof.values import Known, Masks, Operation, Value, uniform

_RESHAPES = ("reshape", "broadcast_in_dim", "squeeze")


def exponents(op: Operation) -> tuple[Value, tuple[int, ...]] | None:
  """(u, axes) where the operation completes log(sum(exp(u))), the sum over `axes`."""
  if op.primitive == "log":
    found = _exponents(op.inputs[0])
    return found and (found[0], found[1] or ())
  return _shifted_exponents(*op.inputs) if op.primitive == "add" else None


def _shifted_exponents(a, b) -> tuple[Value, tuple[int, ...]] | None:
  """The same for log(sum(exp(u - c))) + c, which is log(sum(exp(u))) for finite c."""
  for log, shift in ((a, b), (b, a)):
    if not isinstance(log, Value) or log.made_by is None or log.made_by.primitive != "log":
      continue
    inner = _exponents(log.made_by.inputs[0])
    if inner is None or inner[0].made_by is None:
      continue
    (exponent, axes), made_by = inner, inner[0].made_by
    u, c = made_by.inputs if made_by.primitive == "sub" else (None, None)
    if axes is None or not isinstance(u, Value) or not is_total(c):
      continue
    kept = tuple(n for i, n in enumerate(exponent.shape) if i not in axes)
    if u.shape == exponent.shape and _same_along(c, shift, exponent.shape, axes, kept):
      return u, axes
  return None


def masks(op: Operation, *_: Value | Known) -> Masks | None:
  """Those of a log-sum-exp that the operation completes; None where it does not."""
  found = exponents(op)
  if found is None:
    return None
  u, axes = found
  nc = np.asarray(u.not_convex.any(axes)).reshape(op.shape)
  return nc, uniform(True, op.shape)


PATTERNS = {"log": masks, "add": masks}


def _exponents(x: Any) -> tuple[Value, tuple[int, ...] | None] | None:
  """(u, axes) where x is the sum over axes of exp(u)."""
  axes = None
  while isinstance(x, Value) and x.made_by is not None:
    op = x.made_by
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
  while isinstance(x, Value) and x.made_by is not None and x.made_by.primitive in _RESHAPES:
    moves.append((x.made_by, x.shape))
    x = x.made_by.inputs[0]
  index = np.arange(int(np.prod(x.shape))).reshape(x.shape)
  for op, shape in reversed(moves):
    if op.primitive == "broadcast_in_dim":
      index = broadcast(index, shape, op.params["broadcast_dimensions"])
    else:
      index = index.reshape(shape)
  return x, index


def is_logaddexp(eqn: Any) -> bool:
  """Whether a custom function computes, step by step, what `jnp.logaddexp` does.

  Its body has cases for infinities, which no rule follows; its text is compared instead.
  """
  if eqn.primitive.name != "custom_jvp_call" or len(eqn.invars) != 2 or eqn.params["num_consts"]:
    return False
  shapes = tuple((v.aval.shape, str(v.aval.dtype)) for v in eqn.invars)
  return str(eqn.params["call_jaxpr"]) == _logaddexp_text(shapes)


@functools.cache
def _logaddexp_text(shapes) -> str:
  jaxpr = jax.make_jaxpr(jnp.logaddexp)(*(jax.ShapeDtypeStruct(s, d) for s, d in shapes))
  calls = [e for e in jaxpr.eqns if e.primitive.name == "custom_jvp_call"]
  return str(calls[0].params["call_jaxpr"]) if calls else ""
