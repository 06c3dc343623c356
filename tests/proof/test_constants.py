"""Known numbers: enclosures that contain the real number and what the program makes of it."""

import fractions
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import io_callback

from convex_jax.proof import certify, constants, enclosures, interpreter
from convex_jax.proof.values import Known

RNG = np.random.default_rng(0)
X = jax.ShapeDtypeStruct((4,), jnp.float32)
NUMBERS = [-7.3, -1.0, -1e-20, 0.0, 1e-30, 0.1, 0.5, 1.0, 3.0, 1e8]
PAIRS = list(itertools.product(NUMBERS, NUMBERS))
WIDE = [(-2.0, -0.5), (-0.3, 0.7), (0.0, 2.0), (0.1, 0.1)]

exact = fractions.Fraction


def enclose(f, *numbers, varies=False) -> list[Known]:
  """The enclosures of f's outputs; the numbers are given in their own dtypes."""
  jaxpr, _ = interpreter.trace(f, *numbers[:-1], jnp.asarray(numbers[-1]))
  inputs = [constants.number(n, a.dtype) for n, a in zip(numbers, jaxpr.in_avals, strict=True)]
  inputs = [Known(k.low, k.high, {}, varies) for k in inputs]
  return interpreter.evaluate(jaxpr, inputs)


@pytest.mark.parametrize("turned", [False, True])
def test_a_broadcast_may_transpose(turned):
  """Of a known factor: what is negative in the first row of W^T is in the second of W."""
  w = jnp.array([[1.0, 1.0], [-1.0, 1.0]])

  def f(x):
    factor = lax.broadcast_in_dim(w, (2, 1, 2), (2, 0) if turned else (0, 2))
    return (jnp.abs(x).reshape(2, 1, 2) * factor)[0, 0]

  np.testing.assert_array_equal(f(jnp.ones(4)), [1, -1 if turned else 1])
  assert certify(f, X, search_steps=0).proved.tolist() == [True, not turned]


@pytest.mark.parametrize(
  "name,operation",
  [
    ("add", lambda a, b: a + b),
    ("subtract", lambda a, b: a - b),
    ("multiply", lambda a, b: a * b),
    ("divide", lambda a, b: a / b),
  ],
)
def test_interval_arithmetic_contains_the_exact_result(name, operation):
  """Against rational arithmetic, of points and of the corners of intervals."""
  compute = getattr(enclosures, name)
  points = [((a, a), (b, b)) for a, b in PAIRS]
  for a, b in [*points, *itertools.product(WIDE, WIDE)]:
    if name == "divide" and b[0] <= 0 <= b[1]:
      with np.errstate(all="ignore"):
        assert np.isnan(compute(tuple(map(np.float64, a)), tuple(map(np.float64, b)))).all()
      continue
    low, high = compute(tuple(map(np.float64, a)), tuple(map(np.float64, b)))
    for x, y in itertools.product(map(exact, a), map(exact, b)):
      assert exact(float(low)) <= operation(x, y) <= exact(float(high))
  third = enclosures.divide((np.float64(1),) * 2, (np.float64(3),) * 2)
  assert third[0] < third[1], "a rounded quotient is a point"
  half = enclosures.divide((np.float64(1),) * 2, (np.float64(2),) * 2)
  assert half[0] == half[1] == 0.5, "an exact quotient is widened"


@pytest.mark.parametrize("power", [0, 1, 2, 3, 5, 8, -1, -2])
def test_integer_powers_contain_the_exact_result(power):
  for low, high in [*WIDE, *((n, n) for n in NUMBERS)]:
    with np.errstate(all="ignore"):
      found = enclosures.integer_power((np.float64(low), np.float64(high)), power)
    if power < 0 and low <= 0 <= high:
      assert np.isnan(found).all()
      continue
    inside = [exact(x) for x in np.linspace(low, high, 7)]
    assert all(exact(float(found[0])) <= x**power <= exact(float(found[1])) for x in inside)


