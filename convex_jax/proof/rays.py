"""How far logits stay apart along the axes of an input: the search behind certified radii.

Along each of the 2 D rays x + s e_i and x - s e_i, s >= 0, the tangent of the predicted logit less a rival
is concave in s where the rival is convex. So a few evaluations per ray bound from below where it
becomes negative; and a point of the convex hull of what all rays reach is as safe as they are.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from convex_jax.proof.float64 import ROUNDING

DUAL = {"l1": np.inf, "l2": 2, "linf": 1}
FIRST = 512  # The steepest rays, with which the search for the least reach begins.
FEW = 32  # The rays that are searched further at each later step.
EXACT = 1 / 4096  # Relative accuracy of the least reach.
STEPS = 100  # Of the search for it, at most.
SWEEPS = 2  # Over all rays; a third gains 0 to 3 %.
EVERY = slice(None)


class Around:
  """The logits y near an input: their values and tangents there, and what was seen along rays.

  Ray i of 2 D goes along e_i, ray D + i against it.
  """

  def __init__(
    self,
    x: np.ndarray,
    y_K: np.ndarray,
    tangents_K: np.ndarray,
    slopes_KxD: np.ndarray,
    evaluate: Callable[..., np.ndarray],
  ):
    self.k = k = int(y_K.argmax())
    self.rivals = rivals = np.delete(np.arange(len(y_K)), k)
    self.slopes_KxD, self._evaluate, self._x_D = slopes_KxD, evaluate, np.ravel(x)
    self._y_k = min(y_K[k], tangents_K[k])
    self._slope_N = np.concatenate([slopes_KxD[k], -slopes_KxD[k]])
    self.margins_R = self._y_k - y_K[rivals] - ROUNDING * (1 + np.abs(y_K).max())
    falls_DxR = (slopes_KxD[rivals] - slopes_KxD[k]).T
    self.falls_NxR = np.concatenate([falls_DxR, -falls_DxR])  # Of the slack, at 0.
    self.seen: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # Rays, steps, slack.

  def look(self, rays: np.ndarray, steps: np.ndarray) -> None:
    """Adds the slack at some steps, (tangent of y_k) - y_j less a margin for rounding, to `seen`."""
    d = len(self._x_D)
    at_N = self._x_D[rays % d]
    moves_N = (at_N + np.where(rays < d, steps, -steps)) - at_N  # As far as the sum really moves.
    y_NxK, steps = self._evaluate(rays % d, moves_N), np.abs(moves_N)
    tangent_N = self._y_k + steps * self._slope_N[rays]
    margin_N = ROUNDING * (1 + np.abs(y_NxK).max(-1))
    self.seen.append((rays, steps, (tangent_N - margin_N)[:, None] - y_NxK[:, self.rivals]))


class Rays:
  """How far (tangent of y_k) - y_j, the slack, is positive along each ray, for each rival.

  Along a ray the slack is concave, and positive at 0. So it is positive up to where it was seen
  positive, and from there to the zero of its interpolation with a step at which it was not;
  beyond what its slope at 0 allows, it is not.
  """

  def __init__(self, around: Around, margins_R: np.ndarray, off_R: np.ndarray):
    self._around, self._margins_R, self._off_R = around, margins_R, off_R
    shape = around.falls_NxR.shape
    with np.errstate(divide="ignore"):
      self._tangent = margins_R / np.maximum(around.falls_NxR, 0)  # Where the tangents meet.
    self._low, self._above = np.zeros(shape), np.broadcast_to(margins_R, shape).copy()
    self._high, self._below = np.full(shape, np.inf), np.full(shape, -np.inf)
    self._told = 0
    self._hear()

  def _hear(self) -> None:
    """Takes in what was seen since the last time."""
    for rays, steps, slack in self._around.seen[self._told :]:
      slack, at = slack - self._off_R, np.broadcast_to(steps[:, None], slack.shape)
      holds = slack > 0  # False for NaN.
      for known, value, where in (
        (self._low, self._above, holds & (at > self._low[rays])),
        (self._high, self._below, ~holds & (at < self._high[rays])),
      ):
        known[rays] = np.where(where, at, known[rays])
        value[rays] = np.where(where, np.nan_to_num(slack, nan=-np.inf), value[rays])
    self._told = len(self._around.seen)

  def _look(self, rays: np.ndarray, steps: np.ndarray) -> None:
    self._around.look(rays, steps)
    self._hear()

  def reach(self, rays: Any = EVERY) -> np.ndarray:
    """Steps (rays, rivals) up to which the slack is surely positive."""
    low, above = self._low[rays], self._above[rays]
    high, below = self._high[rays], self._below[rays]
    with np.errstate(invalid="ignore"):
      part = above / (above - below) * (high - low)
    return low + np.where(np.isfinite(high), part, 0.0)

  def _both_ways(self) -> np.ndarray:
    """The reach (D, rivals) along each axis, the less of both directions, as a number > 0."""
    return np.maximum(self.reach().reshape(2, -1, len(self._margins_R)).min(0), 1e-300)

  def radius(self, norm: str) -> float:
    """The radius of the largest ball of a norm in the convex hull of what the axes reach both ways."""
    return float(1 / dual_size(1 / self._both_ways(), norm, axis=0).max())

  def _limit(self, rays: Any = EVERY) -> np.ndarray:
    """Steps (rays, rivals) beyond which it is surely not."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
      drop = self._margins_R - self._above[rays]
      chord = np.where(drop > 0, self._low[rays] * self._margins_R / drop, np.inf)
    return np.minimum(np.minimum(self._tangent[rays], self._high[rays]), chord)

  def _guess(self, rays: Any = EVERY) -> np.ndarray:
    """Where the slack may be 0: for the parabola with its value and slope at 0, and one more value."""
    fall, margin = self._around.falls_NxR[rays], self._margins_R
    failed = np.isfinite(self._below[rays])
    at = np.where(failed, self._high[rays], self._low[rays])
    value = np.where(failed, self._below[rays], self._above[rays])
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
      bend = np.where(at > 0, np.maximum(margin - fall * at - value, 0.0) / at**2, 0.0)
      zero = 2 * margin / (fall + np.sqrt(fall**2 + 4 * bend * margin))
    zero = np.where(zero > 0, zero, np.inf)  # No slope and no bend.
    return np.clip(zero, self.reach(rays), self._limit(rays))

  def find_least(self, furthest: float) -> None:
    """Finds the least reach of all rays, to `EXACT`: the l1 radius.

    First among the rays that are the steepest at 0. At the result all others are evaluated, of
    which those that fail are searched further. No ray is followed beyond where all would have
    failed, or `furthest` where none has a slope.
    """
    tangent = self._tangent.min(-1)
    order = np.argsort(tangent, kind="stable")
    looked, waiting = order[:FIRST], order[FIRST:]
    for step in range(STEPS):
      reach, limit = self.reach(looked).min(-1), self._limit(looked).min(-1)
      best = reach.min()
      least = limit.min() if np.isfinite(limit.min()) else furthest
      if best >= (1 - EXACT) * least or step == STEPS - 1:
        waiting = waiting[self._low[waiting].min(-1) < best]
        if not len(waiting) or not best > 0:
          return
        self._look(waiting, np.full(len(waiting), best))
        looked, waiting = order, waiting[:0]
      elif step == 0:
        some = looked[self._low[looked].min(-1) < least]
        self._look(some, np.full(len(some), least))
      else:
        some = looked[np.argsort(reach, kind="stable")[:FEW]]
        at = self._guess(some).min(-1)
        if step % 3 == 0:  # Where parabolas mislead.
          at = (self.reach(some).min(-1) + np.minimum(self._limit(some).min(-1), least)) / 2
        self._look(some, np.minimum(at, least))

  def find_all(self, furthest: float) -> None:
    """Finds about how far each ray reaches, up to `furthest`, for the rival that is worst overall."""
    for _ in range(SWEEPS):
      worst = dual_size(1 / self._both_ways(), "l2", axis=0).argmax()
      self._look(np.arange(len(self._low)), np.minimum(self._guess()[:, worst], furthest))


def dual_size(vectors: np.ndarray, norm: str, axis: int = -1) -> np.ndarray:
  """The dual norm of vectors along an axis; squares of their entries may leave float64's range."""
  largest = np.abs(vectors).max(axis, keepdims=True)
  unit = np.where((largest > 0) & np.isfinite(largest), largest, 1.0)
  return np.linalg.norm(vectors / unit, DUAL[norm], axis) * np.squeeze(unit, axis)
