"""Certified radii: how far an input may move, in any direction, before its class can change.

For an input x of predicted class k and a rival j, convex logits give three bounds that no sampling
can: y_k lies above its tangent; the tangent of y_k minus y_j is concave, so that over an l1 ball
it is least at one of the 2 D vertices, each of which is evaluated (`rays`); and, weights being
non-negative, the bounds of `slopes` lose nothing to signs between layers. The radii hold for every
perturbation in the ball, whether or not the moved input is still valid (an image with pixels in
range, say), and for the function over the reals. They are computed in float64; to allow for its
rounding, `ROUNDING` times the size of the logits and twice a bound on the rounding errors over the ball
(`rounding_errors`) are subtracted from every margin. The bound is counted twice to cover the tangents
as well, for which it is not proved. With an `arithmetic` radii hold for the program that is deployed:
what its rounding can do to two logits over the ball is subtracted from their difference.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convex_jax.proof import affine_front, interpreter, slopes
from convex_jax.proof.arithmetic import FLOAT64, Arithmetic
from convex_jax.proof.certificate import NotProved, proved
from convex_jax.proof.convexified import convexify
from convex_jax.proof.float64 import ROUNDING, float64
from convex_jax.proof.rays import FEW, Around, Rays, dual_size
from convex_jax.proof.rounding_errors import Program, in_float64
from convex_jax.proof.rounding_walk import Ball
from convex_jax.proof.values import Value

NORMS = ("l1", "l2", "linf")
BATCH = 512  # Vertices evaluated together.
LARGE = 64  # The same for a network with many features, which then stay in the cache.
FURTHEST = 100.0  # In units of `scale`; where rays without a slope end.
IMAGES = 16  # Whose slopes are computed together.
SLOPES = 2**22  # Or fewer images, so that there are at most as many of these.
BALLS = 8  # Each half as large as the one before it, over which rounding errors are bounded.
SLIGHT = 1e-3  # Of a margin, what it may lose to a bound for many inputs.
KEPT = 0.9  # Of a radius, with which one bound for all norms is good enough.
ASIDE = 2.0**-30  # Of `scale`, or of a larger entry: how far from an input its tangents are taken.


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
    arithmetic: how `logits` is computed where it is deployed. Then radii hold for that program, at
      inputs that float32 holds. None: radii hold for what it is over the reals.
    others: with an `arithmetic`, other programs of the same function, any of which may be deployed.
    convexified: for logits that are not convex: certifies them by `convexify`. Their differences,
      so their radii, are those of convex logits, which have a term t in common. The price is
      how much t curves: the margin has to exceed t(x + d) less its tangent.
    scale: the unit of radii, in units of the input: with 255, radii of pixels in 0..255 are
      given for pixels in 0..1.

  Raises:
    convex_jax.proof.NotProved: a logit is not proved convex in the input.
    ValueError: an argument is none of these; the rounding error of an operation has no bound; no
      convex form of it is known; JAX has no derivative of it in reverse mode; the function returns
      something else than two or more logits.
  """

  def __init__(
    self,
    logits: Callable[[Any, jax.Array], jax.Array],
    weights: Any,
    shape: tuple[int, ...],
    scale: float = 1.0,
    arithmetic: Arithmetic | None = None,
    others: Sequence[Callable[[Any, jax.Array], jax.Array]] = (),
    convexified: bool = False,
  ):
    if not (
      isinstance(shape, Sequence) and all(isinstance(n, int | np.integer) and n > 0 for n in shape)
    ):
      raise ValueError(f"shape is {shape!r}; expected a tuple of integers >= 1, of one input")
    if not (isinstance(scale, int | float | np.number) and 0 < scale < np.inf):
      raise ValueError(f"scale is {scale!r}; expected a finite number > 0")
    if not (arithmetic is None or isinstance(arithmetic, Arithmetic)):
      raise ValueError(
        f"arithmetic is {arithmetic!r}; expected one of proof.arithmetic.ARITHMETICS, or None"
      )
    example = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    deployed = (logits,) if arithmetic is None else (logits, *others)
    every = [Program(f, weights, example, arithmetic=arithmetic) for f in deployed]
    network = every[0].exact  # In float64, whatever it casts to.
    returned = jax.eval_shape(lambda x: logits(weights, x), example).shape
    if len(returned) != 2 or returned[1] < 2:
      raise ValueError(
        f"the function returns an array of shape {returned} for one input; expected (1, K), two or"
        " more logits (of one logit z, the two logits are 0 and z)"
      )
    self._programs = []
    if arithmetic is not None:
      programs = list({program.text: program for program in reversed(every)}.values())[::-1]
      for program in programs:
        program.error(Ball(np.zeros(shape), "l1", 0.0))  # What has no rule is refused here.
      self._programs = programs
    if convexified:
      apart = _value(logits, weights, example)  # The common term is in no difference.
      with float64():
        wide = jax.ShapeDtypeStruct(example.shape, jnp.float64)
        convex = convexify(network, wide)
        output = proved(convex.convex_logits, wide)
      network = jax.vmap(lambda x: convex.convex_logits(x[None])[0])
    else:
      apart = output = proved(logits, weights, example)
    self._scale, self._shape = scale, tuple(shape)
    # Of the logits themselves: a large common term is in what `ROUNDING` is relative to.
    self._evaluated = _Evaluated(every[0].exact, example.shape, returned[1])

    def one(x):
      return network(x[None])[0]

    def with_slopes(x, near):
      """The logits and tangents that lie below them: their values at x, and their slopes."""
      y, pull = jax.vjp(one, near)
      slopes_KxD = jax.vmap(pull)(jnp.eye(len(y)))[0].reshape(len(y), -1)
      return one(x), y + slopes_KxD @ jnp.ravel(x - near), slopes_KxD

    slopes_of_one = int(apart.shape[-1] * np.prod(shape))
    self._together = int(np.clip(SLOPES // slopes_of_one, 1, IMAGES))  # Inputs at a time.
    with float64():
      front, rest, self._columns = affine_front.split(one, shape)
      batch = jax.ShapeDtypeStruct((self._together, *shape), jnp.float64)
      self._with_slopes = jax.jit(jax.vmap(with_slopes))
      try:
        jax.eval_shape(self._with_slopes, batch, batch)
      except ValueError as error:  # Of a loop, say.
        raise ValueError(
          f"radii need derivatives of the logits in reverse mode: {error}"
        ) from error
    self._front = jax.jit(front)
    self._moved = jax.jit(functools.partial(_moved, rest))
    # Bounds on the slopes of y_k - y_j, (K, K, D) or (K, K, 1), and of y_j, (K, D) or (K, 1).
    try:
      self._between = slopes.sensitivities(apart, (1, *shape))
      self._alone = slopes.sensitivities(output, (1, *shape), alone=True)
    except ValueError:  # A product has none, or a square; corners need none.
      classes = output.shape[-1]
      self._between = np.full((classes, classes, 1), np.inf)
      self._alone = np.full((classes, 1), np.inf)

  def radius(self, image_HxWxC: np.ndarray, norms: Sequence[str] = NORMS) -> Radius:
    """The certified radii of one input, an array of `shape`: see `radii`."""
    return next(self.radii([image_HxWxC], norms))

  def radii(
    self, images: Sequence[np.ndarray] | np.ndarray, norms: Sequence[str] = NORMS
  ) -> Iterator[Radius]:
    """The certified radii of many inputs, one by one, as they are found.

    The l1 radius alone takes about one evaluation of each of the 2 D vertices, `rays.SWEEPS` more are
    for the other norms.

    Raises `ValueError` for an unknown norm, and for an input of another shape.
    """
    chosen = tuple(norms) if isinstance(norms, Iterable) and not isinstance(norms, str) else ()
    if not (chosen and all(norm in NORMS for norm in chosen)):
      raise ValueError(f"norms are {norms!r}; expected some of {', '.join(NORMS)}, in a tuple")
    if not hasattr(images, "__len__"):
      raise ValueError(f"images are a {type(images).__name__}; expected an array or a sequence")
    return self._radii(images, chosen)

  def _radii(self, images, norms: tuple[str, ...]) -> Iterator[Radius]:
    together = self._together
    for start in range(0, len(images), together):
      part = np.asarray(images[start : start + together])
      if np.iscomplexobj(part):
        raise ValueError(f"an input is an array of {part.dtype}; expected real numbers")
      part = part.astype(np.float64)
      if part.shape[1:] != self._shape:
        raise ValueError(f"an input has the shape {part.shape[1:]}; expected {self._shape}")
      padded = np.pad(part, [(0, together - len(part)), *[(0, 0)] * (part.ndim - 1)], "edge")
      aside = _aside(padded, padded.shape[1:], self._scale)
      with float64():
        found = map(np.asarray, self._with_slopes(padded, padded + aside))
      for x, y_K, tangents_K, slopes_KxD in zip(part, *found, strict=False):
        around = Around(x, y_K, tangents_K, slopes_KxD, self._evaluator(x))
        yield (self._deployed if self._programs else self._over_the_reals)(x, around, norms)

  def _deployed(self, x: np.ndarray, around: Around, norms: tuple[str, ...]) -> Radius:
    """The radii of all programs; next to what rounding does to these, that of float64 is nothing."""

    def off(ball):
      return np.max([program.differences(ball) for program in self._programs], 0)

    return self._less(x, around, self._radius(around, norms), off)

  def _over_the_reals(self, x: np.ndarray, around: Around, norms: tuple[str, ...]) -> Radius:
    """The radii of the function, by a bound for many inputs where that costs next to nothing."""
    size, reach = float(np.abs(x).max()), self._scale
    while size + reach < 2.0**1000:
      exponent = 2 + math.ceil(math.log2(max(size, reach)))
      off_KxK = self._evaluated.over_box(exponent)
      if not (off_KxK[around.k, around.rivals] <= SLIGHT * around.margins_R).all():
        break
      found = self._radius(around, norms, off_KxK)
      # An infinite radius is one of slopes, which need the margin at x alone.
      reach = self._scale * max((r for r in found.radii.values() if np.isfinite(r)), default=0.0)
      if size + reach <= 2.0**exponent:
        return found
    return self._less(x, around, self._radius(around, norms), self._evaluated.over_ball)

  def _less(
    self,
    x: np.ndarray,
    around: Around,
    real: Radius,
    off: Callable[[Ball], np.ndarray],
  ) -> Radius:
    """The radii of a program whose y_k - y_j are off by at most `off` (K, K) over a ball.

    What rounding can do grows with the ball. One bound for the balls of all norms does where it
    costs little; elsewhere each norm has its own, and smaller balls are tried.
    """
    if not any(real.radii.values()):
      return real

    def within(norms, balls):
      each = [Ball(x, n, balls[n] * self._scale) for n in norms]
      radii = self._radius(around, norms, np.max([off(ball) for ball in each], 0)).radii
      return {n: min(radii[n], balls[n]) for n in norms}

    best = within(tuple(real.radii), real.radii)
    if not any(best.values()):
      at_x = off(Ball(x, "l1", 0.0))[around.k, around.rivals]
      if not (around.margins_R > at_x).all():  # Smaller balls are of no use.
        return Radius(real.predicted, best)
    for norm, ball in real.radii.items():
      tries = BALLS if best[norm] < KEPT * ball else 0
      ball = min(ball, FURTHEST)  # Of an infinite one nothing is known.
      for _ in range(tries):
        best[norm] = max(best[norm], within((norm,), {norm: ball})[norm])
        if best[norm] >= ball / 2:
          break
        ball /= 2
    return Radius(real.predicted, best)

  def _radius(self, around: Around, norms: tuple[str, ...], off_KxK: Any = None) -> Radius:
    """The radii of a program whose y_k - y_j are off the real ones by at most `off_KxK`; or of none."""
    k, rivals = around.k, around.rivals
    off_R = np.zeros(len(rivals)) if off_KxK is None else off_KxK[k, rivals]
    margins_R = around.margins_R - off_R
    if not margins_R.min() > 0:
      return Radius(k, dict.fromkeys(norms, 0.0))
    rays = Rays(around, margins_R, off_R)
    rays.find_least(FURTHEST * self._scale)
    if set(norms) - {"l1"}:
      rays.find_all(FURTHEST * self._scale)
    radii = {}
    for norm in norms:
      slope = self._by_slope(norm, k, rivals, margins_R, around.slopes_KxD)
      radii[norm] = max(0.0, rays.radius(norm), slope) / self._scale
    return Radius(k, radii)

  def _by_slope(self, norm: str, k: int, rivals, margins_R, slopes_KxD) -> float:
    """The margin over a bound on its slope in the dual norm.

    Two bounds, the better for each rival: on the slope of y_k - y_j as one function, and on the
    slopes of y_k's tangent and of y_j separately.
    """
    separate_R = dual_size(np.abs(slopes_KxD[k]) + self._alone[rivals], norm)
    apart_R = np.minimum(dual_size(self._between[k, rivals], norm), separate_R)
    with np.errstate(divide="ignore"):
      return float((margins_R / apart_R).min())

  def _evaluator(self, x: np.ndarray) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """A function of (rays, steps): the logits at x + step e_ray for each of them."""
    with float64():
      front = self._front(x)
    batch = LARGE if self._columns is None else BATCH

    def evaluate(rays, steps):
      out, start = [], 0
      with float64():
        while start < len(rays):
          size = batch if len(rays) - start > FEW else FEW
          part = slice(start, start + size)
          missing = size - len(rays[part])
          at = np.pad(rays[part], (0, missing)), np.pad(steps[part], (0, missing))
          out.append(np.asarray(self._moved(front, self._columns, *at))[: size - missing])
          start += size
      return np.concatenate(out)

    return evaluate


class _Evaluated:
  """How far differences (K, K) of logits that are evaluated in float64 can be from the real ones.

  The bounds are doubled, for the tangents with which logits are compared.
  """

  def __init__(
    self, network: Callable[[jax.Array], jax.Array], shape: tuple[int, ...], classes: int
  ):
    self._network, self._shape, self._classes = network, shape, classes
    self._boxes: dict[int, np.ndarray] = {}

  @functools.cached_property
  def _program(self) -> Program:
    with float64():
      example = jax.ShapeDtypeStruct(self._shape, jnp.float64)
      return Program(self._network, example, arithmetic=FLOAT64)

  def _over(self, ball: Ball) -> np.ndarray:
    try:
      return 2 * self._program.differences(ball, quickly=True)
    except ValueError:  # An operation has no rule, whatever the ball.
      return np.zeros((self._classes,) * 2)

  def over_ball(self, ball: Ball) -> np.ndarray:
    """A bound over one ball; 0 where none is known, as of a root at 0: `ROUNDING` is all there is."""
    return np.nan_to_num(self._over(ball), nan=0.0, posinf=0.0)

  def over_box(self, exponent: int) -> np.ndarray:
    """A bound for all inputs whose entries are at most 2**exponent in size; infinite where none is."""
    if exponent not in self._boxes:
      box = Ball(np.zeros(self._shape), "linf", 2.0**exponent)
      self._boxes[exponent] = self._over(box)
    return self._boxes[exponent]


def _value(f: Callable[..., jax.Array], *args: Any) -> Value:
  (output,), _ = interpreter.analyse(f, *args)
  if not isinstance(output, Value):
    raise NotProved("the output does not depend on the input")
  return output


def _moved(rest, front_U, columns_DxU, rays_N, steps_N):
  """The logits at x + step e_ray, given what `affine_front.split` makes of x."""
  if columns_DxU is None:
    at_NxU = jnp.broadcast_to(front_U, (len(rays_N), len(front_U)))
    at_NxU = at_NxU.at[jnp.arange(len(rays_N)), rays_N].add(steps_N)
  else:
    at_NxU = front_U + steps_N[:, None] * columns_DxU[rays_N]
  return jax.vmap(rest)(at_NxU)


def _aside(x: np.ndarray, shape: tuple[int, ...], scale: float) -> np.ndarray:
  """How far from inputs of a shape, at random, their tangents are taken.

  At a kink, such as a pixel of 0, the derivative that JAX computes may be no subgradient.
  """
  return np.random.default_rng(0).uniform(-ASIDE, ASIDE, shape) * np.maximum(scale, np.abs(x))


def one_sided_radius(
  logit: Callable[[jax.Array], jax.Array], x: jax.Array, norm: str
) -> tuple[float, float]:
  """(y, radius): no d with |d| < radius makes a positive convex logit y negative at x + d.

  radius = y(x) / |grad y(x)| in the dual norm: a convex function lies above its tangent
  (Pfrommer et al. 2023, "Asymmetric Certified Robustness via Feature-Convex Neural
  Networks", theorem 2), which is taken next to x. In the units of x; 0 where y(x) <= 0, a side
  that has no closed form, and where JAX's derivative is NaN. `norm` is "l1", "l2" or "linf".

  Raises `ValueError` for another norm.
  """
  if norm not in NORMS:
    raise ValueError(f"norm is {norm!r}; expected one of {', '.join(NORMS)}")
  exact = Program(logit, jax.ShapeDtypeStruct(x.shape, x.dtype)).exact
  at = np.asarray(x, np.float64)
  near = at + _aside(at, at.shape, 1.0)
  off = in_float64(exact, Ball(at, "linf", float(np.abs(near - at).max(initial=0.0))))
  with float64():
    y = float(jnp.squeeze(exact(jnp.asarray(at))))
    value, slope = jax.value_and_grad(lambda x: jnp.squeeze(exact(x)))(jnp.asarray(near))
  tangent = float(value) + float(np.sum(np.asarray(slope) * (at - near)))
  margin = float(np.minimum(y, tangent)) - ROUNDING * (1 + abs(y)) - off  # NaN, if either is.
  size = float(dual_size(np.ravel(np.asarray(slope)), norm))
  if not margin > 0:
    return y, 0.0
  return y, margin / size if size else np.inf
