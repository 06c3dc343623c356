"""Constraints on weights: the tag on a weight, the projection, the last link of the optimizer.

A network of affine maps and convex, non-decreasing activations is convex in its
input when every weight after the first activation is >= 0 (Sivaprasad et al. 2021,
"The Curious Case of Convex Neural Networks", section 3; Amos, Xu and Kolter 2017).

Nothing here depends on the name of a layer. The layer that creates a weight tags it, with an
initializer wrapped by `constrained`; `constraints_of` reads the tags from the variables;
`enforce` projects exactly the tagged weights, after every other link of the optimizer.
Renaming or adding a layer therefore cannot drop a constraint.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct

Initializer = Callable[..., Any]
Projection = Callable[[jax.Array], jax.Array]

FREE = "free"
PENALISED = "penalised"  # Of either sign; what is negative counts in `negative_shares`.


def exponentiate(weight: jax.Array) -> jax.Array:
  """w if w >= 0, else exp(w - 5): the map of Sivaprasad et al. 2021, appendix B.

  Not a projection: a weight that would become -1e-4 restarts at 0.0067. The report and the 2021
  paper used it; it is kept so that their tables can be reproduced.
  """
  return jnp.where(weight < 0, jnp.exp(weight - 5), weight)


def shift(kernel_DxK: jax.Array) -> jax.Array:
  """w_dk - min(0, min_k w_dk): makes the head of a classifier >= 0 without changing it.

  All logits move by one common term, -sum_d min(0, min_k w_dk) h_d, to which softmax,
  cross-entropy and argmax are invariant. Shape (inputs, classes), classes last.
  """
  return kernel_DxK - jnp.minimum(kernel_DxK.min(axis=-1, keepdims=True), 0)


def keep(projection: Projection) -> optax.GradientTransformation:
  """An optimizer's link that applies `projection` to `params + updates`; the result is >= 0.

  Where p + u meets the constraint, the update u becomes max(u, -p); elsewhere it becomes
  a - p with the projected value a >= 0. Rounding is monotone, so for p >= 0 both p + max(u, -p)
  and p + fl(a - p) >= p - p are >= 0 exactly, not up to a tolerance.

  Both maxima are needed. The compiler may compute p + u twice, once with a fused multiply-add and
  once without (for instance in the minimum over a row and outside it), so that a projection sees
  0 where the sum that it corrects is -1e-10.
  """

  def one(update, param):
    wanted = param + update
    allowed = jnp.maximum(projection(wanted), 0)
    return jnp.where(allowed == wanted, jnp.maximum(update, -param), allowed - param)

  def update(updates, params):
    if params is None:
      raise ValueError("a projection needs `params`: call update(updates, state, params)")
    return jax.tree.map(one, updates, params)

  return optax.stateless(update)


PROJECTIONS: dict[str, Projection] = {
  FREE: lambda weight: weight,
  PENALISED: lambda weight: weight,
  "clamp": optax.projections.projection_non_negative,
  "exponentiate": exponentiate,
  "shift": shift,
}

LINKS: dict[str, optax.GradientTransformation] = {
  FREE: optax.identity(),
  "clamp": optax.keep_params_nonnegative(),
  "exponentiate": keep(exponentiate),
  "shift": keep(shift),
}


class Constrained(struct.PyTreeNode, nn.meta.AxisMetadata[Any]):
  """The tag: a Flax metadata box with a weight and the name of its constraint."""

  value: Any
  constraint: str = struct.field(pytree_node=False)

  def unbox(self) -> Any:
    return self.value

  def replace_boxed(self, val: Any) -> "Constrained":
    return self.replace(value=val)

  def add_axis(self, index: int, params: dict[Any, Any]) -> "Constrained":
    return self  # Every constraint here acts on each slice alone.

  def remove_axis(self, index: int, params: dict[Any, Any]) -> "Constrained":
    return self


def constrained(initializer: Initializer, constraint: str) -> Initializer:
  """An initializer that tags what `initializer` creates and projects it once.

  Raises `ValueError` for an unknown constraint.
  """
  if constraint not in PROJECTIONS:
    raise ValueError(f"Unknown constraint {constraint!r}; expected one of {', '.join(PROJECTIONS)}")
  if constraint == FREE:
    return initializer

  def initialize(*args, **kwargs):
    value = PROJECTIONS[constraint](initializer(*args, **kwargs))
    return Constrained(value, constraint)

  return initialize


def constraints_of(params: Any) -> Any:
  """The tree of the constraints' names of boxed parameters; "free" where untagged."""
  return jax.tree.map(
    lambda leaf: leaf.constraint if isinstance(leaf, Constrained) else FREE,
    params,
    is_leaf=lambda leaf: isinstance(leaf, Constrained),
  )


