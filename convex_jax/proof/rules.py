"""The rules of disciplined convex programming, one per primitive, element by element.

Affine maps of either sign, sums, non-negative weights, maxima, and convex non-decreasing
functions keep convexity (Grant, Boyd and Ye 2006, "Disciplined Convex Programming"). Linear
operations are in `linear`, powers, products of equal numbers and norms in `powers`; here are
scalar functions, bounds and extremes.

A primitive without a rule loses both. No rule is about a function that is undefined somewhere
(log, 1 / x), and a root is one only of what is surely >= 0: a proof must hold on all of R^n.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from convex_jax.proof import powers
from convex_jax.proof.linear import (
  LINEAR,
  in_windows,
  is_over_nothing,
  lost,
  masks_of,
  over_axes,
  so_far,
  sums_at_places,
  times,
  updates_of,
)
from convex_jax.proof.signs import infinite, sign
from convex_jax.proof.values import (
  Known,
  Masks,
  Operation,
  Value,
  composed,
  either,
  is_nowhere,
  swapped,
  uniform,
)


def _exponential(op: Operation, x: Value) -> Masks:
  return composed(x, convex=True, concave=False, rising=True, falling=False)


def _quotient(op: Operation, a, b) -> Masks:
  """Linear in a; and c / exp(u) is c exp(-u)."""
  power = b.made_by if isinstance(b, Value) else None
  if power is None or power.primitive not in ("exp", "exp2") or not isinstance(a, Known):
    return LINEAR["div"](op, a, b)
  u: Any = power.inputs[0]
  masks = composed(u, convex=True, concave=False, rising=False, falling=True)
  return times(op, Value(*masks, power), a)


def _even(op: Operation, x: Value) -> Masks:
  """cosh, convex, falls up to 0 and rises from there."""
  if x.is_affine:
    return composed(x, convex=True, concave=False, rising=False, falling=False)
  above, below = (~mask for mask in sign(x))
  yes = uniform(True, x.shape)
  return composed(x, yes, ~yes, above, below)


def _odd(op: Operation, x: Value) -> Masks:
  """sinh, concave up to 0, convex from there, rises."""
  above, below = (~mask for mask in sign(x))
  return composed(x, above, below, uniform(True, x.shape), uniform(False, x.shape))


# Maxima are convex where all their numbers are, minima concave. A bound that is infinite may be
# none: the maximum of a number and minus infinity is that number.


def _both(masks: Masks, is_maximum: bool) -> Masks:
  return masks if is_maximum else swapped(masks)


def _extreme(is_maximum: bool):
  def rule(op: Operation, a, b) -> Masks:
    (p, n), (q, m) = (_both(masks_of(x), is_maximum) for x in (a, b))
    curved = uniform(True, op.shape)
    if is_nowhere(p) and is_nowhere(q):
      return _both((uniform(False, op.shape), curved), is_maximum)
    no_a, no_b = (~_both(infinite(x), is_maximum)[0] for x in (a, b))
    not_convex = (p & ~no_a) | (q & ~no_b) | (no_a & no_b)
    not_concave = (n | ~no_b) & (m | ~no_a) | (no_a & no_b)
    return _both((curved & not_convex, curved & not_concave), is_maximum)

  return rule


maximum = _extreme(is_maximum=True)
_minimum = _extreme(is_maximum=False)


def _clamp(op: Operation, low, x, high) -> Masks:
  """min(max(x, low), high): convex where no upper bound cuts, concave where no lower one does."""
  if not isinstance(low, Known) or not isinstance(high, Known) or isinstance(x, Known):
    return lost(op)
  bad = ~(low.high < np.inf) | ~(high.low > -np.inf) | ~(low.low <= high.high)
  return either(x.masks[0], high.low < np.inf, bad), either(x.masks[1], low.high > -np.inf, bad)


def _scattered(is_maximum: bool):
  def rule(op: Operation, x, indices, updates) -> Masks:
    count = updates_of(op, x, indices, updates)
    if count is None:
      return lost(op)
    (old, kept), (new, _) = (_both(masks_of(y), is_maximum) for y in (x, updates))
    old = old & (_both(infinite(x), is_maximum)[0] | (count == 0))
    not_convex = sums_at_places(op, old, indices, new) > 0
    return _both((not_convex, kept | (count > 0)), is_maximum)

  return rule


def _over(gather: Callable[[Operation, np.ndarray], np.ndarray], is_maximum: bool = True):
  """The extreme of what `gather` gathers; of nothing, or of infinities alone, it is infinite."""

  def rule(op: Operation, x) -> Masks:
    old, nothing = _both(x.masks, is_maximum)[0], is_over_nothing(op, x)
    if not is_nowhere(old):
      counts = _both(infinite(x), is_maximum)[0]
      old, nothing = old & counts, nothing | ~gather(op, counts)
    return _both((either(gather(op, old), nothing), uniform(True, op.shape)), is_maximum)

  return rule


def _sum(op: Operation, x) -> Masks:
  """The sum of the k largest of convex numbers is the largest sum of k of them."""
  made = x.made_by
  if made is None or made.primitive != "top_k" or op.params["axes"] != (made.params["axis"],):
    return LINEAR["reduce_sum"](op, x)
  return over_axes(op, made.inputs[0].not_convex), uniform(True, op.shape)


RULES: dict[str, Callable[..., Masks]] = LINEAR | {
  **dict.fromkeys(("mul", "dot_general"), powers.product),
  "div": _quotient,
  **dict.fromkeys(("integer_pow", "square"), powers.power),
  **dict.fromkeys(("pow", "sqrt", "cbrt"), powers.root),
  "abs": powers.absolute,
  **dict.fromkeys(("exp", "exp2", "expm1"), _exponential),
  "cosh": _even,
  "sinh": _odd,
  **dict.fromkeys(("max", "logaddexp"), maximum),  # `log_sum_exp` names the latter.
  "min": _minimum,
  "clamp": _clamp,
  "scatter-max": _scattered(is_maximum=True),
  "scatter-min": _scattered(is_maximum=False),
  "reduce_sum": _sum,
  "reduce_max": _over(over_axes),
  "reduce_window_max": _over(in_windows),
  **dict.fromkeys(("cummax", "cumlogsumexp"), _over(so_far)),
  "reduce_min": _over(over_axes, is_maximum=False),
  "reduce_window_min": _over(in_windows, is_maximum=False),
  "cummin": _over(so_far, is_maximum=False),
}
