"""Convex functions as people write them: losses, norms, layers, masks, loops.

They are of the families of `tests.support.planted`, without its faults. Each is convex (or
concave, where it says so) for the reasons of a textbook (Boyd and Vandenberghe 2004, chapter 3).
The share of them that is PROVED measures how complete the certificate is.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import PartitionSpec

from tests.support import planted
from tests.support.midpoints import midpoint_gaps
from tests.support.planted import Case

# fmt: off
# One line a case.
RNG = np.random.default_rng(1)
W = np.float32(RNG.standard_normal((4, 5)))
POSITIVE = np.float32(RNG.uniform(0.1, 1, (5, 3)))
BIAS = np.float32(RNG.standard_normal(5))
FACTOR = np.float32(RNG.standard_normal((4, 3)))
PSD = FACTOR @ FACTOR.T  # Singular, up to the rounding of its entries ...
DEFINITE = PSD + np.float32(0.1) * np.eye(4, dtype=np.float32)  # ... and not.
SCALES = np.float32([0.5, 1, 2, 3])
MASK = np.array([True, False, True, True])
INDEX = np.int32([2, 0, 2, 1])
LABEL = np.float32([0, 1, 0, 0])
SIGNS = np.float32([1, -1, 1, -1])
relu, softplus, lse = jax.nn.relu, jax.nn.softplus, jax.nn.logsumexp

KINKS: list[tuple[str, Callable]] = [
  ("relu", relu),
  ("relu by maximum", lambda x: jnp.maximum(x, 0)),
  ("relu by maximum, reversed", lambda x: jnp.maximum(0.0, x)),
  ("relu by where", lambda x: jnp.where(x > 0, x, 0)),
  ("relu by a product with a condition", lambda x: x * (x > 0)),
  ("relu by (x + |x|) / 2", lambda x: (x + abs(x)) / 2),
  ("relu by clip", lambda x: jnp.clip(x, 0)),
  ("relu by clip up to infinity", lambda x: jnp.clip(x, 0, jnp.inf)),
  ("relu by lax.clamp up to infinity", lambda x: lax.clamp(0.0, x, jnp.inf)),
  ("relu by select", lambda x: jnp.select([x > 0], [x], 0.0)),
  ("relu by piecewise", lambda x: jnp.piecewise(x, [x > 0], [lambda v: v, 0.0])),
  ("relu by heaviside", lambda x: x * jnp.heaviside(x, 0.5)),
  ("relu by cond", lambda x: jax.vmap(lambda v: lax.cond(v > 0, lambda u: u, lambda u: 0 * u, v))(x)),
  ("relu by cond, unbatched", lambda x: lax.cond(x[0] > 0, lambda u: u, lambda u: 0 * u, x[0])),
  ("relu at another place", lambda x: relu(x - 1e6)),
  ("leaky relu", jax.nn.leaky_relu),
  ("leaky relu by maximum", lambda x: jnp.maximum(x, 0.2 * x)),
  ("leaky relu of slope -0.1", lambda x: jnp.where(x > 0, x, -0.1 * x)),
  ("prelu", lambda x: jnp.where(x >= 0, x, np.float32([0, 0.1, 0.5, 1]) * x)),
  ("elu", jax.nn.elu),
  ("elu, alpha 0.5", lambda x: jax.nn.elu(x, 0.5)),
  ("elu by hand", lambda x: jnp.where(x > 0, x, jnp.exp(jnp.minimum(x, 0)) - 1)),
  ("elu by a maximum", lambda x: jnp.maximum(x, 0) + jnp.minimum(jnp.expm1(x), 0)),
  ("celu", lambda x: jax.nn.celu(x, 0.3)),
  ("celu by hand", lambda x: jnp.maximum(x, 0) + jnp.minimum(0.5 * jnp.expm1(x / 0.5), 0)),
  ("absolute value", jnp.abs),
  ("absolute value by maximum", lambda x: jnp.maximum(x, -x)),
  ("absolute value by sign", lambda x: x * jnp.sign(x)),
  ("absolute value by where", lambda x: jnp.where(x < 0, -x, x)),
  ("absolute value by a root", lambda x: jnp.sqrt(x**2)),
  ("epsilon-insensitive", lambda x: relu(abs(x) - 0.1)),
  ("pinball", lambda x: jnp.maximum(0.3 * x, -0.7 * x)),
  ("hinge", lambda x: relu(1 - x * SIGNS)),
  ("squared hinge", lambda x: relu(1 - x) ** 2),
  ("smooth hinge", lambda x: jnp.where(x <= 0, 0.5 - x, jnp.where(x < 1, (1 - x) ** 2 / 2, 0))),
  ("huber", lambda x: jnp.where(abs(x) <= 1, x**2 / 2, abs(x) - 0.5)),
  ("huber by a minimum", lambda x: jnp.minimum(abs(x), 1) ** 2 / 2 + jnp.maximum(abs(x) - 1, 0)),
  ("huber, delta 0.3", lambda x: jnp.where(abs(x) < 0.3, 0.5 * x**2, 0.3 * (abs(x) - 0.15))),
  ("reversed huber", lambda x: jnp.where(abs(x) <= 1, abs(x), (x**2 + 1) / 2)),
  ("distance to an interval", lambda x: abs(x - jnp.clip(x, -1, 1))),
  ("squared distance to an interval", lambda x: (x - jnp.clip(x, -1, 1)) ** 2),
  ("interpolation in a convex table", lambda x: jnp.maximum(jnp.maximum(-2 * x - 1, -x), jnp.maximum(x, 3 * x - 2))),
  ("sparse plus", jax.nn.sparse_plus),
  ("relu squared", lambda x: jnp.square(relu(x))),
  ("relu to the power 1.5", lambda x: relu(x) ** 1.5),
  ("relu cubed", lambda x: relu(x) ** 3),
  ("|x|^3", lambda x: abs(x) ** 3),
  ("|x|^1.5", lambda x: abs(x) ** 1.5),
  ("squareplus", jax.nn.squareplus),
  ("squareplus by hand", lambda x: (x + jnp.sqrt(x**2 + 4)) / 2),
  ("pseudo-huber", lambda x: jnp.sqrt(1 + x**2) - 1),
  ("pseudo-huber by hypot", lambda x: jnp.hypot(x, 1.0)),
]

SMOOTH: list[tuple[str, Callable]] = [
  ("exp", jnp.exp),
  ("exp of minus x", lambda x: jnp.exp(-x)),
  ("exp2", jnp.exp2),
  ("expm1", jnp.expm1),
  ("2 to the x", lambda x: 2.0**x),
  ("0.5 to the x", lambda x: 0.5**x),
  ("e to the x by power", lambda x: jnp.power(np.float32(np.e), x)),
  ("square", lambda x: x**2),
  ("square by product", lambda x: x * x),
  ("square by lax.square", lax.square),
  ("square by power", lambda x: jnp.power(x, 2)),
  ("square by float power", lambda x: x**2.0),
  ("fourth power", lambda x: x**4),
  ("fourth power by float", lambda x: jnp.power(x, 4.0)),
  ("sixth power by squares", lambda x: jnp.square(x) ** 3),
  ("square of a square", lambda x: jnp.square(jnp.square(x))),
  ("cosh", jnp.cosh),
  ("cosh by exps", lambda x: (jnp.exp(x) + jnp.exp(-x)) / 2),
  ("log cosh", lambda x: jnp.log(jnp.cosh(x))),
  ("log cosh by logaddexp", lambda x: jnp.logaddexp(x, -x) - np.log(2)),
  ("log cosh by softplus", lambda x: x + softplus(-2 * x) - np.log(2)),
  ("exp of a square", lambda x: jnp.exp(x**2)),
  ("exp of a softplus", lambda x: jnp.exp(softplus(x))),
  ("square of a softplus", lambda x: softplus(x) ** 2),
  ("square of an exp", lambda x: jnp.exp(x) ** 2),
  ("polynomial with positive even terms", lambda x: 0.1 * x**4 + x**2 - 3 * x),
  ("reciprocal of an exp", lambda x: 1 / jnp.exp(x)),
  ("softplus", softplus),
  ("softplus, beta 5", lambda x: softplus(5 * x) / 5),
  ("softplus by log1p(exp)", lambda x: jnp.log1p(jnp.exp(x))),
  ("softplus by log(1 + exp)", lambda x: jnp.log(1 + jnp.exp(x))),
  ("softplus by log(exp + 1)", lambda x: jnp.log(jnp.exp(x) + 1.0)),
  ("softplus, stable", lambda x: jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-abs(x)))),
  ("softplus, stable, reversed", lambda x: jnp.log1p(jnp.exp(-jnp.abs(x))) + relu(x)),
  ("softplus by where", lambda x: jnp.where(x > 0, x + jnp.log1p(jnp.exp(-x)), jnp.log1p(jnp.exp(x)))),
  ("softplus by logaddexp", lambda x: jnp.logaddexp(x, 0.0)),
  ("softplus by logaddexp, reversed", lambda x: jnp.logaddexp(0.0, x)),
  ("softplus by logsumexp", lambda x: lse(jnp.stack([x, jnp.zeros_like(x)]), axis=0)),
  ("softplus by log sigmoid", lambda x: -jax.nn.log_sigmoid(-x)),
  ("softplus by log of sigmoid", lambda x: -jnp.log(jax.nn.sigmoid(-x))),
  ("log(2 + exp)", lambda x: jnp.log(2 + jnp.exp(x))),
  ("logistic loss", lambda x: jnp.log1p(jnp.exp(-x * SIGNS))),
  ("inverse by logaddexp2", lambda x: jnp.logaddexp2(x, 0.0)),
]

LOG_SUM_EXPS: list[tuple[str, Callable]] = [
  ("logsumexp", lse),
  ("logsumexp over an axis", lambda x: lse(x.reshape(2, 2), axis=1)),
  ("logsumexp over both axes", lambda x: lse(x.reshape(2, 2), axis=(0, 1))),
  ("logsumexp over the first axis, kept", lambda x: lse(x.reshape(2, 2), axis=0, keepdims=True)),
  ("logsumexp, b", lambda x: lse(x, b=SCALES)),
  ("logsumexp where", lambda x: lse(x, where=MASK)),
  ("logsumexp of relus", lambda x: lse(relu(x @ W))),
  ("logsumexp of a masked value", lambda x: lse(jnp.where(MASK, x, -jnp.inf))),
  ("logsumexp of a value masked by -1e9", lambda x: lse(jnp.where(MASK, x, -1e9))),
  ("logmeanexp", lambda x: lse(x) - np.log(4)),
  ("jax.nn.logmeanexp", lambda x: jax.nn.logmeanexp(x)),
  ("log of mean of exp", lambda x: jnp.log(jnp.exp(x).mean())),
  ("log of exp times weights", lambda x: jnp.log(jnp.exp(x) @ SCALES)),
  ("log sum exp", lambda x: jnp.log(jnp.sum(jnp.exp(x)))),
  ("log sum exp, shifted", lambda x: jnp.log(jnp.exp(x - x.max()).sum()) + x.max()),
  ("log sum exp, shift without gradient", lambda x: lax.stop_gradient(x.max()) + jnp.log(jnp.exp(x - lax.stop_gradient(x.max())).sum())),
  ("log sum exp, rows", lambda x: jnp.log(jnp.exp(x.reshape(2, 2) - x.reshape(2, 2).max(1, keepdims=True)).sum(1, keepdims=True)) + x.reshape(2, 2).max(1, keepdims=True)),
  ("log sum exp, rows, shift squeezed", lambda x: jnp.log(jnp.exp(x.reshape(2, 2) - x.reshape(2, 2).max(1)[:, None]).sum(1)) + x.reshape(2, 2).max(1)),
  ("log sum exp by vmap", lambda x: jax.vmap(lse)(x.reshape(2, 2))),
  ("log sum exp with temperature", lambda x: 0.1 * lse(x / 0.1)),
  ("log sum exp by a scan", lambda x: lax.scan(lambda c, r: (jnp.logaddexp(c, r), None), x[0], x[1:])[0]),
  ("log sum exp by einsum", lambda x: jnp.log(jnp.einsum("i,ij->j", jnp.exp(x), np.abs(W)))),
  ("logaddexp", lambda x: jnp.logaddexp(x[0], x[1:])),
  ("logaddexp by maximum", lambda x: jnp.maximum(x[0], x[1]) + jnp.log1p(jnp.exp(-abs(x[0] - x[1])))),
  ("logaddexp2", lambda x: jnp.logaddexp2(x[:2], x[2:])),
  ("cumlogsumexp", lambda x: lax.cumlogsumexp(x)),
  ("minus log_softmax", lambda x: -jax.nn.log_softmax(x)[0]),
  ("minus log of softmax", lambda x: -jnp.log(jax.nn.softmax(x))[1]),
  ("cross-entropy by log_softmax", lambda x: -(LABEL * jax.nn.log_softmax(x)).sum()),
  ("cross-entropy by indexing", lambda x: -jax.nn.log_softmax(x)[1]),
  ("cross-entropy by take_along_axis", lambda x: -jnp.take_along_axis(jax.nn.log_softmax(x.reshape(2, 2)), np.array([[0], [1]]), 1).mean()),
  ("cross-entropy by logsumexp", lambda x: lse(x) - x[1]),
  ("cross-entropy of soft labels", lambda x: lse(x) - np.float32([0.1, 0.2, 0.3, 0.4]) @ x),
  ("cross-entropy, smoothed", lambda x: optax.softmax_cross_entropy(x, optax.smooth_labels(LABEL, 0.1))),
  ("cross-entropy of linear logits", lambda x: lse(x @ W) - (x @ W)[2]),
  ("optax softmax cross-entropy", lambda x: optax.softmax_cross_entropy(x, LABEL)),
  ("optax softmax cross-entropy, integers", lambda x: optax.softmax_cross_entropy_with_integer_labels(x, jnp.asarray(1))),
  ("optax safe softmax cross-entropy", lambda x: optax.safe_softmax_cross_entropy(x, LABEL)),
  ("optax sigmoid binary cross-entropy", lambda x: optax.sigmoid_binary_cross_entropy(x, LABEL)),
  ("optax log cosh", lambda x: optax.log_cosh(x, SCALES)),
  ("optax huber loss", lambda x: optax.huber_loss(x, SCALES)),
  ("optax l2 loss", lambda x: optax.l2_loss(x, SCALES)),
  ("optax squared error", lambda x: optax.squared_error(x, SCALES)),
  ("optax hinge loss", lambda x: optax.hinge_loss(x, SIGNS)),
  ("optax perceptron loss", lambda x: optax.losses.perceptron_loss(x, SIGNS)),
  ("optax multiclass hinge", lambda x: optax.losses.multiclass_hinge_loss(x, jnp.asarray(1))),
  ("optax multiclass perceptron", lambda x: optax.losses.multiclass_perceptron_loss(x, jnp.asarray(1))),
  ("optax ranking softmax loss", lambda x: optax.losses.ranking_softmax_loss(x, LABEL)),
  ("optax sparsemax loss", lambda x: optax.losses.sparsemax_loss(x, LABEL)),
]

QUADRATICS: list[tuple[str, Callable]] = [
  ("x A x", lambda x: x @ DEFINITE @ x),
  ("x A x, A singular", lambda x: x @ np.float32([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 2, 0], [0, 0, 0, 0]]) @ x),
  ("x (F F^T) x, made in the program", lambda x: x @ (jnp.asarray(FACTOR) @ jnp.asarray(FACTOR).T) @ x),
  ("x A x, made by F F^T + 0.1 I", lambda x: x @ (jnp.asarray(FACTOR) @ FACTOR.T + 0.1 * jnp.eye(4)) @ x),
  ("x A x, not symmetric", lambda x: x @ (DEFINITE + np.float32([[0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])) @ x),
  ("x @ x", lambda x: x @ x),
  ("dot", lambda x: jnp.dot(x, x)),
  ("vdot", lambda x: jnp.vdot(x, x)),
  ("inner", lambda x: jnp.inner(x, x)),
  ("einsum i,i", lambda x: jnp.einsum("i,i->", x, x)),
  ("einsum i,ij,j", lambda x: jnp.einsum("i,ij,j->", x, DEFINITE, x)),
  ("einsum of rows", lambda x: jnp.einsum("bi,bi->b", x.reshape(2, 2), x.reshape(2, 2))),
  ("tensordot", lambda x: jnp.tensordot(x, x, 1)),
  ("sum of squares", lambda x: jnp.sum(x**2)),
  ("sum of x x", lambda x: (x * x).sum()),
  ("sum of x (A x)", lambda x: (x * (DEFINITE @ x)).sum()),
  ("x dot A x", lambda x: jnp.vdot(x, DEFINITE @ x)),
  ("column form", lambda x: (x[None] @ DEFINITE @ x[:, None])[0, 0]),
  ("half of it, plus a linear part", lambda x: 0.5 * x @ DEFINITE @ x - SCALES @ x + 3),
  ("|x W + b|^2", lambda x: jnp.sum((x @ W + BIAS) ** 2)),
  ("|x W + b|^2 by dot", lambda x: jnp.dot(x @ W + BIAS, x @ W + BIAS)),
  ("mean squared error", lambda x: jnp.mean((x @ W - BIAS) ** 2)),
  ("ridge", lambda x: jnp.mean((x @ W - BIAS) ** 2) + 0.1 * jnp.vdot(x, x)),
  ("weighted squares", lambda x: SCALES @ x**2),
  ("squared distance", lambda x: jnp.sum((x - SCALES) ** 2)),
  ("Mahalanobis", lambda x: (x - SCALES) @ DEFINITE @ (x - SCALES)),
  ("Mahalanobis by solve", lambda x: (x - SCALES) @ jnp.linalg.solve(DEFINITE, x - SCALES)),
  ("variance", jnp.var),
  ("Laplacian of a path", lambda x: jnp.sum(jnp.diff(x) ** 2)),
  ("batched forms", lambda x: jnp.einsum("i,bij,j->b", x, np.stack([DEFINITE, PSD + DEFINITE]), x)),
  ("batched by vmap", lambda x: jax.vmap(lambda a: x @ a @ x)(np.stack([DEFINITE, 2 * DEFINITE]))),
  ("squares of relus", lambda x: jnp.vdot(relu(x), relu(x))),
  ("product of relus with a positive matrix", lambda x: jnp.sum(relu(x) ** 2 * SCALES)),
  ("sum of the outer product", lambda x: jnp.sum(DEFINITE * jnp.outer(x, x))),
  ("trace of the outer product", lambda x: jnp.trace(jnp.outer(x, x))),
]

NORMS: list[tuple[str, Callable]] = [
  ("norm", jnp.linalg.norm),
  ("norm by hand", lambda x: jnp.sqrt(jnp.sum(x**2))),
  ("norm by x @ x", lambda x: jnp.sqrt(x @ x)),
  ("norm by vdot", lambda x: jnp.sqrt(jnp.vdot(x, x))),
  ("norm by a power", lambda x: jnp.sum(x**2) ** 0.5),
  ("norm of an affine value", lambda x: jnp.linalg.norm(x @ W + BIAS)),
  ("norm of relus", lambda x: jnp.linalg.norm(relu(x))),
  ("norm squared", lambda x: jnp.linalg.norm(x) ** 2),
  ("norm with an epsilon", lambda x: jnp.sqrt(jnp.sum(x**2) + 1e-6)),
  ("norm, safe by maximum", lambda x: jnp.sqrt(jnp.maximum(jnp.sum(x**2), 1e-12))),
  ("norms of rows", lambda x: jnp.linalg.norm(x.reshape(2, 2), axis=1)),
  ("group lasso", lambda x: jnp.sqrt((x.reshape(2, 2) ** 2).sum(-1)).sum()),
  ("norm of order 1", lambda x: jnp.linalg.norm(x, 1)),
  ("norm of order infinity", lambda x: jnp.linalg.norm(x, jnp.inf)),
  ("norm of order 3", lambda x: jnp.linalg.norm(x, 3)),
  ("norm of order 4 by hand", lambda x: jnp.sum(x**4) ** 0.25),
  ("Frobenius norm", lambda x: jnp.linalg.norm(x.reshape(2, 2))),
  ("optax global norm", lambda x: optax.global_norm({"a": x[:2], "b": x[2:]})),
  ("safe norm of optax", lambda x: optax.safe_norm(x, 1e-3)),
  ("hypot", lambda x: jnp.hypot(x[:2], x[2:])),
  ("norm of a quadratic form", lambda x: jnp.sqrt(x @ DEFINITE @ x)),
  ("standard deviation", jnp.std),
  ("elastic net", lambda x: jnp.sum(abs(x)) + jnp.sum(x**2)),
  ("total variation", lambda x: jnp.sum(abs(jnp.diff(x)))),
  ("range", lambda x: x.max() - x.min()),
  ("jnp.ptp", jnp.ptp),
  ("mean absolute deviation from a known value", lambda x: jnp.mean(abs(x - 0.3))),
  ("sum of the two largest", lambda x: lax.top_k(x, 2)[0].sum()),
  ("nuclear norm of a diagonal", lambda x: jnp.sum(abs(jnp.diag(jnp.diag(x))))),
]

REDUCTIONS: list[tuple[str, Callable]] = [
  ("maximum", jnp.max),
  ("maximum over an axis", lambda x: x.reshape(2, 2).max(0)),
  ("maximum of affine values", lambda x: jnp.max(x @ W + BIAS)),
  ("maximum where, initial -inf", lambda x: jnp.max(x, where=MASK, initial=-jnp.inf)),
  ("maximum where, initial -1e9", lambda x: jnp.max(x, where=MASK, initial=-1e9)),
  ("maximum of a masked value", lambda x: jnp.max(jnp.where(MASK, x, -jnp.inf))),
  ("sum where", lambda x: jnp.sum(relu(x), where=MASK)),
  ("mean where", lambda x: jnp.mean(relu(x), where=MASK)),
  ("masked mean by hand", lambda x: (relu(x) * MASK).sum() / MASK.sum()),
  ("minus a minimum", lambda x: -jnp.min(x, where=MASK, initial=jnp.inf)),
  ("cumulative sum", lambda x: jnp.cumsum(relu(x))),
  ("cumulative maximum", lambda x: lax.cummax(x)),
  ("associative scan of maxima", lambda x: lax.associative_scan(jnp.maximum, x)),
  ("reduce with maximum", lambda x: lax.reduce(x, -np.float32(np.inf), lax.max, (0,))),
  ("functools.reduce of maximum", lambda x: functools.reduce(jnp.maximum, list(x))),
  ("nanmax", lambda x: jnp.nanmax(x)),
  ("nansum of relus", lambda x: jnp.nansum(relu(x))),
  ("average with weights", lambda x: jnp.average(relu(x), weights=SCALES)),
  ("segment_sum", lambda x: jax.ops.segment_sum(relu(x), INDEX, 3)),
  ("segment_sum of sorted indices", lambda x: jax.ops.segment_sum(relu(x), np.array([0, 0, 1, 2]), 3, indices_are_sorted=True)),
  ("segment_max", lambda x: jax.ops.segment_max(x, np.array([2, 0, 2, 1]), 3)),
  ("segment mean", lambda x: jax.ops.segment_sum(relu(x), INDEX, 3) / jax.ops.segment_sum(jnp.ones(4), INDEX, 3)),
  ("at[].add", lambda x: jnp.zeros(3, x.dtype).at[INDEX].add(relu(x))),
  ("at[].add onto a convex value", lambda x: relu(x).at[INDEX].add(softplus(x))),
  ("at[].set", lambda x: relu(x).at[1].set(3.0)),
  ("at[].set of a slice", lambda x: relu(x).at[1:3].set(x[:2])),
  ("at[].max", lambda x: relu(x).at[INDEX].max(x)),
  ("at[].multiply", lambda x: relu(x).at[1].multiply(2.0)),
  ("at[].subtract of a concave value", lambda x: relu(x).at[1].subtract(-relu(x[0]))),
  ("bincount with weights", lambda x: jnp.bincount(INDEX, relu(x), length=3)),
  ("max pooling", lambda x: nn.max_pool(x[None, :, None], (2,), (2,))),
  ("max pooling, same padding", lambda x: nn.max_pool(x[None, :, None], (3,), (1,), "SAME")),
  ("mean pooling of relus", lambda x: nn.avg_pool(relu(x)[None, :, None], (2,), (1,))),
  ("mean pooling without the padding", lambda x: nn.avg_pool(relu(x)[None, :, None], (2,), (1,), "SAME", count_include_pad=False)),
  ("windows with dilation", lambda x: lax.reduce_window(relu(x), -jnp.inf, lax.max, (2,), (1,), "VALID", window_dilation=(2,))),
  ("linear resize", lambda x: jax.image.resize(relu(x), (8,), "linear")),
  ("moving average by convolve", lambda x: jnp.convolve(relu(x), np.float32([0.25, 0.5, 0.25]), "same")),
  ("trapezoid", lambda x: jnp.trapezoid(relu(x))),
  ("discounted sum", lambda x: lax.scan(lambda c, r: (0.9 * c + relu(r), None), 0.0, x)[0]),
]


def _icnn(act):
  def f(x):
    h = act(x @ W + BIAS)
    return act(h @ POSITIVE + x @ W[:, :3]) @ np.float32([1, 2, 3])

  return f


class Icnn(nn.Module):
  """An input-convex network whose positive weights are made in the forward pass."""

  positive: Callable[[Any], Any]

  @nn.compact
  def __call__(self, x):
    h = nn.softplus(nn.Dense(5)(x))
    for i in range(2):
      kernel = self.param(f"kernel_{i}", nn.initializers.normal(), (5, 5))
      h = nn.softplus(h @ self.positive(kernel) + nn.Dense(5)(x))
    return h.sum()


def _flax(positive):
  model = Icnn(positive)
  weights = model.init(jax.random.key(0), jnp.zeros(4))
  return lambda x: model.apply(weights, x)


def quadratic_icnn(rectify=relu, act=relu):
  """OTT-JAX's ICNN (Amos et al. 2017; Vesseron and Cuturi 2024) in a few lines."""
  rng = np.random.default_rng(3)
  quad, diag, line = (np.float32(rng.standard_normal(s)) for s in ((2, 5, 4, 1), (2, 4, 5), (2, 4, 5)))
  kernel = np.float32(rng.standard_normal((5, 5)))

  def potential(i, x):
    y = 0.5 * jnp.sum((x**2)[..., None] * softplus(jnp.asarray(diag[i])), 0)
    y = y + jnp.sum(0.5 * jnp.tensordot(x, quad[i], axes=(-1, 1)) ** 2, -1)
    return y + jnp.dot(x, line[i])

  def f(x):
    z = act(potential(0, x))
    z = act(jnp.tensordot(z, rectify(jnp.asarray(kernel)), axes=(-1, 0)) + potential(1, x))
    return z.sum() + 0.5 * jnp.sum(x**2)

  return f