@pytest.mark.parametrize("name", sorted(enclosures.FUNCTIONS))
def test_functions_contain_what_jax_computes_between_the_ends(name):
  """Against XLA's float64, which is not numpy's or scipy's, to within its rounding."""
  primitive = getattr(lax, {"neg": "neg"}.get(name, name))
  domain = {"log1p": -0.9, "log": 0.1, "sqrt": 0, "rsqrt": 0.1, "erf_inv": -0.9}
  low = RNG.uniform(domain.get(name, -3), 0.8, 50)
  high = np.minimum(low + RNG.uniform(0, 0.5, 50), 0.95)
  low = np.minimum(low, high)
  found = enclosures.FUNCTIONS[name]((low, high))
  assert np.isfinite(found).all()
  with jax.enable_x64(True):
    values = np.stack([primitive(jnp.asarray(x)) for x in np.linspace(low, high, 9)])
  slack = 1e-14 * (1 + np.abs(values))
  assert ((found[0] - slack <= values) & (values <= found[1] + slack)).all()
  assert (found[1] - found[0] <= np.ptp(values, 0) * 1.5 + 1).all(), "an empty promise"


NARROW = [*sorted(set(enclosures.FUNCTIONS) - {"neg"}), "acosh", "atanh", "lgamma", "tan"]
POWERS = [lambda x: lax.integer_pow(x, -3), lambda x: 1.37**x, lambda x: jnp.abs(x) ** -30.7]


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_functions_contain_what_the_program_computes_in_its_dtype(dtype):
  """Also where it rounds the argument of an exp, loses digits, and under- or overflows."""
  scales = (1e-10, 1e-4, 0.3, 1, 3, 10, 30, 90, 300, 1e4)
  rng = np.random.default_rng(0)
  ends = 1 - 10.0 ** rng.uniform(-8, 0, 300)
  x = np.concatenate([*(rng.standard_normal(100) * s for s in scales), ends, -ends])
  functions = [*(getattr(lax, name) for name in NARROW), *POWERS]

  def program(x):
    return [f(x) for f in functions]

  with jax.enable_x64(dtype == "float64"):
    x = jnp.asarray(x, dtype)
    found, _ = interpreter.analyse(lambda x, _: program(x), x, X)
    ends_known, finite = 0, 0
    for i, (k, value) in enumerate(zip(found, jax.jit(program)(x), strict=True)):
      if isinstance(k, Known):
        y = np.asarray(value, np.float64)
        outside = (y < k.low) | (y > k.high)
        assert not outside.any(), (i, x[outside][0], y[outside][0], k.low[outside][0])
        finite += np.isfinite(y).sum()
        ends_known += (np.isfinite(y) & np.isfinite(k.low) & np.isfinite(k.high)).sum()
    assert ends_known > 0.9 * finite > 0.3 * len(functions) * x.size  # Else nothing was shown.


PROGRAMS = [
  ("products", lambda a, b: a * b / (jnp.abs(a) + 1)),
  ("matrices", lambda a, b: a.reshape(4, 4) @ b.reshape(4, 4)),
  ("sums", lambda a, b: jnp.cumsum(a) - b.mean()),
  ("functions", lambda a, b: jnp.exp(a) * jax.nn.softplus(b) + jnp.tanh(a) - jnp.log1p(b**2)),
  ("roots", lambda a, b: lax.rsqrt(b.var() + 0.125) * a),
  ("a loop", lambda a, b: lax.fori_loop(0, 5, lambda i, c: c * 0.875 + b, a)),
  ("a scan", lambda a, b: lax.scan(lambda c, r: (c * r + 1, c), 0.125, a)[1] * b),
  ("a while", lambda a, b: lax.while_loop(lambda c: c.sum() < 99, lambda c: c * 2 + 1, b**2) + a),
  ("choices", lambda a, b: jnp.where(a > b, a, jnp.maximum(b, 0.125)) + jnp.sort(a)),
  ("normalised", lambda a, b: jax.nn.standardize(a) + jax.nn.softmax(b)),
  ("half precision", lambda a, b: (a.astype(jnp.bfloat16) * b.astype(jnp.bfloat16)).astype(float)),
  ("convolved", lambda a, b: jnp.convolve(a, b, mode="same")),
]


