"""Certified radii: how far an input may move, in any direction, before its class can change.

For an input x of predicted class k and a rival j, convex logits give three bounds that no sampling
can: y_k lies above its tangent; the tangent of y_k minus y_j is concave, so that over an l1 ball
it is least at one of the 2 D vertices, each of which is evaluated; and, weights being
non-negative, the bounds of `slopes` lose nothing to signs between layers. The radii hold for every
perturbation in the ball, whether or not the moved input is still valid (an image with pixels in
range, say), and for the function over the reals, as float64 evaluates it with a margin of
`ROUNDING`. With an `arithmetic` they hold for the program that is deployed: from each difference of
two logits, what rounding can do to both over the ball is taken off (`rounding_errors`).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convex_jax.proof import interpreter, slopes
from convex_jax.proof.certificate import NotProved, proved
from convex_jax.proof.convexified import convexify
from convex_jax.proof.rounding_errors import Arithmetic, Ball, Program
from convex_jax.proof.values import Value
from convex_jax.proof.wide import in_float64

NORMS = ("l1", "l2", "linf")
DUAL = {"l1": np.inf, "l2": 2, "linf": 1}
BATCH = 512  # Vertices evaluated together.
GRID = (0.5, 0.75, 1.0, 1.5)  # Points on each ray, as fractions of the furthest its zero can be.
FURTHEST = 100.0  # In units of `scale`; where rays without a slope end.
BALLS = 8  # Each half as large as the one before it, over which rounding errors are bounded.
KEPT = 0.9  # Of a radius, with which one bound for all norms is good enough.
HALVINGS = 12  # Of the bracket of an l1 radius, to 1/4096 of its width.
ROUNDING = 1e-9  # Relative to the logits; more than the error of their float64 evaluation.


@dataclasses.dataclass(frozen=True)
class Radius:
  """The predicted class of one input, and the radius of each norm's ball in which it holds."""

  predicted: int
  radii: dict[str, float]  # By norm, in the certifier's units.


