"""The rules: which functions are proved, and which must not be."""

import functools
import gc

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from convex_jax.proof import (
  certify,
  constants,
  equations,
  interpreter,
  layouts,
  linear,
  rules,
  slopes,
)
from tests.support.curvature import X, curvature_of
from tests.support.midpoints import midpoint_gaps

RNG = np.random.default_rng(0)
POSITIVE = RNG.uniform(0.1, 1, (3, 3)).astype(np.float32)
MIXED = RNG.standard_normal((3, 3)).astype(np.float32)


def scanned(weights, cell=nn.elu):
  def function(x):
    last, sums = jax.lax.scan(lambda c, w: (cell(c @ w), c.sum()), x, weights, reverse=True)
    return last, sums

  return function


ROWS = np.array([1, 2])


def doubled(times):
  """2^n for each n of some, by loops that `vmap` makes one of."""
  return jax.vmap(lambda n: jax.lax.fori_loop(0, n, lambda i, y: 2 * y, 1.0))(times)


def hand_made_logsumexp(x):
  top = jax.lax.stop_gradient(x.max(1, keepdims=True))
  return jnp.log(jnp.exp(x - top).sum(1)) + top[:, 0]


def with_another_shift(x):
  """Shifted back by the maximum of another row: no log-sum-exp."""
  top = jax.lax.stop_gradient(x.max(1))
  return jnp.log(jnp.exp(x - top[:, None]).sum(1)) + top[::-1]


def shifted_by(bounded):
  """A log-sum-exp shifted by a function of a row's first entry."""

  def function(x):
    c = bounded(x[:, 0])
    return jnp.log(jnp.exp(x - c[:, None]).sum(1)) + c

  return function


def entering_often(x):
  """A sum of which the same values are terms by thousands of ways; one by one, it takes long."""
  a, b = x, nn.relu(x)
  for _ in range(18):
    a, b = b, a + b - nn.relu(a)
  return b