@pytest.mark.parametrize("name,program", PROGRAMS, ids=[p[0] for p in PROGRAMS])
def test_enclosures_contain_the_program_and_the_real_numbers(name, program):
  """The program as XLA runs it, compiled and not, and the same in float64."""
  a, b = (RNG.standard_normal(16).astype(np.float32) for _ in range(2))
  (found,) = enclose(program, a, b)
  with jax.enable_x64(True):
    real = program(jnp.asarray(a, jnp.float64), jnp.asarray(b, jnp.float64))
  narrow = [program(jnp.asarray(a), jnp.asarray(b)), jax.jit(program)(a, b)]
  for value in [*narrow, *([real] if name != "half precision" else [])]:
    inside = (found.low <= np.asarray(value)) & (np.asarray(value) <= found.high)
    assert inside.all(), (found.low - value, found.high - value)
  assert (found.high - found.low).max() < (0.2 if name == "half precision" else 1e-3)


@pytest.mark.parametrize("name,program", PROGRAMS[:-2], ids=[p[0] for p in PROGRAMS[:-2]])
def test_a_point_is_enclosed_in_float64(name, program):
  """Whatever the program's dtype: these decide whether two points refute."""
  a, b = (RNG.standard_normal(16).astype(np.float32) for _ in range(2))
  (found,) = enclose(program, a, b, varies=True)
  with jax.enable_x64(True):
    real = np.asarray(program(jnp.asarray(a, jnp.float64), jnp.asarray(b, jnp.float64)))
  # Literals of the program, such as an epsilon of 1e-5, are float32's.
  slack = 0.1 if name == "half precision" else 1e-11 * (1 + np.abs(real))
  assert ((found.low - slack <= real) & (real <= found.high + slack)).all()
  assert (found.high - found.low <= 1e-11 * (1 + np.abs(real))).all()


T = jnp.float32(1e-30)
KEY = jax.random.key(7)


def _below(n):
  """n or n - 1, a multiple of 7."""
  return (jnp.float32(0.7) * (n / 0.7)).astype(jnp.int32)


_TWICE = np.array([0, 0])
_PAIR = jnp.array([1.0, 2.0])


def _set_key():
  return jax.random.split(KEY, 2).at[0].set(KEY)[0]


def _cast(number):
  return lax.convert_element_type(jnp.float32(number) * 1, jnp.bfloat16).astype(jnp.float32)


