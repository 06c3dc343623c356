"""What is proved of a function, in a word, and tried at midpoints."""

import jax
import jax.numpy as jnp
import numpy as np

from convex_jax.proof import certify
from tests.support.midpoints import midpoint_gaps

KINDS = {"affine": (1, -1), "convex": (1,), "concave": (-1,), "unknown": ()}  # Signs of gaps.


X = jax.ShapeDtypeStruct((2, 3), jnp.float32)


def curvature_of(function, example=X) -> str:
  """affine, convex, concave, or unknown: what is proved of all outputs."""
  found = [
    kind for kind in ("convex", "concave") if certify(function, example, kind=kind, search_steps=0)
  ]
  return {2: "affine", 1: found and found[0], 0: "unknown"}[len(found)]


def check_curvature(function, example, expected):
  """Raises unless just this is proved, and unless what is expected holds at midpoints."""
  assert curvature_of(function, example) == expected
  for sign in KINDS[expected]:
    assert worst_gap(function, example, sign) < 1e-11


def worst_gap(function, example, sign):
  """By how much a function misses convexity (sign 1) or concavity (-1) at some midpoint."""
  gaps = midpoint_gaps(
    jax.vmap(function), example.shape, pairs=60, sizes=(0.3, 3), steps=(0.1, 1, 5)
  )
  assert not np.isnan(gaps).any()
  return np.max(sign * gaps)
