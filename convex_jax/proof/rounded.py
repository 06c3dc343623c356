"""A number of a program: where its real value lies, and how far the computed one can be from it."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from convex_jax.proof.enclosures import Ends, size_of
from convex_jax.proof.equations import Unknown
from convex_jax.proof.merged import NOTHING, Merged
from convex_jax.proof.values import Known


@dataclasses.dataclass(frozen=True, eq=False)
class Chain:
  """A number as a scalar function g of an earlier one, its root, element by element."""

  root: "Rounded"
  slope: Ends  # Encloses g' wherever it exists, between the root's real and computed values.
  error: Any  # Of the computed g at a number without error, and of g where it jumps.

  @functools.cached_property
  def total(self) -> Any:
    """A bound on the error: |g~(z~) - g(z~)| + |g(z~) - g(z)|."""
    return self.error + product_of(size_of(self.slope), self.root.error)


@dataclasses.dataclass(frozen=True, eq=False)
class Rounded:
  """A floating-point number of the program, at any input of the ball."""

  low: Any  # low <= its real value <= high.
  high: Any
  error: Any  # |computed - real| <= error.
  varies: bool = True  # It depends on the input.
  is_affine: bool = False  # It is an affine function of the input.
  made_by: "tuple[Any, Sequence[Any]] | None" = None  # Equation and operands.
  chains: tuple[Chain, ...] = ()
  around: Ends | None = None  # What its operation makes of all that its operands are between.
  merged: Merged = NOTHING
  shift: Any = None  # Where all of the error is known: computed - real, unless it is 0.

  @property
  def ends(self) -> Ends:
    return self.low, self.high

  @property
  def shape(self) -> tuple[int, ...]:
    return np.shape(self.low)

  @functools.cached_property
  def wide(self) -> Ends:
    """Contains the real value, the computed one, and what a chain takes between them."""
    margin = functools.reduce(np.maximum, [c.total for c in self.chains], self.error)
    low, high = self.low - margin, self.high + margin
    if self.around is None:
      return low, high
    return np.maximum(low, self.around[0]), np.minimum(high, self.around[1])

  @functools.cached_property
  def known(self) -> Known:
    """Both the real and the computed value, for what `constants` decides of them."""
    if not np.any(self.error) and np.array_equal(self.low, self.high):
      return Known.exactly(np.asarray(self.low))
    low, high = self.wide
    return Known(np.asarray(low), np.asarray(high))


@dataclasses.dataclass(frozen=True, eq=False)
class Condition:
  """A comparison of two numbers, by an equation."""

  known: Known
  made_by: tuple[Any, Sequence[Rounded]]

  @property
  def agrees(self) -> Any:
    """Where it is of two numbers without error, so that the program decides as it is in reality."""
    return functools.reduce(np.logical_and, [np.equal(x.error, 0) for x in self.made_by[1]])


def as_rounded(x: Any) -> Rounded:
  """A known number as one whose computed value may be anywhere in its enclosure."""
  if isinstance(x, Rounded):
    return x
  error = np.where(x.low == x.high, 0.0, x.high - x.low)
  return Rounded(x.low, x.high, error, varies=False)


def as_known(x: Any) -> Known:
  """What is known of a number, or of a condition."""
  return x if isinstance(x, Known) else x.known


def is_number(x: Any) -> bool:
  """Whether it is a floating-point number, not an integer or a condition."""
  return isinstance(x, Rounded) or (isinstance(x, Known) and x.is_float)


def is_fixed(x: Any) -> bool:
  """Whether a number surely does not depend on the input."""
  if isinstance(x, Known):
    return x.is_float or x.is_exact
  return isinstance(x, Rounded) and not x.varies


def product_of(slope: Any, error: Any) -> Any:
  """slope error, where infinity times 0 is 0."""
  return np.where(np.asarray(error) == 0, 0.0, slope * error)


def has_root(x: Rounded, root: Rounded) -> bool:
  """Whether a number is a scalar function of a root, or does not vary."""
  return x is root or not x.varies or any(c.root is root for c in x.chains)


def roots_of(operands: Sequence[Rounded]) -> list[Rounded]:
  """The numbers of which all operands are scalar functions."""
  varying = [x for x in operands if x.varies]
  if not varying:
    return []
  known = [[x, *(c.root for c in x.chains)] for x in varying]
  return [r for r in known[0] if all(any(r is s for s in others) for others in known[1:])]


def chain_of(x: Rounded, root: Rounded) -> Chain:
  """A number as a function of a root that it has, or of none."""
  if x is root:
    return Chain(root, (1.0, 1.0), 0.0)
  if not x.varies:
    return Chain(root, (0.0, 0.0), x.error)
  return next(c for c in x.chains if c.root is root)


def joined_chain(root: Rounded, possible, cases, roots, jump) -> Chain:
  """A choice among functions of a root, which it has with a smaller range."""
  parts = [chain_of(x, r) for x, r in zip(cases, roots, strict=True)]
  slope = hull_of(possible, [c.slope for c in parts])
  return Chain(root, slope, largest_of(possible, [c.error for c in parts]) + jump)


def sides_of(which: Any) -> tuple[Rounded, Rounded, Rounded, Rounded] | None:
  """Of a comparison of z with a number c: z; z where it is false, at c, and where it is true."""
  if not isinstance(which, Condition):
    return None
  eqn, (a, b) = which.made_by
  if eqn.primitive.name in ("eq", "ne"):
    return None
  root, number_ = (a, b) if a.varies else (b, a)
  if number_.varies or not number_.known.is_exact:
    return None
  c = number_.low
  is_above = eqn.primitive.name in ("gt", "ge")

  def cut(f):
    wide = f(root.wide[0], c), f(root.wide[1], c)
    return Rounded(f(root.low, c), f(root.high, c), root.error, around=wide)

  below, above = cut(np.minimum), cut(np.maximum)
  if is_above != (root is a):
    below, above = above, below
  at = np.broadcast_to(c, root.shape)
  return root, below, Rounded(at, at, np.zeros(root.shape)), above


def keeps_affine(name: str, operands: Sequence[Rounded]) -> bool:
  """Whether an elementwise operation on these is affine in the input."""
  if not all(x.is_affine for x in operands if x.varies):
    return False
  if name == "div":
    return not operands[1].varies
  return name != "mul" or not all(x.varies for x in operands)


def hull_of(possible: Sequence[Any], ends: Sequence[Ends]) -> Ends:
  """Of all that is possible, element by element."""
  lows = [np.where(p, e[0], np.inf) for p, e in zip(possible, ends, strict=True)]
  highs = [np.where(p, e[1], -np.inf) for p, e in zip(possible, ends, strict=True)]
  return functools.reduce(np.minimum, lows), functools.reduce(np.maximum, highs)


def largest_of(possible: Sequence[Any], arrays: Sequence[Any]) -> Any:
  """The largest of all that is possible, element by element."""
  return functools.reduce(
    np.maximum, [np.where(p, a, 0.0) for p, a in zip(possible, arrays, strict=True)]
  )


def mapped(f: Callable[..., Any], numbers: Sequence[Any]) -> Any:
  """What moves elements, applied to what is known of them."""
  if all(isinstance(x, Known) for x in numbers):
    return Known(f(*(x.low for x in numbers)), f(*(x.high for x in numbers)))
  if not all(map(is_number, numbers)):
    raise Unknown("of a comparison")
  xs = [as_rounded(x) for x in numbers]
  low, high, error = (f(*(getattr(x, part) for x in xs)) for part in ("low", "high", "error"))
  return Rounded(low, high, error)
