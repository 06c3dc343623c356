"""Bounds on rounding errors against programs as XLA computes them, over whole balls."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax import lax

from convex_jax.proof import arithmetic, rounding_walk
from convex_jax.proof.arithmetic import ARITHMETICS, FLOAT64, Arithmetic
from convex_jax.proof.constants import number
from convex_jax.proof.radii import Certifier
from convex_jax.proof.rounding_errors import Program
from convex_jax.proof.rounding_walk import Ball, Walk
from convex_jax.proof.source import Place

# Their bounds are of the programs that users compile.
pytestmark = pytest.mark.usefixtures("usual_emitters")

F32 = ARITHMETICS["float32"]
RADIUS = {"l1": 1.0, "l2": 0.3, "linf": 0.1}


def program(f, *args, arithmetic=F32):
  *weights, x = args
  return Program(f, *weights, jax.ShapeDtypeStruct(np.shape(x), np.float32), arithmetic=arithmetic)


def points(ball, rng, count=60):
  """Points of a ball that float32 holds: its centre, corners, and any others."""
  d = rng.standard_normal((count, *ball.centre.shape))
  d[: count // 2] **= 9  # Nearly corners of an l1 ball.
  if ball.norm == "linf":
    d[: count // 2] = np.sign(d[: count // 2])
  order = {"l1": 1, "l2": 2, "linf": np.inf}[ball.norm]
  size = np.linalg.norm(d.reshape(count, -1), order, axis=1)
  scale = np.where(rng.random(count) < 0.7, 0.9999, rng.random(count)) * ball.radius / size
  moved = ball.centre + d * scale.reshape(-1, *[1] * ball.centre.ndim)
  return np.concatenate([ball.centre[None], moved]).astype(np.float32)


def largest_ratio(f, weights, centre, arithmetic=F32, norms=("l1", "linf"), seed=0):
  """The largest |computed - real| / bound over points of balls around an input."""
  p, rng = program(f, weights, centre, arithmetic=arithmetic), np.random.default_rng(seed)
  computed = jax.jit(f)
  with jax.enable_x64(True):
    exact = jax.jit(p.exact)
  worst = 0.0
  for norm in norms:
    ball = Ball(centre.astype(np.float64), norm, RADIUS[norm])
    bound, apart = p.error(ball), p.differences(ball)
    assert np.isfinite(bound).all()
    for x in points(ball, rng):
      got = np.asarray(computed(weights, x)).astype(np.float64)
      with jax.enable_x64(True):
        real = np.asarray(exact(jnp.asarray(x, jnp.float64)))
      off = got - real
      worst = max(worst, float((np.abs(off) / np.maximum(bound, 1e-300)).max()))
      assert (np.abs(off.ravel()[:, None] - off.ravel()) <= apart).all()
  return worst


def mlp(activation, dtype):
  """An MLP with BatchNorm, residual and passthrough, in a dtype."""

  def network(w, x):
    x = ((x.astype(dtype) / 255 - jnp.asarray(0.45, dtype)) / jnp.asarray(0.22, dtype)).ravel()
    z = x @ w["first"].astype(dtype) + w["bias"].astype(dtype)
    z = (z - w["mean"]) * (lax.rsqrt(w["var"] + 1e-5) * w["scale"])
    h = activation(z.astype(dtype))
    z = h @ w["second"].astype(dtype) + x @ w["passthrough"].astype(dtype)
    h = h + activation(z)
    return (h @ w["last"].astype(dtype)).astype(jnp.float32)

  return network


def weights_of(rng, n=48, m=24):
  normal = rng.standard_normal
  w = {
    "first": normal((n, m)) / np.sqrt(n),
    "bias": normal(m) / 10,
    "mean": normal(m) / 3,
    "var": rng.uniform(0.3, 2, m),
    "scale": rng.uniform(0.5, 2, m),
    "second": normal((m, m)) / np.sqrt(m),
    "passthrough": normal((n, m)) / np.sqrt(n),
    "last": normal((m, 5)) / np.sqrt(m),
  }
  return {k: v.astype(np.float32) for k, v in w.items()}


ACTIVATIONS = {
  "relu": jax.nn.relu,
  "leaky_relu": jax.nn.leaky_relu,
  "elu": jax.nn.elu,
  "selu": jax.nn.selu,
  "softplus": jax.nn.softplus,
  "silu": jax.nn.silu,
  "gelu": jax.nn.gelu,
  "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
  "tanh": jnp.tanh,
  "sigmoid": jax.nn.sigmoid,
  "abs": jnp.abs,
  "clip": lambda z: jnp.clip(z, -1, 1),
  "own_elu": lambda z: jnp.where(z > 0, z, jnp.exp(z) - 1),
  "square": lambda z: z**2,
  "maxout": lambda z: jnp.maximum(z, -0.1 * z[::-1]),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_no_error_exceeds_its_bound(name):
  """In float32, and so far off that the bound says something: within a factor of 10,000."""
  rng = np.random.default_rng(0)
  x = rng.uniform(0, 255, 48).astype(np.float32)
  ratio = largest_ratio(mlp(ACTIVATIONS[name], jnp.float32), weights_of(rng), x)
  assert 1e-4 < ratio <= 1


@pytest.mark.parametrize("name", ["relu", "elu", "softplus"])
@pytest.mark.parametrize("arithmetic", ["bfloat16", "float16"])
def test_no_error_in_half_precision_exceeds_its_bound(name, arithmetic):
  rng = np.random.default_rng(1)
  x = rng.uniform(0, 255, 48).astype(np.float32)
  how = ARITHMETICS[arithmetic]
  assert 1e-4 < largest_ratio(mlp(ACTIVATIONS[name], how.dtype), weights_of(rng), x, how) <= 1


OF_ROUNDED = {
  **{name: f for name, f in ACTIVATIONS.items() if name != "maxout"},
  "elu_of_softplus": lambda z: jax.nn.elu(jax.nn.softplus(z) - 1),
  "mish": jax.nn.mish,
  "log": lambda z: jnp.log(1.5 + jnp.exp(-z)),
  "roots": lambda z: jnp.sqrt(1 + z**2) * lax.rsqrt(2 + jnp.abs(z)),
  "cubic": lambda z: 0.1 * z**3 - z / (2 + z**2),
  "minus_elu": lambda z: -jnp.where(-z >= 0.5, z + 0.5, jnp.expm1(-jnp.abs(z + 0.5))),
  "jump": lambda z: jnp.where(z > 0, z, 0.3 - 0.5 * z),
  "below": lambda z: jnp.where(z < 0.2, 0.5 * z - 0.1, jnp.expm1(2 * z - 0.4)),
  "above": lambda z: jnp.where(
    lax.ge(np.full(400, np.float32(0.2)), z), z / 2 - 0.1, jnp.expm1(2 * z - 0.4)
  ),
  "bounded": lambda z: jnp.clip(z, -0.5, jnp.tanh(z) / 2),
  "least": lambda z: jnp.minimum(z, 0.3 * z**2 - 0.1),
  # Of two arguments each.
  "product": lambda z: z[:200] * z[200:],
  "quotient": lambda z: z[:200] / (6.0 + z[200:]),
  "greater": lambda z: jnp.maximum(z[:200], 0.9 * z[200:]),
  "lesser": lambda z: jnp.minimum(z[:200], 0.9 * z[200:]),
  "choice": lambda z: jnp.where(z[:200] > 0, z[200:], 0.1 * z[200:]),
  "comparison": lambda z: jnp.where(z[:200] <= z[200:], z[:200] + 1, z[200:]),
  "dot": lambda z: z.reshape(200, 2) @ np.float32([[0.3, -1.1], [0.2, 0.4]]),
  "both": lambda z: jnp.einsum("nij,njk->nik", z.reshape(100, 2, 2), z.reshape(100, 2, 2)),
  "sum": lambda z: z.reshape(200, 2).sum(1),
  "extremes": lambda z: z.reshape(200, 2).max(1) + jnp.cos(0.0) * z.reshape(200, 2).min(1),
}


@pytest.mark.parametrize("name", OF_ROUNDED)
def test_the_error_of_an_argument_is_passed_on_by_no_less_than_it_does(name):
  """Where the argument is off by far more than the result: it is rounded to bfloat16 before."""

  def f(x):
    return OF_ROUNDED[name](x.astype(jnp.bfloat16).astype(jnp.float32))

  p, rng, ratios = program(f, np.zeros(400)), np.random.default_rng(6), []
  computed = jax.jit(OF_ROUNDED[name])
  with jax.enable_x64(True):
    exact = jax.jit(p.exact)
  for scale in (0.1, 1.0, 5.0):
    for radius in (0.0, 0.01, 0.3):
      centre = scale * rng.uniform(-1, 1, 400)
      bound = p.error(Ball(centre, "linf", radius))
      for _ in range(20):
        x = (centre + 0.999 * radius * rng.uniform(-1, 1, 400)).astype(np.float32)
        rounded = x.astype(jnp.bfloat16).astype(np.float32)  # XLA may leave out such a cast.
        got = np.asarray(computed(rounded)).astype(np.float64)
        with jax.enable_x64(True):
          real = np.asarray(exact(jnp.asarray(x, jnp.float64)))
        ratios.append(np.abs(got - real) / np.maximum(bound, 1e-300))
  assert 0.3 < np.max(ratios) <= 1


def test_casts_of_weights_and_results_count():
  """The casts are made here, since XLA may leave them out."""
  rng = np.random.default_rng(8)
  x, w = rng.integers(1, 9, 2).astype(np.float64), rng.uniform(0.5, 1, (2, 300)).astype(np.float32)
  real, short = x @ w.astype(np.float64), w.astype(jnp.bfloat16)

  def off_by(f, got):
    error = program(f, w, x).error(Ball(x, "l1", 0.0))
    return (np.abs(np.asarray(got, np.float64) - real) / error).max()

  assert 0.9 < off_by(lambda w, x: x @ w.astype(jnp.bfloat16).astype(jnp.float32), x @ short) <= 1
  rounded = real.astype(jnp.bfloat16)
  multiply = functools.partial(jnp.matmul, preferred_element_type=jnp.bfloat16)
  assert 0.4 < off_by(lambda w, x: multiply(x, w), rounded) <= 1


def test_what_two_logits_have_in_common_does_not_part_them():
  """Of logits h W the error of h counts by differences of columns, and by no less."""
  rng, ratios = np.random.default_rng(7), []
  w = (3 + rng.uniform(-1, 1, (4, 3))).astype(np.float32)

  def f(w, x):
    return (x.astype(jnp.bfloat16).astype(jnp.float32) @ w + 1.0)[None]

  p = program(f, w, np.zeros(4))
  for _ in range(40):
    centre = rng.uniform(-1, 1, 4)
    ball = Ball(centre, "linf", 0.01)
    apart, error = p.differences(ball), p.error(ball)[0]
    assert (apart < 0.6 * (error[:, None] + error)).all()
    for x in points(ball, rng, 20):
      off = (x.astype(jnp.bfloat16).astype(np.float64) - x) @ w
      ratios.append((np.abs(off[:, None] - off) / apart).max())
  assert 0.3 < max(ratios) <= 1


@pytest.mark.slow
def test_no_error_of_many_random_networks_exceeds_its_bound():
  ratios = []
  for seed in range(30):
    rng = np.random.default_rng(seed)
    n, m = int(rng.integers(5, 200)), int(rng.integers(3, 60))
    name, how = rng.choice(list(ACTIVATIONS)), rng.choice(["float32", "bfloat16", "float16"])
    x, arithmetic = rng.uniform(0, 255, n).astype(np.float32), ARITHMETICS[how]
    f = mlp(ACTIVATIONS[name], arithmetic.dtype)
    if name == "square" and how != "float32":
      continue  # Its slope grows with the error: the bound may be infinite.
    ratios.append(largest_ratio(f, weights_of(rng, n, m), x, arithmetic, seed=seed))
  assert max(ratios) <= 1


OPERATIONS = {  # Functions of an 8 x 8 x 3 image.
  "convolution": lambda k, x: lax.conv_general_dilated(
    x[None], k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  ),
  "mean": lambda k, x: x.mean((0, 1)),
  "cumsum": lambda k, x: jnp.cumsum(x, 1),
  "max": lambda k, x: x.max((0, 1)) - x.min((0, 1)),
  "pooling": lambda k, x: lax.reduce_window(x, -np.inf, lax.max, (2, 2, 1), (2, 2, 1), "SAME"),
  "average": lambda k, x: lax.reduce_window(x, 0.0, lax.add, (2, 2, 1), (2, 2, 1), "VALID"),
  "moves": lambda k, x: jnp.pad(jnp.concatenate([x[::-1], x.swapaxes(0, 1)], 1), 1)[2:] * 0.3,
  "gather": lambda k, x: x[np.array([3, 1]), 2] / 3.0,
  "gather, beyond the end": lambda k, x: (
    x.at[np.array([3, 9])].get(mode="fill", fill_value=-1.0) * 0.3
  ),
  "quotient": lambda k, x: x / (1 + x.mean() ** 2),
  "softmax": lambda k, x: jax.nn.softmax(x.ravel() / 8),
  "logsumexp": lambda k, x: jax.nn.logsumexp(x.ravel() / 8),
  "norm": lambda k, x: jnp.sqrt(1 + (x**2).sum()),
  "scan": lambda k, x: lax.scan(lambda c, row: (0.9 * c + row, c.sum()), x[0], x),
  "cond": lambda k, x: lax.cond(k[0, 0, 0, 0] > 9, jnp.sin, lambda y: 3.3 * y, x),
  "while": lambda k, x: lax.fori_loop(0, 5, lambda i, y: y * 0.7 + i, x),
  "product": lambda k, x: x[0] * x[1] - x[2] * x[3],
  "greater": lambda k, x: jnp.maximum(x * 0.3, 0.9 / (2 + x)),
  "choice": lambda k, x: jnp.where(x > 1, x * 0.3, x / 3.0),
  "choice by two conditions": lambda k, x: jnp.where((x > 1) & (x < 1.5), x * 0.3, x / 3.0),
  "choice by a scalar": lambda k, x: jnp.where(
    x.sum() / 99 > k[0, 0, 0], x.sum() - k[0, 0, 0], 0.0
  ),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_no_error_of_an_operation_exceeds_its_bound(name):
  rng = np.random.default_rng(2)
  kernel = rng.standard_normal((3, 3, 3, 4)).astype(np.float32)
  x = rng.uniform(0.5, 2, (8, 8, 3)).astype(np.float32)

  def f(k, x):
    out = OPERATIONS[name](k, x)
    return jnp.concatenate([jnp.ravel(o) for o in jax.tree.leaves(out)])

  assert largest_ratio(f, kernel, x) <= 1


@pytest.mark.parametrize(
  "f",
  [
    lambda x: jnp.exp(jnp.sum(jnp.where(x > 0, 16 * x, x / 1024))),
    lambda x: jnp.exp(jnp.sum(lax.cond(x[0] > 0, lambda x: 16 * x, lambda x: x / 1024, x))),
    lambda x: jnp.exp(jnp.sum(jnp.stack([x / 1024, 16 * x])[(x > 0).astype(int)])),
  ],
  ids=["choice", "branch", "index"],
)
def test_a_bound_does_not_depend_on_the_balls_before(f):
  """Where another ball lies, the program may compute another affine function."""
  ball, other = (Ball(np.array([at]), "linf", 1.0) for at in (1.5, -1.5))
  fresh, used = (program(f, np.zeros(1)) for _ in range(2))
  used.error(other)
  np.testing.assert_array_equal(used.error(ball), fresh.error(ball))


F, H = np.float32, np.float16
MERGED = {  # What XLA computes in other numbers than the program's, at some x; the dtype is float32 but for "half".
  "constants, flushed to 0": (lambda x: x * F(1e-30) * F(1e-15), [1e30]),
  "constants, too large": (lambda x: x * F(1e20) * F(1e25), [1e-30]),
  "constants, moved": (lambda x: (x * F(1e-25)).reshape(2, 2) * F(1e-25), [1e38] * 4),
  "half": (lambda x: x.astype(H) * H(300) * H(300), [1e-3]),
  "half, rounded": (lambda x: x.astype(H) * H(1e-4) * H(1e-3) * H(2e3), [6e4]),
  "a divisor": (lambda x: x / F(3e38), [2e38]),
  "divisors": (lambda x: x / F(1e25) / F(1e25), [1e38]),
  "exponentials": (lambda x: jnp.exp(x) * jnp.exp(x + F(3.3)), [39.12, 40.77, 41.3, 38.01]),
  "exponential of a sum of one": (
    lambda x: jnp.exp(x).reshape(4, 1).sum(1) * jnp.exp(x + F(0.3)),
    [39.123, -38.3, 41.7, 40.9],
  ),
  "products": (lambda x: (x[0] * F(1e-30)) * (x[1] * F(1e-30)), [1e30, 2e30]),
  "a sum of products": (lambda x: x[0] * F(2.0**-10) + x[1] * F(2.0**-10), [3e38, 3e38]),
  "an outer product": (
    lambda x: x.reshape(4, 1) @ np.full((1, 3), F(1e-25)) * F(1e-25),
    [1e38] * 4,
  ),
  "an inner product": (lambda x: (x[None] * F(1e-25)) @ np.full((4, 1), F(1e-25)), [1e38] * 4),
  "a convolution": (
    lambda x: lax.conv_general_dilated(
      (x * F(1e-25)).reshape(1, 1, 4), np.full((1, 1, 1), F(1e-25)), (1,), "SAME"
    ),
    [1e38] * 4,
  ),
  "a mean of one": (lambda x: jnp.mean((x * F(1e-25)).reshape(4, 1), 1) * F(1e-25), [1e38] * 4),
  "a maximum of one": (lambda x: jnp.max((x * F(1e-25)).reshape(4, 1), 1) * F(1e-25), [1e38] * 4),
  "an empty border": (lambda x: jnp.pad(x * F(1e-25), 0) * F(1e-25), [1e38]),
  "windows of padding alone": (
    lambda x: jnp.maximum(
      lax.reduce_window(x, -np.inf, lax.max, (1,), (2,), ((4, 4),), (1,), (1,)), 0
    ),
    [1.0, 2, 3, 4],
  ),
}


@pytest.mark.parametrize("name", MERGED)
def test_no_error_of_what_the_compiler_merges_exceeds_its_bound(name):
  f, x = MERGED[name]
  x = np.float32(x)
  how = ARITHMETICS["float16"] if "half" in name else F32
  p = program(f, x, arithmetic=how)
  error = p.error(Ball(np.float64(x), "linf", 0.0))
  with jax.enable_x64(True):
    real = np.asarray(p.exact(jnp.asarray(x, jnp.float64)))
  got = np.asarray(jax.jit(f)(x), np.float64)
  assert (error >= 0).all()
  assert (np.isinf(error) | (np.abs(got - real) <= error)).all()


QUOTIENTS = {  # Of an input x and weights w, which are arguments of the compiled program, too.
  "x / y / z": (lambda w, x: x[0] / x[1] / x[2], [], [1e25, 1e20, 1e20]),
  "x / (y / z)": (lambda w, x: x[0] / (x[1] / x[2]), [], [1e25, 1e25, 1e25]),
  "of quotients": (
    lambda w, x: (x[0] / x[1]) / (x[2] / x[3]),
    [],
    [1e25, 1e24, 1e25, 1e24],
  ),
  "of small ones": (lambda w, x: (x[0] / x[1]) / (x[2] / x[3]), [], [1e-25] * 4),
  "c / (d / x)": (lambda w, x: F(1e30) / (F(1e30) / x), [], [1e30]),
  "of weights": (lambda w, x: x * (w[0] / w[1] / w[2]), [1e25, 1e20, 1e20], [1.0]),
  "of small weights": (lambda w, x: x * (w[0] / w[1] / w[2]), [1e-25, 1e-20, 1e-20], [1.0]),
  "by a quotient of weights": (
    lambda w, x: jax.nn.relu(x) * (w[0] / (w[1] / w[2])),
    [1e25, 1e25, 1e25],
    [1.0],
  ),
  "by an exponential": (lambda w, x: w[0] / jnp.exp(x) / w[1], [1e30, 1e30], [50.0]),
  "moved": (
    lambda w, x: x * ((w[:1] / w[1:2]).reshape(1, 1)[0] / w[2]),
    [1e25, 1e20, 1e20],
    [1.0],
  ),
  "the greater of two": (
    lambda w, x: x * (jnp.maximum(w[0] / w[1], w[0] / w[1]) / w[2]),
    [1e25, 1e20, 1e20],
    [1.0],
  ),
  "the greater of a quotient and a weight": (
    lambda w, x: x * (jnp.maximum(w[0] / w[1], w[2]) * F(1e-30) * F(1e-30)),
    [1, 1, 1e38],
    [1.0],
  ),
  "a weight times constants": (lambda w, x: x * (w[0] * F(1e30) * F(1e30)), [1e-35], [1.0]),
  "a weight and constants": (
    lambda w, x: x * (w[0] + F(3e38) + F(3e38)),
    [-3e38],
    [1.0],
  ),
  "a product with a weight": (
    lambda w, x: (x * F(1e-20)) * (w[0] * F(1e30)),
    [1e-30],
    [1e-15],
  ),
}


@pytest.mark.parametrize("name", QUOTIENTS)
def test_quotients_and_weights_may_be_merged(name):
  """Compiled, some of these are 0, infinite or NaN where the program's own order is not."""
  f, w, x = QUOTIENTS[name]
  w, x = np.float32(w), np.float32(x)
  p = program(f, w, x)
  error = p.error(Ball(np.float64(x), "linf", 0.0))
  with jax.enable_x64(True):
    real = np.asarray(p.exact(jnp.asarray(x, jnp.float64)))
  for got in (jax.jit(f)(w, x), jax.jit(functools.partial(f, w))(x), f(w, x)):
    assert (np.isinf(error) | (np.abs(np.asarray(got, np.float64) - real) <= error)).all()