def _dropout(key):
  return lambda x: relu(x @ W) * jax.random.bernoulli(key, 0.5, (5,)) / 0.5


def _batch_norm(x):
  mean, var, scale = BIAS, np.abs(BIAS) + 0.5, np.float32([1, 2, 0.5, 1, 1])
  return softplus(x @ W) * (scale / jnp.sqrt(var + 1e-5)) + (1 - mean * scale / jnp.sqrt(var + 1e-5))


def _shard_map(inside):
  def f(x):
    mesh = _one_device()
    spec = PartitionSpec("d")
    return jax.shard_map(inside, mesh=mesh, in_specs=spec, out_specs=spec)(x)

  return f


@jax.custom_jvp
def _custom_softplus(x):
  return softplus(x)


_custom_softplus.defjvp(lambda p, t: (softplus(*p), jax.nn.sigmoid(*p) * t[0]))


def _one_device():
  return jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))


def _psum(x):
  mesh = _one_device()

  def inside(v):
    return lax.psum(relu(v).sum(), "d")

  return jax.shard_map(inside, mesh=mesh, in_specs=PartitionSpec("d"), out_specs=PartitionSpec())(x)


_STACK = np.stack([np.abs(np.float32(RNG.standard_normal((4, 4)))) / 4 for _ in range(6)])
_PARAMS = {"w": [np.abs(np.float32(RNG.standard_normal((4, 4)))) for _ in range(3)]}

