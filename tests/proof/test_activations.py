"""Scalar functions with kinks: which are proved, and which must not be."""

import functools

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from convex_jax.proof import pieces
from tests.support.curvature import curvature_of
from tests.support.midpoints import midpoint_gaps


def huber(x, d=1.5):
  return jnp.where(jnp.abs(x) <= d, 0.5 * x * x, d * (jnp.abs(x) - 0.5 * d))


def huber_of_magnitude(t, d=1.5):
  """Huber's function of t >= 0, beyond which it is not convex."""
  return jnp.where(t <= d, 0.5 * t * t, d * (t - 0.5 * d))


def huber_by_minimum(x, d=1.5):
  q = jnp.minimum(jnp.abs(x), d)
  return 0.5 * q**2 + d * (jnp.abs(x) - q)


def huber_by_clip(x, d=1.5):
  q = jnp.clip(x, -d, d)
  return 0.5 * q**2 + d * jnp.abs(x - q)


def huber_between(x, d=1.5):
  inside = (x >= -d) & (x <= d)
  return jnp.where(inside, 0.5 * x**2, d * (jnp.abs(x) - 0.5 * d))


def three_pieces(x, left, middle, right):
  """A slope on either side of [-1, 2] and between, continuous."""
  sides = jnp.where(x > 2, 2 * middle + right * (x - 2), left * (x + 1) - middle)
  return jnp.where((x > -1) & (x <= 2), middle * x, sides)


def stable_softplus(x):
  return jnp.where(x > 0, x + jnp.log1p(jnp.exp(-x)), jnp.log1p(jnp.exp(x)))


def pinball(x, q=0.25):
  return jnp.where(x >= 0, q * x, (q - 1) * x)


def over_one_number(x):
  return jnp.where(x > 0, x * x, -x * x) / jnp.broadcast_to(jnp.float32([0.3]), x.shape)