def test_ordinary_quotients_have_a_narrow_bound():
  """The negative control of a bound that would be infinite wherever something is divided twice."""
  x = np.float32([3.0, 0.7, -2.0])
  p = program(lambda w, x: jax.nn.relu(x) / w[0] / (w[1] / w[2]), np.float32([0.1, 7, 300]), x)
  assert 0 < p.error(Ball(np.float64(x), "linf", 0.1)).max() < 1e-3


LOST = 64, 2048  # Terms of 1, and terms of 2^-24, which are lost beside the sums of the former.


def lossy():
  """(x, w, sum): where float32 loses nearly all of the small terms of x @ w, in any usual order."""
  x = np.full(LOST[1], 2.0**-24, np.float32)
  x[: LOST[0]] = 1
  return x, np.ones((LOST[1], 1), np.float32), float(x.astype(np.float64).sum())


@pytest.mark.parametrize("units", [None, 0, 1])
def test_a_sum_that_loses_its_small_terms(monkeypatch, units):
  """The negative control: a bound without the number of terms does not cover it."""
  x, w, real = lossy()
  if units is not None:
    monkeypatch.setattr(rounding_walk, "gamma", lambda n, u: units * u)
  (error,) = program(lambda w, x: x @ w, w, x).error(Ball(x, "l1", 0.0))
  off = abs(float(jax.jit(lambda w, x: x @ w)(w, x)[0]) - real)
  assert off > 10 * 2.0**-24 * real  # The program loses more than one rounding.
  assert (off <= error) == (units is None)


