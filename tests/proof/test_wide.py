"""Programs in wide arithmetic: floats in float64, all else the program's own."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from convex_jax.proof.arithmetic import ARITHMETICS
from convex_jax.proof.certificate import certify
from convex_jax.proof.float64 import float64
from convex_jax.proof.minimum import minimise
from convex_jax.proof.radii import Certifier
from convex_jax.proof.wide import Impure, widened

F32 = ARITHMETICS["float32"]
X = np.linspace(-1.0, 1.0, 8, dtype=np.float32)
KEY = jax.random.key(7)
KERNEL = jnp.asarray(np.random.default_rng(0).standard_normal((2, 2, 2, 2)), jnp.float32)


def convolved(x):
  return lax.conv_general_dilated(
    x.reshape(1, 2, 2, 2), KERNEL, (1, 1), "SAME", preferred_element_type=jnp.float32
  )


PROGRAMS = {
  "calls": lambda x: jax.checkpoint(jax.nn.logsumexp)(jax.nn.softplus(x)) + jax.nn.relu(x),
  "a scan": lambda x: lax.scan(lambda c, y: (c / 2 + y, jnp.tanh(c)), jnp.float32(0), x),
  "a while loop": lambda x: lax.while_loop(
    lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * jnp.float32(1.5)), (0, x)
  ),
  "branches": lambda x: jax.vmap(lambda a: lax.cond(a > 0, jnp.sin, jnp.cos, a))(x),
  "one branch": lambda x: lax.cond(x[0] > 0, jnp.sin, jnp.cos, x),
  "a convolution": convolved,
  "a product": lambda x: jnp.dot(x, x, precision="highest", preferred_element_type=jnp.float32),
  "sums into places": lambda x: jnp.zeros(3).at[jnp.array([0, 2, 2, 1])].add(x[:4]),
  "a reduction": lambda x: lax.reduce(x, jnp.float32(0), lambda a, b: a + b, (0,)),
  "a linear system": lambda x: jnp.linalg.solve(2 * jnp.eye(2) + x[:4].reshape(2, 2), x[4:6]),
  "steps": lambda x: (x.astype(jnp.float8_e4m3fn).astype(x.dtype), lax.reduce_precision(x, 5, 1)),
  "places": lambda x: (jnp.argmax(x), jnp.argsort(x), lax.top_k(x, 2)),
  "integers that wrap": lambda x: x * (jnp.int32(50000) * jnp.int32(50000)),
  "bits": lambda x: lax.bitcast_convert_type(
    lax.bitcast_convert_type(x, jnp.int32) & -65536, jnp.float32
  ),
  "a mask that is drawn": lambda x: jnp.where(jax.random.bernoulli(KEY, 0.5, x.shape), x, 0),
  "normal numbers": lambda x: x * jax.random.normal(KEY, x.shape),
  "gamma numbers": lambda x: x * jax.random.gamma(KEY, 2.0),
  "a transform": lambda x: jnp.abs(jnp.fft.fft(x)),
}


def run(f, x, dtype=np.float64):
  jaxpr = jax.make_jaxpr(f)(x)
  with jax.enable_x64(True):
    return jax.jit(widened(jaxpr))(np.asarray(x, dtype))


@pytest.mark.parametrize("f", PROGRAMS.values(), ids=PROGRAMS)
def test_the_program_computes_the_same_in_float64(f):
  own, wide = jax.tree.leaves(f(X)), run(f, X)
  for a, b in zip(own, wide, strict=True):
    assert b.shape == a.shape
    assert b.dtype == (np.float64 if jnp.issubdtype(a.dtype, jnp.floating) else a.dtype)
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_rounding_to_a_dtype_of_numbers_is_left_out():
  wide = np.asarray(run(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32) / 3, X)[0])
  np.testing.assert_allclose(wide, X.astype(np.float64) / 3, rtol=1e-15)
  assert np.abs(wide - X / np.float32(3)).max() > 1e-9  # The control.


def test_it_can_be_differentiated_through_loops():
  def f(x):
    return lax.scan(lambda c, y: (jnp.sin(c / 2 + y), None), jnp.float32(0), x)[0]

  jaxpr = jax.make_jaxpr(f)(X)
  with jax.enable_x64(True):
    slope = jax.grad(lambda x: widened(jaxpr)(x)[0])(X.astype(float))
  np.testing.assert_allclose(slope, jax.grad(f)(X), atol=1e-6)


@pytest.mark.parametrize(
  "f",
  [
    lambda x: jax.pure_callback(np.cos, x, x),
    lambda x: lax.scan(lambda c, y: (c, jax.pure_callback(np.cos, y, y)), 0, x)[1],
    lambda x: jax.new_ref(x)[...],
  ],
  ids=["callback", "callback in a loop", "mutable array"],
)
def test_what_may_change_is_refused(f):
  with pytest.raises(Impure, match="side effects or reads what may change"):
    run(f, X)


def test_a_tpu_leaves_float64_to_its_host(monkeypatch):
  with float64():
    assert jnp.ones(1).dtype == np.float64 and jax.config.jax_default_device is None
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  with float64():
    assert jnp.ones(1).dtype == np.float64
    assert jax.config.jax_default_device == jax.local_devices(backend="cpu")[0]
  assert jax.config.jax_default_device is None and jnp.ones(1).dtype == np.float32

  def refuse(backend):
    raise RuntimeError(f"Unknown backend {backend}")

  monkeypatch.setattr(jax, "local_devices", refuse)
  with pytest.raises(ValueError, match="JAX_PLATFORMS=tpu,cpu"), float64():
    pass


SETTINGS = {
  "none": contextlib.nullcontext,
  "products in bfloat16": lambda: jax.default_matmul_precision("BF16_BF16_F32"),
  "products that a CPU lacks": lambda: jax.default_matmul_precision("TF32_TF32_F32"),
  "no promotion of ranks": lambda: jax.numpy_rank_promotion("raise"),
  "no promotion of dtypes": lambda: jax.numpy_dtype_promotion("strict"),
  "no transfers": lambda: jax.transfer_guard("disallow"),
}


@pytest.fixture(scope="module")
def certified():
  weights = np.random.default_rng(0).uniform(0, 1, (3, 3)).astype(np.float32)
  box = np.full(3, -1.0), np.full(3, 1.0)

  def logits(weights, x):
    return jax.nn.relu(x @ weights) @ weights.T

  def all_of(setting):
    like, x = jax.ShapeDtypeStruct((1, 3), jnp.float32), np.array([0.1, 0.5, -0.3])
    with SETTINGS[setting]():
      each = (None,) if setting.startswith("products") else (None, F32)  # Those are other programs.
      both = [Certifier(logits, weights, (3,), arithmetic=a) for a in each]
      radii = [r for certifier in both for r in certifier.radius(x).radii.values()]
      least = minimise(lambda x: logits(weights, x)[0], *box).bound
      return [certify(logits, weights, like, search_steps=0).verdict, least, *radii]

  return all_of, all_of("none")


@pytest.mark.parametrize("setting", list(SETTINGS)[1:])
def test_what_is_certified_does_not_depend_on_settings_of_jax(certified, setting):
  all_of, want = certified
  found = all_of(setting)
  assert found == want[: len(found)]


@pytest.mark.parametrize("precision", ["BF16_BF16_F32", "TF32_TF32_F32", "highest"])
def test_products_of_weights_are_known_in_full_precision(precision):
  """Rounded to bfloat16 their factors sum up to 2^-8; they sum up to -0.48 * 2^-7."""
  a = np.float32([1 + 0.51 * 2**-7, 1 + 0.49 * 2**-7, 2**-8])

  def f(sign, x):
    return jnp.dot(a, sign * jnp.float32([1, -1, -1]), precision=precision) * x**2

  like = jax.ShapeDtypeStruct((), jnp.float32)
  assert [certify(f, s, like, search_steps=0).verdict for s in (1, -1)] == ["UNKNOWN", "PROVED"]


@pytest.mark.parametrize("precision", ["BF16_BF16_F32", "TF32_TF32_F32", "highest"])
def test_bounds_on_slopes_are_in_full_precision(precision):
  def logits(weights, x):
    return jnp.dot(x, weights, precision=precision) @ np.float32([[1, 0]])

  weights, x = np.float32([[1 + 0.49 * 2**-7]]), np.array([1.0])
  radius = Certifier(logits, weights, (1,)).radius(x).radii["l1"]
  assert 0.999 < radius <= 1