CURVATURES = [  # (name, function, curvature)
  ("identity", lambda x: x, "affine"),
  ("dense", lambda x: x @ MIXED + 1, "affine"),
  ("mean and resize", lambda x: jax.image.resize(x - x.mean(), (4, 5), "linear"), "affine"),
  ("gather", lambda x: x[:, jnp.array([0, 2])], "affine"),
  ("pad, roll, flip", lambda x: jnp.roll(jnp.pad(x, 1), 1, 1)[::-1], "affine"),
  ("average pooling", lambda x: nn.avg_pool(x[None, ..., None], (2, 2)), "affine"),
  ("cumulative sum", lambda x: jnp.cumsum(x, 1), "affine"),
  ("double negative", lambda x: -(-x - x), "affine"),
  ("constant", lambda x: jnp.ones(3), "affine"),
  ("relu", nn.relu, "convex"),
  ("elu", nn.elu, "convex"),
  ("elu, alpha 1/2", functools.partial(nn.elu, alpha=0.5), "convex"),
  ("leaky relu", nn.leaky_relu, "convex"),
  ("celu", nn.celu, "convex"),
  ("softplus", nn.softplus, "convex"),
  ("elu by hand", lambda x: jnp.where(x <= 0, jnp.exp(x) - 1, x), "convex"),
  ("prelu", lambda x: jnp.where(x > 0, x, jnp.array([0.1, 0.5, 1.0]) * x), "convex"),
  ("clipped below", lambda x: jnp.clip(x, 0), "convex"),
  ("abs", jnp.abs, "convex"),
  ("square", lambda x: x**2, "convex"),
  ("product with itself", lambda x: x * x, "convex"),
  ("fourth power", lambda x: x**4, "convex"),
  ("exp", jnp.exp, "convex"),
  ("logsumexp", lambda x: jax.nn.logsumexp(x, 1), "convex"),
  ("logsumexp of elu", lambda x: jax.nn.logsumexp(nn.elu(x), 0), "convex"),
  ("logsumexp, dimensions kept", lambda x: jax.nn.logsumexp(x, 1, keepdims=True), "convex"),
  ("logsumexp by hand", hand_made_logsumexp, "convex"),
  ("log sum exp, unshifted", lambda x: jnp.log(jnp.exp(x).sum()), "convex"),
  ("logaddexp", lambda x: jnp.logaddexp(nn.relu(x), jnp.exp(x)), "convex"),
  ("max pooling", lambda x: nn.max_pool(x[None, ..., None], (2, 2)), "convex"),
  ("maximum over an axis", lambda x: x.max(0), "convex"),
  ("cumulative maximum", lambda x: jax.lax.cummax(x, 1), "convex"),
  ("two layers", lambda x: nn.elu(nn.elu(x @ MIXED) @ POSITIVE + x @ MIXED), "convex"),
  ("rematerialised", lambda x: jax.checkpoint(lambda x: nn.elu(x) @ POSITIVE)(x), "convex"),
  ("scan, from the back", scanned(np.stack([POSITIVE, MIXED])), "convex"),
  ("turned twice", lambda x: -(-nn.relu(x) @ POSITIVE), "convex"),
  ("falling of concave", lambda x: jnp.exp(-jnp.minimum(x, 0)), "convex"),
  ("branch on a constant", lambda x: jax.lax.cond(True, jnp.exp, jnp.sin, x), "convex"),
  ("log sigmoid", nn.log_sigmoid, "concave"),
  ("steep leaky relu", functools.partial(nn.leaky_relu, negative_slope=2.0), "concave"),
  ("minimum over an axis", lambda x: x.min(0), "concave"),
  ("min pooling", lambda x: -nn.max_pool(-x[None, ..., None], (2, 2)), "concave"),
  ("negative relu", lambda x: -nn.relu(x), "concave"),
  ("elu, alpha 1.5", functools.partial(nn.elu, alpha=1.5), "unknown"),
  ("selu", nn.selu, "unknown"),
  ("gelu", nn.gelu, "unknown"),
  ("gelu, exact", functools.partial(nn.gelu, approximate=False), "unknown"),
  ("silu", nn.silu, "unknown"),
  ("sigmoid", nn.sigmoid, "unknown"),
  ("tanh", nn.tanh, "unknown"),
  ("relu6", nn.relu6, "unknown"),
  ("hard tanh", nn.hard_tanh, "unknown"),
  ("step", lambda x: jnp.where(x > 0, 1.0, 0.0), "unknown"),
  ("step, by dtype", lambda x: (x > 0).astype(jnp.float32), "unknown"),
  ("rounding", jnp.round, "unknown"),
  (
    "prelu, one slope too steep",
    lambda x: jnp.where(x > 0, x, jnp.array([0, 1, 1.1]) * x),
    "unknown",
  ),
  ("elu with a jump", lambda x: jnp.where(x > 0, x + 0.1, jnp.exp(x) - 1), "unknown"),
  ("choice by another value", lambda x: jnp.where(x[::-1] > 0, x, jnp.exp(x) - 1), "unknown"),
  ("cube", lambda x: x**3, "unknown"),
  ("cubic resize of relu", lambda x: jax.image.resize(nn.relu(x), (4, 5), "cubic"), "unknown"),
  ("softmax", jax.nn.softmax, "unknown"),
  ("logsumexp of concave", lambda x: jax.nn.logsumexp(-nn.elu(x), 0), "unknown"),
  ("log-sum-exp shifted back by another", with_another_shift, "unknown"),
  ("difference", lambda x: nn.relu(x) - nn.relu(x @ MIXED), "unknown"),
  ("product", lambda x: nn.relu(x) * nn.relu(x[::-1]), "unknown"),
  ("matrix product with itself", lambda x: nn.relu(x) @ nn.relu(x).T, "unknown"),
  ("quotient", lambda x: 1 / (1 + nn.relu(x)), "unknown"),
  ("square of a convex value", lambda x: (nn.relu(x) - 1) ** 2, "unknown"),
  ("relu of concave", lambda x: nn.relu(-nn.relu(x) @ POSITIVE + x), "unknown"),
  ("layer norm", lambda x: (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True), "unknown"),
  ("a weight of the wrong sign", lambda x: nn.elu(x @ MIXED) @ MIXED, "unknown"),
  ("scan with a wrong sign", scanned(np.stack([MIXED, POSITIVE])), "unknown"),
  ("sorting", jnp.sort, "unknown"),
  ("middle of three", lambda x: jnp.median(x, 1), "unknown"),
  (
    "loop without end known",
    lambda x: jax.lax.while_loop(lambda c: c.sum() < 9, jnp.exp, x),
    "unknown",
  ),
  ("branch on the input", lambda x: jax.lax.cond(x[0, 0] > 0, jnp.exp, jnp.abs, x), "unknown"),
  ("NaN weight", lambda x: nn.relu(x) @ np.full((3, 1), np.nan, np.float32), "unknown"),
  ("NaN bias", lambda x: nn.relu(x) + np.float32(np.nan), "unknown"),
  ("infinite branch", lambda x: jnp.where(x > 1, np.inf * x, np.inf), "unknown"),
  ("rows of an array", lambda x: jax.lax.unstack(nn.relu(x))[0], "convex"),
  ("columns, one negative", lambda x: -jax.lax.unstack(nn.relu(x), 1)[1], "concave"),
  ("rows of weights", lambda x: sum(nn.relu(x) * w for w in jax.lax.unstack(POSITIVE)), "convex"),
  ("rows of weights of both signs", lambda x: nn.relu(x) * jax.lax.unstack(MIXED)[0], "unknown"),
  ("halves of a split", lambda x: jnp.split(nn.relu(x), 2, 0)[1], "convex"),
  ("a split into one part", lambda x: jnp.split(nn.relu(x), 1)[0], "convex"),
  ("a negative split into one part", lambda x: -jnp.split(nn.relu(x), 1, 1)[0], "concave"),
  ("the row of one row", lambda x: sum(jnp.linalg.norm(row) for row in x[:1]), "convex"),
  ("numbers in the place of NaN", lambda x: jnp.nan_to_num(nn.relu(x)), "convex"),
  ("numbers in the place of infinity", lambda x: jnp.where(jnp.exp(x) == jnp.inf, -x, x), "affine"),
  ("of what may be infinite", lambda x: jnp.where(jnp.log(x) == -jnp.inf, 9.0, x), "unknown"),
  ("of NaN", lambda x: jnp.where(x == jnp.nan, -nn.relu(x), x), "unknown"),
  ("a value that enters often", entering_often, "unknown"),
  (
    "of which enough are left",
    lambda x: (lambda z: z + z + z)(nn.relu(x)) - nn.relu(x) - nn.relu(x),
    "convex",
  ),
  (
    "of which too few are left",
    lambda x: (lambda z: z + z)(nn.relu(x)) - nn.relu(x) - nn.relu(x) - nn.relu(x),
    "concave",
  ),
  ("a point of its own", lambda x: jnp.where(x >= 0, jnp.where(x > 0, 0.0, 3.0), 0.0), "unknown"),
  (
    "steps that cancel but at 0",
    lambda x: jnp.where(x >= 0, 1.0, 0) - jnp.where(x > 0, 1.0, 0),
    "unknown",
  ),
  (
    "axes of a reshaped sum",
    lambda x: jnp.log(jnp.exp(jnp.stack([x, -(x**2)]))[None].sum(1)),
    "unknown",
  ),
  (
    "log-sum-exp by an undefined shift",
    lambda x: jnp.log(jnp.exp(x - jnp.log(x[:, :1])).sum(1)) + jnp.log(x[:, 0]),
    "unknown",
  ),
  ("log-sum-exp by a bound", shifted_by(lambda c: jnp.maximum(c, -np.inf)), "convex"),
  ("log-sum-exp by infinity", shifted_by(lambda c: jnp.maximum(c, np.inf)), "unknown"),
  ("log-sum-exp by minus infinity", shifted_by(lambda c: jnp.minimum(c, -np.inf)), "unknown"),
  ("log-sum-exp by NaN", shifted_by(lambda c: jnp.maximum(c, np.nan)), "unknown"),
  (
    "log-sum-exp clamped to infinity",
    shifted_by(lambda c: jax.lax.clamp(jnp.inf, c, jnp.inf)),
    "unknown",
  ),
  (
    "NaN at a loop's border",
    lambda x: jax.lax.scan(lambda c, r: (r, c), jnp.full(3, jnp.nan), x)[1],
    "unknown",
  ),
  (
    "an empty window",
    lambda x: 0 * jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 1), (1, 1), ((1, 1), (0, 0))),
    "unknown",
  ),
  ("maximum of nothing", lambda x: x + 0 * jnp.max(x[:0], initial=-jnp.inf), "unknown"),
  ("an infinite factor", lambda x: -(jnp.where(x > 1, 2 * x, x) * -jnp.inf), "unknown"),
  ("clamped at infinity", lambda x: jax.lax.clamp(jnp.inf, x, jnp.inf), "unknown"),
  ("a jump that overflows", lambda x: jnp.where(x > 800, jnp.exp(x), 2 * jnp.exp(x)), "unknown"),
  ("a jump that underflows", lambda x: jnp.where(x > -800, jnp.exp(x), 2 * jnp.exp(x)), "unknown"),
  ("stack and tile", lambda x: jnp.tile(jnp.stack([nn.relu(x), x]), (1, 2, 1)), "convex"),
  (
    "an empty scan",
    lambda x: jax.lax.scan(lambda c, r: (c + x.sum(), c), 0.0, None, length=0)[0],
    "unknown",
  ),
  (
    "slopes that rounding makes equal",
    lambda x: jnp.where(x > 0, x * 1e16, x * 1e16 + x) - x * 2 * 5e15,
    "unknown",
  ),
  (
    "slopes that cancel exactly",
    lambda x: jnp.where(x > 0, x * 1e16, x * 1e16 + x) - x * 1e16,
    "concave",
  ),
  (
    "a value that is rounded at the kink",
    lambda x: jnp.where(x > 1, np.e * x, jnp.exp(x)),
    "unknown",
  ),
  ("slopes that are fractions", lambda x: nn.celu(x, 0.3), "convex"),
  ("a random key", lambda x: jax.random.key(0), "unknown"),
  (
    "keys in a loop",
    lambda x: jax.lax.scan(
      lambda c, k: (c + nn.relu(x) * jax.random.uniform(k), k),
      jnp.zeros_like(x),
      jax.random.split(jax.random.key(1), 2),
    )[0],
    "convex",
  ),
  ("a scalar and numbers", lambda x: jnp.maximum(x.sum(), jnp.arange(3.0)), "convex"),
  ("the smaller of both", lambda x: jnp.minimum(x.sum(), jnp.arange(3.0)), "concave"),
  ("a scalar and an array", lambda x: jnp.maximum(nn.relu(x).sum(), x), "convex"),
  ("their difference", lambda x: x - nn.relu(x).sum(), "concave"),
  ("a product of a scalar", lambda x: nn.relu(x).sum() * jnp.arange(3.0), "convex"),
  ("powers of a scalar", lambda x: jnp.abs(x).sum() ** jnp.arange(1.0, 4), "convex"),
  ("loops of rows", lambda x: x**2 * doubled(np.array([1, 3, 2])).sum(), "convex"),
  ("loops of rows, of which one is short", lambda x: x**2 * (3 - doubled(ROWS)[0]), "convex"),
  ("and one is long", lambda x: x**2 * (3 - doubled(ROWS)[1]), "concave"),
  ("out of bounds", lambda x: x.at[:, jnp.array([0, 7])].get(mode="fill"), "unknown"),
]