# (name, a factor that the program computes, whether it is surely > 0)
FACTORS = [
  ("an integer that wraps", lambda: jnp.asarray(jnp.int32(50000) * 50000, jnp.float32), False),
  ("a small integer", lambda: jnp.asarray(jnp.int32(500) * 500, jnp.float32), True),
  ("unsigned, below 0", lambda: (jnp.uint8(3) - jnp.uint8(4)).astype(jnp.float32), True),
  ("a cast that wraps", lambda: jnp.int32(200).astype(jnp.int8).astype(jnp.float32), False),
  ("rejection sampling", lambda: jax.random.gamma(KEY, 2.0) - 3, False),
  ("a draw above 0", lambda: jax.random.gamma(KEY, 2.0), True),
  ("a uniform draw", lambda: jax.random.uniform(KEY) + 0.01, True),
  ("a Poisson draw", lambda: jax.random.poisson(KEY, 3.0) + 1.0, True),
  ("floor at a border", lambda: 6.5 - jnp.floor(jnp.float32(0.7) * 10), False),
  ("floor, clear", lambda: 6.5 - jnp.floor(jnp.float32(0.65) * 10), True),
  ("ceil at a border", lambda: jnp.ceil(jnp.float32(0.7) * 10) - 7.5, False),
  ("round at a half", lambda: jnp.round(jnp.float32(0.35) * 10) - 3.5, False),
  ("a cast at a border", lambda: 6.5 - (jnp.float32(0.7) * 10).astype(jnp.int32), False),
  (
    "a comparison at a border",
    lambda: jnp.where(jnp.float32(0.1) + jnp.float32(0.2) > jnp.float32(0.3), 1.0, -1.0),
    False,
  ),
  ("a comparison, clear", lambda: jnp.where(jnp.float32(0.1) * 3 > 0.2, 1.0, -1.0), True),
  ("either case", lambda: jnp.where(jnp.float32(0.1) * 3 > 0.3, 1.0, 2.0), True),
  (
    "an index at a border",
    lambda: jnp.float32([1, -1])[(jnp.float32(0.7) * 10).astype(int) - 6],
    False,
  ),
  ("the sign of a difference", lambda: jnp.float32(0.1) * 3 - jnp.float32(0.3), False),
  ("a difference, clear", lambda: jnp.float32(0.1) * 3 - jnp.float32(0.2), True),
  ("an exact difference", lambda: jnp.float32(0.75) - jnp.float32(0.5), True),
  ("a tiny product", lambda: jnp.float32(1e-30) * jnp.float32(1e-30), True),
  (
    "a cast to float8",
    lambda: jnp.float32(1.05).astype(jnp.float8_e4m3fn).astype(float) - 1.02,
    False,
  ),
  (
    "an effect",
    lambda: io_callback(lambda: np.float32(1), jax.ShapeDtypeStruct((), "float32")),
    False,
  ),
  (
    "a callback",
    lambda: jax.pure_callback(lambda: np.float32(1), jax.ShapeDtypeStruct((), "float32")),
    False,
  ),
  ("an argument of most", lambda: 1.5 - jnp.argmax(jnp.float32([0.1 * 3, 0.3])), True),
  ("bits", lambda: lax.bitcast_convert_type(jnp.uint32(0x3F800000), jnp.float32), True),
  ("an integer that its dtype rounds", lambda: 256.5 - lax.iota("bfloat16", 300)[257], False),
  ("one that it holds", lambda: 256.5 - lax.iota("bfloat16", 300)[256], True),
  ("bits of what may be flushed to 0", lambda: -1e38 * jnp.nextafter(jnp.float32(0), 1), False),
  ("exp, far below", lambda: jnp.exp(jnp.float32(-80)), True),
  ("underflow that is compared", lambda: 2 * (jnp.float32(1e-30) * 1e-30 > 0) - 1.0, False),
  ("overflow that is asked for", lambda: 2.0 * jnp.isfinite(jnp.float32(1e30) * 1e30) - 1, False),
  ("overflow", lambda: jnp.float32(1e30) * jnp.float32(1e30), False),
  ("a quotient by what may be 0", lambda: 1 / (jnp.float32(0.1) * 3 - jnp.float32(0.3)), False),
  (
    "a comparison with such a quotient",
    lambda: jnp.where(1 / (jnp.float32(0.1) * 3 - jnp.float32(0.3)) > 0, -1.0, 1.0),
    False,
  ),
  (
    "sorted with such a quotient",
    lambda: jnp.sort(jnp.stack([1 / (jnp.float32(0.1) * 3 - jnp.float32(0.3)), 1.0]))[0],
    False,
  ),
  (
    "clipped from such a quotient",
    lambda: jnp.clip(1 / (jnp.float32(0.1) * 3 - jnp.float32(0.3)), 1, 2),
    False,
  ),
  ("softplus of a rounded number", lambda: jax.nn.softplus(jnp.float32(-0.1) * 3), True),
  ("a long loop", lambda: lax.fori_loop(0, 2000, lambda i, c: c * 1.001, 1.0), False),
  (
    "a loop that may end sooner",
    lambda: 0.35 - lax.while_loop(lambda c: c < 0.3, lambda c: c + 0.1, jnp.float32(0)),
    False,
  ),
  ("a high power", lambda: jnp.float32(1.1) ** 100, True),
  ("a product of twelve", lambda: -jnp.prod(jnp.full(12, 1e-30)), False),
  ("a product that underflows float64", lambda: -functools.reduce(jnp.multiply, [T] * 12), False),
  (
    "a product that underflows on the way",
    lambda: jnp.cumprod(jnp.float32([1e-30, 1e-30, 1e30, 1e30]))[3] - 0.5,
    False,
  ),
  ("a sum that overflows on the way", lambda: jnp.float32([3e38, 3e38, -3e38]).sum(), False),
  ("the inverse of a matrix", lambda: jnp.linalg.inv(jnp.float32([[1, 0.5], [0, 1]]))[0, 0], False),
  ("a special function", lambda: jax.lax.lgamma(jnp.float32(0.5)), True),
  ("a special function at a zero", lambda: jax.lax.lgamma(jnp.float32(2.0)) + 1e-9, False),
  ("a product of three", lambda: jnp.prod(jnp.float32([0.1, -0.2, -0.3])), True),
  ("a running product", lambda: jnp.cumprod(jnp.float32([-0.1, -0.2, 0.3, 4]))[2], True),
  ("what XLA takes for 0", lambda: -(jnp.exp(jnp.full(3, -1000.0)) @ jnp.ones(3)), False),
  ("sums of updates", lambda: jnp.zeros(3).at[jnp.array([0, 0, 1])].add(0.1)[0], True),
  ("the largest of updates", lambda: (jnp.full(3, -0.3) * 3).at[1].max(0.1)[1], True),
  ("the least of them", lambda: jnp.full(3, 0.1).at[_TWICE].min(0.3 * jnp.float32(-3))[0], False),
  ("factors of updates", lambda: jnp.full(3, -0.1).at[1:].multiply(-2.0)[0], False),
  ("one of them", lambda: jnp.full(3, -0.1).at[1:].multiply(-2.0)[1], True),
  ("a factor beyond the end", lambda: jnp.full(3, 0.1).at[5].multiply(-1.0, mode="drop")[2], True),
  ("two factors at one place", lambda: jnp.ones(3).at[_TWICE].multiply(-0.1)[0], False),
  ("updates that cancel", lambda: jnp.full(3, -0.3).at[jnp.array([0, 0, 0])].add(0.1)[0], False),
  ("and of integers", lambda: -lax.reduce_and(jnp.stack([_below(56), 7]), (0,)) * 1.0, False),
  ("or of integers", lambda: 8.0 - lax.reduce_or(jnp.stack([_below(7), 1]), (0,)), False),
  ("an index past the end", lambda: lax.select_n(_below(7), jnp.float32(1), jnp.float32(2)), True),
  ("all are finite", lambda: jnp.where(jnp.isfinite(jnp.ones(3)).all(), 1.0, 2.0), True),
  ("incomplete gamma function", lambda: lax.igamma(147632.47, 147709.95) - 0.6, False),
  ("one that float32 loses", lambda: lax.betainc(0.0095, 146432.7, 6.48e-8) - 1, False),
  ("a cast to half precision", lambda: _cast(1.001) - 1.0005, False),
  ("a cast to half precision, clear", lambda: _cast(1.001), True),
  ("the last of two updates", lambda: jnp.ones(3).at[_TWICE].set(jnp.array([-1.0, 1]))[0], False),
  ("one of two updates, of one sign", lambda: jnp.ones(3).at[_TWICE].set(_PAIR)[0], True),
  ("an update of the same", lambda: (jnp.ones(3) * 0.1).at[_TWICE].set(0.1)[0], True),
  ("an update that is dropped", lambda: _PAIR.at[_TWICE + 2].set(-1.0, mode="drop")[0], True),
  ("a draw from a key that is set", lambda: 0.1 + jax.random.uniform(_set_key()), True),
  ("int4", lambda: (_below(7)).astype(jnp.float32).astype(jnp.int4).astype(jnp.float32), True),
  ("counted in a loop", lambda: lax.while_loop(lambda c: c < 5, lambda c: c * 2.0, 1.0), True),
]


