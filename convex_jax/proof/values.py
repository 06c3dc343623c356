"""What is known of each number of a computation: the currency of the proof.

A number that does not depend on the input is `Known`. One that does is a `Value`: two boolean
masks of its own shape say of which elements convexity, and concavity, is not proved. Affine
elements are set in neither mask, elements of which nothing is proved in both.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from convex_jax.proof.in_numpy import rearranged
from convex_jax.proof.layouts import Parameters
from convex_jax.proof.source import Place

Masks = tuple[np.ndarray, np.ndarray]  # Not proved convex, not proved concave.


@dataclasses.dataclass(frozen=True, eq=False)
class Known:
  """A number that does not depend on the input, by its enclosure low <= number <= high.

  Floats are in float64. Their enclosure contains the real number and all that the program may
  make of it by rounding each operation in its own dtype. Integers, booleans and random keys are
  the program's own. A sign, an order or an index is known only if both ends show it.
  """

  low: np.ndarray
  high: np.ndarray  # The very array `low` where the number is exact.
  origins: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # Weights in it.
  varies: bool = False  # It stands for a value at one point of the input: see `evaluate`.
  is_real: ClassVar[bool] = True

  @classmethod
  def exactly(cls, array: Any, origins: dict[str, np.ndarray] | None = None) -> "Known":
    """A number without rounding."""
    return cls(array, array, origins or {})

  @functools.cached_property
  def is_exact(self) -> bool:
    return self.low is self.high or bool(np.array_equal(self.low, self.high))

  @functools.cached_property
  def not_finite(self) -> np.ndarray:
    """Where it is infinite, NaN, or not known at all; never for integers. As `tidy` stores it."""
    return tidy(~is_finite(self), self.shape) if self.is_float else uniform(False, self.shape)

  @property
  def array(self) -> np.ndarray:
    """The number, or the middle of its enclosure: for estimates and messages."""
    if self.low is self.high or not self.is_float:
      return self.low
    with np.errstate(all="ignore"):
      return self.low + (self.high - self.low) / 2

  @property
  def is_float(self) -> bool:
    return self.low.dtype == np.float64

  @property
  def shape(self) -> tuple[int, ...]:
    return self.low.shape

  @property
  def masks(self) -> Masks:
    no = uniform(False, self.shape)
    return no, no


def is_finite(known: Known) -> np.ndarray:
  """Where a known number is surely a finite real number."""
  if not isinstance(known.low, np.ndarray | np.generic):  # A random key.
    return np.zeros(known.shape, bool)
  finite = np.isfinite(known.low)
  return finite if known.low is known.high else finite & np.isfinite(known.high)


@dataclasses.dataclass(frozen=True, eq=False)
class ScalarFunction:
  """What is proved of a scalar function with kinks; every field but the last two may be an array."""

  convex: Any
  concave: Any
  least: Any  # A lower bound of its slope; minus infinity if none is known.
  most: Any  # An upper bound of it.
  ends: Sequence[np.ndarray] = ()  # Of its pieces, in rising order; infinite or kinks.
  note: str = ""  # What keeps it from being convex.

  @property
  def rising(self) -> Any:
    return self.least >= 0

  @property
  def falling(self) -> Any:
    return self.most <= 0

  @property
  def steepest(self) -> np.ndarray:
    """A bound on its slope's magnitude."""
    return np.maximum(np.abs(self.least), np.abs(self.most))


