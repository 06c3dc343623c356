"""Powers, norms and quadratic forms: which are proved, and which must not be."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convex_jax.proof import certify, powers, quadratic
from tests.support.curvature import check_curvature, curvature_of, worst_gap

X = jax.ShapeDtypeStruct((4,), jnp.float32)
MATRIX = jax.ShapeDtypeStruct((2, 3), jnp.float32)
RNG = np.random.default_rng(0)
MIXED = RNG.standard_normal((4, 4)).astype(np.float32)
CENTRE = RNG.standard_normal(4).astype(np.float32)
DEFINITE = (MIXED @ MIXED.T + np.eye(4)).astype(np.float32)
FACTOR = RNG.integers(-3, 4, (2, 4)).astype(np.float32)
SINGULAR = FACTOR.T @ FACTOR  # Of rank 2.
LAPLACIAN = np.float32([[1, -1, 0, 0], [-1, 2, -1, 0], [0, -1, 2, -1], [0, 0, -1, 1]])
PROJECTION = np.eye(4, dtype=np.float32) - 0.25
NEARLY = np.diag(np.float32([1, 1, 1, -1e-6]))
TURNING = np.triu(np.ones((4, 4), np.float32), 1)
ASYMMETRIC = DEFINITE + TURNING - TURNING.T
SMALL = DEFINITE[:3, :3]

relu = nn.relu
norm = jnp.linalg.norm


def form(matrix, x):
  return x @ matrix @ x


POWERS = [  # (name, function, what is to be proved)
  ("a convex value >= 0, squared", lambda x: relu(x) ** 2, "convex"),
  ("cubed", lambda x: relu(x) ** 3, "convex"),
  ("to 3/2", lambda x: relu(x) ** 1.5, "convex"),
  ("to 1/2", lambda x: relu(x) ** 0.5, "unknown"),
  ("to -1", lambda x: relu(x) ** -1, "unknown"),
  ("to -3/2", lambda x: relu(x) ** -1.5, "unknown"),
  ("times itself, written twice", lambda x: relu(x) * relu(x), "convex"),
  ("times itself, turned", lambda x: relu(x) * relu(x)[::-1], "unknown"),
  ("a value of any sign, squared in floats", lambda x: x**2.0, "convex"),
  ("to 4.0", lambda x: x**4.0, "convex"),
  ("to 3.0", lambda x: x**3.0, "unknown"),
  ("to 1.0", lambda x: x**1.0, "affine"),
  ("to 3/2, of any sign", lambda x: x**1.5, "unknown"),
  ("to nearly 2", lambda x: x ** jnp.exp(jnp.log(2.0)), "unknown"),
  ("to many", lambda x: jnp.abs(x) ** jnp.array([1.0, 2.0, 3.5, 4.0]), "convex"),
  ("to a power that depends on the input", lambda x: jnp.abs(x) ** x, "unknown"),
  ("exponentials of base 2", lambda x: 2.0 ** relu(x), "convex"),
  ("of base 1/2", lambda x: 0.5**x, "convex"),
  ("of base 1/2, of a convex value", lambda x: 0.5 ** relu(x), "unknown"),
  ("of base 0", lambda x: 0.0**x, "unknown"),
  ("of base -2", lambda x: (-2.0) ** x, "unknown"),
  ("square of a concave value <= 0", lambda x: (-relu(x)) ** 2, "convex"),
  ("cube of a concave value <= 0", lambda x: (-relu(x)) ** 3, "concave"),
  ("square of a value above 1", lambda x: (relu(x) + 1) ** 2, "convex"),
  ("square of a value above -1", lambda x: (relu(x) - 1) ** 2, "unknown"),
  ("square of softplus", lambda x: nn.softplus(x) ** 2, "convex"),
  ("square of exp", lambda x: jnp.exp(x) ** 2, "convex"),
  ("square of relu by choice", lambda x: jnp.where(x > 0, x, 0.0) ** 2, "convex"),
  ("square of the other choice", lambda x: jnp.where(x > 0, 0.0, x) ** 2, "convex"),
  ("square of elu", lambda x: nn.elu(x) ** 2, "unknown"),
  ("square of leaky relu", lambda x: nn.leaky_relu(x) ** 2, "convex"),
  ("square of a sum with positive weights", lambda x: (relu(x) @ np.abs(MIXED)) ** 2, "convex"),
  ("square of a sum with mixed weights", lambda x: (relu(x) @ MIXED) ** 2, "unknown"),
  (
    "square of a filled gather",
    lambda x: relu(x).at[jnp.array([0, 9])].get(mode="fill", fill_value=-1.0) ** 2,
    "convex",
  ),
  (
    "square of its sum",
    lambda x: relu(x).at[jnp.array([0, 9])].get(mode="fill", fill_value=-1.0).sum() ** 2,
    "unknown",
  ),
  ("absolute value of a convex value >= 0", lambda x: jnp.abs(jnp.abs(x) + 1), "convex"),
  ("of one <= 0", lambda x: jnp.abs(jnp.minimum(x, 0)), "convex"),
  ("of one of any sign", lambda x: jnp.abs(relu(x) - 1), "unknown"),
  ("cosh", jnp.cosh, "convex"),
  ("cosh of a convex value >= 0", lambda x: jnp.cosh(relu(x)), "convex"),
  ("cosh of one of any sign", lambda x: jnp.cosh(relu(x) - 1), "unknown"),
  ("sinh", jnp.sinh, "unknown"),
  ("sinh of a convex value >= 0", lambda x: jnp.sinh(relu(x)), "convex"),
]


def bent(x):
  """Concave between 0 and 1; its square is convex."""
  return jnp.where(x < 0, 1.0, jnp.where(x < 1, 1 + x - x * x / 8, 2 * x - 0.125))


NORMS = [
  ("square of a bent number", lambda x: bent(x) ** 2, "convex"),
  ("product of two", lambda x: bent(x) * bent(x), "convex"),
  ("root of the square", lambda x: jnp.sqrt(bent(x) ** 2), "unknown"),
  ("root of the product", lambda x: jnp.sqrt(bent(x) * bent(x)), "unknown"),
  ("power 1/2 of the square", lambda x: (bent(x) ** 2) ** 0.5, "unknown"),
  ("norm of bent numbers", lambda x: norm(bent(x)), "unknown"),
  ("root of a sum with infinity", lambda x: jnp.sqrt(x**2 + jnp.inf), "unknown"),
  ("norm with infinity", lambda x: jnp.sqrt(jnp.append(x**2, jnp.inf).sum()), "unknown"),
  ("root of a maximum with infinity", lambda x: jnp.sqrt(jnp.maximum(x**2, jnp.inf)), "unknown"),
  ("root of a maximum", lambda x: jnp.sqrt(jnp.maximum(x**2, -1.0)), "convex"),
  ("to infinity", lambda x: jnp.abs(x) ** jnp.inf, "unknown"),
  ("to 1/2 and infinity", lambda x: (x * x) ** jnp.array([0.5, 0.5, 0.5, jnp.inf]), "unknown"),
  ("to NaN", lambda x: jnp.abs(x) ** jnp.nan, "unknown"),
  *((f"norm {p}", functools.partial(norm, ord=p), "convex") for p in (None, 1, 2, 3, 4, jnp.inf)),
  *((f"norm {p}", functools.partial(norm, ord=p), "unknown") for p in (0, 0.5, -1, -jnp.inf)),
  ("of an affine value", lambda x: norm(x @ MIXED - CENTRE), "convex"),
  ("of a convex value >= 0", lambda x: norm(relu(x @ MIXED)), "convex"),
  ("of a convex value of any sign", lambda x: norm(nn.elu(x @ MIXED)), "unknown"),
  ("of squares and a constant", lambda x: jnp.sqrt(x**2 + 1), "convex"),
  ("of squares less a constant", lambda x: jnp.sqrt(x**2 - 1), "unknown"),
  ("of fourth powers", lambda x: jnp.sqrt(x**4 + 1), "convex"),
  ("of squares and more", lambda x: jnp.sqrt(x**2 + x + 1), "unknown"),
  ("of a difference of squares", lambda x: jnp.sqrt(jnp.abs(x[0] ** 2 - x[1] ** 2)), "unknown"),
  ("root of relu", lambda x: jnp.sqrt(relu(x)), "unknown"),
  ("root of |x|", lambda x: jnp.sqrt(jnp.abs(x)), "unknown"),
  ("root of x", jnp.sqrt, "unknown"),
  ("root of exp", lambda x: jnp.sqrt(jnp.exp(x) + 1), "convex"),
  ("root of a maximum", lambda x: jnp.sqrt(jnp.maximum(x**2, 1.0)), "convex"),
  ("root of a square below 1", lambda x: jnp.sqrt(jnp.minimum(x**2, 1.0)), "unknown"),
  ("third root of cubes", lambda x: jnp.cbrt(jnp.sum(jnp.abs(x) ** 3)), "convex"),
  ("third root of squares", lambda x: jnp.cbrt(jnp.sum(x**2)), "unknown"),
  ("square of a norm", lambda x: norm(x) ** 2, "convex"),
  ("reciprocal root", lambda x: jax.lax.rsqrt(jnp.sum(x**2) + 1), "unknown"),
  ("squareplus", jax.nn.squareplus, "convex"),
  ("pseudo-Huber", lambda x: jnp.sqrt(1 + (x / 2) ** 2) - 1, "convex"),
  ("by a dot product", lambda x: jnp.sqrt(jnp.vdot(x - CENTRE, x - CENTRE)), "convex"),
  ("by einsum", lambda x: jnp.sqrt(jnp.einsum("i,i", x, x)), "convex"),
  ("variance", jnp.var, "convex"),
  ("standard deviation", jnp.std, "convex"),
  ("Mahalanobis", lambda x: jnp.sqrt(form(DEFINITE, x - CENTRE)), "convex"),
  ("Mahalanobis, singular", lambda x: jnp.sqrt(form(SINGULAR, x) + 1), "convex"),
  ("root of an indefinite form", lambda x: jnp.sqrt(form(NEARLY, x)), "unknown"),
  ("root of a form and more", lambda x: jnp.sqrt(form(DEFINITE, x) + CENTRE @ x), "unknown"),
]

FORMS = [
  ("definite", functools.partial(form, DEFINITE), "convex"),
  ("singular", functools.partial(form, SINGULAR), "convex"),
  ("Laplacian", functools.partial(form, LAPLACIAN), "convex"),
  ("projection", functools.partial(form, PROJECTION), "convex"),
  ("of equal fractions", functools.partial(form, np.full((4, 4), 0.1, np.float32)), "convex"),
  ("one eigenvalue is -1e-6", functools.partial(form, NEARLY), "unknown"),
  ("asymmetric", functools.partial(form, ASYMMETRIC), "convex"),
  ("turned", lambda x: -form(LAPLACIAN, x), "concave"),
  ("dot", lambda x: x @ x, "convex"),
  ("dot, turned", lambda x: jnp.dot(x, -x), "concave"),
  ("einsum", lambda x: jnp.einsum("i,ij,j->", x, SINGULAR, x), "convex"),
  ("by elements", lambda x: jnp.sum(x * (DEFINITE @ x)), "convex"),
  ("by elements, indefinite", lambda x: jnp.sum(x * (NEARLY @ x)), "unknown"),
  ("squared features", lambda x: jnp.sum((x @ MIXED) ** 2), "convex"),
  ("features twice", lambda x: (MIXED @ x) @ (MIXED @ x), "convex"),
  ("features in two ways", lambda x: (x @ FACTOR.T) @ (FACTOR @ x), "convex"),
  ("with a linear term", lambda x: 0.5 * form(DEFINITE, x) + CENTRE @ x + 3, "convex"),
  ("about a centre", lambda x: form(LAPLACIAN, x - CENTRE), "convex"),
  ("about a centre, written twice", lambda x: (x - CENTRE) @ LAPLACIAN @ (x - CENTRE), "convex"),
  ("product of shifted values", lambda x: x * (2 * x + 1), "convex"),
  ("product with its opposite", lambda x: x * -x, "concave"),
  ("product of two", lambda x: x[0] * x[1], "unknown"),
  ("a square in three terms", lambda x: x[0] ** 2 + 2 * x[0] * x[1] + x[1] ** 2, "convex"),
  ("nearly a square", lambda x: x[0] ** 2 + 2.00001 * x[0] * x[1] + x[1] ** 2, "unknown"),
  ("sum of an indefinite and a definite", lambda x: form(NEARLY, x) + x @ x, "convex"),
  ("difference of squares", lambda x: x[0] ** 2 - x[1] ** 2, "unknown"),
  ("0", lambda x: x[0] * x[1] - x[1] * x[0], "affine"),
  ("of a convex value", lambda x: form(DEFINITE, relu(x)), "unknown"),
  ("dot of a convex value >= 0", lambda x: relu(x) @ relu(x), "convex"),
  ("dot of a convex value of any sign", lambda x: nn.elu(x) @ nn.elu(x), "unknown"),
  ("cubic", lambda x: (x @ x) * x[0], "unknown"),
  ("cubic by a quotient", lambda x: x.sum() / (x.sum() + 1) * x.sum(), "unknown"),
  ("cubic by a convolution", lambda x: jnp.convolve(x[:1], x[:1]) * x[:1], "unknown"),
  ("form by a known quotient", lambda x: x[0] / 2 * x[0], "convex"),
  ("by an infinite matrix", functools.partial(form, np.full((4, 4), np.inf)), "unknown"),
  ("by NaN", functools.partial(form, np.full((4, 4), np.nan)), "unknown"),
  ("times an infinite number", lambda x: jnp.inf * (x @ x), "unknown"),
  ("trace of an outer product", lambda x: jnp.trace(jnp.outer(x, x)), "convex"),
]

MATRICES = [
  ("rows", lambda x: norm(x, axis=1, keepdims=True), "convex"),
  ("Frobenius", norm, "convex"),
  ("greatest column", lambda x: norm(x, 1), "convex"),
  ("nuclear", lambda x: norm(x, "nuc"), "unknown"),
  ("trace of a Gram matrix", lambda x: jnp.trace(x @ x.T), "convex"),
  ("a Gram matrix", lambda x: x @ x.T, "unknown"),
  ("its diagonal", lambda x: jnp.diag(x @ x.T), "convex"),
  ("a form per row", lambda x: jnp.einsum("bi,ij,bj->b", x, SMALL, x), "convex"),
  ("a form per row, vmapped", jax.vmap(lambda x: form(SINGULAR[:3, :3], x)), "convex"),
  ("a square per row", lambda x: jnp.einsum("bi,bi->b", x, x), "convex"),
  ("weighted Frobenius", lambda x: jnp.trace(x @ SMALL @ x.T), "convex"),
  ("less a smaller form", lambda x: 2 * jnp.sum(x**2) - jnp.sum(x) ** 2 / 10, "convex"),
  ("less a larger form", lambda x: 2 * jnp.sum(x**2) - jnp.sum(x) ** 2, "unknown"),
]

VECTORS = [*POWERS, *NORMS, *FORMS]


@pytest.mark.parametrize("name,function,expected", VECTORS, ids=[row[0] for row in VECTORS])
def test_what_is_proved_of_powers_norms_and_forms(name, function, expected):
  check_curvature(function, X, expected)


@pytest.mark.parametrize("name,function,expected", MATRICES, ids=[row[0] for row in MATRICES])
def test_what_is_proved_of_functions_of_a_matrix(name, function, expected):
  check_curvature(function, MATRIX, expected)


def test_a_form_of_no_numbers_is_not_read():
  assert curvature_of(lambda x: x @ (x + 1), jax.ShapeDtypeStruct((0,), jnp.float32)) == "unknown"


def test_the_midpoint_test_can_fail():
  assert worst_gap(jnp.tanh, X, 1) > 1e-3 and worst_gap(lambda x: x[0] * x[1], X, 1) > 1e-3


def test_a_rule_that_forgets_the_sign_is_caught(monkeypatch):
  """Negative control: with all values taken for >= 0, the midpoints object."""
  everywhere = np.zeros(4, bool), np.ones(4, bool)
  monkeypatch.setattr(powers, "sign", lambda x: everywhere)
  with pytest.raises(AssertionError):
    check_curvature(lambda x: (relu(x) - 1) ** 2, X, "convex")


SIZES = (1, 2, 5, 40)


@pytest.mark.parametrize("size", SIZES)
def test_exact_elimination_tells_singular_from_indefinite(size):
  rng = np.random.default_rng(size)
  factor = rng.integers(1, 9, ((size + 1) // 2, size)) / 8
  gram = factor.T @ factor
  assert quadratic._is_semidefinite(gram, gram)
  assert not quadratic._is_semidefinite(-gram, -gram)
  gram[-1, -1] -= 2.0**-40 if size > 1 else 1
  assert not quadratic._is_semidefinite(gram, gram)
  assert quadratic._is_semidefinite(np.eye(size), np.eye(size))


def test_an_enclosure_is_definite_only_if_all_its_matrices_are():
  one = np.eye(3)
  assert quadratic._is_semidefinite(one - 0.1, one + 0.1)
  assert not quadratic._is_semidefinite(one - 0.6, one + 0.6)
  gram = np.ones((3, 3))  # Singular: a neighbour is indefinite.
  assert quadratic._is_semidefinite(gram, gram)
  assert not quadratic._is_semidefinite(gram, np.nextafter(gram, 2))


@pytest.mark.parametrize("n,proved", [(256, True), (257, False)])
def test_matrices_have_a_greatest_size(n, proved):
  rng = np.random.default_rng(0)
  factor = rng.standard_normal((n, n)).astype(np.float32)
  matrix = factor @ factor.T / n + np.eye(n, dtype=np.float32)
  x = jax.ShapeDtypeStruct((n,), jnp.float32)
  assert bool(certify(functools.partial(form, matrix), x, search_steps=0)) == proved
  assert certify(lambda x: jnp.sum((x @ factor) ** 2) + x @ x, x, search_steps=0)  # Of any size.
  matrix[0] *= -1
  matrix[:, 0] *= -1
  matrix[0, 0] = -1e-3
  assert not certify(functools.partial(form, matrix), x, search_steps=0)
