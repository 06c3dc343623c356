"""Whether the primitives of a program are JAX's own.

The rules go by the names of primitives, and would otherwise take another package's `exp` for JAX's.
"""

import functools
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives

from convex_jax.proof import layouts
from convex_jax.proof.equations import SAME
from convex_jax.proof.rules import RULES

_OF_JAX = {
  p.name: p
  for module in (primitives, lax)
  for p in vars(module).values()
  if isinstance(p, jex.Primitive)
}


def check(jaxpr: Any) -> None:
  """Raises `ValueError` where another package's primitive bears a name that has a rule."""
  for eqn in jaxpr.eqns:
    name = eqn.primitive.name
    is_ruled = name in SAME or name in RULES
    own = _OF_JAX.get(name) or (_of_sharding().get(name) if is_ruled else None)
    if own is not eqn.primitive and (own or is_ruled):
      raise ValueError(
        f"the function uses a primitive named {name!r} that is not jax's own; proofs go by the names"
        " of primitives: rename it"
      )
    for inner in jex.jaxprs_in_params(eqn.params):
      check(layouts.parts_of(inner)[0])


@functools.cache
def _of_sharding() -> dict[str, jex.Primitive]:
  """`pvary` and `reshard`, which no public module has, by their names."""
  kinds, spec = jax.sharding.AxisType, jax.sharding.PartitionSpec("i")
  mesh = jax.sharding.AbstractMesh((1,), ("i",), axis_types=(kinds.Explicit,))
  varies = jax.shard_map(
    lambda x: lax.pcast(x, "i", to="varying"),
    mesh=mesh,
    in_specs=jax.sharding.PartitionSpec(),
    out_specs=spec,
  )
  x, found = jax.ShapeDtypeStruct((1,), jnp.float32), {}
  with jax.sharding.use_abstract_mesh(mesh):
    todo = [jax.make_jaxpr(f)(x).jaxpr for f in (varies, lambda x: jax.sharding.reshard(x, spec))]
  while todo:
    for eqn in todo.pop().eqns:
      found[eqn.primitive.name] = eqn.primitive
      todo += [layouts.parts_of(inner)[0] for inner in jex.jaxprs_in_params(eqn.params)]
  return found
