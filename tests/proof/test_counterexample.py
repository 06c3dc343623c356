"""The search for two points: it finds what is there, reports nothing else, and raises nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from convex_jax.proof import certify, counterexample, interpreter

X = jnp.zeros(4)
KEY = jax.random.key(7)
SIGNS = jnp.asarray(np.random.default_rng(0).standard_normal((3, 3, 2, 2)), jnp.float32)
MUTABLE = jax.new_ref(jnp.ones(4))


def dropped_out(x):
  """By a fixed key: a mask that another program would draw otherwise."""
  return jnp.sum(jnp.where(jax.random.bernoulli(KEY, 0.5, x.shape), x / 0.5, 0))


def bent(x):
  """Convex: its curvature is 1 at 0, and vanishes far away."""
  return jnp.sqrt(1 + x**2)


def convolved(x):
  image = jnp.tile(x, 8).reshape(1, 4, 4, 2)
  return lax.conv_general_dilated(
    image, SIGNS, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


def searched(f, x=X, kind="convex"):
  """What the search says, of a function that may well be proved."""
  jaxpr, _ = interpreter.trace(f, x)
  outputs = np.ones(sum(aval.size for aval in jaxpr.out_avals), bool)
  return counterexample.search(jaxpr, [x], 0, outputs, kind, (-1.0, 1.0), 200)


NOT_CONVEX = {
  "GELU": jax.nn.gelu,
  "GELU by erf": lambda x: jax.nn.gelu(x, approximate=False),
  "SiLU": jax.nn.silu,
  "mish": jax.nn.mish,
  "a tanh far away": lambda x: jnp.tanh(x - 100),
  "a concave corner far away": lambda x: jnp.minimum(x, 150),
  "a step down at 50": lambda x: jnp.where(jnp.abs(x) > 50, x**2 - 100, x**2),
  "a corner at a small scale": lambda x: jnp.sum(x**2) - 1e-3 * jnp.abs(x[0]),
  "a gap of a millionth": lambda x: 1 - 1e-6 * x**2,
  "a product": lambda x: x[0] * x[1],
  "a middle one": lambda x: jnp.sort(x)[1],
  "one of two branches": lambda x: lax.cond(x[0] > 0.2, lambda x: -x @ x, lambda x: x @ x, x),
  "a convolution": lambda x: jnp.sin(convolved(x)),
  "a scan": lambda x: lax.scan(lambda c, y: (jnp.sin(c / 2 + y), c), jnp.float32(0), x),
  "a while loop": lambda x: lax.while_loop(lambda x: jnp.sum(x) > 1, lambda x: x / 2, x),
  "casts": lambda x: jnp.sin(x.astype(jnp.bfloat16).astype(jnp.float32)),
  "a float8": lambda x: x.astype(jnp.float8_e4m3fn).astype(jnp.float32),
  "a place": lambda x: jnp.argmax(x).astype(jnp.float32),
  "dropout": lambda x: -dropped_out(jnp.log1p(jnp.exp(x))),
  "a print": lambda x: (jax.debug.print("{}", x), jnp.sin(x))[1],
  "a place beside it": lambda x: (jnp.argmax(x), jnp.sin(x), KEY),
}


@pytest.mark.parametrize("f", NOT_CONVEX.values(), ids=NOT_CONVEX)
def test_what_is_not_convex_is_refuted_from_the_default_box(f, capfd):
  certificate = certify(f, X)
  found = certificate.counterexample
  assert certificate.verdict == "REFUTED" and certificate.stopped is None and found.gap > 0
  assert not capfd.readouterr().out  # The search prints nothing.
  if found.gap > 1e-3:  # Which the program shows in its own precision.
    a, b, middle = (
      np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(f(jnp.float32(x)))[:2]])
      for x in (found.a, found.b, (found.a + found.b) / 2)
    )
    gap = (middle - (a + b) / 2)[found.output]
    assert gap == pytest.approx(found.gap, rel=1e-3, abs=1e-5)


CONVEX = {
  "a softplus after dropout": lambda x: dropped_out(jnp.log1p(jnp.exp(x))),
  "a softplus of drawn weights": lambda x: jnp.log1p(jnp.exp(x @ jax.random.normal(KEY, (4, 4)))),
  "a distance to a far point": lambda x: jnp.sqrt(jnp.sum((x + 1e8) ** 2)) - 2e8,
  "a bow of little bend": lambda x: bent(1e-5 * x) - 1,
  "a bow that is shifted": lambda x: (bent(x) - 1e6) + 1e6,
  "a bow in bfloat16": lambda x: bent(x.astype(jnp.bfloat16)),
  "a bow that leaves the middle out": lambda x: bent(x) + x**3 - x**3,
  "no number": lambda x: bent(x) * jnp.nan,
  "on half the space": lambda x: -jnp.sqrt(x),
  "an infinite step": lambda x: jnp.where(jnp.abs(x) > 0.5, jnp.inf, bent(x)),
}


@pytest.mark.parametrize("f", CONVEX.values(), ids=CONVEX)
def test_what_is_convex_is_not_refuted(f):
  assert searched(f)[0] is None


@pytest.mark.parametrize("name", ["a softplus after dropout", "a distance to a far point"])
def test_what_is_concave_in_float64_is_not_refuted(name):
  with jax.enable_x64(True):
    found, _ = searched(lambda x: -CONVEX[name](x), jnp.zeros(4), "concave")
  assert found is None


def test_weights_that_are_cast_are_what_they_were():
  """Of a bow of 1e-4: rounding one weight twice as another would hide it."""

  def f(w, x):
    half = w.astype(jnp.bfloat16).astype(jnp.float32)
    return half * jnp.abs(x) + 100 * half * x - 1.0001 * w * jnp.abs(x)

  x = jax.ShapeDtypeStruct((), jnp.float32)
  assert certify(f, np.float32(0.3), x).verdict == "REFUTED"


def test_a_weight_that_devices_take_for_0_refutes_nothing():
  """1e-40 times 1e41 is 10; a device may make 0 of it."""

  def f(w, x):
    return (w * 1e38 * 1e3 - 5) * x**2

  x = jax.ShapeDtypeStruct((), jnp.float32)
  assert certify(f, np.float32(1e-40), x).verdict == "UNKNOWN"
  assert certify(f, np.float32(0), x).verdict == "REFUTED"


@pytest.mark.parametrize("f", [CONVEX["a distance to a far point"], CONVEX["a bow of little bend"]])
def test_the_check_by_enclosures_is_what_tells_rounding_from_a_gap(f, monkeypatch):
  assert "rounding may explain them" in searched(f)[1]

  def trusted(program, x, which):
    return np.stack([program.values(x)] * 2)

  monkeypatch.setattr(counterexample._Program, "enclosed", trusted)
  assert searched(f)[0] is not None


def test_an_enclosure_that_is_too_wide_refutes_nothing(monkeypatch):
  exact = counterexample._Program.enclosed

  def wider(program, x, which):
    low, high = exact(program, x, which)
    return np.stack([low - width, high + width])

  monkeypatch.setattr(counterexample._Program, "enclosed", wider)
  width = 0.1
  assert certify(lambda x: -(x**2), X).verdict == "REFUTED"
  width = 1e6
  assert "rounding may explain them" in certify(lambda x: -(x**2), X).stopped


@pytest.mark.parametrize("kind", ["convex", "concave", "affine"])
def test_each_kind_is_refuted_by_its_own_inequality(kind):
  functions = {"convex": bent, "concave": lambda x: -bent(x), "affine": lambda x: x}
  for own, function in functions.items():
    fits = own in (kind, "affine")
    assert (searched(function, kind=kind) == (None, None)) == fits


def test_the_search_climbs_where_lines_miss(monkeypatch):
  """Convex, except for a dent in the middle of one coordinate of two hundred."""

  def dented(x):
    return jnp.sum(x**2) + 2 * jnp.exp(-8 * x[0] ** 2)

  x = jax.ShapeDtypeStruct((200,), jnp.float32)
  assert certify(dented, x).verdict == "REFUTED"
  monkeypatch.setattr(counterexample._Search, "_climb", lambda *_: None)
  assert certify(dented, x).verdict == "UNKNOWN"


def test_points_lie_in_the_box_where_they_can_and_their_midpoint_is_exact():
  found = certify(lambda x: -bent(x), X, box=(0.1, 255.0)).counterexample
  assert (
    min(found.a.min(), found.b.min()) >= 0.1 - 1e-9 and max(found.a.max(), found.b.max()) <= 255
  )
  middle = (found.a + found.b) / 2
  assert (middle - found.a == found.b - middle).all() and (found.a != found.b).any()


STOPPED = {  # What cannot be searched, and why.
  "a place": (lambda x: jnp.argmax(x), "no output in question is a floating-point number"),
  "integers": (lambda x: (9 * x).astype(int), "no output in question is a floating-point number"),
  "complex numbers": (jnp.fft.fft, "no output in question is a floating-point number"),
  "a callback": (
    lambda x: jax.pure_callback(np.cos, jax.ShapeDtypeStruct((4,), np.float32), x),
    "pure_callback has side effects or reads what may change",
  ),
  "a mutable array that is read": (lambda x: jnp.sin(x) * MUTABLE[...], "get has side effects"),
  "a mutable array inside": (lambda x: jnp.sin(jax.new_ref(x)[...]), "has side effects or"),
  "an operation without enclosures": (
    lambda x: jnp.linalg.eigvalsh(jnp.diag(-x)),
    "what rounding makes of them is not known: eigh",
  ),
}


@pytest.mark.parametrize("f,why", STOPPED.values(), ids=STOPPED)
def test_a_search_that_stops_says_why(f, why):
  certificate = certify(f, X)
  assert certificate.verdict == "UNKNOWN" and why in certificate.stopped


def test_a_search_neither_writes_nor_calls_back():
  calls = []

  def f(x):
    MUTABLE[...] = x
    jax.debug.callback(calls.append, x)
    return jnp.sin(x) * MUTABLE[...]

  assert certify(f, X).verdict == "UNKNOWN"
  assert (np.asarray(MUTABLE[...]) == 1).all() and not calls


KNOWN = {  # What may stand among the arguments.
  "numbers of Python": {"a": 2.0, "n": 2, "flag": True, "none": None},
  "a key": {"a": 2.0, "key": KEY},
  "an old key": {"a": 2.0, "key": jax.random.PRNGKey(7)},
  "numpy's numbers": {"a": np.float64(2), "n": np.int64(2)},
  "half precision": {"a": jnp.bfloat16(2)},
}


@pytest.mark.parametrize("weights", KNOWN.values(), ids=KNOWN)
def test_any_tree_of_numbers_may_be_known(weights):
  def f(weights, x):
    factor = weights["a"] + weights.get("n", 0)
    drawn = jax.random.uniform(weights["key"]) if "key" in weights else 1
    return jnp.sin(x) * factor * drawn

  assert certify(f, weights, X).verdict == "REFUTED"


def test_a_mutable_array_may_be_an_argument():
  assert "get has side effects" in certify(lambda r, x: jnp.sin(x) * r[...], MUTABLE, X).stopped


def test_a_derivative_that_raises_leaves_the_lines():
  @jax.custom_jvp
  def sine(x):
    return jnp.sin(x)

  @sine.defjvp
  def derivative(primals, tangents):
    raise NotImplementedError

  assert certify(sine, X).verdict == "REFUTED"


ERRORS = [
  (MemoryError("no memory\nleft"), "MemoryError: no memory"),
  (RecursionError(), "RecursionError"),
]


@pytest.mark.parametrize("error,stopped", ERRORS, ids=["memory", "recursion"])
def test_errors_of_the_search_become_its_reason(error, stopped, monkeypatch):
  def fail(*_):
    raise error

  monkeypatch.setattr(counterexample._Program, "values", fail)
  certificate = certify(jnp.sin, X)
  assert certificate.verdict == "UNKNOWN" and certificate.stopped == stopped


def test_an_interrupt_passes(monkeypatch):
  def interrupt(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(counterexample._Program, "values", interrupt)
  with pytest.raises(KeyboardInterrupt):
    certify(jnp.sin, X)


@pytest.mark.parametrize("shape", [(), (0,), (2, 0)])
def test_scalars_and_empty_arrays_may_be_the_input(shape):
  x = jnp.zeros(shape)
  assert certify(jnp.sin, x).verdict == ("PROVED" if x.size == 0 else "REFUTED")
  assert certify(lambda x: jnp.sum(x) - jnp.inf, x).verdict == "UNKNOWN"


def test_the_program_is_searched_as_it_is_now():
  weights = {"last": jnp.ones(4)}
  net = jax.jit(lambda x: weights["last"] @ bent(x))
  assert certify(net, X).verdict != "REFUTED"
  weights["last"] = -weights["last"]
  assert certify(net, X).verdict == "REFUTED"