class Certifier:
  """Certified radii of a proved classifier, input by input.

  Args:
    logits: maps weights and a batch of inputs (B, *shape) to logits (B, K).
    weights: a tree of arrays.
    shape: of one input, without its batch axis.
    exact: `logits` in a form that computes in float64; by default `logits` itself.
    arithmetic: how `logits` is computed where it is deployed. Then radii hold for that program, at
      inputs that float32 holds, and `exact` is what the program is over the reals, whatever is
      given. None: radii hold over the reals.
    convexified: for logits that are not convex: certifies them by `convexify`. Their differences,
      so their radii, are those of convex logits, which have a term t in common. The price is
      how much t curves: the margin has to exceed t(x + d) less its tangent.
    scale: the unit of radii, in units of the input: with 255, radii of pixels in 0..255 are
      given for pixels in 0..1.

  Raises:
    convex_jax.proof.certificate.NotProved: a logit is not proved convex in the input, or its slope has no bound.
    ValueError: the rounding error of an operation has no bound; no convex form of it is known.
  """

  def __init__(
    self,
    logits: Callable[[Any, jax.Array], jax.Array],
    weights: Any,
    shape: tuple[int, ...],
    exact: Callable[[Any, jax.Array], jax.Array] | None = None,
    scale: float = 1.0,
    arithmetic: Arithmetic | None = None,
    convexified: bool = False,
  ):
    example = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    network = functools.partial(exact or logits, in_float64(weights))
    self._program = None
    if arithmetic is not None:
      program = self._program = Program(logits, weights, example, arithmetic=arithmetic)
      program.error(Ball(np.zeros(shape), "l1", 0.0))  # What has no rule is refused here.
      network = jax.vmap(lambda x: program.exact(x[None])[0])
    if convexified:
      apart = _value(logits, weights, example)  # The common term is in no difference.
      with jax.enable_x64(True):
        wide = jax.ShapeDtypeStruct(example.shape, jnp.float64)
        convex = convexify(network, wide)
        output = proved(convex.convex_logits, wide)
      network = jax.vmap(lambda x: convex.convex_logits(x[None])[0])
    else:
      apart = output = proved(logits, weights, example)
    self._scale = scale
    self._logits = jax.jit(network)
    self._slopes = jax.jit(jax.jacrev(lambda x: network(x[None])[0]))
    self._vertices = jax.jit(functools.partial(_at_vertices, network))
    # Bounds on the slopes of y_k - y_j, (K, K, D) or (K, K, 1), and of y_j, (K, D) or (K, 1).
    try:
      self._between = slopes.sensitivities(apart, (1, *shape))
      self._alone = slopes.sensitivities(output, (1, *shape), alone=True)
    except ValueError as error:
      if not convexified:
        raise NotProved(f"its slope has no bound: {error}") from error
      classes = output.shape[-1]  # A GELU is a product, which has none. The corners need none.
      self._between = np.full((classes, classes, 1), np.inf)
      self._alone = np.full((classes, 1), np.inf)

  def radius(self, image_HxWxC: np.ndarray, norms: tuple[str, ...] = NORMS) -> Radius:
    """The certified radii of one input, an array of `shape`.

    Raises `ValueError` for an unknown norm.
    """
    if isinstance(norms, str) or not set(norms) <= set(NORMS):
      raise ValueError(f"norms are {norms!r}; expected some of {', '.join(NORMS)}, in a tuple")
    x = np.asarray(image_HxWxC, np.float64)
    real = self._radius(x, tuple(norms))
    return real if self._program is None else self._deployed(self._program, x, real)

  def _deployed(self, program: Program, x: np.ndarray, real: Radius) -> Radius:
    """The radii of the program that is deployed, given those over the reals.

    What rounding can do grows with the ball. One bound for the balls of all norms does where it
    costs little; elsewhere each norm has its own, and smaller balls are tried.
    """

    def within(norms, balls):
      off = [program.differences(Ball(x, n, balls[n] * self._scale)) for n in norms]
      radii = self._radius(x, norms, np.max(off, 0)).radii
      return {n: min(radii[n], balls[n]) for n in norms}

    best = within(tuple(real.radii), real.radii)
    for norm, ball in real.radii.items():
      for _ in range(BALLS if best[norm] < KEPT * ball else 0):
        best[norm] = max(best[norm], within((norm,), {norm: ball})[norm])
        if best[norm] >= ball / 2:
          break
        ball /= 2
    return Radius(real.predicted, best)

  def _radius(self, image_HxWxC: np.ndarray, norms: tuple[str, ...], off_KxK: Any = None) -> Radius:
    """The radii of a program whose y_k - y_j are off the real ones by at most `off_KxK`; or of none."""
    with jax.enable_x64(True):
      x = jnp.asarray(image_HxWxC, jnp.float64)
      y_K = np.asarray(self._logits(x[None]))[0]
      slopes_KxD = np.asarray(self._slopes(x)).reshape(len(y_K), -1)
      k = int(y_K.argmax())
      off_K = np.zeros(len(y_K)) if off_KxK is None else off_KxK[k]
      margins_K = y_K[k] - y_K - off_K - ROUNDING * (1 + np.abs(y_K).max())
      if not np.delete(margins_K, k).min() > 0:
        return Radius(k, dict.fromkeys(norms, 0.0))
      radii = {n: self._by_slope(n, k, margins_K, slopes_KxD) for n in norms}
      l1 = self._by_vertices(x, k, y_K, margins_K, off_K, slopes_KxD)
      reach_DxR = np.maximum(l1, self._reach(x, k, y_K, margins_K, off_K, slopes_KxD))
      for norm in norms:
        corners = 1 / np.linalg.norm(1 / reach_DxR, DUAL[norm], axis=0).max()
        radii[norm] = max(radii[norm], float(corners))
    return Radius(k, {n: max(0.0, r) / self._scale for n, r in radii.items()})

  def _reach(self, x, k: int, y_K, margins_K, off_K, slopes_KxD) -> np.ndarray:
    """Steps t (D, rivals) with (tangent of y_k) - y_j >= 0 at x - t_i e_i and x + t_i e_i, each i.

    Being concave, it is >= 0 on the convex hull of these corners, which contains the l_p ball of
    radius 1 / |1 / t| in the dual norm (for l1: the least t). Along a ray a concave function lies
    above its interpolation, so that a few evaluations bound its first zero.
    """
    rivals = np.delete(np.arange(len(y_K)), k)
    steepness_RxD = np.abs(slopes_KxD[k] - slopes_KxD[rivals])
    # A ray's zero is no further than where both tangents meet.
    furthest_D = (margins_K[rivals, None] / np.maximum(steepness_RxD, 1e-300)).min(0)
    furthest_D = np.minimum(furthest_D, FURTHEST * self._scale)
    d = len(furthest_D)
    rays, signs = np.tile(np.arange(d), 2), np.repeat([1.0, -1.0], d)
    before, reach = np.zeros(2 * d), np.zeros((2 * d, len(rivals)))
    slack_before = np.broadcast_to(margins_K[rivals], reach.shape)
    for fraction in GRID:
      at = fraction * furthest_D[rays]
      slack = self._slack(x, rays, signs * at, k, y_K, off_K, slopes_KxD[k], rivals)
      crossing = before[:, None] + (at - before)[:, None] * slack_before / np.maximum(
        slack_before - slack, 1e-300
      )
      alive = slack_before > 0
      reach = np.where(alive & (slack > 0), at[:, None], np.where(alive, crossing, reach))
      before, slack_before = at, np.where(alive, slack, 0.0)
    return np.maximum(reach.reshape(2, d, -1).min(0), 1e-300)

  def _slack(self, x, rays, steps, k, y_K, off_K, slope_D, rivals) -> np.ndarray:
    """(Tangent of y_k) - y_j at x + step e_ray, less a margin for rounding; (rays, rivals)."""
    y_NxK = self._evaluate(x, rays, steps)
    tangent_N = y_K[k] + steps * slope_D[rays]
    margin = off_K[rivals] + ROUNDING * (1 + np.abs(y_NxK).max())
    return tangent_N[:, None] - y_NxK[:, rivals] - margin

  def _by_slope(self, norm: str, k: int, margins_K, slopes_KxD) -> float:
    """The margin over a bound on its slope in the dual norm.

    Two bounds, the better for each rival: on the slope of y_k - y_j as one function, and on the
    slopes of y_k's tangent and of y_j separately.
    """

    def size(bound_KxD):
      return np.linalg.norm(bound_KxD, DUAL[norm], axis=-1)

    apart = np.minimum(size(self._between[k]), size(np.abs(slopes_KxD[k]) + self._alone))
    with np.errstate(divide="ignore"):
      radii = margins_K / apart
    return float(np.delete(radii, k).min())

  def _by_vertices(self, x, k: int, y_K, margins_K, off_K, slopes_KxD) -> float:
    """The largest e with (tangent of y_k) - y_j > 0 at x + e v, for all 2 D vertices v.

    Along a vertex's ray this is concave and positive at 0, so if it is positive at e, it is at
    every smaller step. The slopes at 0 bound e from above, and a ray that holds at one e need not
    be tried at a smaller one: few are left after the first sweep.
    """
    rivals = np.delete(np.arange(len(y_K)), k)
    steepness = np.abs(slopes_KxD[k] - slopes_KxD[rivals]).max(-1)
    low, high = 0.0, float((margins_K[rivals] / np.maximum(steepness, 1e-300)).min())
    d = slopes_KxD.shape[1]
    rays, signs = np.tile(np.arange(d), 2), np.repeat([1.0, -1.0], d)

    def broken(e, rays, signs):
      slack = self._slack(x, rays, e * signs, k, y_K, off_K, slopes_KxD[k], rivals)
      return ~(slack > 0).all(-1)

    first = broken(high, rays, signs)
    if not first.any():
      return high
    rays, signs = rays[first], signs[first]
    for _ in range(HALVINGS):
      e = (low + high) / 2
      bad = broken(e, rays, signs)
      if bad.any():
        high, rays, signs = e, rays[bad], signs[bad]
      else:
        low = e
    return low

  def _evaluate(self, x, rays, steps) -> np.ndarray:
    """Logits at x + step e_ray for each (ray, step)."""
    out = []
    for start in range(0, len(rays), BATCH):
      part = slice(start, start + BATCH)
      missing = BATCH - len(rays[part])
      at = self._vertices(x, np.pad(rays[part], (0, missing)), np.pad(steps[part], (0, missing)))
      out.append(np.asarray(at)[: BATCH - missing])
    return np.concatenate(out)