def enforce(constraints: Any) -> optax.GradientTransformation:
  """The last link of an optimizer, after which every tagged weight meets its constraint exactly.

  Any link after it (weight decay, a learning rate, an average of updates) could undo it.
  `constraints` is the tree that `constraints_of` returns.
  """
  links = jax.tree.map(lambda name: FREE if name == PENALISED else name, constraints)
  return optax.partition({**LINKS}, links)


def averaged(params: Any, constraints: Any) -> Any:
  """Averaged weights, with those that are tagged at >= 0 exactly.

  An average of weights >= 0 is >= 0, but the compiler may compute the newest ones again where they
  are averaged, with another rounding (see `keep`), which leaves some at -1e-16.
  """

  def one(weight, name):
    return weight if name in (FREE, PENALISED) else jnp.maximum(weight, 0)

  return jax.tree.map(one, params, constraints)


def negative_shares(params: Any, constraints: Any) -> jax.Array:
  """The sum over all penalised weights of n, the negative share of a unit's weights; 0 without any.

  n = sum_i max(-w_ij, 0) / sum_i |w_ij|, in [0, 1], is the mean over the units j (the last axis) of
  a layer; a vector, as the scales of a norm, counts as one unit.

  Why this form: where the inputs of a layer are carried as a - b, both convex (`proof.convexify`),
  W+ a + W- b and W+ b + W- a take their place. A unit whose weights have a negative share n keeps
  1 - 2 n of its value for each |w| that its two parts are made of. From layer to layer the
  common term so grows by about 1 / (1 - 2 n) against the values, its logarithm by a sum over the
  layers, which to first order is 2 sum n. The size of a unit's weights has no part in it, nor
  in what the network computes where a norm follows, so it has none here: a penalty on
  max(-w, 0) itself is met by smaller weights and a larger scale in the norm.

  A linear head of several logits is not penalised: softmax sees its weights only up to a number
  for each input (`shift`), so that they can be made >= 0.
  """

  def share(weight, name):
    if name != PENALISED:
      return 0.0
    weight = jnp.reshape(weight, (-1, 1 if weight.ndim == 1 else weight.shape[-1]))
    size = jnp.abs(weight).sum(0)
    return jnp.mean(jax.nn.relu(-weight).sum(0) / jnp.where(size == 0, 1, size))

  return sum(jax.tree.leaves(jax.tree.map(share, params, constraints)), jnp.zeros(()))


def summary(params: Any, constraints: Any) -> dict[str, jax.Array]:
  """The smallest constrained weight and the fraction that is exactly 0, `negative_shares`.

  Each where there are such weights.
  """
  names, found = jax.tree.leaves(constraints), {}
  if PENALISED in names:
    found["negative_shares"] = negative_shares(params, constraints)
  pairs = zip(jax.tree.leaves(params), names, strict=True)
  leaves = [leaf for leaf, name in pairs if name not in (FREE, PENALISED)]
  if not leaves:
    return found
  zeros = jnp.stack([jnp.sum(leaf == 0, dtype=jnp.float32) for leaf in leaves]).sum()
  return found | {
    "smallest_constrained": jnp.stack([leaf.min() for leaf in leaves]).min(),
    "zero_share": zeros / sum(leaf.size for leaf in leaves),
  }