NETWORKS: list[tuple[str, Callable]] = [
  ("ICNN, relu", _icnn(relu)),
  ("ICNN, softplus", _icnn(softplus)),
  ("ICNN, elu", _icnn(jax.nn.elu)),
  ("ICNN, leaky relu", _icnn(jax.nn.leaky_relu)),
  ("ICNN, squared relu at the end", lambda x: relu(_icnn(relu)(x)) ** 2),
  ("ICNN, log cosh of the input", lambda x: softplus(jnp.logaddexp(x, -x) @ np.abs(W)).sum()),
  ("weights by softplus in the forward pass", lambda x: softplus(jnp.asarray(W.T)) @ relu(x)),
  ("weights by exp in the forward pass", lambda x: jnp.exp(jnp.asarray(W.T)) @ relu(x)),
  ("weights by square in the forward pass", lambda x: jnp.square(jnp.asarray(W.T)) @ relu(x)),
  ("weights by relu in the forward pass", lambda x: relu(jnp.asarray(W.T)) @ relu(x)),
  ("weights by abs in the forward pass", lambda x: jnp.abs(jnp.asarray(W.T)) @ relu(x)),
  ("weights by softmax in the forward pass", lambda x: jax.nn.softmax(jnp.asarray(W.T)) @ relu(x)),
  ("weights by sigmoid in the forward pass", lambda x: jax.nn.sigmoid(jnp.asarray(W.T)) @ relu(x)),
  ("weights by clip in the forward pass", lambda x: jnp.clip(jnp.asarray(W.T), 0) @ relu(x)),
  ("weights by elu + 1 in the forward pass", lambda x: (jax.nn.elu(jnp.asarray(W.T)) + 1) @ relu(x)),
  ("weights by logaddexp", lambda x: jnp.logaddexp(jnp.asarray(W.T), 0.0) @ relu(x)),
  ("Flax, softplus weights", _flax(nn.softplus)),
  ("Flax, relu weights", _flax(nn.relu)),
  ("Flax, squared weights", _flax(jnp.square)),
  ("quadratic ICNN as OTT-JAX has it", quadratic_icnn()),
  ("quadratic ICNN, softplus weights", quadratic_icnn(softplus)),
  ("quadratic ICNN, elu, softplus weights", quadratic_icnn(softplus, jax.nn.elu)),
  ("dropout with a fixed key", _dropout(jax.random.key(0))),
  ("BatchNorm with known statistics", _batch_norm),
  ("max-out", lambda x: (x @ np.concatenate([W, -W, W[:, :2]], 1)).reshape(4, 3).max(-1)),
  ("GroupSort of two, the larger", lambda x: jnp.maximum(x[:2], x[2:])),
  ("residual", lambda x: x @ W[:, :4] + relu(x @ W[:, 1:])),
  ("bfloat16 layers", lambda x: relu(x.astype(jnp.bfloat16) @ W.astype(jnp.bfloat16)) @ POSITIVE.astype(jnp.bfloat16)),
  ("float16 layers", lambda x: relu(x.astype(np.float16) @ W.astype(np.float16)).astype(np.float32) @ POSITIVE),
  ("mixed precision", lambda x: jnp.dot(relu(x @ W).astype(jnp.bfloat16), POSITIVE.astype(jnp.bfloat16), preferred_element_type=np.float32)),
  ("scanned layers", lambda x: lax.scan(lambda c, w: (relu(c @ w + x), None), x, _STACK)[0]),
  ("scanned, rematerialised layers", lambda x: lax.scan(jax.checkpoint(lambda c, w: (softplus(c @ w), None)), x, _STACK)[0]),
  ("fori_loop of layers", lambda x: lax.fori_loop(0, 6, lambda i, c: relu(c @ jnp.asarray(_STACK)[i] + x), x)),
  ("map over examples", lambda x: lax.map(lambda r: relu(r @ W[:2]) @ POSITIVE, x.reshape(2, 2))),
  ("vmap over examples", lambda x: jax.vmap(lambda r: relu(r @ W[:2]) @ POSITIVE)(x.reshape(2, 2))),
  ("vmap over members of an ensemble", lambda x: jax.vmap(lambda w: relu(x @ w).sum())(_STACK).mean()),
  ("nested jits", lambda x: jax.jit(lambda v: jax.jit(relu)(v) @ SCALES)(x)),
  ("tree of layers", lambda x: functools.reduce(lambda h, w: softplus(h @ w), _PARAMS["w"], x)),
  ("stop_gradient", lambda x: relu(lax.stop_gradient(x))),
  ("custom_jvp of softplus", _custom_softplus),
  ("cond on a known number", lambda x: lax.cond(jnp.asarray(2) > 1, relu, lambda v: -v, x)),
  ("switch on a known number", lambda x: lax.switch(1, [lambda v: -v, softplus, jnp.sin], x)),
  ("cond on an unrelated input that keeps convexity", lambda x: lax.cond(x[0] > 0, lambda v: relu(v), lambda v: relu(v), x)),
  ("mask of an embedding", lambda x: jnp.where(MASK, relu(x), 0.0) @ np.abs(W)),
  ("one-hot choice", lambda x: relu(x) @ jax.nn.one_hot(INDEX, 3)),
  ("shard_map", _shard_map(relu)),
  ("psum on one device", _psum),
  ("pmax by vmap", lambda x: jax.vmap(lambda v: lax.pmax(v, "i"), axis_name="i")(x)),
  ("psum by vmap", lambda x: jax.vmap(lambda v: lax.psum(relu(v), "i"), axis_name="i")(x)),
  ("sharding constraint", lambda x: lax.with_sharding_constraint(relu(x), jax.sharding.NamedSharding(_one_device(), PartitionSpec()))),
  ("optimization barrier", lambda x: lax.optimization_barrier(relu(x))),
  ("energy of a convex potential", lambda x: softplus(x @ W).sum() + 0.5 * jnp.sum(x**2)),
  ("Moreau-like: squares of parts", lambda x: 0.5 * jnp.sum(relu(x) ** 2) + 0.5 * jnp.sum(relu(-x) ** 2)),
  ("linear part by a fixed solve", lambda x: relu(jnp.linalg.solve(DEFINITE, x))),
  ("linear part by fft", lambda x: jnp.fft.rfft(x).real),
  ("linear part by an inverse", lambda x: relu(jnp.linalg.inv(DEFINITE) @ x)),
  ("positional encoding added", lambda x: relu(x + jnp.sin(jnp.arange(4.0)))),
  ("attention weights that are known", lambda x: jax.nn.softmax(np.eye(4, dtype=np.float32)) @ relu(x)),
  ("circulant by roll", lambda x: relu(x) + 0.5 * relu(jnp.roll(x, 1))),
  ("quantile loss of a linear model", lambda x: jnp.maximum(0.9 * (BIAS - x @ W), -0.1 * (BIAS - x @ W)).mean()),
]