def _value(f: Callable[..., jax.Array], *args: Any) -> Value:
  (output,), _ = interpreter.analyse(f, *args)
  if not isinstance(output, Value):
    raise NotProved("the output does not depend on the input")
  return output


def _at_vertices(logits, x_HxWxC, rays_N, steps_N):
  moved_NxD = jnp.broadcast_to(x_HxWxC.ravel(), (len(rays_N), x_HxWxC.size))
  moved_NxD = moved_NxD.at[jnp.arange(len(rays_N)), rays_N].add(steps_N)
  return logits(moved_NxD.reshape(-1, *x_HxWxC.shape))


def one_sided_radius(
  logit: Callable[[jax.Array], jax.Array], x: jax.Array, norm: str
) -> tuple[float, float]:
  """(y, radius): no d with |d| < radius makes a positive convex logit y negative at x + d.

  radius = y(x) / |grad y(x)| in the dual norm: a convex function lies above its tangent
  (Pfrommer et al. 2023, "Asymmetric Certified Robustness via Feature-Convex Neural
  Networks", theorem 2). In the units of x; 0 where y(x) <= 0, a side
  that has no closed form.
  """
  value, gradient = jax.value_and_grad(lambda x: jnp.squeeze(logit(x)))(x)
  size = float(np.linalg.norm(np.ravel(np.asarray(gradient, np.float64)), DUAL[norm]))
  if value <= 0:
    return float(value), 0.0
  return float(value), float(value) / size if size else np.inf
