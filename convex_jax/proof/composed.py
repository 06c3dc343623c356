"""Operations as compositions of others, for which every walk over a program has its rules.

So a parameter that changes what an operation means, as a transpose within a reshape, need be known
nowhere else.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from convex_jax.proof.collectives import on_one_device
from convex_jax.proof.equations import has_body, is_float
from convex_jax.proof.layouts import Parameters
from convex_jax.proof.values import Known

Function = Callable[..., list[Any]]  # Of the operands; returns the outputs.


def composed(eqn: Any, operands: Sequence[Any]) -> Function | None:
  """What an equation computes, in other operations; None of one that has rules of its own."""
  name = eqn.primitive.name
  if name in _FORMS:
    return _FORMS[name](eqn, Parameters(eqn))
  return _elementwise(eqn, operands) if name in _ELEMENTWISE else on_one_device(eqn)


def _elementwise(eqn: Any, operands: Sequence[Any]) -> Function | None:
  """A scalar value next to an array counts for each element; a known number is left as it is."""
  shape = eqn.outvars[0].aval.shape
  pairs = zip(eqn.invars, operands, strict=True)
  if all(v.aval.shape == shape or isinstance(x, Known) for v, x in pairs):
    return None
  params = eqn.params
  return lambda *xs: [eqn.primitive.bind(*(jnp.broadcast_to(x, shape) for x in xs), **params)]


def _unstack(eqn: Any, params: Parameters) -> Function:
  """In jax 0.12 also iteration over an array."""
  axis = params["axis"]
  return lambda x: [lax.squeeze(part, (axis,)) for part in lax.split(x, (1,) * x.shape[axis], axis)]


def _split(eqn: Any, params: Parameters) -> Function | None:
  """Into one part."""
  return (lambda x: [x]) if len(eqn.outvars) == 1 else None


def _reshape(eqn: Any, params: Parameters) -> Function | None:
  order = params["dimensions"]
  if order is None:
    return None
  return lambda x: [lax.reshape(lax.transpose(x, order), params["new_sizes"])]


def _broadcast(eqn: Any, params: Parameters) -> Function | None:
  """Where its dimensions do not rise it transposes, which JAX's own gradient of it does not."""
  places = params["broadcast_dimensions"]
  order = sorted(range(len(places)), key=places.__getitem__)
  if order == list(range(len(places))):
    return None
  return lambda x: [lax.broadcast_in_dim(lax.transpose(x, order), params["shape"], sorted(places))]


def _gather(eqn: Any, params: Parameters) -> Function | None:
  """Beyond the array it fills in a number, NaN by default: it fills in 0, and chooses."""
  fill = params["fill_value"]
  if "FILL" not in str(params["mode"]) or fill == 0 or not is_float(eqn.outvars[0].aval.dtype):
    return None
  keys = ("dimension_numbers", "slice_sizes", "unique_indices", "indices_are_sorted", "mode")
  options = {key: params[key] for key in keys}

  def filled(x, indices):
    inside = lax.gather(np.ones(x.shape, bool), indices, **options, fill_value=False)
    y = lax.gather(x, indices, **options, fill_value=0)
    return [lax.select(inside, y, lax.full_like(y, np.nan if fill is None else fill))]

  return filled


def _subtract_at(eqn: Any, params: Parameters) -> Function | None:
  if has_body(eqn):
    return None
  options: Any = {k: value for k, value in params.items() if not k.startswith("update_")}
  return lambda x, indices, updates: [lax.scatter_add(x, indices, -updates, **options)]


_ELEMENTWISE = {"add", "sub", "mul", "div", "max", "min", "pow", "rem", "gt", "ge", "lt", "le"}
_ELEMENTWISE |= {"eq", "ne", "and", "or", "xor"}
_FORMS: dict[str, Callable[[Any, Parameters], Function | None]] = {
  "unstack": _unstack,
  "split": _split,
  "reshape": _reshape,
  "broadcast_in_dim": _broadcast,
  "gather": _gather,
  "scatter-sub": _subtract_at,
}
