"""Numbers that do not depend on the input, folded in float64."""

from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

SAME = {  # Of one value, and the same value over the reals.
  "copy",
  "copy_p",
  "name",
  "optimization_barrier",
  "pvary",
  "reduce_precision",
  "reshard",
  "sharding_constraint",
  "stop_gradient",
}


def real(number: Any) -> Any:
  """A number as it is computed with here: float64 for floats, as it is otherwise."""
  if isinstance(number, jax.Array) and jnp.issubdtype(number.dtype, jax.dtypes.prng_key):
    return number
  array = np.asarray(number)
  return array.astype(np.float64) if jnp.issubdtype(array.dtype, jnp.floating) else array


FOLDS: dict[str, Callable[..., Any]] = {  # In float64, without compiling anything.
  "add": np.add,
  "sub": np.subtract,
  "mul": np.multiply,
  "neg": np.negative,
  "max": np.maximum,
  "min": np.minimum,
  "exp": np.exp,
  "sqrt": np.sqrt,
  "rsqrt": lambda x: 1 / np.sqrt(x),
  "square": np.square,
}


def fold(eqn, arrays: list[np.ndarray]) -> list[Any]:
  """An equation of known numbers, in float64 where it has floats and no loop."""
  name, params = eqn.primitive.name, dict(eqn.params)
  if name in SAME:
    return arrays
  if name == "convert_element_type" and jnp.issubdtype(params["new_dtype"], jnp.floating):
    return [np.asarray(arrays[0], np.float64)]
  if name == "div" and arrays[0].dtype == np.float64:
    return [arrays[0] / arrays[1]]
  if name == "broadcast_in_dim":
    thin = [1] * len(params["shape"])
    for d, n in zip(params["broadcast_dimensions"], arrays[0].shape, strict=True):
      thin[d] = n
    return [np.broadcast_to(arrays[0].reshape(thin), params["shape"])]
  if name == "reshape" and params.get("dimensions") is None:
    return [arrays[0].reshape(params["new_sizes"])]
  if name in FOLDS:
    return [FOLDS[name](*arrays)]
  inner = any(True for _ in jex.jaxprs_in_params(params)) or name == "bitcast_convert_type"
  with jax.enable_x64(not inner):
    if inner:  # A loop's body was traced in the dtypes of the program; and bits are bits.
      arrays = [a.astype(v.aval.dtype) for a, v in zip(arrays, eqn.invars, strict=True)]
    for key in ("preferred_element_type", "dtype"):
      if not inner and params.get(key) in (np.float32, jnp.bfloat16, np.float16):
        params[key] = np.dtype(np.float64)
    out = eqn.primitive.bind(*map(jnp.asarray, arrays), **params)
    return list(out) if eqn.primitive.multiple_results else [out]
