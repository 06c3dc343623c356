"""A traced program in wide arithmetic: its floats in float64, everything else as it is.

What only the program's own dtypes can say stays in them: integers, booleans, random keys and bits,
the bits of a float. Casts between floating-point types change nothing, as over the reals.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax import lax

from convex_jax.proof import layouts
from convex_jax.proof.composed import composed
from convex_jax.proof.equations import is_float, is_half_or_more
from convex_jax.proof.float64 import float64
from convex_jax.proof.interpreter import is_rounding, needed

# What these compute depends on their dtype, as does what is drawn from a key.
BOUND = {"bitcast_convert_type", "nextafter", "rng_uniform"}


def widened(jaxpr: Any, consts: Sequence[Any] = ()) -> Callable[..., list[jax.Array]]:
  """The program of a jaxpr in float64: jittable, and differentiable where the program is.

  Derivatives are those of what is computed, also of custom ones and of `stop_gradient`. To be
  traced under `float64`.

  Args:
    jaxpr: an open or a closed one, traced in the program's own dtypes.
    consts: of an open one.
  """
  if isinstance(jaxpr, jex.ClosedJaxpr):
    jaxpr, consts = jaxpr.jaxpr, jaxpr.consts

  def run(*arguments):
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))

    def read(var):
      if not isinstance(var, jex.Literal):
        return _to_float64(env[var])
      aval: Any = var.aval
      return _to_float64(np.asarray(var.val, aval.dtype))

    for eqn in needed(jaxpr):
      env.update(zip(eqn.outvars, equation(eqn, [read(v) for v in eqn.invars]), strict=True))
    return [read(v) for v in jaxpr.outvars]

  return run


class Impure(ValueError):
  """What the program returns may differ from call to call, or the call may change something."""


def equation(eqn, inputs) -> Sequence[Any]:
  """The outputs of an equation in wide arithmetic; raises `Impure` of one with side effects."""
  name, params = eqn.primitive.name, eqn.params
  has_body = any(True for _ in jex.jaxprs_in_params(params))
  called, other = layouts.called(eqn, inputs), composed(eqn, inputs)
  if called is not None:
    return widened(called[0])(*called[1])
  if other is not None:
    return other(*inputs)
  if (eqn.effects and not has_body) or "callback" in name or "ffi_call" in name:
    raise Impure(f"{name} has side effects or reads what may change")
  if is_rounding(eqn) or name == "stop_gradient":
    return inputs
  if has_body or not _is_bound(eqn):
    try:
      return _checked(
        eqn, eqn.primitive.bind(*inputs, **{k: _wider(k, v) for k, v in params.items()})
      )
    except Impure:
      raise
    except Exception:  # Whatever a primitive says that does not know float64.
      pass
  return _in_own_dtypes(eqn, inputs)


def _is_bound(eqn) -> bool:
  """Whether what an equation computes depends on its dtype, other than by rounding."""
  avals = [v.aval for v in (*eqn.invars, *eqn.outvars) if hasattr(v.aval, "dtype")]
  keys = any(jnp.issubdtype(aval.dtype, jax.dtypes.prng_key) for aval in avals)
  floats = [aval.dtype for aval in avals if is_float(aval.dtype)]
  narrow = not all(map(is_half_or_more, floats))
  return eqn.primitive.name in BOUND or narrow or bool(keys and floats)


def _wider(name: str, param: Any) -> Any:
  """A parameter of a primitive for float64."""
  if name in ("precision", "accuracy"):
    return None
  if isinstance(param, jex.Jaxpr | jex.ClosedJaxpr):
    is_closed = isinstance(param, jex.ClosedJaxpr)
    avals = [jax.ShapeDtypeStruct(a.shape, _to_wide(a.dtype)) for a in _in_avals(param)]
    wide = jax.make_jaxpr(widened(param))(*avals)
    return wide if is_closed else wide.jaxpr
  if isinstance(param, tuple):  # Perhaps a named one.
    return getattr(param, "_make", type(param))(_wider("", p) for p in param)
  if isinstance(param, np.dtype | type):
    return _to_wide(param)
  return param


def _in_avals(jaxpr) -> list[Any]:
  return jaxpr.in_avals if isinstance(jaxpr, jex.ClosedJaxpr) else [v.aval for v in jaxpr.invars]


def _checked(eqn, outputs) -> Sequence[Any]:
  outputs = outputs if eqn.primitive.multiple_results else [outputs]
  for var, out in zip(eqn.outvars, outputs, strict=True):
    if out.shape != var.aval.shape or out.dtype != _to_wide(var.aval.dtype):
      raise TypeError(f"{eqn.primitive} returned {out.dtype}{out.shape} for {var.aval}")
  return outputs


def _in_own_dtypes(eqn, inputs) -> Sequence[Any]:
  """The outputs of an equation as the program computes them, from inputs rounded to its dtypes."""
  own = {v: x for v, x in zip(eqn.invars, inputs, strict=True) if not isinstance(v, jex.Literal)}
  jaxpr = jex.Jaxpr([], list(own), eqn.outvars, [eqn], eqn.effects)
  narrow = [
    x if _to_wide(v.aval.dtype) == v.aval.dtype else lax.convert_element_type(x, v.aval.dtype)
    for v, x in own.items()
  ]
  return [_to_float64(out) for out in jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, []))(*narrow)]


def _to_float64(array: Any) -> Any:
  if not isinstance(array, jax.Array | np.ndarray | np.generic):  # A mutable array.
    return array
  wide = _to_wide(array.dtype)
  return array if wide == array.dtype else lax.convert_element_type(jnp.asarray(array), wide)


def _to_wide(dtype: Any) -> Any:
  if is_float(dtype):
    return np.dtype(np.float64)
  return np.dtype(np.complex128) if jnp.issubdtype(dtype, jnp.complexfloating) else dtype


def in_float64(tree: Any) -> Any:
  """The tree with its floating-point arrays in float64."""

  def one(leaf):
    return jnp.asarray(leaf, jnp.float64) if is_float(jnp.result_type(leaf)) else leaf

  with float64():
    return jax.tree.map(one, tree)
