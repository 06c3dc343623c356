"""Our forms of convolutions against XLA's own."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from convex_jax import mesh
from convex_jax.models import fast_forms
from convex_jax.models.fast_forms import conv_general_dilated

KERNELS = ((1, 1), (3, 3))
MORE = [pytest.param(kernel, marks=pytest.mark.slow) for kernel in ((5, 1), (2, 3))]
STRIDES = ((1, 1), (2, 1), (2, 2), (2, 3))
PADDINGS = ("SAME", "VALID", [(2, 2), (3, 0)])
FEATURES = {  # (in, out, groups)
  "wider": (4, 6, 1),
  "narrower": (6, 3, 1),
  "many": (64, 64, 1),  # The gradient of the map has another form, too.
  "depthwise": (4, 4, 4),
  "grouped": (4, 8, 2),
}


def ours(x, w, window_strides, padding, feature_group_count):
  """Our convolution under the argument names of `lax.conv_general_dilated`."""
  return conv_general_dilated(
    x, w, window_strides, padding, feature_group_count=feature_group_count
  )


def drawn(shape, seed=0, dtype=np.float64):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("kernel", [*KERNELS, *MORE], ids=str)
def test_values_and_gradients_are_those_of_xla(kernel, features):
  c, d, groups = FEATURES[features]
  native = functools.partial(lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"))

  def all_forms(conv, x, w):
    """Value and gradients for every stride and padding, as one program."""
    results = []
    for strides, padding in itertools.product(STRIDES, PADDINGS):
      form = functools.partial(
        conv, window_strides=strides, padding=padding, feature_group_count=groups
      )
      y, pull = jax.vjp(form, x, w)
      results.append((y, *pull(drawn(y.shape, seed=2))))
    return results

  with jax.enable_x64(True):
    x, w = drawn((2, 7, 6, c)), drawn((*kernel, c // groups, d), seed=1)
    actual, expected = (jax.jit(all_forms, static_argnums=0)(f, x, w) for f in (ours, native))
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
      np.testing.assert_allclose(a, b, atol=1e-12)


def test_gradients_by_tiles_are_as_exact_as_float32_allows():
  def gradients(conv, dtype):
    form = functools.partial(conv, window_strides=(1, 1), padding="SAME", feature_group_count=1)
    return jax.jit(lambda x, w, g: jax.vjp(form, x, w)[1](g))(*(v.astype(dtype) for v in (x, w, g)))

  with jax.enable_x64(True):
    x, w, g = drawn((4, 16, 16, 64)), drawn((3, 3, 64, 64), seed=1), drawn((4, 16, 16, 64), seed=2)
    native = functools.partial(lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    exact = gradients(native, jnp.float64)
    for got, want in zip(gradients(ours, jnp.float32), exact, strict=True):
      assert abs(got - want).max() < 5e-6 * abs(want).max()  # 3e-6; points 0, 1, 2: 1e-5.


@pytest.mark.parametrize("shape", [(6, 6), (5, 9), (12, 4)], ids=str)
def test_maps_are_resized_as_by_jax(shape):
  x = drawn((3, 8, 10, 4), dtype=np.float32)

  def value_and_gradient(f):
    y, pull = jax.vjp(f, x)
    return y, *pull(jnp.cos(y))

  want = value_and_gradient(lambda x: jax.image.resize(x, (3, *shape, 4), "linear", antialias=True))
  got = value_and_gradient(lambda x: fast_forms.resize(x, shape))
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
@pytest.mark.parametrize(
  "side,strides,groups", [(1, (1, 1), 1), (4, (4, 4), 1), (3, (2, 2), 1), (3, (1, 1), 8)]
)
def test_other_devices_get_xlas_own_convolutions(platform, side, strides, groups, monkeypatch):
  x = drawn((2, 8, 8, 8), dtype=np.float32)
  w = drawn((side, side, 8 // groups, 8), 1, np.float32)

  def f(x, w):  # Anew: what JAX has traced it does not trace again.
    return (conv_general_dilated(x, w, strides, "SAME", feature_group_count=groups) ** 2).sum()

  want, programs = jax.grad(f, (0, 1))(x, w), [str(jax.make_jaxpr(jax.grad(f, (0, 1)))(x, w))]
  monkeypatch.setattr(fast_forms.meshes, "target", lambda: (platform, 4))
  programs.append(str(jax.make_jaxpr(jax.grad(lambda *xs: f(*xs), (0, 1)))(x, w)))
  assert [program.count(" conv_general_dilated[") for program in programs] == [0, 3]
  for a, b in zip(jax.grad(lambda *xs: f(*xs), (0, 1))(x, w), want, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
  monkeypatch.setattr(fast_forms, "_LARGE", 0)
  once = jax.make_jaxpr(jax.grad(lambda x: (fast_forms.gradient_once(x) ** 2).sum()))(x)
  assert "cond[" not in str(once)


def test_the_forms_ask_the_mesh_that_the_program_is_for():
  few = mesh.make_mesh(jax.devices()[:1])

  def kinds(x):
    seen.append(mesh.target())
    return x

  seen = []
  jax.jit(kinds)(1.0)
  jax.jit(mesh.traced_on(few, kinds))(1.0)
  assert seen == [("cpu", jax.device_count()), ("cpu", 1)] and jax.device_count() > 1


def test_bfloat16_sums_gradients_in_float32():
  x, w = drawn((8, 16, 16, 4), dtype=jnp.bfloat16), drawn((3, 3, 4, 8), 1, jnp.bfloat16)

  def total(w, x, conv):
    return (conv(x, w, (1, 1), "SAME") ** 2).sum()

  def native(x, w, strides, padding):
    return lax.conv_general_dilated(
      x, w, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )

  exact = jax.grad(total)(w.astype(jnp.float32), x.astype(jnp.float32), native)
  ours = jax.grad(total)(w, x, conv_general_dilated)
  assert ours.dtype == jnp.bfloat16
  error = jnp.abs(ours.astype(jnp.float32) - exact).max() / jnp.abs(exact).max()
  assert error < 2e-2  # bfloat16 itself has steps of 8e-3.


def test_what_is_not_supported_is_refused():
  x, w = jnp.ones((1, 8, 8, 2)), jnp.ones((3, 3, 2, 2))
  with pytest.raises(NotImplementedError, match="dilation"):
    conv_general_dilated(x, w, (1, 1), "SAME", rhs_dilation=(2, 2))


def test_flax_accepts_it():
  x = drawn((2, 8, 8, 3), dtype=np.float32)
  plain = nn.Conv(5, (3, 3), strides=(2, 2))
  ours = nn.Conv(5, (3, 3), strides=(2, 2), conv_general_dilated=conv_general_dilated)
  variables = plain.init(jax.random.key(0), x)
  np.testing.assert_allclose(ours.apply(variables, x), plain.apply(variables, x), atol=1e-6)


def test_a_large_gradient_is_computed_once_and_is_the_same_gradient():
  def f(x, keep):
    y = keep(jnp.sin(x))
    return jnp.sum(y**2) + jnp.sum(jnp.cos(y))

  slope = jax.jit(jax.grad(lambda x: f(x, fast_forms.gradient_once)))
  for shape in ((3, 4), (512, 512)):
    x = jax.random.normal(jax.random.key(0), shape)
    np.testing.assert_allclose(slope(x), jax.grad(lambda x: f(x, lambda y: y))(x), rtol=1e-6)
    program = slope.lower(x).compile().as_text()
    # What XLA fuses nothing into; it may not be simplified away.
    assert ("conditional(" in program) == (shape == (512, 512))


def test_what_is_computed_once_keeps_its_nans_to_itself():
  x = jnp.ones((512, 512)).at[0, 0].set(jnp.nan)
  np.testing.assert_array_equal(jax.jit(fast_forms.materialize)(x), x)
