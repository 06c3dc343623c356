"""Primitives that NumPy computes as well: the same elements, and nothing to compile.

JAX compiles an operation anew for each shape that it has not seen. Moves of masks, signs and known
numbers are of many shapes, each used once.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Params = Mapping[str, Any]


def rearranged(name: str, params: Params, arrays: Sequence[Any]) -> list[np.ndarray] | None:
  """The outputs of a primitive that moves elements; None of one that has no rule here.

  The arrays are NumPy's, and their dtypes those of the outputs.
  """
  move = _MOVES.get(name)
  if move is None or (name == "reshape" and params.get("dimensions") is not None):
    return None
  return move(params, *arrays)


def broadcast(array: np.ndarray, shape: Sequence[int], dimensions: Sequence[int]) -> np.ndarray:
  """`lax.broadcast_in_dim`, as a view; dimensions that do not rise transpose the array."""
  thin = [1] * len(shape)
  for d, n in zip(dimensions, array.shape, strict=True):
    thin[d] = n
  rising = array.transpose(tuple(np.argsort(dimensions)))
  return np.broadcast_to(rising.reshape(thin), tuple(shape))


def _slice(params: Params, x: np.ndarray) -> np.ndarray:
  steps = params["strides"] or (1,) * x.ndim
  cuts = zip(params["start_indices"], params["limit_indices"], steps, strict=True)
  return x[tuple(slice(*cut) for cut in cuts)]


def _pad(params: Params, x: np.ndarray, padding: np.ndarray) -> np.ndarray:
  """With (before, after, between) elements along each axis; fewer than none cut elements off."""
  config = params["padding_config"]
  shape, kept, places = [], [], []
  for n, (before, after, between) in zip(x.shape, config, strict=True):
    shape.append(before + after + n + max(n - 1, 0) * between)
    at = before + np.arange(n) * (1 + between)
    inside = (at >= 0) & (at < shape[-1])
    kept.append(np.flatnonzero(inside))
    places.append(at[inside])
  out = np.full(shape, padding, x.dtype)
  out[np.ix_(*places)] = x[np.ix_(*kept)]
  return out


def select(which: np.ndarray, *cases: np.ndarray) -> np.ndarray:
  """`lax.select_n`; as in XLA a number beyond the last case chooses that."""
  index = np.broadcast_to(np.clip(which, 0, len(cases) - 1), cases[0].shape).astype(int)
  return np.take_along_axis(np.stack(cases), index[None], 0)[0]


def as_rows(dimension_numbers: Any, a: np.ndarray, b: np.ndarray) -> list[np.ndarray]:
  """The operands of a `dot_general` as (batch, rows, terms): it sums products of terms."""
  rows = []
  for array, sums, batch in zip((a, b), *dimension_numbers, strict=True):
    free = [i for i in range(array.ndim) if i not in (*sums, *batch)]
    sizes = [np.prod([array.shape[i] for i in axes], dtype=int) for axes in (batch, free, sums)]
    rows.append(array.transpose(*batch, *free, *sums).reshape(sizes))
  return rows


def distinct(rows_BxMxK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(indices of boolean rows that all differ, for each row the position of its equal among them)."""
  batch, rows, terms = rows_BxMxK.shape
  if rows and not rows_BxMxK.strides[1]:  # Stored once.
    return np.zeros(1, int), np.zeros(rows, int)
  seen: dict[bytes, int] = {}
  bits = np.packbits(rows_BxMxK.swapaxes(0, 1).reshape(rows, batch * terms), axis=1)
  like = [seen.setdefault(row.tobytes(), len(seen)) for row in bits]
  return np.unique(np.array(like, int), return_index=True)[1], np.array(like, int)


_MOVES: dict[str, Callable[..., list[np.ndarray]]] = {
  "broadcast_in_dim": lambda p, x: [broadcast(x, p["shape"], p["broadcast_dimensions"])],
  "concatenate": lambda p, *xs: [np.concatenate(xs, p["dimension"])],
  "pad": lambda p, x, padding: [_pad(p, x, padding)],
  "reshape": lambda p, x: [x.reshape(p["new_sizes"])],
  "rev": lambda p, x: [np.flip(x, tuple(p["dimensions"]))],
  "select_n": lambda p, which, *cases: [select(which, *cases)],
  "slice": lambda p, x: [_slice(p, x)],
  "split": lambda p, x: np.split(x, np.cumsum(p["sizes"])[:-1], p["axis"]),
  "squeeze": lambda p, x: [np.squeeze(x, tuple(p["dimensions"]))],
  "transpose": lambda p, x: [np.transpose(x, p["permutation"])],
}
