"""Layers in fast forms against plain ones; initial values against the literature."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convex_jax.models import catalog, initializers, layers
from convex_jax.models.constraints import constraints_of
from convex_jax.models.parts import Parts, ioc, make_parts
from convex_jax.models.variables import apply, init_variables
from convex_jax.proof.certificate import certify


def quadrature(g, correlation=0.5):
  """E g(z), E g(z)^2, E g(z) g(z') in float64, by the trapezoidal rule."""
  x = np.linspace(-10, 10, 2001)
  w = np.exp(-(x**2) / 2)
  w /= w.sum()
  other = correlation * x[:, None] + np.sqrt(1 - correlation**2) * x[None]
  return w @ g(x), w @ g(x) ** 2, w @ (g(x) * (g(other) @ w))


@pytest.mark.parametrize(
  "moments,g",
  [
    (initializers.ELU, lambda z: np.where(z > 0, z, np.expm1(np.minimum(z, 0)))),
    (initializers.NORMED, lambda z: z),
  ],
)
def test_moments_agree_with_quadrature(moments, g):
  got = (moments.mean, moments.square, moments.product)
  np.testing.assert_allclose(got, quadrature(g), atol=2e-5)


def test_log_normal_agrees_with_hoedt_and_klambauer_for_relu():
  """Their closed form for ReLU at fan-in 800: mean 0.002317, deviation 0.03536."""
  relu = initializers.Moments(1 / np.sqrt(2 * np.pi), 0.5, 0.30449)
  assert initializers.log_normal_mean(800, relu) == pytest.approx(0.002317, abs=1e-6)
  w = initializers.log_normal(relu)(jax.random.key(0), (800, 4000))
  assert float(w.mean()) == pytest.approx(0.002317, rel=0.05)
  assert float(w.std()) == pytest.approx(0.03536, rel=0.25)  # A heavy tail.
  assert (w > 0).all()


def test_principled_layers_keep_variance_and_centre():
  """Pre-activations of mean 0 and variance 1 stay so through a non-negative layer."""
  parts = Parts(ioc("clamp", passthrough=False))
  z = np.sqrt(0.5) * jax.random.normal(jax.random.key(1), (4000, 1))
  z = z + np.sqrt(0.5) * jax.random.normal(jax.random.key(2), (4000, 512))  # Correlation 1/2.

  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      return parts.dense(x, 512, name="dense")

  out, _ = Net().init_with_output(jax.random.key(0), nn.elu(z))
  assert abs(float(out.mean())) < 0.1
  assert 0.5 < float(out.var()) < 1.5  # 1 on average; the weights' tail is heavy.


@pytest.mark.parametrize("principled,variance", [(True, 1.0), (False, 512 * 0.02**2)])
def test_free_weights_of_ioc_start_for_a_variance_of_1(principled, variance):
  """Else they are the architecture's own: of 0.02 here, a fifth of that variance."""
  parts = make_parts("ioc", "clamp", log_normal_init=principled)

  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      return parts.dense(x, 512, free=True, own_init=nn.initializers.normal(0.02), name="dense")

  x = jax.random.normal(jax.random.key(1), (1000, 512))
  out, _ = Net().init_with_output(jax.random.key(0), x)
  np.testing.assert_allclose(out.var(), variance, rtol=0.05)


def test_naive_non_negative_layers_lose_variance():
  """The control: a clipped LeCun layer shifts its outputs far from 0."""
  x = nn.elu(jax.random.normal(jax.random.key(1), (1000, 512)))
  kernel = jnp.maximum(nn.initializers.lecun_normal()(jax.random.key(0), (512, 512)), 0)
  assert float((x @ kernel).mean()) > 1


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("axis", [0, -1])
def test_a_dense_layer_and_its_gradients_are_those_of_einsum(axis, scale):
  with jax.enable_x64(True):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 4, 5)))
    kwargs = dict(kernel_init=nn.initializers.normal(), dtype=jnp.float64)
    layer = layers.Dense(6, bias_init=nn.initializers.normal(), axis=axis, **kwargs)
    layer = layer.clone(initial_scale=scale)
    params = nn.meta.unbox(layer.init(jax.random.key(0), x))

    def plain(params, x):
      p = params["params"]
      s = p.get("scale", jnp.ones(6))
      y = jnp.einsum("sbd,dt->sbt" if axis else "sbd,st->bdt", x, p["kernel"]) + p["bias"]
      return y * s if axis else jnp.moveaxis(y * s, -1, 0)

    want, pull_want = jax.vjp(plain, params, x)
    got, pull_got = jax.vjp(layer.apply, params, x)
    cotangent = jnp.asarray(rng.normal(size=want.shape))
    for a, b in zip(
      jax.tree.leaves((got, pull_got(cotangent))),
      jax.tree.leaves((want, pull_want(cotangent))),
      strict=True,
    ):
      np.testing.assert_allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("name,error", [("elu", 1e-6), ("silu", 5e-6)])
