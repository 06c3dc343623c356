"""Log-sum-exp in every spelling, and what must not pass for one."""

import functools
from types import SimpleNamespace

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from convex_jax.proof import certify, forms
from convex_jax.proof.forms import MOVES
from convex_jax.proof.parameters import PARAMETERS, is_plain
from convex_jax.proof.source import Place
from convex_jax.proof.values import Operation
from tests.support.curvature import curvature_of
from tests.support.midpoints import midpoint_gaps

WEIGHTS = np.random.default_rng(0).uniform(0.1, 1, (3, 3)).astype(np.float32)
MASK = np.array([True, False, True])


def shifted(log_of_sum, top=lambda x: x.max(1, keepdims=True), back=lambda m: m):
  """log_of_sum(exp(x - c)) + c, with a shift c that no gradient goes through."""

  def function(x):
    m = lax.stop_gradient(top(x))
    return jnp.log(log_of_sum(jnp.exp(x - m))) + back(m)

  return function


def over_columns(e):
  return e.sum(1, keepdims=True)


def through_a_reshape(axis):
  """A shift whose reshape also transposes, as only one of the axes allows."""

  def function(x):
    x = x[:, :2]
    m = lax.stop_gradient(x.max(axis))
    turned = lax.reshape(jnp.broadcast_to(m[:, None], (2, 2)), (2, 2), dimensions=(1, 0))
    return jnp.log(jnp.exp(x - turned).sum(axis)) + m

  return function


def cross_entropy_by_hand(x):
  z = x - lax.stop_gradient(x.max(1, keepdims=True))
  return (jnp.log(jnp.exp(z).sum(1)) - z[:, 0]).mean()


def binary_cross_entropy_by_hand(x):
  return jnp.maximum(x, 0) - 0.7 * x + jnp.log1p(jnp.exp(-jnp.abs(x)))


def softened(x, weight=1.0, bend=lambda x: x, exp=jnp.exp):
  return jnp.maximum(x, 0) + weight * jnp.log1p(exp(-jnp.abs(bend(x))))


def margin(x):
  p = nn.log_softmax(x)
  return p[:, 0] - p[:, 1]


def of_stack(x):
  parts = [nn.logsumexp(x, 1), nn.softplus(x[:, 0]), x[:, 1] ** 2, jnp.logaddexp(x[:, 2], 1.0)]
  return nn.logsumexp(jnp.stack(parts), 0)


TURNED = np.float32([1, -1, 1])


def of_square(f):
  """f(u, exp(u)) of the concave u = -x^2, where softplus(u) is not convex."""
  return lambda x: f(u := -(x[0, 0] ** 2), jnp.exp(u))