@pytest.mark.parametrize("arithmetic", [None, F32])
def test_the_radius_of_the_program_is_0_where_it_is_wrong(arithmetic):
  """Over the reals the first class wins; the program, which loses small terms, says the second."""
  x, w, real = lossy()
  bias = np.float32(-real * (1 - 5 * 2.0**-24))

  def logits(w, x):
    y = x @ w + bias
    return jnp.concatenate([y, jnp.zeros_like(y)], -1)

  assert float(logits(w, x[None])[0, 0]) < 0
  found = Certifier(logits, w, x.shape, arithmetic=arithmetic).radius(x, ("l1",))
  assert found.predicted == 0
  assert (found.radii["l1"] > 0) == (arithmetic is None)


def test_a_jump_within_reach_of_rounding_counts():
  def f(x):
    z = x.sum()
    return jnp.where(z > 0, z, z + 1)

  p = program(f, np.zeros(3))
  away, near = (p.error(Ball(np.full(3, c), "l1", 0.1)) for c in (1.0, 0.01))
  assert away < 1e-6 and 1 <= near < 1.1


def test_a_choice_by_something_else_counts_as_a_jump():
  p = program(lambda x: jnp.where(x[0] > x[1] * x[2], x[0], x[1]).sum(), np.zeros(3))
  assert p.error(Ball(np.array([1.0, 0.5, 2.0]), "l1", 0.01)) > 0.4


