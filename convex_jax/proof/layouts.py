"""Where each version of jax keeps the bodies and the operands of primitives that have a body.

The layouts known are those of jax 0.10 to 0.12; one that is not raises `ValueError`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex

CALLS = {  # Primitives that run the body under this parameter, once.
  "jit": "jaxpr",
  "closed_call": "call_jaxpr",  # Not in jax 0.12.
  "custom_jvp_call": "call_jaxpr",
  "custom_vjp_call": "call_jaxpr",
  "remat2": "jaxpr",
}


class Parameters(dict):
  """The parameters of an equation."""

  def __init__(self, eqn: Any):
    super().__init__(eqn.params)
    self._name = eqn.primitive.name

  def __missing__(self, key: str):
    raise ValueError(
      f"jax {jax.__version__} describes `{self._name}` without `{key}`, in a way that convex_jax"
      " does not know; install one of the versions in its setup.cfg"
    )


class Scan(NamedTuple):
  """A `lax.scan`; its operands are constants, carried values, and columns."""

  body: Any
  length: int
  reverse: bool
  constants: int
  carried: int


class While(NamedTuple):
  """A `lax.while_loop`; its operands are constants of test and of body, and carried values."""

  test: Any
  body: Any
  test_constants: int
  body_constants: int


def called(eqn: Any, operands: list[Any]) -> tuple[Any, list[Any]] | None:
  """The jaxpr that a call runs, and of which operands; None of what is no call."""
  name = eqn.primitive.name
  if name in CALLS:
    return Parameters(eqn)[CALLS[name]], operands
  if name == "shard_map":  # On one device it changes nothing.
    params = Parameters(eqn)
    return (params["jaxpr"], operands) if params["mesh"].size == 1 else None
  if name != "custom_linear_solve":
    return None
  params = Parameters(eqn)  # Its operands are constants of four jaxprs, and the right side.
  sizes = params["const_lengths"]
  start, end = sizes.matvec + sizes.vecmat, sum(sizes)
  return params["jaxprs"].solve, operands[start : start + sizes.solve] + operands[end:]


def scan_of(eqn: Any) -> Scan:
  """How a `scan` is laid out."""
  params = Parameters(eqn)
  if "ft_in" in params:  # jax 0.12.
    constants, carried, _ = map(len, params["ft_in"].unpack())
  else:
    constants, carried = params["num_consts"], params["num_carry"]
  return Scan(params["jaxpr"], params["length"], params["reverse"], constants, carried)


def while_of(eqn: Any) -> While:
  """How a `while` is laid out."""
  params = Parameters(eqn)
  names = ("cond_jaxpr", "body_jaxpr", "cond_nconsts", "body_nconsts")
  return While(*(params[name] for name in names))


def branches_of(eqn: Any) -> Sequence[Any]:
  """The jaxprs among which a `cond` chooses by its first operand."""
  return Parameters(eqn)["branches"]


def parts_of(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
  """The jaxpr and the numbers it closes over; from jax 0.12 on, inner jaxprs close over none."""
  return (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, jex.ClosedJaxpr) else (jaxpr, ())