CONCAVE: list[tuple[str, Callable]] = [
  ("log sigmoid", jax.nn.log_sigmoid),
  ("log_softmax", lambda x: jax.nn.log_softmax(x)[0]),
  ("minimum", jnp.min),
  ("minus norm", lambda x: -jnp.linalg.norm(x)),
  ("minus a quadratic form", lambda x: -(x @ DEFINITE @ x)),
  ("minimum of relu and 1, of minus", lambda x: jnp.minimum(-relu(x), 1)),
  ("log likelihood of a normal", lambda x: jax.scipy.stats.norm.logpdf(x)),
  ("log likelihood of a logistic", lambda x: jax.scipy.stats.logistic.logpdf(x)),
  ("log likelihood of a Laplace", lambda x: jax.scipy.stats.laplace.logpdf(x)),
  ("log likelihood of a multivariate normal", lambda x: jax.scipy.stats.multivariate_normal.logpdf(x, jnp.zeros(4), jnp.asarray(DEFINITE))),
]

TABLES = {
  "kinks": KINKS,
  "smooth functions": SMOOTH,
  "log-sum-exp": LOG_SUM_EXPS,
  "quadratic forms": QUADRATICS,
  "norms": NORMS,
  "reductions": REDUCTIONS,
  "networks": NETWORKS,
  "concave": CONCAVE,
}