def test_what_has_no_error_is_compared_as_in_reality():
  """In float64 the input is what it is; in float32 it may be flushed to 0."""

  def by(z):
    return lambda x: jnp.where(z(x) == 0, 0.0, x + 1).sum()

  ball = Ball(np.zeros(3), "linf", 0.5)
  for z, computed, error in (
    (lambda x: x, FLOAT64, 0.0),
    (lambda x: x * 3, FLOAT64, 3.0),  # The controls.
    (lambda x: x, F32, 3.0),
  ):
    with jax.enable_x64(computed is FLOAT64):
      example = jax.ShapeDtypeStruct((3,), computed.dtype)
      found = Program(by(z), example, arithmetic=computed).error(ball)
    assert error <= found < error + 2


def test_without_derivatives_of_affine_values_a_bound_is_wider():
  rng = np.random.default_rng(3)
  w, v = rng.standard_normal((2, 50, 50)).astype(np.float32)
  p = Program(
    lambda x: jax.nn.elu(x @ w @ v), jax.ShapeDtypeStruct((50,), jnp.float32), arithmetic=F32
  )
  ball = Ball(rng.standard_normal(50), "l1", 1.0)
  narrow, wide = p.error(ball), p.error(ball, quickly=True)
  assert (narrow <= wide).all() and narrow.sum() < 0.9 * wide.sum()


