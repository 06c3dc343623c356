"""Random small networks, judged by CVXPY's disciplined convex programming and by us.

CVXPY is an independent prover with the same calculus. It sees each unit as one scalar
expression; ELU, which it does not know, by its exact conic form: elu(z) is the minimum
over u >= 0 of exp(z - u) - 1 + u, and an expression that is jointly convex is convex after
a partial minimum.
"""

import dataclasses
from typing import Any

import cvxpy as cp
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from convex_jax.proof.certificate import certify

UNITS = 3
ACTIVATIONS = {
  "relu": nn.relu,
  "softplus": nn.softplus,
  "elu": nn.elu,
  "maxout": None,
  "none": None,
}


@dataclasses.dataclass(frozen=True)
class Layer:
  weights: np.ndarray  # (units in, units out)
  bias: np.ndarray
  passthrough: np.ndarray | None  # (inputs, units out): the image again, of either sign.
  activation: str


def draw(seed: int) -> tuple[list[Layer], bool]:
  """(layers, broken): a convex network, or one with a wrong sign somewhere."""
  rng = np.random.default_rng(seed)
  layers = []
  for i in range(rng.integers(2, 5)):
    # Never a unit without inputs: CVXPY knows that it is constant after an activation too,
    # ours calls it convex.
    linked = (rng.random((UNITS, UNITS)) < 0.7) | np.eye(UNITS, dtype=bool)
    weights = rng.standard_normal((UNITS, UNITS)) * linked
    layers.append(
      Layer(
        np.float32(weights if i == 0 else abs(weights)),
        np.float32(rng.standard_normal(UNITS)),
        np.float32(rng.standard_normal((UNITS, UNITS))) if i and rng.random() < 0.5 else None,
        str(rng.choice(list(ACTIVATIONS))),
      )
    )
  broken = bool(seed % 2)
  if broken:
    at = rng.integers(1, len(layers))
    layers[at].weights[tuple(rng.integers(UNITS, size=2))] = -1 - rng.random()
  return layers, broken


def ours(layers: list[Layer]) -> tuple[list[bool], list[bool]]:
  """(convex, concave) of each output."""

  def function(x):
    h = x
    for layer in layers:
      h = h @ layer.weights + layer.bias
      if layer.passthrough is not None:
        h = h + x @ layer.passthrough
      if layer.activation == "maxout":
        h = jnp.maximum(h, jnp.roll(h, 1))
      else:
        h = (ACTIVATIONS[layer.activation] or (lambda h: h))(h)
    return h

  x = jax.ShapeDtypeStruct((UNITS,), jnp.float32)
  kinds = ("convex", "concave")
  convex, concave = (certify(function, x, kind=k, search_steps=0).proved.tolist() for k in kinds)
  return convex, concave


def theirs(layers: list[Layer]) -> tuple[list[bool], list[bool]]:
  """(convex, concave) of each output, by CVXPY."""
  x: list[Any] = [cp.Variable() for _ in range(UNITS)]

  def elu(z):
    if z.is_constant():
      return z
    u = cp.Variable(nonneg=True)
    return cp.exp(z - u) - 1 + u

  known = {"relu": cp.pos, "softplus": cp.logistic, "elu": elu, "none": lambda z: z}

  def weighted(units, column):
    return sum(float(w) * h for w, h in zip(column, units, strict=True) if w != 0)

  h = x
  for layer in layers:
    z = [weighted(h, layer.weights[:, j]) + float(layer.bias[j]) for j in range(UNITS)]
    if layer.passthrough is not None:
      z = [zj + weighted(x, layer.passthrough[:, j]) for j, zj in enumerate(z)]
    z = [cp.Constant(zj) if isinstance(zj, float) else zj for zj in z]
    if layer.activation == "maxout":
      h = [cp.maximum(z[j], z[j - 1]) for j in range(UNITS)]
    else:
      h = [known[layer.activation](zj) for zj in z]
  return [bool(e.is_convex()) for e in h], [bool(e.is_concave()) for e in h]


def compare(seeds: range) -> list[dict[str, Any]]:
  """One row a network: what each prover says."""
  rows = []
  for seed in seeds:
    layers, broken = draw(seed)
    rows.append({"seed": seed, "broken": broken, "ours": ours(layers), "theirs": theirs(layers)})
  return rows
