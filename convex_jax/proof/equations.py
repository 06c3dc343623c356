"""Questions about one equation of a program, and its outputs in float64."""

import math
from typing import Any

import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from convex_jax.proof.float64 import float64

# Over the reals, these return their input.
SAME = {"copy", "name", "optimization_barrier", "pvary", "reshard"}
SAME |= {"sharding_constraint", "stop_gradient"}

_IMPURE = ("callback", "ffi_call", "rng_uniform")  # Parts of the names of such primitives.
_UPDATES = {"scatter-add": "add", "scatter-sub": "sub", "scatter-mul": "mul"}
_UPDATES |= {"scatter-max": "max", "scatter-min": "min"}


class Unknown(Exception):
  """A number that cannot be enclosed; the message says why."""


def is_float(dtype: Any) -> bool:
  """Whether a dtype is one of floating-point numbers."""
  return bool(jnp.issubdtype(dtype, jnp.floating))


def is_half_or_more(dtype: Any) -> bool:
  """Whether rounding to a dtype is left out of account; to less it is a step function."""
  return is_float(dtype) and jnp.finfo(dtype).nmant >= jnp.finfo(jnp.bfloat16).nmant


def is_step(eqn) -> bool:
  """Whether an equation rounds a number that it computes to less than half precision."""
  return any(is_float(v.aval.dtype) and not is_half_or_more(v.aval.dtype) for v in eqn.outvars)


def keeps_precision(eqn) -> bool:
  """Whether an equation is a `reduce_precision` to no less than what its dtype has."""
  if eqn.primitive.name != "reduce_precision":
    return False
  info = jnp.finfo(eqn.invars[0].aval.dtype)
  bits = eqn.params["exponent_bits"], eqn.params["mantissa_bits"]
  return bits[0] >= info.nexp and bits[1] >= info.nmant


def is_pure(eqn) -> bool:
  """Whether an equation gives the same result each time."""
  return not (eqn.effects or any(part in eqn.primitive.name for part in _IMPURE))


def has_body(eqn) -> bool:
  """Whether an equation computes with a function of the program's, or a scatter with its own."""
  bodies = [jaxpr.eqns for jaxpr in jex.jaxprs_in_params(eqn.params)]
  if eqn.primitive.name.startswith("scatter"):
    wanted = _UPDATES.get(eqn.primitive.name)
    return [[e.primitive.name for e in eqns] for eqns in bodies] not in ([], [[wanted]])
  return bool(bodies)


def has_known_updates(eqn) -> bool:
  """Whether a scatter makes the updates of its name, and all of them.

  Of several whose indices have no entries, XLA makes one (jaxlib 0.12).
  """
  *rows, depth = eqn.invars[1].aval.shape
  batched = eqn.params["dimension_numbers"].scatter_indices_batching_dims
  alike = math.prod(n for axis, n in enumerate(rows) if axis not in batched)
  return not has_body(eqn) and (depth > 0 or alike <= 1)


def bind(eqn, *arrays: Any) -> list[Any]:
  """The outputs of an equation for other arrays, its floats in float64."""
  params = dict(eqn.params)
  for key in ("preferred_element_type", "dtype", "out_dtype"):
    if params.get(key) is not None and is_float(params[key]):
      params[key] = np.dtype(np.float64)
  if "precision" in params:
    params["precision"] = None
  with float64():
    out = eqn.primitive.bind(*map(jnp.asarray, arrays), **params)
    outputs = out if eqn.primitive.multiple_results else [out]
    return [np.asarray(o) for o in outputs]
