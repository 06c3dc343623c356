"""The sets that keep a network convex, a weight's tag, the last link of the chain.

A network of affine maps and convex, non-decreasing activations is convex in its
input when every weight after the first activation is >= 0 (Sivaprasad et al. 2021,
"The Curious Case of Convex Neural Networks", section 3; Amos, Xu and Kolter 2017).

Nothing here knows a layer's name. The layer that creates a weight tags it, by an
initializer that `constrained` wraps; `constraints_of` reads the tags off the
variables; `enforce` projects exactly the tagged weights, after every other link.
Renaming a layer, or adding one, can therefore not drop a constraint.
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


def exponentiate(weight: jax.Array) -> jax.Array:
  """W if w >= 0, else exp(w - 5): the map of Sivaprasad et al. 2021, appendix B.

  Not a projection: a weight that would become -1e-4 restarts at 0.0067. It is what
  the report and the 2021 paper ran, kept so that their tables can be run again.
  """
  return jnp.where(weight < 0, jnp.exp(weight - 5), weight)


def shift(kernel_DxK: jax.Array) -> jax.Array:
  """w_dk - min(0, min_k w_dk): a classifier's head made >= 0 at no cost.

  All logits move by one common term, -sum_d min(0, min_k w_dk) h_d, which softmax,
  cross-entropy and argmax do not see. Shape (inputs, classes), classes last.
  """
  return kernel_DxK - jnp.minimum(kernel_DxK.min(axis=-1, keepdims=True), 0)


def keep(projection: Projection) -> optax.GradientTransformation:
  """A link after which `params + updates` is what `projection` makes of it, and >= 0.

  Where the constraint is met already the update u passes as max(u, -p), elsewhere it
  becomes a - p for the allowed value a >= 0. Rounding is monotone, so p + max(u, -p) and
  p + fl(a - p) >= p - p are >= 0 exactly for p >= 0, not to a tolerance.

  Both maxima are needed. The compiler may compute p + u twice, once with a fused
  multiply-add and once without (in a row's minimum and beside it, say), so that a
  projection sees a 0 where the sum that it corrects is -1e-10.
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
  """The tag: a Flax metadata box that holds a weight and its constraint's name."""

  value: Any
  constraint: str = struct.field(pytree_node=False)

  def unbox(self) -> Any:
    return self.value

  def replace_boxed(self, val: Any) -> "Constrained":
    return self.replace(value=val)

  def add_axis(self, index: int, params: dict[Any, Any]) -> "Constrained":
    return self  # Every constraint here holds slice by slice.

  def remove_axis(self, index: int, params: dict[Any, Any]) -> "Constrained":
    return self


def constrained(initializer: Initializer, constraint: str) -> Initializer:
  """Tags what `initializer` creates, and makes it feasible from the start."""
  if constraint == FREE:
    return initializer

  def initialize(*args, **kwargs):
    value = PROJECTIONS[constraint](initializer(*args, **kwargs))
    return Constrained(value, constraint)

  return initialize


def constraints_of(params: Any) -> Any:
  """The tree of constraint names ("free" where untagged) of boxed parameters."""
  return jax.tree.map(
    lambda leaf: leaf.constraint if isinstance(leaf, Constrained) else FREE,
    params,
    is_leaf=lambda leaf: isinstance(leaf, Constrained),
  )


def enforce(constraints: Any) -> optax.GradientTransformation:
  """The last link: afterwards every tagged weight meets its constraint, exactly.

  Anything that follows (weight decay, a rate, an average of updates) could undo it,
  so it closes the chain. `constraints` is the tree that `constraints_of` returns.
  """
  return optax.partition({**LINKS}, constraints)


def summary(params: Any, constraints: Any) -> dict[str, jax.Array]:
  """Smallest constrained weight and the share of them that is exactly 0; empty if none."""
  names = jax.tree.leaves(constraints)
  leaves = [leaf for leaf, name in zip(jax.tree.leaves(params), names, strict=True) if name != FREE]
  if not leaves:
    return {}
  zeros = jnp.stack([jnp.sum(leaf == 0, dtype=jnp.float32) for leaf in leaves]).sum()
  return {
    "smallest_constrained": jnp.stack([leaf.min() for leaf in leaves]).min(),
    "zero_share": zeros / sum(leaf.size for leaf in leaves),
  }