@pytest.mark.parametrize("name,function,expected", CURVATURES, ids=[c[0] for c in CURVATURES])
def test_what_is_proved_of_a_function(name, function, expected):
  assert curvature_of(function) == expected


def test_masks_are_kept_element_by_element():
  """A column of weights that meets only affine features may have any sign."""

  def function(x):
    both = jnp.concatenate([x, nn.relu(x)], axis=1)
    return both @ np.float32([[-1, -1], [2, -1], [-1, 3], [1, 0], [1, -1], [0, 0]])

  assert certify(function, X, search_steps=0).proved.reshape(2, 2).tolist() == [[True, False]] * 2


@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, 1), (-1, -1)])
def test_convolutions_follow_the_signs_of_their_kernels(signs):
  x = jax.ShapeDtypeStruct((1, 5, 5, 2), jnp.float32)
  kernel = np.ones((3, 3, 2, 2), np.float32) * np.float32(signs)

  def function(x):
    return jax.lax.conv_general_dilated(
      nn.relu(x), kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )

  convex = certify(function, x, search_steps=0).proved.reshape(25, 2)
  concave = certify(function, x, kind="concave", search_steps=0).proved.reshape(25, 2)
  assert (convex == (np.array(signs) > 0)).all() and (concave == (np.array(signs) < 0)).all()