def test_the_bound_of_an_affine_function_counts_an_l1_ball_as_one():
  """Its values reach as far as its largest slope, not as far as in the box around the ball."""
  rng = np.random.default_rng(3)
  w = rng.standard_normal((50, 4)).astype(np.float32)
  x = rng.standard_normal(50)
  p = program(lambda w, x: jnp.tanh((2 * x).reshape(5, 10).ravel() @ w), w, x)
  walk = Walk(F32, Ball(x, "l1", 3.0), {})
  inputs = [number(w, np.float32), walk.input((50,))]
  affine = [walk.run(p._jaxpr.jaxpr, [], inputs, Place())[0].made_by[1][0]]
  half = (affine[0].high - affine[0].low) / 2
  np.testing.assert_allclose(half, 3 * 2 * np.abs(w).max(0), rtol=1e-6)


@pytest.mark.parametrize(
  "f,is_affine",
  [
    (lambda x: (3 * x - 1).reshape(5, 2).sum(1) / 7, True),
    (lambda x: x * x, False),
    (lambda x: 1 / (9 + x), False),
    (jnp.abs, False),
  ],
)
def test_what_is_affine_is_seen(f, is_affine):
  walk = Walk(F32, Ball(np.ones(10), "l1", 0.1), {})
  jaxpr = program(f, np.zeros(10))._jaxpr.jaxpr
  (out,) = walk.run(jaxpr, [], [walk.input((10,))], Place())
  assert out.is_affine == is_affine