@pytest.mark.parametrize("name,factor,positive", FACTORS, ids=[f[0] for f in FACTORS])
def test_a_sign_is_known_only_if_the_program_and_the_reals_agree(name, factor, positive):
  """A factor of x^2 decides between convex and not."""
  certificate = certify(lambda x: jnp.square(x) * factor(), X, search_steps=0)
  assert bool(certificate) == positive, certificate


def test_integers_that_float64_rounds_are_not_known():
  with jax.enable_x64(True):
    x = jax.ShapeDtypeStruct((), jnp.float64)

    def f(n, x):  # 2^53 + 1 is 2^53 in float64.
      return (2.0**53 - n.astype(jnp.float64)) * x**2

    assert not certify(f, np.int64(2**53 + 1), x, search_steps=0)
    assert certify(f, np.int64(2**53 - 1), x, search_steps=0)


def test_the_place_of_the_greatest_is_that_of_the_numbers_themselves():
  """At a point in float64, though in float32 they are equal."""
  (found,) = enclose(lambda x: jnp.argmax(jnp.stack([x, x + 2.0**-40])), 1.0, varies=True)
  assert found.is_exact and found.low == 1


def test_folded_integers_are_the_arguments_own():
  """Of 64-bit numbers a program without 64-bit types makes 32-bit ones."""

  def f(w, x):
    return jnp.square(x) * jnp.asarray(w * w, jnp.float32)

  assert not certify(f, np.int64(50000), X, search_steps=0)
  assert certify(f, np.int64(500), X, search_steps=0)