# What is convex and not proved.
UNPROVED = {
  "kinks: relu by select",
  "kinks: relu by piecewise",
  "kinks: pseudo-huber by hypot",
  "quadratic forms: x (F F^T) x, made in the program",
  "quadratic forms: Mahalanobis by solve",
  "norms: safe norm of optax",
  "norms: hypot",
  "reductions: trapezoid",
  "known numbers: trace of an inverse",
  "networks: linear part by an inverse",
  "networks: linear part by a fixed solve",
  "networks: linear part by fft",
  "concave: log likelihood of a multivariate normal",
}


def largest_gap(case: Case) -> float:
  """By how much the middles of random pairs are too high, at most, for the values' size."""

  def f(x):
    def one(row):
      leaves = jax.tree.leaves(case.program(*case.weights, row))
      return jnp.concatenate([jnp.ravel(leaf).astype(jnp.float64) for leaf in leaves])

    return lax.map(one, x)

  gaps = midpoint_gaps(f, np.shape(case.a), pairs=40, sizes=(0.3, 3), steps=(0.1, 1))
  return float(np.nanmax(gaps if case.kind == "convex" else -gaps))


def tolerance(case: Case) -> float:
  """What rounding may make of a gap: some programs compute in half or single precision."""
  return 1e-2 if "16" in case.name or "mixed" in case.name else 1e-6


