"""Constant folding in float64, of numbers that do not depend on the input.

In float32 a product of two small weights may round to 0, and its sign be lost.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

SAME = {"copy", "name", "optimization_barrier", "pvary", "reduce_precision", "reshard"}
SAME |= {"sharding_constraint", "stop_gradient"}  # Over the reals, these return their input.


def real(number: Any) -> Any:
  """The number as an array: in float64 if it is a float, else as it is."""
  if isinstance(number, jax.Array) and jnp.issubdtype(number.dtype, jax.dtypes.prng_key):
    return number
  array = np.asarray(number)
  return array.astype(np.float64) if jnp.issubdtype(array.dtype, jnp.floating) else array


# In numpy, which compiles nothing.
FOLDS: dict[str, Callable[..., Any]] = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
FOLDS |= {"neg": np.negative, "max": np.maximum, "min": np.minimum, "exp": np.exp}
FOLDS |= {"sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x), "square": np.square}


def broadcast(array: np.ndarray, shape: tuple[int, ...], dimensions: Sequence[int]) -> np.ndarray:
  """`lax.broadcast_in_dim`, which compiles."""
  thin = [1] * len(shape)
  for d, n in zip(dimensions, array.shape, strict=True):
    thin[d] = n
  return np.broadcast_to(array.reshape(thin), shape)


def fold(eqn, arrays: list[np.ndarray]) -> list[Any]:
  """The outputs of an equation of known numbers; its floats in float64 unless it has a body."""
  name, params = eqn.primitive.name, dict(eqn.params)
  if name in SAME:
    return arrays
  if name == "convert_element_type" and jnp.issubdtype(params["new_dtype"], jnp.floating):
    return [np.asarray(arrays[0], np.float64)]
  if name == "div" and arrays[0].dtype == np.float64:
    return [arrays[0] / arrays[1]]
  if name == "broadcast_in_dim":
    return [broadcast(arrays[0], params["shape"], params["broadcast_dimensions"])]
  if name == "reshape" and params.get("dimensions") is None:
    return [arrays[0].reshape(params["new_sizes"])]
  if name in FOLDS:
    return [FOLDS[name](*arrays)]
  inner = any(True for _ in jex.jaxprs_in_params(params)) or name == "bitcast_convert_type"
  with jax.enable_x64(not inner):
    if inner:  # A loop's body was traced in the program's dtypes, and bits belong to a dtype.
      arrays = [a.astype(v.aval.dtype) for a, v in zip(arrays, eqn.invars, strict=True)]
    for key in ("preferred_element_type", "dtype"):
      if not inner and params.get(key) in (np.float32, jnp.bfloat16, np.float16):
        params[key] = np.dtype(np.float64)
    out = eqn.primitive.bind(*map(jnp.asarray, arrays), **params)
    return list(out) if eqn.primitive.multiple_results else [out]