def test_known_numbers_are_folded_in_float64():
  """In float32 this product of weights is 0, and its product with a feature would seem affine."""

  def function(weights, x):
    return nn.relu(x) * (weights[0] * weights[1])

  for sign, kind, other in ((1, "convex", "concave"), (-1, "concave", "convex")):
    tiny = np.float32([sign * 1e-30, 1e-30])
    assert certify(function, tiny, X, kind=kind, search_steps=0)
    assert not certify(function, tiny, X, kind=other, search_steps=0)


def test_logaddexp_is_known_by_what_it_computes():
  @jax.custom_jvp
  def logaddexp(a, b):
    return a - b

  logaddexp.defjvp(lambda p, t: (logaddexp(*p), t[0] - t[1]))
  assert not certify(lambda x: logaddexp(nn.relu(x), nn.relu(x[::-1])), X, search_steps=0)


# Random compositions: all that is proved must pass the midpoint test.

UNARY = (nn.relu, nn.elu, nn.softplus, nn.leaky_relu, jnp.abs, jnp.tanh, lambda x: jnp.exp(x / 4))
UNARY += (lambda x: -x, nn.gelu, lambda x: x**2 / 4, lambda x: jnp.maximum(x, 0.5), nn.selu)
UNARY += (lambda x: jax.nn.logsumexp(x, -1, keepdims=True) + 0 * x, lambda x: jnp.minimum(x, 1.0))
UNARY += (lambda x: x[..., ::-1], lambda x: x.max(-1, keepdims=True) + 0 * x, nn.celu)
UNARY += (lambda x: jnp.sqrt(x**2 + 1), lambda x: x**3.0, lambda x: nn.relu(x) ** 1.5, jnp.abs)
UNARY += (lambda x: jnp.linalg.norm(x, axis=-1, keepdims=True) + 0 * x, lambda x: x * x.sum() / 4)
UNARY += (lambda x: jnp.clip(x, -1.0, jnp.inf), lambda x: x.at[..., 1].set(0.5 * x[..., 0]))
UNARY += (lambda x: jnp.where(x > 0, x, 0.0), lambda x: jnp.sqrt(jnp.abs(x)), nn.silu)
UNARY += (lambda x: nn.elu(x, alpha=1.3), lambda x: x - x.mean(-1, keepdims=True), jnp.cumsum)
BINARY = (jnp.add, jnp.subtract, jnp.multiply, jnp.maximum, jnp.minimum, jnp.logaddexp)
TWICE = np.array([0, 2, 2, 1])
FORM = np.array([[2.0, -1, 0, 0], [-1, 2, -1, 0], [0, -1, 2, -1], [0, 0, -1, 2]])
# Updates, cumulative operations, moves.
UNARY += (lambda x: x.at[TWICE].add(x), lambda x: x.at[TWICE].mul(FORM[1]), jnp.sort)
UNARY += (lambda x: x.at[TWICE].max(x[::-1]), lambda x: x.at[TWICE].set(x), lambda x: x[TWICE])
UNARY += (lambda x: jax.lax.cummax(x, reverse=True), lambda x: jax.lax.cumlogsumexp(x))
UNARY += (lambda x: x.at[jnp.array([0, 9, 1, 2])].get(mode="fill", fill_value=1.0), jnp.floor)
# Powers, forms, quotients and roots.
UNARY += (lambda x: x**-1, lambda x: x**-2, jnp.cbrt, jnp.sqrt, jnp.cosh, lambda x: 0.5**x)
UNARY += (lambda x: x @ FORM @ x + 0 * x, lambda x: x @ (FORM - 1) @ x + 0 * x, jnp.log, jnp.sign)
UNARY += (lambda x: jnp.convolve(x, x, "same"), lambda x: x.reshape(2, 2) @ x.reshape(2, 2).T)
# Activations with several kinks, guards, conditions.
UNARY += (lambda x: jnp.where(jnp.abs(x) < 1, x * x / 2, jnp.abs(x) - 0.5), nn.hard_sigmoid)
UNARY += (lambda x: jnp.where(x < 0, 1.0, jnp.where(x < 1, 1 + x - x * x / 8, 2 * x - 0.125)),)
UNARY += (lambda x: jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1.0)), 0.0), jax.nn.sparse_plus)
UNARY += (lambda x: jax.lax.cond(x[0] > 0, lambda: x, lambda: -x), lambda x: x * (x > 0))
# Spellings of log-sum-exp.
UNARY += (lambda x: jnp.log(jnp.exp(x - x[0]).sum()) + x, jax.nn.log_softmax, jnp.exp, jnp.log1p)
UNARY += (lambda x: jnp.log(jnp.exp(x) @ FORM), lambda x: jax.nn.logsumexp(x, b=FORM[0]) + 0 * x)
BINARY += (jnp.divide, jnp.hypot, lambda x, y: jnp.convolve(x, y, "same"))
BINARY += (lambda x, y: jnp.where(x > 0, y, 0.0), lambda x, y: jnp.where(x <= 0, x, y))
BINARY += (lambda x, y: jnp.where(x > 0, jnp.logaddexp(jnp.where(x > 0, x, 0.0), y), y),)
BINARY += (lambda x, y: jnp.maximum(x, y) + jnp.log1p(jnp.exp(-jnp.abs(x - y))),)
BINARY += (lambda x, y: x * x + y * y - x * y, lambda x, y: x.at[TWICE].min(y))