def test_activations_and_their_slopes_are_those_of_jax(name, error):
  x = jnp.concatenate([jnp.asarray([-1e30, -1e-4, -0.0, 1e-4, 1e30]), jnp.linspace(-60, 60, 1001)])
  ours, theirs = getattr(layers, name), getattr(jax.nn, name)
  np.testing.assert_allclose(ours(x), theirs(x), rtol=1e-6, atol=1e-7)
  for derivative in (jax.grad, jax.jacfwd):
    slope, expected = (jax.vmap(derivative(f))(x) for f in (ours, theirs))
    np.testing.assert_allclose(slope, expected, rtol=0, atol=error)


def test_an_unknown_twin_is_refused():
  with pytest.raises(ValueError, match="Unknown twin 'convex'; expected one of base, ioc, paper"):
    make_parts("convex", "clamp")


def test_one_logit_is_clamped_since_it_cannot_be_shifted():
  class Head(nn.Module):
    classes: int

    @nn.compact
    def __call__(self, x):
      return Parts(ioc("clamp", passthrough=False)).linear_head(x, self.classes, name="head")

  for classes, want in ((1, "clamp"), (2, "shift")):
    boxed = Head(classes).init(jax.random.key(0), jnp.ones((1, 4)))["params"]
    assert constraints_of(boxed)["head"]["kernel"] == want


@pytest.mark.parametrize("shape,axis", [((5, 3), -1), ((4, 5, 3), 0), ((2, 4, 4, 3), -1)])
def test_dense_layers_have_forward_derivatives(shape, axis):
  """Of a convex network one wants Hessians: forward over reverse."""
  layer = layers.Dense(6, jax.nn.initializers.normal(), jax.nn.initializers.zeros, None, axis=axis)
  x = jax.random.normal(jax.random.key(0), shape)
  variables = layer.init(jax.random.key(1), x)

  def squares(x):
    return (layer.apply(variables, x) ** 2).sum() / 2

  v = jax.random.normal(jax.random.key(2), shape)
  hessian_v = jax.jvp(jax.grad(squares), (x,), (v,))[1]
  w = variables["params"]["kernel"]
  moved = jnp.moveaxis(v, axis, -1) @ w @ w.T
  np.testing.assert_allclose(hessian_v, jnp.moveaxis(moved, -1, axis), rtol=1e-4, atol=1e-5)


IMAGE = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)


def mixer_of(**choices):
  """A tiny `ioc` Mixer of 8 px with some of its choices changed, and its weights."""
  network = catalog.create_model("mixer", "tiny", "ioc", classes=3, **choices)
  boxed = jax.jit(lambda key: init_variables(network, key, (8, 8, 3)))(jax.random.key(0))
  return network, nn.meta.unbox(boxed)


@pytest.mark.parametrize(
  "choices",
  [
    {"norm": "batch"},
    {"norm": "affine"},
    {"log_normal_init": False},
    {"branch_scales": False},
    {"passthrough": False},
    {"norm": "affine", "log_normal_init": False, "branch_scales": False, "passthrough": False},
  ],
)
def test_a_convex_twin_is_convex_whatever_else_is_chosen(choices):
  network, variables = mixer_of(**choices)
  assert certify(functools.partial(apply, network), variables, IMAGE)