SPELLINGS = [  # (name, function, curvature)
  ("huber", huber, "convex"),
  ("huber by minimum", huber_by_minimum, "convex"),
  ("huber by clip", huber_by_clip, "convex"),
  ("huber between bounds", huber_between, "convex"),
  ("huber of a magnitude", lambda x: huber_of_magnitude(jnp.abs(x @ np.ones((3, 2)))), "convex"),
  ("half of huber", lambda x: huber_of_magnitude(x) - 0.1 * jnp.abs(x), "unknown"),
  ("huber, optax", optax.losses.huber_loss, "convex"),
  ("huber, optax, 0.3", functools.partial(optax.losses.huber_loss, delta=0.3), "convex"),
  ("minus huber", lambda x: -huber(x), "concave"),
  ("smooth l1", lambda x: jnp.where(jnp.abs(x) < 1, 0.5 * x**2, jnp.abs(x) - 0.5), "convex"),
  ("log cosh, optax", optax.losses.log_cosh, "convex"),
  ("hinge", lambda x: jnp.maximum(0, 1 - x), "convex"),
  ("hinge, optax", lambda x: optax.losses.hinge_loss(x, jnp.float32([1, -1, 1])), "convex"),
  ("squared hinge", lambda x: jnp.maximum(0, 1 - x) ** 2, "convex"),
  ("squared hinge of labels", lambda x: nn.relu(1 - jnp.float32([1, -1, 1]) * x) ** 2, "convex"),
  ("pinball", pinball, "convex"),
  ("deadzone", lambda x: jnp.maximum(jnp.abs(x) - 1, 0), "convex"),
  ("squared deadzone", lambda x: jnp.maximum(jnp.abs(x) - 1, 0) ** 2, "convex"),
  ("relu squared", lambda x: nn.relu(x) ** 2, "convex"),
  ("relu cubed", lambda x: nn.relu(x) ** 3, "convex"),
  ("relu times itself", lambda x: x * nn.relu(x), "convex"),
  ("fatou, half of relu", lambda x: jnp.where(x > 0, x, 0.5 * x) + nn.relu(x), "convex"),
  ("stable softplus", stable_softplus, "convex"),
  ("stable softplus, scaled", lambda x: stable_softplus(3 * x) / 3, "convex"),
  ("tanh below 0", lambda x: jnp.where(x > 0, x, jnp.tanh(x)), "convex"),
  ("logistic below 0", lambda x: jnp.where(x > 0, 0.25 * x + 0.5, nn.sigmoid(x)), "convex"),
  ("exp2 below 0", lambda x: jnp.where(x > 0, x, jnp.exp2(x) - 1), "convex"),
  ("cubes of both signs", lambda x: jnp.abs(x) ** 3, "convex"),
  ("x times |x|", lambda x: x * jnp.abs(x), "unknown"),
  ("three slopes", lambda x: three_pieces(x, -1.0, 0.5, 3.0), "convex"),
  ("three slopes falling", lambda x: three_pieces(x, 3.0, 0.5, -1.0), "concave"),
  ("elu, 0.3", functools.partial(nn.elu, alpha=0.3), "convex"),
  ("celu, 0.3", functools.partial(nn.celu, alpha=0.3), "convex"),
  ("squares on one side", lambda x: jnp.where(x > 0, x * x, 0), "convex"),
  ("kinks of each entry", lambda x: jnp.where(x > jnp.arange(3.0), x - jnp.arange(3), 0), "convex"),
  ("of convex, rising", lambda x: nn.relu(nn.relu(x) - 1) ** 2, "convex"),
  ("relu by a condition", lambda x: x * (x > 0), "convex"),
  ("relu by the other", lambda x: (x >= 0) * x, "convex"),
  ("relu, shifted, by a condition", lambda x: (x - 1) * (x > 1), "convex"),
  ("relu by heaviside", lambda x: x * jnp.heaviside(x, 7.0), "convex"),
  ("leaky relu by conditions", lambda x: x * (x > 0) + 0.1 * x * (x <= 0), "convex"),
  ("minimum by a condition", lambda x: x * (x < 0), "concave"),
  ("squares by a condition", lambda x: x**2 * (x > 0), "convex"),
  ("magnitude by a sign", lambda x: x * jnp.sign(x), "convex"),
  ("deadzone by a sign", lambda x: jnp.sign(nn.relu(jnp.abs(x) - 1)) * (jnp.abs(x) - 1), "convex"),
  ("distance to an interval", lambda x: jnp.abs(x - jnp.clip(x, -1, 1)), "convex"),
  ("magnitude of a leaky relu", lambda x: jnp.abs(nn.leaky_relu(x, 0.5)), "convex"),
  # And what is none.
  ("a condition", lambda x: (x > 0).astype(np.float32), "unknown"),
  ("a sign", jnp.sign, "unknown"),
  ("by a condition elsewhere", lambda x: x * (x > 1), "unknown"),
  ("by a condition a bit elsewhere", lambda x: x * (x > 1e-30), "unknown"),
  ("by two conditions", lambda x: x * (x > 0) * (x < 1), "unknown"),
  ("by a condition of another element", lambda x: x * (x[..., ::-1] > 0), "unknown"),
  ("a shifted one by a sign", lambda x: (x - 1) * jnp.sign(x), "unknown"),
  ("a sign of a shifted one", lambda x: x * jnp.sign(x - 1), "unknown"),
  ("by heaviside elsewhere", lambda x: x * jnp.heaviside(x - 1, 0.5), "unknown"),
  ("a product of signs", lambda x: jnp.sign(x) * jnp.sign(x), "unknown"),
  ("a point removed by a sign", lambda x: (x**2 + 1) * jnp.sign(x) ** 2, "unknown"),
  ("where a logarithm is NaN", lambda x: jnp.where(jnp.isnan(jnp.log(x)), -1, abs(x)), "unknown"),
  ("a step in few bits", lambda x: x * x.astype(jnp.float8_e4m3fn).astype(np.float32), "unknown"),
  ("a step of integers", lambda x: x * x.astype(np.int32).astype(np.float32), "unknown"),
  ("distance to one of two", lambda x: jnp.abs(jnp.abs(x) - 1), "unknown"),
  ("three slopes, up and down", lambda x: three_pieces(x, 1.0, 0.5, 3.0), "unknown"),
  ("soft threshold", lambda x: jnp.sign(x) * nn.relu(jnp.abs(x) - 1), "unknown"),
  ("soft threshold by relus", lambda x: nn.relu(x - 1) - nn.relu(-x - 1), "unknown"),
  ("hard tanh", nn.hard_tanh, "unknown"),
  ("hard sigmoid", nn.hard_sigmoid, "unknown"),
  ("hard swish", nn.hard_swish, "unknown"),
  ("relu6", nn.relu6, "unknown"),
  ("clip", lambda x: jnp.clip(x, -1, 1), "unknown"),
  ("huber that jumps", lambda x: huber(x, 1.5) + jnp.where(x > 1.5, 1e-6, 0.0), "unknown"),
  ("huber, slope too small", lambda x: jnp.where(jnp.abs(x) <= 1, x * x, jnp.abs(x)), "unknown"),
  ("huber of concave", lambda x: huber(-nn.relu(x)), "convex"),
  ("squared hinge of concave", lambda x: nn.relu(nn.relu(x) * -1 + 1) ** 2, "unknown"),
  ("square of a leaky relu", lambda x: nn.leaky_relu(x, 0.5) ** 2, "convex"),
  ("leaky relu times relu6", lambda x: nn.leaky_relu(x) * nn.relu6(x), "unknown"),
  ("a point of its own", lambda x: jnp.where(x == 0, 1.0, jnp.abs(x)), "unknown"),
  ("a removed point", lambda x: jnp.where(x != 0, jnp.abs(x), 0.0), "convex"),
  ("stable softplus, off by a bit", lambda x: stable_softplus(x) + 1e-7 * (x > 0), "unknown"),
  (
    "a softplus that is not the other",
    lambda x: jnp.where(x > 0, x + jnp.log1p(jnp.exp(-x)), 1.0000001 * jnp.log1p(jnp.exp(x))),
    "unknown",
  ),
  ("softplus cut off", lambda x: jnp.where(x > 20, x, jnp.log1p(jnp.exp(x))), "unknown"),
  ("a threshold known to within rounding", lambda x: jnp.where(x > jnp.exp(1.0), x, 0), "unknown"),
  ("gelu cut off", lambda x: jnp.where(x > 0, nn.gelu(x), 0), "unknown"),
  ("cubic", lambda x: nn.relu(x) ** 3 - nn.relu(-x) ** 3, "unknown"),
  ("cubic by cubes", lambda x: jnp.where(x > 0, x**3, x**3), "unknown"),
  ("a hidden dent", lambda x: x**2 - 3 * nn.relu(x - 1) + 3 * nn.relu(x - 1.5), "unknown"),
  ("squareplus, of x x", lambda x: x + jnp.sqrt(jnp.where(x > 0, x * x, x * x) + 4.0), "convex"),
  ("0 times no number", lambda x: jnp.where(x > 0, x * x, 0 * jnp.sqrt(x)), "unknown"),
  ("no number less itself", lambda x: nn.relu(x) ** 2 + (jnp.sqrt(x) - jnp.sqrt(x)), "unknown"),
  ("root of a negative number", lambda x: nn.relu(x) + jnp.sqrt((x - x) - 1.0), "unknown"),
  ("slope falls at the second kink", lambda x: nn.relu(x) - nn.relu(x - 5), "unknown"),
  ("by one number, spread", lambda x: over_one_number(over_one_number(x)), "unknown"),
]