@st.composite
def compositions(draw):
  """A program on vectors of 4: each step takes earlier values and appends one."""
  steps = []
  for i in range(draw(st.integers(2, 7))):
    arity = draw(st.sampled_from(("unary", "unary", "binary", "dense")))
    a, b = (draw(st.integers(max(0, i - 2), i)) for _ in range(2))
    if arity == "dense":
      signs = draw(st.sampled_from(("positive", "positive", "mixed")))
      steps.append((arity, a, draw(st.integers(0, 99)), signs))
    else:
      table = UNARY if arity == "unary" else BINARY
      steps.append((arity, a, b, draw(st.sampled_from(table))))
  return steps


def run(steps, x):
  values = [x]
  for arity, a, b, what in steps:
    if arity == "dense":
      w = np.random.default_rng(b).standard_normal((4, 4)) / 2
      values.append(values[a] @ (w if what == "mixed" else np.abs(w)))
    elif arity == "unary":
      value = what(values[a])
      values.append(value.reshape(values[a].shape))
    else:
      values.append(what(values[a], values[b]))
  return values[-1]


def check_composition(steps) -> str:
  """Raises if a proved output breaks its inequality at a midpoint; says what is all proved."""
  with jax.enable_x64(True):
    x, f = jax.ShapeDtypeStruct((4,), jnp.float64), functools.partial(run, steps)
    proved = {k: certify(f, x, kind=k, search_steps=0).proved for k in ("convex", "concave")}
  gaps = midpoint_gaps(jax.vmap(f), x.shape, pairs=200, sizes=(0.3, 2), steps=(0.03, 1, 3))
  for kind, sign in (("convex", 1), ("concave", -1)):
    bad = np.isfinite(gaps) & (sign * gaps > 1e-11)
    assert not (bad.any(0) & proved[kind]).any(), (kind, steps)
  return "".join(str(int(p.all())) for p in proved.values())


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(compositions())
def test_nothing_that_is_proved_has_a_midpoint_too_high(steps):
  check_composition(steps)