def test_what_is_beyond_the_dtype_has_no_bound():
  p = program(lambda x: 300 * x.astype(jnp.float16), np.zeros(2), arithmetic=ARITHMETICS["float16"])
  assert np.isfinite(p.error(Ball(np.full(2, 100.0), "l1", 1.0))).all()
  assert np.isinf(p.error(Ball(np.full(2, 210.0), "linf", 10.0))).all()
  undefined = program(lambda x: jnp.log(x), np.zeros(2))
  assert np.isinf(undefined.error(Ball(np.ones(2), "linf", 1.1))).all()


@pytest.mark.parametrize(
  "f,name",
  [
    (jnp.sin, "sin"),
    (jnp.sort, "sort"),
    (lambda x: jnp.floor(x / 3), "floor"),
    (lambda x: lax.reduce_precision(x, 8, 4), "reduce_precision"),
    (lambda x: x.astype(jnp.float8_e4m3fn), "convert_element_type"),
  ],
)
def test_an_operation_without_a_rule_is_refused_by_name_and_line(f, name):
  with pytest.raises(ValueError, match=rf"{name} has no bound .*test_rounding_errors.py:\d+"):
    program(lambda x: f(x), np.zeros(3)).error(Ball(np.ones(3), "l1", 0.1))


def test_products_of_reduced_precision_count_unless_the_program_asks_for_more():
  rng = np.random.default_rng(4)
  w, x = rng.standard_normal((30, 3)).astype(np.float32), rng.standard_normal(30)

  def error(arithmetic, precision=None):
    f = functools.partial(jnp.dot, precision=precision)
    p = program(lambda w, x: f(x, w), w, x, arithmetic=ARITHMETICS[arithmetic])
    return p.error(Ball(x, "l1", 0.1))

  assert (error("tensorfloat32") > 100 * error("float32")).all()
  np.testing.assert_array_equal(error("tensorfloat32", lax.Precision.HIGHEST), error("float32"))