@pytest.mark.parametrize("name,function,expected", SPELLINGS, ids=[s[0] for s in SPELLINGS])
def test_what_is_proved_of_a_spelling(name, function, expected):
  assert curvature_of(function) == expected


@pytest.mark.slow
def test_all_that_is_proved_passes_the_midpoint_test():
  """The table's own verdicts are of the functions, not of what the author thinks of them."""
  for name, function, expected in SPELLINGS:
    if expected not in ("convex", "concave"):
      continue
    gaps = midpoint_gaps(jax.vmap(function), (2, 3), pairs=300, sizes=(1, 3), steps=(0.1, 1, 5))
    assert np.max((1 if expected == "convex" else -1) * gaps) < 1e-6, name


def test_overflow_hides_no_jump():
  """Both sides are beyond float64 at the kink, one of them twice as far."""

  def function(x):
    return jnp.where(x > 1e10, x * 2.0**1000, x * 2.0**1001)

  with jax.enable_x64(True):
    x = jax.ShapeDtypeStruct((2,), jnp.float64)
    assert curvature_of(function, x) == "unknown"
    assert curvature_of(lambda x: function(x) / 2.0**1000, x) == "unknown"


# Random functions with kinks: all that is proved must pass the midpoint test.


@st.composite
def functions(draw):
  """A function of one number, of pieces between up to three kinks, joined in some way."""
  number = st.integers(-8, 8).map(lambda i: i / 4)
  kinks = sorted(draw(st.sets(number, min_size=1, max_size=3)))
  pieces = []
  for at in [kinks[0], *kinks]:
    power, bend = draw(st.sampled_from((1, 1, 2, 3))), draw(st.sampled_from((0, 0, 1, -1)))
    pieces.append((at, draw(number), draw(number) / 2, power, bend, draw(st.booleans())))
  compare = draw(st.sampled_from((jnp.greater, jnp.greater_equal)))
  inner = draw(st.sampled_from((lambda x: x, jnp.abs, nn.relu, lambda x: 2 * x - 1, lambda x: -x)))

  def function(x):
    z, y, before = inner(x), 0.0, None
    for at, slope, curve, power, bend, joined in pieces:
      part = slope * (z - at) + curve * (z - at) ** power + bend * jnp.exp(z - at) - bend
      if before is None:
        y = part
      else:  # Up to this kink as before; beyond it, from the value there or from 0.
        start = before(at) if joined else 0.0
        y = jnp.where(compare(z, at), part + start, y)

      def before(
        z, slope=slope, curve=curve, power=power, bend=bend, at=at, last=before, joined=joined
      ):
        start = last(at) if joined and last is not None else 0.0
        return slope * (z - at) + curve * (z - at) ** power + bend * np.exp(z - at) - bend + start

    return y

  return function


@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(functions())
def test_nothing_that_is_proved_of_random_pieces_has_a_midpoint_too_high(function):
  check(function)


def test_the_midpoint_test_of_random_pieces_can_fail(monkeypatch):
  """The negative control: a proof that overlooks jumps is caught."""
  monkeypatch.setattr(pieces, "_are_equal", lambda *_: True)
  with pytest.raises(AssertionError):
    check(lambda x: jnp.where(x > 0, x + 1, 0 * x))


def check(function) -> str:
  """Raises if a proved function breaks its inequality at a midpoint; says what is proved."""
  found = curvature_of(function, jax.ShapeDtypeStruct((1,), jnp.float32))
  a, b = np.random.default_rng(0).uniform(-4, 4, (2, 2000, 1))
  with jax.enable_x64(True):
    fa, fb, middle = (np.asarray(function(jnp.asarray(x))) for x in (a, b, (a + b) / 2))
  gaps = (middle - (fa + fb) / 2) / (1 + np.abs(fa) + np.abs(fb))
  assert found not in ("convex", "affine") or gaps.max() < 1e-6
  assert found not in ("concave", "affine") or gaps.min() > -1e-6
  return found
