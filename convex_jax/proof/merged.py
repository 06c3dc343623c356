"""What a compiler makes of operations in a row that it merges, in other numbers than the program's.

XLA multiplies and adds up constants first, and the arguments of exponentials:

    (x c) d = x (c d),  (x c) (y d) = (x y) (c d),  x c + y c = (x + y) c,  x / c = x (1 / c),
    (x + c) + d = x + (c + d),  exp(u) exp(v) = exp(u + v).

Over the reals these are equal. In a dtype, c d may be too large, or be flushed to 0, where neither
x c nor (x c) d is; and u + v is rounded. What that can add to the error is bounded here, by the
sizes of whole arrays, as moves of elements between two such operations are no obstacle: neither
are sums and products of a single term. A product of a matrix is never one of an elementwise product
and a sum.
"""

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from convex_jax.proof.enclosures import magnitude, size_of


@dataclasses.dataclass(frozen=True)
class Run:
  """A number as s c: a bound on |s|, and the least and the greatest |c|, but for zeros."""

  size: float
  least: float = 1.0
  most: float = 1.0

  def __mul__(self, other: "Run") -> "Run":
    return Run(self.size * other.size, self.least * other.least, self.most * other.most)

  def hull(self, other: "Run | None") -> "Run":
    """For either, as a run of constants may be merged from any place on."""
    if other is None:
      return self
    least, most = min(self.least, other.least), max(self.most, other.most)
    return Run(max(self.size, other.size), least, most)

  def error(self, tiny: float) -> float:
    """What computing c, or 1 / c, by itself adds to the number's error."""
    if not self.most <= 1 / tiny:
      return np.inf
    return self.size * tiny if self.least < tiny else 0.0


@dataclasses.dataclass(frozen=True)
class Merged:
  """What made a number, as far as more may be merged with it.

  Attributes:
    run: as a product with the constants that it was multiplied by.
    added: a bound on the sum of the constants that were added to it.
    exponent: a bound on the sum of the arguments of exponentials that are factors of it.
  """

  run: Run | None = None
  added: float = 0.0
  exponent: float = 0.0


NOTHING = Merged()


def kept(operands: Sequence[Any]) -> Merged:
  """What made a number that is one of several, or at least may be simplified to one."""
  parts = [x.merged for x in operands if x.varies]
  runs = [m.run for m in parts if m.run]
  return Merged(
    functools.reduce(Run.hull, runs) if runs else None,
    max((m.added for m in parts), default=0.0),
    max((m.exponent for m in parts), default=0.0),
  )


def merge(
  name: str, eqn: Any, operands: Sequence[Any], around: Any, dtype: Any
) -> tuple[Merged, Any]:
  """Of an elementwise operation: what made its result, and what merging adds to its error."""
  varying, fixed = ([x for x in operands if x.varies == v] for v in (True, False))
  if not varying:
    return NOTHING, 0.0
  if name == "neg":
    return varying[0].merged, 0.0
  if name == "exp":
    return Merged(exponent=_size(operands[0])), 0.0
  info = jnp.finfo(dtype)
  tiny, largest = float(info.smallest_normal), float(info.max)
  if name in ("add", "add_any", "sub"):
    added = sum(map(_size, fixed)) + sum(x.merged.added for x in varying)
    reached, run = added + sum(map(_size, varying)) if added else 0.0, None
    if len(varying) > 1 and all(x.merged.run for x in varying):  # a c + b c = (a + b) c.
      a, b = (x.merged.run for x in varying)
      run = dataclasses.replace(a.hull(b), size=a.size + b.size)
      reached = max(reached, run.size)
    return Merged(run, added), 0.0 if reached <= largest else np.inf
  if name in ("square", "integer_pow"):
    varying = varying * (2 if name == "square" else eqn.params["y"])
  elif name not in ("mul", "div"):
    return NOTHING, 0.0
  error, exponents = 0.0, [x.merged.exponent for x in varying]
  if sum(e > 0 for e in exponents) > 1:  # exp(u + v), of a sum that is rounded.
    error = float(info.eps) * sum(exponents) * size_of(around)
  factors, constants = varying, [_constant(x) for x in fixed]
  if name == "div":
    inverse = 1 / np.maximum(_least(operands[1]), 1e-300)
    error = error + np.where(_most(operands[1]) * tiny >= 1, _most(operands[0]) * tiny, 0.0)
    error = error + np.where(inverse * tiny > 1, np.inf, 0.0)
    if operands[1].varies:
      factors = [x for x in operands[:1] if x.varies]
      new = None if factors else dataclasses.replace(constants[0], size=float(np.max(inverse)))
      return Merged(new, exponent=sum(exponents)), error
    c = constants[0]
    constants = [Run(1.0, 1 / max(c.most, 1e-300), 1 / max(c.least, 1e-300))]
  old = None
  if any(x.merged.run for x in factors):
    old = functools.reduce(operator.mul, [*map(_run_of, factors), *constants])
    error = error + old.error(tiny)
    if len(factors) > 1:  # (x y) (c d), of which x y may be too large, or flushed to 0.
      error = error + (np.inf if old.size > largest else tiny * old.most)
  new = old
  if constants:
    new = dataclasses.replace(constants[0], size=_size(factors[0])).hull(old)
  return Merged(new, exponent=sum(exponents)), error


def _run_of(x: Any) -> Run:
  return x.merged.run or Run(_size(x))


def _constant(x: Any) -> Run:
  some = _most(x) > 0
  if not some.any():
    return Run(1.0)
  return Run(1.0, float(_least(x)[some].min()), float(_most(x)[some].max()))


def _most(x: Any) -> np.ndarray:
  return np.asarray(size_of(x.ends) + x.error)


def _least(x: Any) -> np.ndarray:
  return np.maximum(magnitude(x.ends)[0] - x.error, 0.0)


def _size(x: Any) -> float:
  return float(np.max(_most(x), initial=0.0))