def test_an_asked_for_precision_is_no_highest():
  """`jax_default_matmul_precision=highest`, of which float32 is, does not change it."""
  for precision in (lax.Precision.DEFAULT, lax.Precision.HIGH):
    p = program(lambda w, x: jnp.dot(x, w, precision=precision), np.float32([1, 2]), np.zeros(2))
    with pytest.raises(ValueError, match=f"of precision {precision.name}, not highest"):
      p.error(Ball(np.ones(2), "l1", 0.1))


@pytest.mark.parametrize("name,bits", [("tensorfloat32", 10), ("float16", 10), ("bfloat16", 7)])
def test_float32_products_in_any_arithmetic_count_as_their_machine_reads_them(name, bits):
  w, x, how = np.float32([1 + 2**-bits / 2.01, 1]), np.array([1.0, 1.0]), ARITHMETICS[name]

  read = lax.reduce_precision(w, 8, bits)
  off = abs(float(np.float64(w).sum()) - float(read.sum()))
  assert 0 < off <= program(lambda w, x: x @ w, w, x, arithmetic=how).error(Ball(x, "l1", 0.0))


def test_sums_in_bfloat16_itself_have_a_bound_up_to_256_terms():
  own = Arithmetic(jnp.bfloat16, accumulator=jnp.bfloat16)
  for n in (100, 256):
    w = np.ones((n, 1), jnp.bfloat16)
    p = program(lambda w, x: x.astype(jnp.bfloat16) @ w, w, np.zeros(n), arithmetic=own)
    assert np.isfinite(p.error(Ball(np.ones(n), "l1", 0.0))).all() == (n == 100)
    x = jnp.ones(n, jnp.bfloat16)
    total = functools.reduce(lambda a, b: a + b, x)  # One by one, rounding each.
    if n == 100:
      assert abs(float(total) - n) <= p.error(Ball(np.ones(n), "l1", 0.0))[0]


