"""Operations across devices, on one of them.

Inside a `shard_map` over one device every named axis has one member, so that sums, maxima and
exchanges along it return what they are given. An axis that `vmap` names has become a number.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from jax import lax

from convex_jax.proof.layouts import Parameters


def on_one_device(eqn: Any) -> Callable[..., Any] | None:
  """What a collective operation computes of its operands; None of any other operation."""
  name = eqn.primitive.name
  if name not in PRIMITIVES:
    return None
  params = Parameters(eqn)
  if params.get("axis_index_groups") is not None:
    return None
  if name in _REDUCTIONS:
    axes = tuple(axis for axis in params["axes"] if isinstance(axis, int))
    return lambda *xs: [_REDUCTIONS[name](x, axes) if axes else x for x in xs]
  if name == "axis_index":
    return lambda: [np.int32(0)]
  if isinstance(params["axis_name"], int):
    return None
  return lambda x: [_EXCHANGES[name](x, params)]


def _gather(x, params: Parameters):
  return x if params["tiled"] else lax.expand_dims(x, [params["all_gather_dimension"]])


def _scatter(x, params: Parameters):
  return x if params["tiled"] else lax.squeeze(x, [params["scatter_dimension"]])


def _permute(x, params: Parameters):
  return x if tuple(map(tuple, params["perm"])) == ((0, 0),) else lax.full_like(x, 0)


_REDUCTIONS: dict[str, Callable[..., Any]] = {
  **dict.fromkeys(("psum", "psum_invariant"), lax.reduce_sum),
  "pmax": lax.reduce_max,
  "pmin": lax.reduce_min,
}
_EXCHANGES: dict[str, Callable[..., Any]] = {
  **dict.fromkeys(("all_gather", "all_gather_invariant"), _gather),
  "reduce_scatter": _scatter,
  "ppermute": _permute,
}
PRIMITIVES = {*_REDUCTIONS, *_EXCHANGES, "axis_index"}
