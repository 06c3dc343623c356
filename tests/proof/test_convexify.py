"""Convex logits with an unchanged softmax: values, proofs, refusals, and what must not be proved."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convex_jax import create_model
from convex_jax.proof import certify, convexify, splitting
from convex_jax.proof.differences import Parts
from tests.support.midpoints import midpoint_gaps

STATIC = {"norm": "batch", "gates": "static"}
NETWORKS = [  # (architecture, size, pixels, further keys)
  ("mlp", "tiny", 8, {}),
  ("all_cnn", "tiny", 8, {}),
  ("densenet", "tiny", 8, {}),
  ("mixer", "tiny", 8, {"norm": "batch"}),
  ("mixer", "tiny", 8, {"norm": "affine", "gelu": "tanh"}),
  ("cycle_mlp", "tiny", 8, STATIC),
  ("efficientnet", "tiny", 16, {"gates": "static", "stages": 2}),
]
LARGE = [
  ("efficientnet", "tiny", 32, {"gates": "static"}),
  ("mlp", "800x3", 32, {}),
  ("all_cnn", "c", 32, {}),
  ("densenet", "40-12", 32, {}),
  ("densenet", "BC-100-12", 32, {}),
  ("densenet", "121", 32, {}),
  ("mixer", "seed", 72, {"norm": "batch"}),
]


def network(name, size, px, keys, scale=1.0):
  """(f, weights, x) of a network with random weights and statistics, in float64."""
  model = create_model(name, size, classes=5, dtype=jnp.float64, **keys)
  x = jax.random.uniform(jax.random.key(0), (1, px, px, 3), jnp.float64)
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    name = jax.tree_util.keystr(path)
    if "var" in name:
      return rng.uniform(0.5, 1.5, leaf.shape)
    fan_in = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 1.0
    return scale * rng.normal(size=leaf.shape) * np.sqrt(2 / fan_in)

  return model.apply, jax.tree_util.tree_map_with_path(draw, shapes), x


def check(f, weights, x, tolerance=1e-13):
  """(convexified, size of its logits); raises unless f + t is proved and has f's softmax.

  To within the rounding of numbers as large.
  """
  found = convexify(f, weights, x)
  # Compiled as a whole: operation by operation, the small programs of a network take far longer.
  functions = (found.logits, found.convex_logits, found.common, functools.partial(f, weights))
  values = jax.jit(lambda x: [function(x) for function in functions])(x)
  logits, convex, common, own = map(np.asarray, values)
  np.testing.assert_array_equal(logits, own)
  assert common.shape == (*logits.shape[:-1], 1)
  rounding = tolerance * (1 + np.abs(convex).max())
  np.testing.assert_allclose(convex, logits + common, rtol=0, atol=rounding)
  softmax = [jax.nn.softmax(values) for values in (logits, convex)]
  np.testing.assert_allclose(*softmax, rtol=0, atol=max(rounding, 1e-15))
  assert found.certificate.verdict == "PROVED", found.certificate.reason
  return found, float(np.abs(convex).max())


def worst_midpoint(f, shape):
  gaps = midpoint_gaps(jax.jit(jax.vmap(f)), shape, pairs=40, sizes=(0.3, 3), steps=(0.1, 1))
  assert not np.isnan(gaps).any()
  return gaps.max()


@pytest.mark.parametrize("case", NETWORKS, ids=lambda c: f"{c[0]} {c[3]}")
def test_every_architecture_has_convex_logits(case):
  with jax.enable_x64(True):
    f, weights, x = network(*case)
    found, size = check(f, weights, x, 1e-12)
    assert worst_midpoint(found.convex_logits, x.shape) <= 1e-12 * (1 + size)
    assert not certify(f, weights, x, search_steps=0)  # It is not convex to begin with.


@pytest.mark.slow
@pytest.mark.parametrize("case", LARGE, ids=lambda c: f"{c[0]} {c[1]}")
def test_large_networks_have_convex_logits(case):
  with jax.enable_x64(True):
    check(*network(*case), 1e-12)


def test_a_convex_twin_needs_no_common_term():
  model = create_model("mlp", "tiny", twin="ioc", classes=5)
  x = jax.random.uniform(jax.random.key(0), (1, 8, 8, 3))
  weights = model.init(jax.random.key(1), x)
  found = convexify(model.apply, weights, x)
  assert certify(model.apply, weights, x, search_steps=0)
  np.testing.assert_array_equal(found.common(x), 0)


DRAW = np.random.default_rng(1).normal
A, B, C = DRAW(size=(6, 8)), DRAW(size=(8, 8)), DRAW(size=(8, 3))
LAST = DRAW(size=(22, 3))
KERNEL, KERNELS = DRAW(size=(3, 3, 2, 4)), DRAW(size=(3, 3, 1, 4))


def conv(x, kernel, stride=1, groups=1, padding="SAME"):
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    padding,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=groups,
  )


def residual(x):
  h = x @ A
  for _ in range(3):
    h = h + nn.silu(h @ B)
  return h @ C


def looped(x):
  h, _ = jax.lax.scan(lambda h, w: (nn.relu(h @ w), h.sum()), x @ A, jnp.stack([B, -B, B]))
  return h @ C


def pooled(pool, x):
  h = nn.relu(conv(x, KERNEL)) - 1
  return pool(nn.relu(conv(h, KERNELS, groups=4))).sum((1, 2)) @ C[:4]


IMAGES, ROWS = (2, 6, 6, 2), (4, 6)
MAX_POOL = functools.partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2), padding="SAME")
FUNCTIONS = {  # name: (function of one array, shape of the array)
  "affine": (lambda x: x @ A @ C, ROWS),
  "a scalar next to an array": (
    lambda x: jnp.minimum(nn.relu(x).max() - nn.relu(-x).max(), x) @ A @ C,
    ROWS,
  ),
  "a head of one sign, less convex units": (
    lambda x: nn.relu(x @ A) @ jnp.abs(C) - nn.relu(x @ A)[:, :3] - nn.relu(-x @ A)[:, :3],
    ROWS,
  ),
  "a head of one sign, plus concave units": (
    lambda x: (nn.relu(x @ A) @ jnp.abs(C) + (-nn.relu(x @ A)[:, :3])) / 2 * 3,
    ROWS,
  ),
  "no weights after the activation": (lambda x: nn.relu(x @ A)[:, :3], ROWS),
  "one example without a batch": (lambda x: nn.gelu(x @ A) @ C, (6,)),
  "weights on the left": (lambda x: C.T @ nn.relu(A.T @ x), (6,)),
  "GELU": (lambda x: nn.gelu(nn.gelu(x @ A) @ B) @ C, ROWS),
  "tanh and sigmoid": (lambda x: (jnp.tanh(x @ A) @ B - nn.sigmoid(x @ A)) @ C, ROWS),
  "SELU, then its negative": (lambda x: -nn.selu(nn.selu(x @ A) @ B) @ C, ROWS),
  "clip": (lambda x: jnp.clip(jnp.clip(x @ A, -1, 1) @ B, -0.5, 2.0) @ C, ROWS),
  "bounds of some channels": (
    lambda x: jnp.clip(nn.relu(x @ A) @ B, jnp.where(A[0] > 0, -1, -np.inf), np.inf) @ C,
    ROWS,
  ),
  "a limit of some channels": (
    lambda x: jnp.minimum(nn.relu(x @ A) @ B, jnp.where(A[0] > 0, 1, np.inf)) @ C,
    ROWS,
  ),
  "updates that subtract": (
    lambda x: nn.relu(x @ A).at[:, jnp.array([1, 3])].subtract(nn.relu(x[:, :2])) @ C,
    ROWS,
  ),
  "clamp of the library": (lambda x: jax.lax.clamp(-0.5, nn.relu(x @ A) @ B, 2.0) @ C, ROWS),
  "slopes per channel": (lambda x: nn.leaky_relu(nn.relu(x @ A) @ B, LAST[:8, 0]) @ C, ROWS),
  "thresholds per channel": (lambda x: jnp.maximum(nn.relu(x @ A) @ B, A[0]) @ C, ROWS),
  "maxout": (lambda x: jnp.maximum(nn.relu(x @ A) @ B, -nn.relu(x @ -A)) @ C, ROWS),
  "maxima over units": (lambda x: (nn.relu(x @ A) @ B).reshape(4, 4, 2).max(-1) @ C[:4], ROWS),
  "an odd number of units": (
    lambda x: nn.relu(x @ A).reshape(4, 8)[:, :7].min(-1, keepdims=True) * C[:1],
    ROWS,
  ),
  "logsumexp of units": (
    lambda x: jax.nn.logsumexp((nn.relu(x @ A) @ B).reshape(4, 4, 2), -1) @ C[:4],
    ROWS,
  ),
  "softplus of a difference": (lambda x: nn.softplus(nn.relu(x @ A) @ B - 1) @ C, ROWS),
  "division": (lambda x: (nn.relu(x @ A) / jnp.where(A[0] > 0, 2.0, -4.0)) @ C, ROWS),
  "signs": (lambda x: 3 - nn.relu(-(nn.relu(x @ A) * A[0])) @ C, ROWS),
  "concatenation": (
    lambda x: nn.elu(jnp.concatenate([nn.elu(x @ A), x, A[:4]], -1)) @ LAST,
    ROWS,
  ),
  "elements moved": (lambda x: nn.relu(x @ A)[:, ::-1][:, jnp.array([0, 3, 3, 1])] @ C[:4], ROWS),
  "filled with a number": (
    lambda x: (
      (nn.relu(x @ A) @ B).at[:, jnp.array([2, 99])].get(mode="fill", fill_value=2.0) @ LAST[:2]
    ),
    ROWS,
  ),
  "padded with a number": (
    lambda x: jnp.pad(nn.relu(x @ A), ((0, 0), (1, 1)), constant_values=2.0) @ LAST[:10],
    ROWS,
  ),
  "updates": (
    lambda x: jnp.zeros((4, 9)).at[:, 1:].add(nn.relu(x @ A)) @ LAST[:9],
    ROWS,
  ),
  "running sums": (lambda x: jnp.cumsum(nn.relu(x @ A), 1) @ C, ROWS),
  "residual": (residual, ROWS),
  "loop": (looped, ROWS),
  "max pooling": (functools.partial(pooled, MAX_POOL), IMAGES),
  "average pooling": (functools.partial(pooled, lambda h: nn.avg_pool(h, (2, 2), (2, 2))), IMAGES),
  "the mean after the head": (
    lambda x: conv(nn.relu(conv(x, KERNEL, 2)), LAST[None, None, :4]).mean((1, 2)),
    IMAGES,
  ),
  "two heads": (lambda x: nn.relu(x @ A) @ C + x @ A[:, :3] - nn.relu(x @ -A) @ C, ROWS),
  "a head used twice": (lambda x: (lambda y: y + nn.relu(y))(nn.relu(x @ A) @ C), ROWS),
}


AS_THEY_ARE = {  # Proved convex by rules that `convexify` does not have.
  "squares": lambda w, x: (x @ w) ** 2,
  "distances": lambda w, x: jnp.linalg.norm(x[..., None] - w, axis=1),
  "exponentials": lambda w, x: jnp.exp(x @ w),
  "running maxima": lambda w, x: jax.lax.cummax(x @ w, 1),
}


@pytest.mark.parametrize("name", AS_THEY_ARE)
def test_what_is_convex_by_other_rules_is_left_as_it_is(name):
  f, rng = AS_THEY_ARE[name], np.random.default_rng(0)
  w, x = (rng.normal(size=shape).astype(np.float32) for shape in ((5, 3), (2, 5)))
  found = convexify(f, w, x)
  assert found.certificate
  np.testing.assert_array_equal(found.convex_logits(x), f(w, x))
  np.testing.assert_array_equal(found.common(x), np.zeros((2, 1)))
  assert found.layers(x) == []
  with pytest.raises(ValueError, match=r"nothing is known|use BatchNorm"):
    convexify(lambda w, x: -f(w, x) * jnp.array([1, -1, 1]), w, x)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_operation_that_has_a_rule(name):
  function, shape = FUNCTIONS[name]
  with jax.enable_x64(True):
    x = jnp.asarray(np.random.default_rng(2).normal(size=shape))
    found, size = check(lambda _, x: function(x), None, x)
    assert worst_midpoint(found.convex_logits, shape) <= 1e-11 * (1 + size)


def layer_norm(x):
  h = nn.relu(x @ A)
  h -= h.mean(-1, keepdims=True)
  return h / jnp.sqrt((h * h).mean(-1, keepdims=True) + 1e-6) @ C


REFUSED = {  # name: (function, what is said)
  "LayerNorm": (layer_norm, "div: a quotient.*BatchNorm"),
  "gates": (lambda x: nn.relu(x @ A) * nn.sigmoid(x @ -A[::-1]) @ C, "mul: .*static gates"),
  "attention": (lambda x: nn.softmax(nn.relu(x @ A)) @ C, "div: a quotient"),
  "a square": (lambda x: nn.relu(x @ A) ** 2 @ C, "slope is not bounded"),
  "a step": (lambda x: jnp.where(x @ A > 0, 1.0, 0.0) @ C, "not continuous"),
  "sorting": (lambda x: jnp.sort(nn.relu(x @ A)) @ C, "sort"),
  "one logit": (lambda x: nn.relu(x @ A) @ C[:, :1], "two or more logits"),
  "no dependence": (lambda x: jnp.ones((4, 3)), "do not depend"),
  "two arrays": (lambda x: (x @ A, x), "2 arrays"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_rule_is_refused(name):
  function, said = REFUSED[name]
  with pytest.raises(ValueError, match=said) as error:
    convexify(function, jnp.zeros(ROWS))
  if name in ("LayerNorm", "gates", "attention", "a square"):
    assert "test_convexify.py:" in str(error.value)


def test_the_functions_can_be_jitted_mapped_and_differentiated():
  with jax.enable_x64(True):
    check_transformations()


def check_transformations():
  f, weights, x = network("mlp", "tiny", 8, {})
  found = convexify(f, weights, x)
  images = jax.random.uniform(jax.random.key(3), (7, *x.shape))
  for name in ("logits", "common", "convex_logits"):
    function = getattr(found, name)
    one_by_one = np.stack([function(image) for image in images])
    np.testing.assert_allclose(
      jax.jit(jax.vmap(function))(images), one_by_one, rtol=1e-11, atol=1e-11
    )
  total = jax.grad(lambda x: found.convex_logits(x)[0, 1])(x)
  parts = [
    jax.grad(lambda x, g=g: g(x).ravel()[i])(x) for g, i in ((found.logits, 1), (found.common, 0))
  ]
  np.testing.assert_allclose(
    total, sum(parts), rtol=1e-10, atol=1e-10 * float(jnp.abs(total).max())
  )


def deep(x):
  for _ in range(100):
    x = nn.relu(4 * x @ B)
  return x @ C


def test_a_term_beyond_the_dtype_is_not_silent():
  x = jnp.ones((1, 8))
  found = convexify(deep, x / 1e30)
  assert found.certificate  # The proof is over the reals.
  assert not np.isfinite(found.common(x)).any()
  assert not np.isfinite(found.layers(x)[-1].common)


# Wrong transformations, none of which may be proved.


def flipped(found):
  return dataclasses.replace(found, convex=lambda z: -found.convex(z))


def with_changes(change):
  """`split` with another result."""
  return lambda *args: change(splitting.split(*args))


WRONG = {  # What is wrong: (name in the module, its replacement).
  "the sign of a part": ("convexified.split", with_changes(flipped)),
  "a slope too small": (
    "convexified.split",
    with_changes(lambda found: dataclasses.replace(found, rising=0.99 * found.rising)),
  ),
  "a falling slope forgotten": (
    "convexified.split",
    with_changes(lambda found: dataclasses.replace(found, falling=0.0)),
  ),
  "a part forgotten": (
    "differences._scaled",
    lambda x, factor: None,
  ),
  "a maximum of the values alone": (
    "differences.extreme",
    lambda x, y, **_: Parts(None, jnp.maximum(value_of(x), value_of(y))),
  ),
  "a maximum where a sum belongs": ("differences.total", lambda *parts: maximum_of(*parts)),
  "weights of any sign": (
    "convexified._Program._weighted",
    lambda self, op, parts, weights: parts.map(lambda x: self._times(op, x, weights)),
  ),
  "the head's weights of any sign": (
    "convexified._Program._head",
    lambda self, op, parts, weights, axis: parts.map(lambda x: self._times(op, x, weights)),
  ),
}


def value_of(x):
  return 0.0 if x.above is None and x.below is None else x.value


def maximum_of(*parts):
  present = [p for p in parts if p is not None]
  return functools.reduce(jnp.maximum, present) if present else None


def both_kinds(x):
  h = nn.gelu(nn.gelu(x @ A) @ B)
  return jnp.maximum(nn.relu(h @ B), -h) @ B @ C


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_transformation_is_not_proved(name, monkeypatch):
  attribute, wrong = WRONG[name]
  x = jnp.ones(ROWS)
  assert convexify(both_kinds, x).certificate
  monkeypatch.setattr(f"convex_jax.proof.{attribute}", wrong)
  assert convexify(both_kinds, x).certificate.verdict == "UNKNOWN"


@pytest.mark.parametrize("shape", [(5, 2), (1, 3), (2,)])
def test_inputs_of_another_shape_are_refused(shape):
  """They would be broadcast, or the first of them would answer for all."""
  g = convexify(lambda w, x: jnp.tanh(x @ w) @ w, jnp.eye(2) - 0.5, jnp.ones((1, 2)))
  for function in (g.common, g.convex_logits, g.layers):
    with pytest.raises(ValueError, match=r"expected \(1, 2\). Of more inputs: jax.vmap"):
      function(jnp.ones(shape))
  x = jnp.linspace(-1, 1, 10).reshape(5, 1, 2)
  assert jax.vmap(g.common)(x).shape == (5, 1, 1)