SPELLINGS = [  # (name, function, curvature)
  ("log1p(exp)", lambda x: jnp.log1p(jnp.exp(x)), "convex"),
  ("log(1 + exp)", lambda x: jnp.log(1 + jnp.exp(x)), "convex"),
  ("log1p of a sum", lambda x: jnp.log1p(jnp.exp(x).sum(1)), "convex"),
  ("log(c + sum)", lambda x: jnp.log(0.3 + jnp.exp(x).sum(1)), "convex"),
  ("log of a mean", lambda x: jnp.log(jnp.mean(jnp.exp(x))), "convex"),
  (
    "log of a mixture",
    lambda x: jnp.log(0.3 * jnp.exp(x[:, 0]) + 0.7 * jnp.exp(x[:, 1])),
    "convex",
  ),
  ("log of weighted terms", lambda x: jnp.log((WEIGHTS[0] * jnp.exp(x)).sum(1)), "convex"),
  ("log of a matrix product", lambda x: jnp.log(jnp.exp(x) @ WEIGHTS), "convex"),
  ("log of a sparse product", lambda x: jnp.log(jnp.exp(x) @ np.eye(3, 2)), "convex"),
  ("log of a product", lambda x: jnp.log(jnp.exp(x).sum(1) * jnp.exp(x[:, 0])), "convex"),
  ("log of powers", lambda x: jnp.log(jnp.exp(x) ** 2 + jnp.sqrt(jnp.exp(-x))), "convex"),
  ("log of an inverse", lambda x: jnp.log(1 / jnp.exp(x).sum(1)), "concave"),
  ("log of a maximum", lambda x: jnp.log(jnp.maximum(jnp.exp(x).sum(1), 1e-6)), "convex"),
  ("log cosh", lambda x: jnp.log(jnp.cosh(x)), "convex"),
  (
    "log cosh of exponentials",
    lambda x: jnp.log(jnp.exp(x) + jnp.exp(-x)) - jnp.log(2.0),
    "convex",
  ),
  ("log sigmoid by hand", lambda x: jnp.log(nn.sigmoid(x)), "concave"),
  ("log 1 / (1 + exp)", lambda x: jnp.log(1 / (1 + jnp.exp(-x))), "concave"),
  ("log softmax by hand", lambda x: jnp.log(nn.softmax(x)), "concave"),
  ("log2", lambda x: jnp.log2(1 + jnp.exp2(x)), "convex"),
  ("softplus by hand", softened, "convex"),
  ("minus softplus by hand", lambda x: -softened(x), "concave"),
  ("a lighter bend", functools.partial(softened, weight=0.5), "convex"),
  ("softplus of a scale", lambda x: nn.softplus(3.3 * x) / 3.3, "convex"),
  ("logaddexp", lambda x: jnp.logaddexp(x, x[::-1]), "convex"),
  ("logaddexp of a number", lambda x: jnp.logaddexp(3.0, x), "convex"),
  ("logaddexp of logaddexp", lambda x: jnp.logaddexp(jnp.logaddexp(x, x[::-1]), x * x), "convex"),
  (
    "logaddexp under vmap",
    lambda x: jax.vmap(jnp.logaddexp, (0, None))(x, nn.relu(x[0])),
    "convex",
  ),
  ("logaddexp2", lambda x: jnp.logaddexp2(x, x[::-1]), "convex"),
  ("logsumexp of logsumexp", of_stack, "convex"),
  ("cumlogsumexp", lambda x: lax.cumlogsumexp(x, axis=1), "convex"),
  ("cumlogsumexp, reversed", lambda x: lax.cumlogsumexp(nn.relu(x), 0, reverse=True), "convex"),
  ("log sigmoid", nn.log_sigmoid, "concave"),
  ("logsumexp over all", nn.logsumexp, "convex"),
  ("logsumexp, kept", lambda x: nn.logsumexp(x, (0, 1), keepdims=True), "convex"),
  ("logsumexp, masked", lambda x: nn.logsumexp(x, 1, where=MASK), "convex"),
  ("logsumexp, weighted", lambda x: nn.logsumexp(x, 1, b=WEIGHTS[:2]), "convex"),
  ("logsumexp, some weights 0", lambda x: nn.logsumexp(x, 1, b=np.float32([1, 2, 0])), "convex"),
  ("logsumexp and sign", lambda x: nn.logsumexp(x, 1, return_sign=True)[0], "convex"),
  ("sign of a sum", lambda x: nn.logsumexp(x, 1, return_sign=True)[1], "affine"),
  ("logmeanexp", jax.nn.logmeanexp, "convex"),
  ("temperature", lambda x: 0.7 * nn.logsumexp(x / 0.7, 1), "convex"),
  ("soft minimum", lambda x: -0.7 * nn.logsumexp(-x / 0.7, 1), "concave"),
  ("shifted by hand", shifted(over_columns), "convex"),
  (
    "temperature and shift",
    lambda x: shifted(over_columns)(x / 0.7) * 0.7 + 0 * nn.relu(x),
    "convex",
  ),
  (
    "shift divided by the temperature",
    lambda x: (lambda m: jnp.log(over_columns(jnp.exp((x - m) / 0.7))) + m / 0.7)(x.max()),
    "convex",
  ),
  ("shifted matrix product", shifted(lambda e: e @ WEIGHTS), "convex"),
  ("shifted cumulative sum", shifted(lambda e: jnp.cumsum(e, 1)), "convex"),
  ("shifted by a transposing reshape", through_a_reshape(0), "convex"),
  ("log softmax", lambda x: -nn.log_softmax(x)[0], "convex"),
  ("log softmax of a margin", margin, "affine"),
  ("cross-entropy by hand", cross_entropy_by_hand, "convex"),
  (
    "cross-entropy, integers",
    lambda x: optax.softmax_cross_entropy_with_integer_labels(x, jnp.array([0, 1])),
    "convex",
  ),
  ("cross-entropy, one-hot", lambda x: optax.softmax_cross_entropy(x, jnp.eye(2, 3)), "convex"),
  (
    "cross-entropy, smoothed",
    lambda x: optax.softmax_cross_entropy(x, optax.smooth_labels(jnp.eye(2, 3), 0.1)).mean(),
    "convex",
  ),
  (
    "binary cross-entropy",
    lambda x: optax.sigmoid_binary_cross_entropy(x, jnp.array([1.0, 0, 0.3])),
    "convex",
  ),
  ("binary cross-entropy by hand", binary_cross_entropy_by_hand, "convex"),
  ("what cancels", lambda x: nn.relu(x) - nn.relu(x) + x, "affine"),
  # And what is none.
  ("a negative constant", lambda x: jnp.log(jnp.exp(x).sum(1) - 0.3), "unknown"),
  ("a negative weight", lambda x: jnp.log(jnp.exp(x) @ -WEIGHTS), "unknown"),
  ("a column of zeros", lambda x: jnp.log(jnp.exp(x) @ np.float32([[0, 1]] * 3)), "unknown"),
  ("one negative weight", lambda x: nn.logsumexp(x, 1, b=np.float32([1, -2, 3])), "unknown"),
  ("everything masked", lambda x: nn.logsumexp(x, 1, where=np.zeros(3, bool)), "unknown"),
  ("expm1", lambda x: jnp.log(jnp.expm1(x)), "unknown"),
  ("a minimum", lambda x: jnp.log(jnp.minimum(jnp.exp(x).sum(1), 1e-6)), "unknown"),
  ("an exponential less another", lambda x: jnp.log(jnp.exp(x) - jnp.exp(-x)), "unknown"),
  ("too heavy a bend", functools.partial(softened, weight=1.001), "unknown"),
  ("a negative bend", functools.partial(softened, weight=-1.0), "unknown"),
  ("a bend elsewhere", functools.partial(softened, bend=lambda x: x - 1), "unknown"),
  ("too sharp a bend", functools.partial(softened, bend=lambda x: 2 * x), "unknown"),
  ("too heavy in base 2", functools.partial(softened, weight=1.443, exp=jnp.exp2), "unknown"),
  ("logaddexp of concave", lambda x: jnp.logaddexp(x, -nn.relu(x)), "unknown"),
  (
    "logaddexp of infinity, written out",
    lambda x: jnp.maximum(x, np.inf) + jnp.log1p(jnp.exp(-jnp.abs(x - np.inf))),
    "unknown",
  ),
  ("cumlogsumexp of concave", lambda x: lax.cumlogsumexp(-nn.relu(x), axis=1), "unknown"),
  ("difference of two", lambda x: nn.logsumexp(x, 1) - nn.logsumexp(x[::-1], 1), "unknown"),
  ("log softmax of convex", lambda x: nn.log_softmax(nn.relu(x)), "unknown"),
  ("softmax", nn.softmax, "unknown"),
  ("infinity less infinity", lambda x: jnp.log(x) - jnp.log(x), "unknown"),
  ("shifted by another row", shifted(over_columns, back=lambda m: m[::-1]), "unknown"),
  ("shifted twice as far", shifted(over_columns, back=lambda m: 2 * m), "unknown"),
  ("shifted the wrong way", shifted(over_columns, back=lambda m: -m), "unknown"),
  ("shifted row by row", shifted(lambda e: e.sum(0), top=lambda x: x.max(1)[:, None]), "unknown"),
  ("shifted by each", shifted(lambda e: e.sum(1), lambda x: x * x, lambda m: m[:, 0]), "unknown"),
  ("shifted along a cumulative sum", shifted(lambda e: jnp.cumsum(e, 0)), "unknown"),
  ("shifted by an undefined number", shifted(over_columns, lambda x: jnp.log(x[:, :1])), "unknown"),
  ("another transposing reshape", through_a_reshape(1), "unknown"),
  ("labels that are negative", lambda x: optax.softmax_cross_entropy(x, -jnp.eye(2, 3)), "concave"),
  (
    "cross-entropy of convex",
    lambda x: optax.softmax_cross_entropy(nn.relu(x), jnp.eye(2, 3)),
    "unknown",
  ),
  (
    "temperatures that differ",
    lambda x: (lambda m: jnp.log(over_columns(jnp.exp((x - m) / 0.7))) + m / 0.6)(x.max()),
    "unknown",
  ),
  ("labels beyond 1", lambda x: optax.sigmoid_binary_cross_entropy(x, 1.5), "unknown"),
  ("sign of a sum of exps", lambda x: jnp.sign(jnp.exp(x) @ jnp.ones(3)), "affine"),
  ("sign of a difference of exps", lambda x: jnp.sign(jnp.exp(x) @ TURNED), "unknown"),
  (
    "choice by such a difference",
    lambda x: jnp.where(jnp.exp(x) @ TURNED < 0, x[:, 0] ** 2, x[:, 0]),
    "unknown",
  ),
  (
    "choice by a convolution of exps",
    lambda x: jnp.where(jnp.convolve(jnp.exp(x[0]), TURNED) < 0, 1.0, 0.0),
    "unknown",
  ),
  (
    "choice by a maximum of no exps",
    lambda x: jnp.where(lax.reduce_max(jnp.exp(x[:0]), (0,)) < 0, -(x[0] ** 2), x[0]),
    "unknown",
  ),
  (
    "logaddexp in a choice, of what it chooses",
    lambda x: jnp.where(x[0, 0] > 0, jnp.logaddexp(jnp.where(x[0, 0] > 0, x[0, 0], 0), x[0, 0]), 0),
    "unknown",
  ),
  *(
    (f"a factor that occurs twice, in common but once, {i}", of_square(f), "unknown")
    for i, f in enumerate(
      (
        lambda u, e: jnp.log(e * e + e) - u,
        lambda u, e: jnp.log(e + e * e) - u,
        lambda u, e: jnp.log(jnp.exp(u + u) + 3 * e) - u,
      )
    )
  ),
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
    gaps = midpoint_gaps(jax.vmap(function), (2, 3), pairs=100, sizes=(1, 5), steps=(1, 5))
    sign = 1 if expected == "convex" else -1
    assert np.isfinite(gaps).any() and np.nanmax(sign * gaps) < 1e-6, name


def test_weights_that_softplus_makes_in_the_forward_pass():
  """The usual input-convex network, whose weights pass through logaddexp themselves."""

  def network(w, x):
    return nn.softplus(w) @ nn.relu(x)

  x = jax.ShapeDtypeStruct((4,), jnp.float32)
  assert certify(network, np.ones((4, 4), np.float32), x).verdict == "PROVED"
  assert not certify(lambda w, x: network(-w, x) - network(w, x), np.ones((4, 4), np.float32), x)


EXAMPLES = {  # How to make each operation whose parameters the table names.
  "add": lambda x: x + x,
  "sub": lambda x: x - x,
  "mul": lambda x: x * x,
  "div": lambda x: x / x,
  "neg": lambda x: -x,
  "max": lambda x: jnp.maximum(x, x),
  "min": lambda x: jnp.minimum(x, x),
  "gt": lambda x: x > x,
  "ge": lambda x: x >= x,
  "lt": lambda x: x < x,
  "le": lambda x: x <= x,
  "eq": lambda x: x == x,
  "ne": lambda x: x != x,
  "add_any": lambda x: jax.vjp(lambda x: (x, x), x)[1]((x, x)),
  "and": lambda x: lax.bitwise_and(x > 0, x > 0),
  "or": lambda x: lax.bitwise_or(x > 0, x > 0),
  "not": lambda x: lax.bitwise_not(x > 0),
  "select_n": lambda x: lax.select_n(x > 0, x, x),
  "integer_pow": lambda x: lax.integer_pow(x, 3),
  "broadcast_in_dim": lambda x: lax.broadcast_in_dim(x, (4, 2, 3), (1, 2)),
  "reshape": lambda x: lax.reshape(x, (3, 2), (1, 0)),
  "squeeze": lambda x: lax.squeeze(x[:1], (0,)),
  "transpose": lambda x: lax.transpose(x, (1, 0)),
  "slice": lambda x: lax.slice(x, (0, 0), (1, 1)),
  "rev": lambda x: lax.rev(x, (0,)),
  "reduce_sum": lambda x: x.sum(1),
  "cumsum": lambda x: lax.cumsum(x, 1),
  "convert_element_type": lambda x: (x > 0).astype(np.float32),
}
ABSENT = {"0.10": {"log2"}}  # By jax version.


def equation(name):
  function = EXAMPLES.get(name) or getattr(lax, name)
  return next(
    e for e in jax.make_jaxpr(function)(jnp.ones((2, 3))).eqns if e.primitive.name == name
  )


def test_the_table_names_every_parameter():
  """A new parameter of a primitive fails here; at run time it makes the patterns not apply.

  Of those that the table names, an older jax lacks some.
  """
  version = ".".join(jax.__version__.split(".")[:2])
  for name, parameters in PARAMETERS.items():
    if name not in ABSENT.get(version, ()):
      assert set(equation(name).params) <= set(parameters), name


def made(name, **changed):
  eqn = equation(name)
  params = {**eqn.params, **changed}
  eqn = SimpleNamespace(primitive=eqn.primitive, params=params, outvars=eqn.outvars)
  return Operation(name, eqn, (), Place(), 0)


def test_an_operation_with_another_parameter_is_not_looked_through():
  for name in {*PARAMETERS} - ABSENT.get(".".join(jax.__version__.split(".")[:2]), set()):
    assert is_plain(made(name)), name
    assert not is_plain(made(name, brand_new=None)), name
  assert not is_plain(made("exp", accuracy=lax.Tolerance(atol=1.0)))
  assert not is_plain(made("mul", out_dtype=np.int32))
  assert {*MOVES} <= {*PARAMETERS}


# Random programs of exponentials, logarithms, shifts and sums.

UNARY = (jnp.exp, jnp.log, jnp.log, jnp.log1p, jnp.abs, jnp.negative, nn.sigmoid, jnp.square)
UNARY += (lambda x: x.sum(keepdims=True) + 0 * x, lambda x: x[::-1], jnp.cumsum, nn.relu)
UNARY += (lambda x: x.max(keepdims=True) + 0 * x, lambda x: x[:1] + 0 * x, lambda x: x / 2)
UNARY += (lambda x: jnp.where(MASK, x, 0), lambda x: x @ WEIGHTS, lambda x: x * WEIGHTS[0])
UNARY += (lambda x: x.max() + jnp.zeros(3), lambda x: x - x.max(), lambda x: x @ (WEIGHTS - 0.5))
BINARY = (jnp.add, jnp.subtract, jnp.subtract, jnp.multiply, jnp.divide, jnp.maximum)


@st.composite
def programs(draw):
  """Steps, each (function, which of the last three values): half of them undo an earlier one."""
  steps = []
  for i in range(draw(st.integers(3, 8))):
    function = draw(st.sampled_from(UNARY if draw(st.booleans()) else BINARY))
    steps.append((function, [draw(st.integers(max(0, i - 3), i)) for _ in range(2)]))
  return steps


def run(steps, x):
  values = [x]
  for function, (a, b) in steps:
    values.append(function(values[a], values[b]) if function in BINARY else function(values[a]))
  return values[-1]


def check(steps) -> str:
  """Raises if a proved output breaks its inequality at a midpoint; says what is proved."""
  function = functools.partial(run, steps)
  found = curvature_of(function, jax.ShapeDtypeStruct((3,), jnp.float32))
  if found != "unknown":
    with np.errstate(invalid="ignore"):  # Where exponentials overflow.
      gaps = midpoint_gaps(jax.vmap(function), (3,), pairs=100, sizes=(0.3, 2), steps=(0.3, 2))
    for kind, sign in (("convex", 1), ("concave", -1)):
      assert found not in (kind, "affine") or not (sign * gaps > 1e-6).any(), steps
  return found


@hypothesis.settings(max_examples=20, deadline=None, derandomize=True)
@hypothesis.given(programs())
def test_nothing_that_is_proved_of_random_programs_has_a_midpoint_too_high(steps):
  check(steps)


def test_the_midpoint_test_of_random_programs_can_fail(monkeypatch):
  """The negative control: terms that cancel whatever their elements are caught."""
  monkeypatch.setattr(forms.Term, "is_alike", lambda a, b: a.root is b.root)
  with pytest.raises(AssertionError):
    check([(nn.relu, (0, 0)), (UNARY[9], (1, 1)), (jnp.subtract, (1, 2))])