@dataclasses.dataclass(frozen=True, eq=False)
class Operation:
  """One step of the computation; `order` counts the steps from the input."""

  primitive: str
  eqn: Any  # A `jax.extend.core.JaxprEqn`; None at the border of an unrolled loop.
  inputs: tuple["Known | Value", ...]
  place: Place
  order: int
  index: int | None = None  # Which part a split makes, which row the border of a loop.
  scalar: "tuple[Value, ScalarFunction] | None" = None  # (z, f) where the result is f(z).
  note: str = ""  # Why `scalar` is neither convex nor concave.

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(self.eqn.outvars[0].aval.shape)

  @functools.cached_property
  def params(self) -> dict[str, Any]:
    return Parameters(self.eqn) if self.eqn else {}

  def bind(self, *arrays: Any, **changed: Any) -> Any:
    """Applies the primitive to other arrays in full precision, with some parameters changed."""
    full = {"precision": None} if "precision" in self.params else {}
    params = {**self.params, **full, **changed}
    return self.eqn.primitive.bind(*map(jnp.asarray, arrays), **params)

  def move(self, *arrays: np.ndarray) -> np.ndarray:
    """`bind`, for a primitive that moves elements: by NumPy where that can."""
    found = rearranged(self.primitive, self.params, arrays)
    return found[0] if found is not None else np.asarray(self.bind(*arrays))


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
  """A number that depends on the input."""

  not_convex: np.ndarray
  not_concave: np.ndarray
  made_by: Operation | None = None  # None: the input itself.
  is_real: bool = True  # False: a condition, an index.

  @property
  def shape(self) -> tuple[int, ...]:
    return self.not_convex.shape

  @property
  def masks(self) -> Masks:
    return self.not_convex, self.not_concave

  @property
  def is_affine(self) -> bool:
    return not (self.not_convex.any() or self.not_concave.any())

  @property
  def is_lost(self) -> bool:
    """Whether some element is proved neither convex nor concave."""
    return overlap(self.masks)


def swapped(masks: Masks) -> Masks:
  """The masks of -x for those of x."""
  return masks[1], masks[0]


# Nearly all masks are the same everywhere. Stored with strides of 0, they take neither memory
# nor time.


def uniform(value: bool, shape: Sequence[int]) -> np.ndarray:
  """A mask with one value everywhere."""
  return np.broadcast_to(np.bool_(value), tuple(shape))


def is_uniform(mask: np.ndarray) -> bool:
  """Whether a mask is stored as `uniform` stores it."""
  return not any(mask.strides)


def tidy(mask: np.ndarray, shape: Sequence[int]) -> np.ndarray:
  """The mask, broadcast to a shape, and stored as `uniform` stores it where possible."""
  mask = np.broadcast_to(mask, tuple(shape))
  if is_uniform(mask):
    return mask
  stored = thin(mask)
  if not stored.any():
    return uniform(False, shape)
  return uniform(True, shape) if stored.all() else mask


def thin(array: np.ndarray) -> np.ndarray:
  """The array with length 1 along the axes along which it is stored once and repeated."""
  return array[tuple(slice(None) if step else slice(1) for step in array.strides)]


def overlap(masks: Masks) -> bool:
  """Whether some element is proved neither convex nor concave."""
  return not any(map(is_nowhere, masks)) and bool((thin(masks[0]) & thin(masks[1])).any())


def both(masks: Masks, others: Masks, shape: Sequence[int]) -> Masks:
  """What is proved by the one or by the other, tidy."""
  not_convex, not_concave = (thin(a) & thin(b) for a, b in zip(masks, others, strict=True))
  return tidy(not_convex, shape), tidy(not_concave, shape)


def is_nowhere(mask: np.ndarray) -> bool:
  """Whether a mask is stored as False everywhere."""
  return is_uniform(mask) and not (mask.size and mask.flat[0])


def either(*masks: np.ndarray) -> np.ndarray:
  """The union of masks."""
  masks = tuple(m for m in masks if not is_nowhere(m)) or masks[:1]
  return functools.reduce(np.logical_or, masks)


def composed(x: Value, convex: Any, concave: Any, rising: Any, falling: Any) -> Masks:
  """Masks of g(x), where g is a scalar function with these properties (booleans or arrays).

  A convex non-decreasing function of a convex value is convex, a convex non-increasing one of
  a concave value too, and any convex function of an affine value.
  """

  def one(is_curved, same, turned):
    if isinstance(is_curved, bool):  # By far cheaper than masks.
      if not is_curved:
        return uniform(True, x.shape)
      return same if rising else turned if falling else either(same, turned)
    same, turned = thin(same), thin(turned)
    mask = np.where(rising, same, np.where(falling, turned, either(same, turned)))
    return np.broadcast_to(np.where(is_curved, mask, True), x.shape)

  return one(convex, *x.masks), one(concave, *x.masks[::-1])


def may_be_nan(x: Known) -> Any:
  """Where a known number may be NaN."""
  if getattr(x.low.dtype, "kind", "") not in ("f", "c"):
    return np.False_
  return np.isnan(x.low) | np.isnan(x.high)
