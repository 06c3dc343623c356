"""Bounds, updates of places, branches, loops and devices: what is proved, and what must not be."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from convex_jax.proof import certify, layouts
from tests.support.curvature import check_curvature, curvature_of

X = jax.ShapeDtypeStruct((4,), jnp.float32)
KEPT = np.array([True, False, True, True])
PLACES = np.array([0, 1, 0, 1])
INF = jnp.inf
SYSTEM = np.float32([[3, 1, -1, 0], [0, 2, 1, 1], [0, 0, 4, 1], [0, 0, 0, 1]])
solve_triangular = jax.scipy.linalg.solve_triangular
relu = nn.relu


def masked(x, other):
  return jnp.where(KEPT, x, other)


def zeros_and(places, values, method="add", **mode):
  """Zeros, of which some are updated."""
  return getattr(jnp.zeros(4).at[jnp.array(places)], method)(values, **mode)


def _updates_of_all(x):
  numbers = lax.ScatterDimensionNumbers((1,), (), ())
  return lax.scatter_add(x, np.zeros((2, 0), np.int32), jnp.stack([x, -3 * relu(x)]), numbers)


BOUNDS = [  # (name, function, what is to be proved)
  ("clip from 0 on", lambda x: jnp.clip(x, 0, INF), "convex"),
  ("clip to nothing", lambda x: jnp.clip(x, -INF, INF), "affine"),
  ("clip", lambda x: jnp.clip(x, 0, 1), "unknown"),
  ("clamp from 0 on", lambda x: lax.clamp(0.0, x, INF), "convex"),
  ("clamp to infinity", lambda x: lax.clamp(INF, x, INF), "unknown"),
  ("minimum with infinity", lambda x: jnp.minimum(x, INF), "affine"),
  ("of a convex value", lambda x: jnp.minimum(relu(x), jnp.full(4, INF)), "convex"),
  ("with infinity here, 1 there", lambda x: jnp.minimum(relu(x), masked(INF, 1.0)), "unknown"),
  ("maximum with minus infinity", lambda x: jnp.maximum(relu(x), -INF), "convex"),
  ("maximum with infinity", lambda x: jnp.maximum(x, INF), "unknown"),
  ("minimum with minus infinity", lambda x: jnp.minimum(x, -INF), "unknown"),
  ("maximum with NaN", lambda x: jnp.maximum(x, jnp.nan), "unknown"),
  ("masked maximum", lambda x: jnp.max(x, where=KEPT, initial=-INF), "convex"),
  ("masked maximum from 0 on", lambda x: jnp.max(x, where=KEPT, initial=0.0), "convex"),
  ("masked minimum", lambda x: jnp.min(x, where=KEPT, initial=INF), "concave"),
  ("maximum of what is kept", lambda x: masked(x, -INF).max(), "convex"),
  ("minimum of what is kept", lambda x: masked(x, INF).min(), "concave"),
  ("of the negative", lambda x: -masked(-x, INF).min(), "convex"),
  ("maximum with what is no bound", lambda x: masked(x, INF).max(), "unknown"),
  ("minimum with what is no bound", lambda x: masked(x, -INF).min(), "unknown"),
  ("maximum of nothing", lambda x: jnp.where(np.zeros(4, bool), x, -INF).max(), "unknown"),
  ("maximum by a condition", lambda x: jnp.where(x > 0, x, -INF).max(), "unknown"),
  ("an infinite element", lambda x: masked(x, -INF), "unknown"),
  ("a sum with infinity", lambda x: masked(x, -INF).sum(), "unknown"),
  ("both are infinite", lambda x: jnp.maximum(masked(x, -INF), masked(x, -INF)), "unknown"),
  ("one of two is", lambda x: jnp.maximum(masked(x, -INF), x), "convex"),
  ("padded by minus infinity", lambda x: jnp.pad(x, 1, constant_values=-INF).max(), "convex"),
  ("maximum so far", lambda x: lax.cummax(masked(x, -INF)), "convex"),
  ("maximum so far of nothing", lambda x: lax.cummax(masked(x, -INF)[::-1][2:]), "unknown"),
  ("masked sum", lambda x: jnp.sum(x, where=KEPT), "affine"),
  ("sum of what is kept", lambda x: masked(relu(x), 0).sum(), "convex"),
]

UPDATES = [
  ("segment sum", lambda x: jax.ops.segment_sum(relu(x), PLACES, 2), "convex"),
  ("segment maximum", lambda x: jax.ops.segment_max(x, PLACES, 2), "convex"),
  ("segment minimum", lambda x: jax.ops.segment_min(x, PLACES, 2), "concave"),
  ("maximum of an empty segment", lambda x: jax.ops.segment_max(x, PLACES, 3), "unknown"),
  ("add", lambda x: x.at[1].add(relu(x[0])), "convex"),
  ("add a concave value", lambda x: x.at[1].add(-relu(x[0])), "concave"),
  ("subtract", lambda x: x.at[1].subtract(relu(x[0])), "concave"),
  ("subtract a concave value", lambda x: relu(x).at[1].subtract(-relu(x[0])), "convex"),
  ("subtract a convex value", lambda x: relu(x).at[1].subtract(relu(x[0])), "unknown"),
  ("subtract twice", lambda x: zeros_and([1, 1], relu(x[:2]), "subtract"), "concave"),
  (
    "filled with 0, which is not infinite",
    lambda x: jnp.minimum(
      relu(x).at[jnp.array([9])].get(mode="fill", fill_value=0.0), relu(x[:1]) - 1
    ),
    "unknown",
  ),
  ("set all", lambda x: x.at[:].set(relu(x)), "convex"),
  ("set all, to a concave value", lambda x: x.at[...].set(-relu(x)), "concave"),
  ("add to a scalar", lambda x: relu(x).sum().at[()].add(x[0]), "convex"),
  ("subtract from all", lambda x: x.at[:].subtract(relu(x)), "concave"),
  ("several updates of all, of which XLA makes one", _updates_of_all, "unknown"),
  ("subtract infinity", lambda x: x.at[1].subtract(INF), "unknown"),
  ("a difference of updates, squared", lambda x: (x.at[1].subtract(x[0])) ** 2, "convex"),
  ("set", lambda x: relu(x).at[1].set(x[0]), "convex"),
  ("set to a number", lambda x: (-relu(x)).at[jnp.arange(4)].set(0.0), "affine"),
  ("set to infinity", lambda x: x.at[1].set(INF), "unknown"),
  ("multiply", lambda x: relu(x).at[1].mul(2.0), "convex"),
  ("multiply by a negative number", lambda x: relu(x).at[1].mul(-2.0), "unknown"),
  ("twice", lambda x: relu(x).at[jnp.array([1, 1])].mul(-2.0), "convex"),
  ("multiply an affine value", lambda x: x.at[1].mul(-2.0), "affine"),
  ("multiply by 0", lambda x: relu(x).at[1].mul(0.0), "convex"),
  ("multiply by infinity", lambda x: relu(x).at[1].mul(INF), "unknown"),
  ("multiply by the input", lambda x: relu(x).at[1].mul(x[0]), "unknown"),
  ("maximum", lambda x: x.at[1].max(0.0), "convex"),
  ("minimum", lambda x: x.at[1].min(0.0), "concave"),
  ("add twice", lambda x: zeros_and([1, 1], relu(x[:2])), "convex"),
  ("set twice", lambda x: zeros_and([1, 1], x[:2], "set"), "unknown"),
  ("outside, dropped", lambda x: zeros_and([1, 9], relu(x[:2]), mode="drop"), "convex"),
  ("outside, clipped", lambda x: zeros_and([1, 9], -relu(x[:2]), mode="clip"), "concave"),
  (
    "outside, against a promise",
    lambda x: zeros_and([1, 9], x[:2], mode="promise_in_bounds"),
    "unknown",
  ),
  ("twice, against a promise", lambda x: zeros_and([1, 1], x[:2], unique_indices=True), "unknown"),
  (
    "unsorted, against a promise",
    lambda x: zeros_and([2, 1], x[:2], indices_are_sorted=True),
    "unknown",
  ),
  ("sorted, as promised", lambda x: zeros_and([1, 2], x[:2], indices_are_sorted=True), "affine"),
  ("a place that depends on the input", lambda x: x.at[jnp.argmax(x)].set(0.0), "unknown"),
]


def by_branch(x):
  return lax.cond(x > 0, lambda: x, lambda: jnp.zeros_like(x))


def counted(body, x, steps=3):
  return lax.while_loop(lambda c: c[0] < steps, lambda c: (c[0] + 1, body(c[1])), (0, x))[1]


BRANCHES = [
  ("relu by a branch", lambda x: by_branch(x[0]), "convex"),
  ("of each", jax.vmap(by_branch), "convex"),
  (
    "elu by a branch",
    lambda x: lax.cond(x[0] > 0, lambda: x[0], lambda: jnp.expm1(x[0])),
    "convex",
  ),
  ("with a jump", lambda x: lax.cond(x[0] > 0, lambda: x[0], lambda: 1.0), "unknown"),
  ("by another value", lambda x: lax.cond(x[0] > 0, lambda: x[1], lambda: 0.0), "unknown"),
  ("the same either way", lambda x: lax.cond(x[0] > 0, lambda: relu(x), lambda: relu(x)), "convex"),
  (
    "one of three",
    lambda x: lax.switch(jnp.int32(x[0]), [lambda: x[0], lambda: 0.0, lambda: 1.0]),
    "unknown",
  ),
  ("a known one of three", lambda x: lax.switch(7, [jnp.sin, jnp.sin, jnp.exp], x), "convex"),
  ("counted loop", lambda x: counted(lambda c: relu(c - 1), x), "convex"),
  ("counted loop of a mixed matrix", lambda x: counted(lambda c: relu(c[::-1] - c), x), "unknown"),
  (
    "loop of unknown length",
    lambda x: lax.while_loop(lambda c: c.sum() < 9, jnp.exp, x),
    "unknown",
  ),
]


def guarded(x, test, root=jnp.sqrt, otherwise=0.0):
  """A norm whose gradient at 0 is no NaN."""
  s = x @ x
  return jnp.where(test(s), root(jnp.where(test(s), s, 1.0)), otherwise)


def of_three(x):
  i = jnp.floor(x).astype(jnp.int32)
  return lax.select_n(i, x, x**2, lax.select_n(i, x, jnp.exp(x)))


CHOICES = [
  ("norm, guarded", lambda x: guarded(x, lambda s: s > 0), "convex"),
  ("by !=", lambda x: guarded(x, lambda s: s != 0), "convex"),
  ("by 0 <", lambda x: guarded(x, lambda s: s > 0), "convex"),
  ("by not ==", lambda x: jnp.where(x @ x == 0, 0.0, jnp.sqrt(x @ x)), "convex"),
  ("of each", lambda x: jnp.where(x**2 > 0, jnp.sqrt(jnp.where(x**2 > 0, x**2, 1.0)), 0), "convex"),
  ("with a jump", lambda x: guarded(x, lambda s: s > 0, otherwise=1.0), "unknown"),
  (
    "with another jump",
    lambda x: guarded(x, lambda s: s > 0, lambda s: jnp.sqrt(s) + 1),
    "unknown",
  ),
  ("at another place", lambda x: guarded(x, lambda s: s > 1), "unknown"),
  ("the wrong way round", lambda x: jnp.where(x @ x <= 0, jnp.sqrt(x @ x), 0.0), "unknown"),
  ("of a value of any sign", lambda x: jnp.where(x > 0, jnp.abs(x), 0.0), "convex"),
  (
    "by another element",
    lambda x: jnp.where(x > 0, jnp.where(x > 0, x, 1.0)[::-1], 0.0),
    "unknown",
  ),
  (
    "by another condition",
    lambda x: jnp.where(x[0] > 0, jnp.where(x[1] > 0, x[0], 1.0), 0.0),
    "unknown",
  ),
  ("elu, guarded", lambda x: jnp.where(x > 0, x, jnp.expm1(jnp.where(x > 0, 0.0, x))), "convex"),
  ("of three, the last again of two", of_three, "unknown"),
]


def on_one_device(function, **kwargs):
  """A function inside a `shard_map` over a mesh of one device, whose axis is "i"."""
  mesh = jax.make_mesh((1,), ("i",), axis_types=(AxisType.Auto,))
  given = {"in_specs": PartitionSpec("i"), "out_specs": PartitionSpec("i"), **kwargs}
  return jax.shard_map(function, mesh=mesh, check_vma=False, **given)


def index():
  return lax.axis_index("i")


DEVICES = [
  ("psum", lambda x: lax.psum(jnp.exp(x), "i"), "convex"),
  ("pmean", lambda x: lax.pmean(jnp.exp(x), "i"), "convex"),
  ("pmax", lambda x: lax.pmax(x, "i"), "affine"),
  ("pmin", lambda x: lax.pmin(relu(x), "i"), "convex"),
  ("all_gather", lambda x: lax.all_gather(jnp.exp(x), "i").sum(0), "convex"),
  ("all_gather, tiled", lambda x: lax.all_gather(jnp.exp(x), "i", tiled=True), "convex"),
  ("psum_scatter", lambda x: lax.psum_scatter(x, "i", tiled=True), "affine"),
  ("ppermute", lambda x: lax.ppermute(relu(x), "i", [(0, 0)]), "convex"),
  ("axis_index", lambda x: relu(x) * (1.0 + index()), "convex"),
  ("axis_index, turned", lambda x: relu(x) * (index() - 1.0), "concave"),
  ("psum of tanh", lambda x: lax.psum(jnp.tanh(x), "i"), "unknown"),
  ("psum of all elements", lambda x: lax.psum(x.sum(), "i") + jax.nn.logsumexp(x)[None], "convex"),
]


@jax.custom_vjp
def with_gradient(x):
  return jnp.exp(x)


with_gradient.defvjp(lambda x: (jnp.exp(x), x), lambda x, g: (g,))

CALLS = [
  ("custom gradient", with_gradient, "convex"),
  ("named", jax.named_call(jnp.exp, name="name"), "convex"),
  (
    "saved by a policy",
    jax.checkpoint(jnp.exp, policy=jax.checkpoint_policies.dots_saveable),
    "convex",
  ),
  (
    "an axis that vmap names",
    jax.vmap(
      lambda x: lax.psum(x * x, "i") + lax.pmean(x, "i") + lax.axis_index("i"), axis_name="i"
    ),
    "convex",
  ),
  (
    "the same, turned",
    jax.vmap(lambda x: -lax.psum(x * x, "i") - lax.pmax(x, "i"), axis_name="i"),
    "concave",
  ),
  # Of its factors only is known that they are numbers.
  ("solution", lambda x: jnp.linalg.solve(SYSTEM, x), "unknown"),
  ("solution of a triangular system", lambda x: solve_triangular(SYSTEM, x), "affine"),
  ("of a convex value", lambda x: solve_triangular(SYSTEM, relu(x)), "unknown"),
  ("0 times", lambda x: 0 * solve_triangular(jnp.diag(x), jnp.ones(4)), "unknown"),
  ("0 times a float8", lambda x: 0 * x.astype(jnp.float8_e4m3fn).astype(x.dtype), "unknown"),
  ("0 times an integer", lambda x: 0 * x.astype(jnp.int8).astype(x.dtype), "affine"),
  ("of a singular system", lambda x: solve_triangular(jnp.zeros((4, 4)), x), "unknown"),
  ("convolution", lambda x: jnp.convolve(relu(x), jnp.ones(3)), "convex"),
  ("associative scan", lambda x: lax.associative_scan(jnp.add, relu(x)), "convex"),
]


def largest(x, k=2, axis=-1):
  return lax.top_k(x, k, axis=axis)[0]


def dot(x, y, dtype):
  return lax.dot_general(x, y, (((0,), (0,)), ((), ())), preferred_element_type=dtype)


SCALARS = [
  ("quotient by an exp", lambda x: 3 / jnp.exp(x), "convex"),
  ("by a power of 2", lambda x: 1 / jnp.exp2(-x), "convex"),
  ("by an exp of a concave value", lambda x: 1 / jnp.exp(-relu(x)), "convex"),
  ("by an exp of a convex value", lambda x: 1 / jnp.exp(relu(x)), "unknown"),
  ("negative quotient", lambda x: -3 / jnp.exp(x), "concave"),
  ("of either sign", lambda x: jnp.float32([1, -1, 1, 1]) / jnp.exp(x), "unknown"),
  ("quotient of infinity", lambda x: INF / jnp.exp(x), "unknown"),
  ("quotient of the input", lambda x: x / jnp.exp(x), "unknown"),
  ("quotient by what may be 0", lambda x: 1 / x**2, "unknown"),
  ("where NaN, 0", lambda x: jnp.where(jnp.isnan(relu(x)), 0.0, relu(x)), "convex"),
  ("maximum without NaN", jnp.nanmax, "convex"),
  ("where not NaN", lambda x: jnp.where(x == x, jnp.exp(x), x), "convex"),
  ("NaN of a root", lambda x: jnp.where(jnp.isnan(jnp.sqrt(x)), x, -x), "unknown"),
  ("NaN of a logarithm", lambda x: jnp.where(jnp.isnan(jnp.log(x)), x, 0.5 * x), "unknown"),
  ("NaN of 0 times infinity", lambda x: jnp.where(jnp.isnan(INF * x), -1.0, 0.0), "unknown"),
  ("NaN of infinities", lambda x: jnp.where(jnp.isnan(x + INF - INF), x[0], x), "unknown"),
  ("NaN of a quotient", lambda x: jnp.where(jnp.isnan(x / x), 1.0, x * x), "unknown"),
  ("not equal to another element", lambda x: jnp.where(x != x[::-1], x, 0.0), "unknown"),
  ("a sum in 8 bits", lambda x: dot(x, jnp.ones(4), jnp.float8_e4m3fn).astype(x.dtype), "unknown"),
  ("by its own integers", lambda x: dot(x.astype(jnp.int8), x, x.dtype), "unknown"),
]

LARGEST = [
  ("sum of the largest", lambda x: largest(x).sum(), "convex"),
  ("mean of the largest convex values", lambda x: largest(x**2, 3).mean(), "convex"),
  ("of rows", lambda x: largest(x.reshape(2, 2), 1).sum(-1), "convex"),
  ("of columns", lambda x: largest(x.reshape(2, 2), 2, 0).sum(0), "convex"),
  ("sum of the smallest", lambda x: -largest(-x).sum(), "concave"),
  ("of concave values", lambda x: largest(-relu(x)).sum(), "unknown"),
  ("one of them concave", lambda x: largest(x.at[0].set(-relu(x[1]))).sum(), "unknown"),
  ("the second", lambda x: largest(x)[1], "unknown"),
  ("the largest of rows, added", lambda x: largest(x.reshape(2, 2), 2).sum(0), "unknown"),
  ("and over the rows", lambda x: largest(x.reshape(2, 2), 1).sum(), "unknown"),
  ("less than half of the largest", lambda x: largest(x)[1:].sum(), "unknown"),
  ("weighted", lambda x: largest(x) @ jnp.float32([1, 2]), "unknown"),
  ("the place", lambda x: lax.top_k(x, 2)[1].sum().astype(np.float32), "unknown"),
]

ROWS = [*BOUNDS, *UPDATES, *BRANCHES, *CHOICES, *CALLS, *SCALARS, *LARGEST]


@pytest.mark.parametrize("name,function,expected", ROWS, ids=[row[0] for row in ROWS])
def test_what_is_proved(name, function, expected):
  check_curvature(function, X, expected)


@pytest.mark.parametrize("name,function,expected", DEVICES, ids=[row[0] for row in DEVICES])
def test_what_is_proved_on_one_device(name, function, expected):
  assert curvature_of(on_one_device(function), X) == expected


@pytest.mark.parametrize(
  "function,key",
  [
    (lambda x: lax.scan(lambda c, r: (c + r, None), 0.0, x)[0], "jaxpr"),
    (lambda x: counted(relu, x), "body_nconsts"),
    (by_branch, "branches"),
    (jax.jit(jnp.exp), "jaxpr"),
    (jnp.cumsum, "axis"),
  ],
  ids=["scan", "while", "cond", "jit", "cumsum"],
)
def test_a_layout_of_another_jax_is_refused_in_a_sentence(function, key, monkeypatch):
  """As a later version might do it, which names a parameter otherwise."""
  plain = layouts.Parameters.__init__

  def without(self, eqn):
    plain(self, eqn)
    self.pop(key, None)

  monkeypatch.setattr(layouts.Parameters, "__init__", without)
  with pytest.raises(ValueError, match=f"describes `.*` without `{key}`"):
    certify(function, jax.ShapeDtypeStruct((), jnp.float32) if function is by_branch else X)