STALE = {"factor": 1.0}


def _scaled(x):
  return STALE["factor"] * x


_compiled = jax.jit(_scaled)
WRAPPERS = {
  "plain": _scaled,
  "compiled": _compiled,
  "compiled within": lambda x: _compiled(x) + 0,
  "checkpointed": jax.checkpoint(_scaled),
  "vectorised": jax.vmap(_compiled),
  "scanned": lambda x: lax.map(_compiled, x),
  "branch": lambda x: lax.cond(True, _compiled, _scaled, x),
  "loop": lambda x: lax.fori_loop(0, 1, lambda i, c: _compiled(c), x),
  "differentiated": lambda x: jax.jvp(_compiled, (x,), (x,))[1],
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_certificate_is_about_the_function_as_it_is_now(name, monkeypatch):
  """Though JAX keeps the jaxpr of a function that it has traced before."""

  def network(x):
    return WRAPPERS[name](jnp.square(x))

  for factor, verdict in ((1.0, "PROVED"), (-1.0, "REFUTED"), (2.0, "PROVED")):
    monkeypatch.setitem(STALE, "factor", factor)
    assert certify(network, X).verdict == verdict


class Network:
  """A mutable module."""

  def __init__(self):
    self.weights = np.ones(4, np.float32)

  def __call__(self, x):
    return jnp.dot(self.weights, jnp.square(x))


def test_a_module_that_was_changed_in_place_is_seen():
  network = Network()
  assert certify(network, X).verdict == "PROVED"
  network.weights *= -1
  assert certify(network, X).verdict == "REFUTED"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_casts_to_half_precision_or_more_count_as_no_rounding(dtype):
  assert certify(lambda x: x.astype(dtype).astype(float), X, kind="affine", search_steps=0)


@pytest.mark.parametrize(
  "step",
  [
    lambda x: lax.reduce_precision(x, 5, 1),
    lambda x: lax.reduce_precision(x, 8, 22),
    lambda x: lax.reduce_precision(x, 7, 23),
    lambda x: x.astype(jnp.float8_e4m3fn).astype(jnp.float32),
    lambda x: x.astype(jnp.float8_e5m2).astype(jnp.float32),
    lambda x: x.astype(jnp.float4_e2m1fn).astype(jnp.float32),
    lambda x: x.astype(jnp.int8).astype(jnp.float32),
  ],
)
def test_casts_to_less_are_steps(step):
  assert certify(step, X, kind="affine", search_steps=0).verdict == "UNKNOWN"


def test_a_precision_that_keeps_the_dtype_is_no_step():
  assert certify(lambda x: lax.reduce_precision(x, 8, 23), X, kind="affine", search_steps=0)


@pytest.mark.parametrize("real", [np.nan, 1.0])
def test_a_complex_number_may_be_none(real):
  """NaN equals nothing, not even itself."""
  z, like = np.complex64([complex(real, 0)] * 2), jax.ShapeDtypeStruct((2,), jnp.float32)
  certificate = certify(lambda z, x: jnp.where(z == z, x**2, -(x**2)), z, like, search_steps=0)
  assert certificate.verdict == ("PROVED" if real == 1 else "UNKNOWN")