def test_the_midpoint_test_of_compositions_can_fail(monkeypatch):
  """The negative control: a rule that calls tanh convex is caught."""
  monkeypatch.setitem(rules.RULES, "tanh", rules.RULES["exp"])
  with pytest.raises(AssertionError, match="convex"):
    check_composition([("unary", 0, 0, jnp.tanh)])


def test_unknown_primitives_and_long_loops_are_not_guessed():
  assert curvature_of(lambda x: jnp.sin(x)) == "unknown"
  weights = np.broadcast_to(POSITIVE, (interpreter.LOOP_LIMIT + 1, 3, 3))
  assert curvature_of(scanned(weights)) == "unknown"


@pytest.mark.parametrize("call", [lambda f: f, jax.jit], ids=["at once", "in a call"])
@pytest.mark.parametrize("name", ["exp", *sorted(interpreter.SAME), "tile", "logaddexp"])
def test_a_primitive_of_that_name_alone_has_no_rule(name, call):
  """Another package's `exp` may be anything."""
  other = jax.extend.core.Primitive(name)
  other.def_abstract_eval(lambda x: x)
  with pytest.raises(ValueError, match=f"named '{name}' that is not jax's own"):
    certify(call(other.bind), X)


def test_jaxs_own_primitives_of_shardings_have_their_rule():
  mesh = jax.sharding.AbstractMesh((1,), ("i",))
  spec = jax.sharding.PartitionSpec()
  f = jax.shard_map(
    lambda x: jax.lax.psum(jax.lax.pcast(x, "i", to="varying"), "i"),
    mesh=mesh, in_specs=spec, out_specs=spec,
  )  # fmt: skip
  assert certify(f, X)


MISSING = {"0.12": {"closed_call"}}  # By jax version.


def test_every_primitive_with_a_rule_exists():
  """A table of soundness has no dead rows."""
  # By type: `isinstance` asks every object for its class, to which some libraries answer by warning.
  gc.unfreeze()  # What tests/conftest.py froze is not listed.
  exist = {p.name for p in gc.get_objects() if issubclass(type(p), jax.extend.core.Primitive)}
  gc.freeze()
  named = {*rules.RULES, *linear.TOTAL, *layouts.CALLS, *equations.SAME, *constants._BY_ENDS}
  named = {*named, *slopes.PRIMITIVES} - {"logaddexp"}  # The name of a pattern.
  missing = MISSING.get(".".join(jax.__version__.split(".")[:2]), set())
  assert named - exist == missing and "no such primitive" not in exist
