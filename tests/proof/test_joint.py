"""Sums that are convex together, and sums that are not, by a hair."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.curvature import curvature_of

relu = jax.nn.relu


def a(x):
  return jnp.abs(x) + x[0]


def b(x):
  return x * x + jnp.sum(jnp.abs(x))


CASES = [  # (name, function of x, curvature)
  ("the pair of a ReLU", lambda x: relu(a(x) - b(x)) + b(x), "convex"),
  ("its negative", lambda x: -(relu(a(x) - b(x)) + b(x)), "concave"),
  ("more than needed", lambda x: relu(a(x) - b(x)) + 1.25 * b(x), "convex"),
  ("too little", lambda x: relu(a(x) - b(x)) + 0.99 * b(x), "unknown"),
  ("the wrong one", lambda x: relu(a(x) - b(x)) + a(x), "unknown"),
  ("the wrong sign", lambda x: relu(a(x) - b(x)) - b(x), "unknown"),
  ("a minimum", lambda x: jnp.minimum(a(x) - b(x), 0) + b(x), "unknown"),
  ("its pair", lambda x: jnp.minimum(a(x) - b(x), 0) - a(x), "concave"),
  ("a leaky ReLU", lambda x: jax.nn.leaky_relu(a(x) - b(x), 0.1) + b(x), "convex"),
  ("an abs", lambda x: jnp.abs(a(x) - b(x)) + a(x) + b(x), "convex"),
  ("an abs, one part missing", lambda x: jnp.abs(a(x) - b(x)) + b(x), "unknown"),
  ("an affine part of any sign", lambda x: relu(x - b(x) + 1) + b(x) - 5 * x, "convex"),
  ("scaled", lambda x: 3 * relu((a(x) - b(x)) / 2) + 1.5 * b(x), "convex"),
  ("scaled, too little", lambda x: 3 * relu((a(x) - b(x)) / 2) + 1.49 * b(x), "unknown"),
  ("scaled by a negative number", lambda x: -2 * relu(a(x) - b(x)) - 2 * b(x), "concave"),
  ("two functions", lambda x: relu(a(x) - b(x)) + relu(b(x) - a(x)) + a(x) + b(x), "convex"),
  (
    "two functions, one part missing",
    lambda x: relu(a(x) - b(x)) + relu(b(x) - a(x)) + a(x),
    "unknown",
  ),
  ("softplus", lambda x: jax.nn.softplus(a(x) - b(x)) + b(x), "convex"),
  ("softplus, too little", lambda x: jax.nn.softplus(a(x) - b(x)) + 0.99 * b(x), "unknown"),
  ("exp, without bound", lambda x: jnp.exp(a(x) - b(x)) + b(x), "unknown"),
  ("ELU", lambda x: jax.nn.elu(a(x) - b(x)) + b(x), "convex"),
  ("tanh, not convex", lambda x: jnp.tanh(a(x) - b(x)) + a(x) + b(x), "unknown"),
  ("of an unknown value", lambda x: relu(jnp.sin(x) - b(x)) + b(x), "unknown"),
  ("with an unknown value", lambda x: relu(a(x) - b(x)) + b(x) + jnp.sin(x), "unknown"),
  ("elements moved", lambda x: relu(a(x) - b(x)) + b(x)[::-1], "unknown"),
  ("a sum over elements", lambda x: relu(a(x) - b(x)) + jnp.sum(x * x), "unknown"),
  (
    "right in some elements",
    lambda x: (relu(a(x) - b(x)) + jnp.array([1.0, 0.5, 1.0]) * b(x))[:, ::2],
    "convex",
  ),
  (
    "wrong in one element",
    lambda x: relu(a(x) - b(x)) + jnp.array([1.0, 0.5, 1.0]) * b(x),
    "unknown",
  ),
  ("an infinite term", lambda x: relu(a(x) - b(x)) + b(x) + jnp.inf, "unknown"),
  ("a term that is not a number", lambda x: relu(a(x) - b(x)) + b(x) + jnp.nan, "unknown"),
]


@pytest.mark.parametrize("name,function,expected", CASES, ids=[c[0] for c in CASES])
def test_what_is_proved_of_a_sum(name, function, expected):
  assert curvature_of(function) == expected


def rare(x):
  """relu(z) + s b with s a hair below 1 is not convex: where b bends and a does not, z > 0."""
  return relu(10 - b(x)) + (1 - 2.0**-20) * b(x)


def test_a_hair_is_enough():
  assert curvature_of(rare) == "unknown"
  with jax.enable_x64(True):
    x, y = jnp.array([0.5, 0.0, 0.0]), jnp.array([-0.5, 0.0, 0.0])
    gap = rare((x + y) / 2) - (rare(x) + rare(y)) / 2
    assert np.max(gap) > 0
