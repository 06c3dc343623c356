"""What a function does to its input before the first operation that is not affine.

f(x) = rest(A x + b), where A x + b is all that the operations after it see of x. A move of one
coordinate of x is a step along a column of A, at the cost of `rest` alone: for an MLP on images
that is a third of its work or less.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from convex_jax.proof.affine_maps import BILINEAR, MOVES, SUMS
from convex_jax.proof.interpreter import needed
from convex_jax.proof.wide import widened

LARGEST = 2**24  # Elements of A, above which f is left as it is.
BATCH = 256  # Columns of A that are computed together.


def split(
  f: Callable[[jax.Array], jax.Array], shape: tuple[int, ...]
) -> tuple[Callable[[jax.Array], jax.Array], Callable[[jax.Array], jax.Array], jax.Array | None]:
  """(front, rest, columns): f(x) = rest(front(x)), front(x + t e_i) = front(x) + t columns[i].

  Both parts are f's own operations, in float64; to be called under `float64`. Where A would be
  too large, `front` only makes x flat, and `columns` is None: those of the identity.
  """
  flat = jax.make_jaxpr(f)(jnp.zeros(shape, jnp.float64))
  flat = jax.make_jaxpr(widened(flat))(jnp.zeros(shape, jnp.float64))  # Without calls inside.
  jaxpr, border = flat.jaxpr, dict[Any, None]()
  affine, varying = set(jaxpr.invars), set(jaxpr.invars)
  for eqn in jaxpr.eqns:
    moved = [v for v in eqn.invars if not isinstance(v, jex.Literal) and v in varying]
    if moved:
      varying.update(eqn.outvars)
      if affine.issuperset(moved) and _is_affine(eqn, moved):
        affine.update(eqn.outvars)
      else:
        border.update(dict.fromkeys(v for v in moved if v in affine))
  border.update(
    dict.fromkeys(v for v in jaxpr.outvars if not isinstance(v, jex.Literal) and v in affine)
  )
  shapes = [tuple(v.aval.shape) for v in border]
  sizes = [int(np.prod(s)) for s in shapes]
  size, inputs = sum(sizes), int(np.prod(shape))
  if size * inputs > LARGEST:
    return jnp.ravel, lambda x: f(x.reshape(shape)), None
  first = _function(jaxpr, jaxpr.invars, list(border), flat.consts, jaxpr.eqns)
  after = [e for e in jaxpr.eqns if affine.isdisjoint(e.outvars)]
  then = _function(jaxpr, list(border), jaxpr.outvars, flat.consts, after)

  def front(x):
    return jnp.concatenate([jnp.zeros(0), *(jnp.ravel(u) for u in first(x))])

  def rest(u_U):
    parts = jnp.split(u_U, np.cumsum(sizes))[:-1]
    return then(*(u.reshape(s) for u, s in zip(parts, shapes, strict=True)))[0]

  _, linear = jax.linearize(front, jnp.zeros(shape, jnp.float64))
  columns = jax.jit(jax.vmap(lambda unit_D: linear(unit_D.reshape(shape))))
  units = (np.eye(min(inputs, BATCH), inputs, start) for start in range(0, inputs, BATCH))
  return front, rest, jnp.concatenate([columns(u) for u in units])[:inputs]


def _function(jaxpr, inputs, outputs, consts, eqns) -> Callable[..., list[jax.Array]]:
  """The function of a part of a jaxpr."""
  part = jex.Jaxpr(jaxpr.constvars, inputs, outputs, eqns, jaxpr.effects)
  part = jex.Jaxpr(jaxpr.constvars, inputs, outputs, list(needed(part)), jaxpr.effects)
  return jex.jaxpr_as_fun(jex.ClosedJaxpr(part, consts))


def _is_affine(eqn, moved) -> bool:
  """Whether an equation is affine in the operands `moved`, which are numbers, the others fixed."""
  name = eqn.primitive.name
  if name == "div":
    return moved == [eqn.invars[0]]
  return (
    name in SUMS or (name in MOVES and name != "scan") or (name in BILINEAR and len(moved) == 1)
  )