def cases() -> Iterator[Case]:
  """All convex cases, with x of four entries unless it is a convolution's."""
  for family, table in TABLES.items():
    kind = "concave" if family == "concave" else "convex"
    for name, program in table:
      yield Case(family, name, program, np.zeros(4), np.ones(4), kind=kind)
  yield from _moves()
  yield from _convolutions()
  yield from _known()


def _moves() -> Iterator[Case]:
  for name, program, _, signs, _ in planted.signs_of_moves():
    s = np.float32(signs)
    yield Case(
      "moves", name, lambda x, p=program, s=s: p(planted._features(jnp, x)).ravel() * s, np.zeros(4), np.ones(4)
    )


def _convolutions() -> Iterator[Case]:
  for name, options in planted.CONVOLUTIONS:
    kernel = planted.kernels(options)

    def program(x, o=options, k=kernel):
      return planted.convolved(o, k, relu(x))

    yield Case("convolutions", name, program, np.zeros((4, 6)), np.ones((4, 6)))


def _known() -> Iterator[Case]:
  """Known numbers whose sign is beyond doubt, though their value is rounded."""
  random, key = jax.random, jax.random.key(7)
  table: list[tuple[str, Callable[[], Any]]] = [
    ("floor of 7.5", lambda: jnp.floor(jnp.float32(0.75) * 10)),
    ("int of 2.5", lambda: jnp.float32(2.5).astype(np.int32).astype(np.float32)),
    ("gamma draw", lambda: random.gamma(key, 2.0)),
    ("uniform draw", lambda: random.uniform(key)),
    ("exponential draw", lambda: random.exponential(key)),
    ("square of a normal draw", lambda: random.normal(key) ** 2),
    ("exp of a normal draw", lambda: jnp.exp(random.normal(key))),
    ("random integers", lambda: random.randint(key, (), 1, 5).astype(np.float32)),
    ("sum of tenths", lambda: jnp.sum(jnp.full(10, 0.1))),
    ("sine of 1", lambda: jnp.sin(jnp.float32(1))),
    ("sigmoid of -5", lambda: jax.nn.sigmoid(jnp.float32(-5))),
    ("softplus of -5", lambda: softplus(jnp.float32(-5))),
    ("variance of known numbers", lambda: jnp.var(jnp.asarray(W))),
    ("norm of known numbers", lambda: jnp.linalg.norm(jnp.asarray(W))),
    ("trace of an inverse", lambda: jnp.trace(jnp.linalg.inv(jnp.asarray(DEFINITE)))),
    ("length of an arange", lambda: jnp.arange(5).sum().astype(np.float32)),
    ("cumulative product", lambda: jnp.cumprod(jnp.asarray(SCALES))[-1]),
    ("a power", lambda: jnp.float32(0.9) ** 10),
    ("a decay by a loop", lambda: lax.fori_loop(0, 10, lambda i, c: c * 0.9, jnp.float32(1))),
    ("a while loop", lambda: lax.while_loop(lambda c: c < 100, lambda c: 2 * c, jnp.float32(1))),
    ("largest of known numbers", lambda: jnp.max(jnp.asarray(SCALES))),
    ("argmax of known numbers", lambda: jnp.argmax(jnp.asarray(SCALES)).astype(np.float32)),
    ("sorted known numbers", lambda: jnp.sort(jnp.asarray(SCALES))[0]),
    ("bfloat16 of 0.3", lambda: jnp.asarray(0.3, jnp.bfloat16).astype(np.float32)),
    ("float8 of 0.3", lambda: jnp.float32(0.3).astype(jnp.float8_e4m3fn).astype(np.float32)),
    ("a draw from a split key in a scan", lambda: lax.scan(lambda c, k: (c + random.uniform(k), None), 0.0, random.split(key, 3))[0]),
  ]
  for name, make in table:
    yield Case("known numbers", name, lambda x, m=make: jnp.square(x) * m(), np.zeros(4), np.ones(4))