@pytest.mark.parametrize("norm", ["own", "layer"])
def test_with_layer_norm_it_is_not(norm):
  network, variables = mixer_of(norm=norm)
  certificate = certify(functools.partial(apply, network), variables, IMAGE, search_steps=0)
  assert not certificate and "LayerNorm" in certificate.reason


def test_a_choice_changes_its_own_part_alone():
  names = {
    key: set(flat(mixer_of(**choice)[1]["params"]))
    for key, choice in (
      ("all", {}),
      ("no scales", {"branch_scales": False}),
      ("own init", {"log_normal_init": False}),
      ("affine", {"norm": "affine"}),
    )
  }
  assert names["own init"] == names["affine"] == names["all"]
  lost = names["all"] - names["no scales"]
  assert lost and all(name.endswith("dense_1/scale") for name in lost)
  own, ours = (mixer_of(log_normal_init=flag)[1]["params"] for flag in (False, True))
  kernels = [params["block_1"]["channel_mixing"]["dense_0"]["kernel"] for params in (own, ours)]
  assert float((kernels[0] == 0).mean()) > 0.3 and (kernels[1] > 0).all()


def flat(params):
  leaves = jax.tree.leaves_with_path(params)
  return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


def test_an_affine_norm_is_a_scale_and_a_bias():
  layer = layers.Affine(jnp.float32, jax.nn.initializers.constant(2.0))
  x = jax.random.normal(jax.random.key(0), (4, 3))
  variables = layer.init(jax.random.key(1), x)
  np.testing.assert_allclose(layer.apply(variables, x), 2 * x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("shape", [(8, 5), (4, 3, 2, 5)])
def test_batch_norm_computes_what_that_of_flax_does(dtype, shape):
  """Values, gradients of the image and of both weights, running averages; then at inference."""
  fields: Any = dict(momentum=0.9, epsilon=1e-3, dtype=dtype, scale_init=nn.initializers.normal())
  ours, flax = layers.BatchNorm, nn.BatchNorm
  with jax.enable_x64(dtype == "float64"):
    x, v = (3 + jax.random.normal(jax.random.key(i), shape).astype(dtype) for i in range(2))
    start = jax.tree.map(lambda leaf: leaf + 0.5, ours(True, **fields).init(jax.random.key(2), x))
    results = []
    for layer in (ours, flax):

      def value(params, x, layer=layer):
        variables = {**start, "params": params}
        y, after = layer(False, **fields).apply(variables, x, mutable=["batch_stats"])
        return jnp.sum(y * v, dtype=jnp.float32), (y, after["batch_stats"])

      @jax.jit
      def every(start, x, layer=layer, value=value):
        (_, (y, stats)), slopes = jax.value_and_grad(value, (0, 1), has_aux=True)(
          start["params"], x
        )
        at_inference = layer(True, **fields).apply({**start, "batch_stats": stats}, x)
        return y, stats, slopes, at_inference

      results.append(every(start, x))
  error = 1e-2 if dtype == "bfloat16" else 1e-4
  for got, expected in zip(*map(jax.tree.leaves, results), strict=True):
    assert got.dtype == expected.dtype
    got, expected = (np.asarray(value, float) for value in (got, expected))
    np.testing.assert_allclose(got, expected, rtol=error, atol=error)


@pytest.mark.parametrize("name", ["mlp", "mixer"])  # The others have convolutions with such rules.
def test_at_inference_there_are_derivatives_in_forward_mode(name):
  """A custom rule for gradients, as training has, would rule out `jax.jvp` and `jax.hessian`."""
  network = catalog.create_model(name, "tiny", "ioc", classes=3)
  variables = nn.meta.unbox(init_variables(network, jax.random.key(0), (16, 16, 3)))
  x, v = (jax.random.normal(jax.random.key(i), (1, 16, 16, 3)) for i in range(2))
  logits = functools.partial(apply, network, variables)

  @jax.jit
  def both(x, v):
    forward = jax.jvp(logits, (x,), (v,))[1][0]
    return forward, [jnp.vdot(jax.grad(lambda x, i=i: logits(x)[0, i])(x), v) for i in range(3)]

  np.testing.assert_allclose(*map(np.array, both(x, v)), rtol=1e-3, atol=1e-4)