FUNCTIONS = {
  "exp": np.exp,
  "expm1": np.expm1,
  "log": np.log,
  "log1p": np.log1p,
  "tanh": np.tanh,
  "logistic": scipy.special.expit,
  "erf": scipy.special.erf,
  "erfc": scipy.special.erfc,
  "sqrt": np.sqrt,
  "rsqrt": lambda x: 1 / np.sqrt(x),
}


@pytest.mark.parametrize("name", arithmetic.FUNCTIONS)
def test_functions_are_as_near_as_is_assumed(name):
  """On a million of float32's numbers, evenly over their bits."""
  x = np.linspace(0, 2**32 - 1, 1 << 20).astype(np.uint32).view(np.float32)
  tiny = float(np.finfo(np.float32).smallest_normal)
  x = x[np.isfinite(x) & (np.abs(x) >= 2 * tiny)]
  with np.errstate(all="ignore"):
    real = FUNCTIONS[name](x.astype(np.float64))
  held = np.isfinite(real) & (np.abs(real) <= np.finfo(np.float32).max)
  got = np.asarray(jax.jit(getattr(lax, name))(x)).astype(np.float64)[held]
  real, unit = real[held], 2.0**-24
  size = np.maximum(np.abs(real), 1.0 if name == "erfc" else 0.0)
  most = arithmetic.FUNCTIONS[name] * unit * size + 2 * tiny
  assert (np.abs(got - real) <= most).all()


def test_every_scalar_function_with_an_error_has_a_slope():
  """The slopes, against differences, which lie between their ends."""
  rng = np.random.default_rng(5)
  for name, slope in arithmetic.SLOPES.items():
    a = rng.uniform(0.1, 2, 50) * (
      1 if "log" in name or "sqrt" in name else rng.choice([-1, 1], 50)
    )
    b = a + rng.uniform(0.01, 0.5, 50)
    ends = arithmetic.enclose(name, None, [(a, b)])
    low, high = (np.broadcast_to(end, a.shape) for end in slope((a, b), ends))
    with jax.enable_x64(True):
      f = jnp.square if name == "square" else getattr(lax, name)
      for t in (0.0, 0.3, 1.0):
        at = jnp.asarray(a + t * (b - a))
        derivative = np.asarray(jax.vmap(jax.grad(f))(at))
        assert (low <= derivative + 1e-12).all() and (derivative <= high + 1e-12).all(), name
