"""Every walk over a program, on operations with any legal parameters (`tests.support.operations`)."""

import collections
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from convex_jax.proof import linear, rules
from convex_jax.proof.arithmetic import ARITHMETICS
from convex_jax.proof.certificate import certify
from convex_jax.proof.convexified import convexify
from convex_jax.proof.export import export_cvxpy
from convex_jax.proof.rounding_errors import Program
from convex_jax.proof.rounding_walk import Ball
from convex_jax.proof.values import Value
from tests.support import operations

F32 = ARITHMETICS["float32"]
SEEDS = (*range(10), 71)  # The last has an element that a gather fills in next to a minimum.
ALL = pytest.param(range(10, 60), marks=pytest.mark.slow, id="all")
seeds_of = pytest.mark.parametrize("seeds", [pytest.param(SEEDS, id="some"), ALL])


def drawn(seed, shape, count=200):
  """Points and steps from them in small integers, of which few entries are not 0 in some."""
  rng = np.random.default_rng(seed)
  share = rng.choice([0.15, 0.5, 1.0], (count, *[1] * len(shape)))
  x, step = rng.integers(-8, 9, (2, count, *shape))
  return x.astype(np.float32), np.float32(step // 2 * (rng.random(step.shape) < share))


def refuted(f, seed, shape):
  """Of each output of f, whether one of many midpoints is too high, and whether one is too low."""
  x, step = drawn(seed, shape)
  at = jax.jit(jax.vmap(lambda x: jnp.ravel(f(x))))
  middle, low, high = (np.asarray(at(x), np.float64) for x in (x, x - step, x + step))
  with np.errstate(invalid="ignore"):
    gap = middle - (low + high) / 2
  gap, middle = (np.where(np.isfinite(gap), a, 0.0) for a in (gap, middle))
  most = 1e-4 * (1 + np.abs(middle))  # Quotients apart, gaps are multiples of 1/2.
  return (gap > most).any(0), (-gap > most).any(0)


def functions(seed, table):
  """Functions in which the operations take |x| of either sign, or numbers that multiply |x|."""
  case, rng = operations.case(seed, table), np.random.default_rng(seed)
  signs = rng.choice([-1.0, 1.0, 2.0] if rng.random() < 0.6 else [1.0, 2.0], case.shape)
  known, taken = operations.weights(rng, case.shape), rng.integers(0, signs.size, case.result)

  def others(x):
    y = jnp.ravel(case.apply(jnp.abs(x) * np.sign(signs.flat[0])))
    beside = jnp.ravel(jnp.abs(x))[taken.ravel()] - 1
    return jnp.stack([y**2, jnp.minimum(y, beside), jnp.maximum(y, -beside)])

  yield case, lambda x: case.apply(jnp.abs(x) * signs.astype(x.dtype))
  yield case, others
  yield case, lambda x: jnp.ravel(jnp.abs(x))[taken] * case.apply(jnp.asarray(known))


def proved_but_refuted(seeds, table=()):
  """Cases of which an output is proved that points refute; how many outputs are proved, or not."""
  wrong, count = [], collections.Counter()
  for seed in seeds:
    for case, f in functions(seed, table):
      refutations = refuted(f, seed, case.shape)
      for kind, bad in zip(("convex", "concave"), refutations, strict=True):
        x = jax.ShapeDtypeStruct(case.shape, np.float32)
        proved = certify(f, x, kind=kind, search_steps=0).proved
        if (proved & bad).any():
          wrong.append((seed, kind, case.names))
        count["proved"] += (proved & ~bad).sum()
        count["neither"] += (~proved & ~bad).sum()
  return wrong, count


@seeds_of
def test_nothing_that_is_proved_has_a_midpoint_too_high(seeds):
  wrong, count = proved_but_refuted(seeds)
  assert wrong == []
  assert count["proved"] > count["neither"]


FORGETFUL = {  # Of each primitive: the operation that makes it, and a rule that forgets something.
  "rev": (operations.reverse, lambda op, x: linear.masks_of(x)),
  "transpose": (
    operations.transpose,
    lambda op, x: [m.reshape(op.shape) for m in linear.masks_of(x)],
  ),
  "scatter": (operations.scatter, lambda op, x, indices, updates: linear.masks_of(x)),
  "mul": (operations.scale, lambda op, x, y: linear.masks_of(x if isinstance(x, Value) else y)),
}


@pytest.mark.parametrize("name", FORGETFUL)
def test_a_rule_that_forgets_something_is_found(name, monkeypatch):
  operation, rule = FORGETFUL[name]
  monkeypatch.setitem(rules.RULES, name, rule)
  assert any(proved_but_refuted([seed], [operation])[0] for seed in range(60))


def logits(seed):
  """Three logits, of activations of what the operations make, before or after them."""
  case, rng = operations.case(seed), np.random.default_rng(seed)
  last = operations.weights(rng, (math.prod(case.result), 3))
  act = [jnp.abs, jax.nn.relu][rng.integers(2)]
  yield case, lambda x: jnp.ravel(act(case.apply(x))) @ last.astype(x.dtype)
  yield case, lambda x: jnp.ravel(case.apply(act(x))) @ np.abs(last).astype(x.dtype)


def of_each(function, seeds):
  """How many cases a function takes, and how many it refuses, in a sentence about an operation."""
  count = collections.Counter()
  for seed in seeds:
    for case, f in logits(seed):
      if not np.isfinite(jax.jit(f)(drawn(seed, case.shape, 1)[0][0])).all():
        continue
      try:
        function(seed, case, f)
        count["done"] += 1
      except ValueError as refusal:
        sentence = ", in " in str(refusal) or "not depend on the input" in str(refusal)
        count["refused" if sentence else f"{seed}: {refusal}"] += 1
  assert set(count) <= {"done", "refused"}
  return count


@seeds_of
def test_derivatives_are_those_of_the_program(seeds):
  """Radii and minima are certified by them; JAX's own of a broadcast that transposes are wrong."""

  def check(seed, case, f):
    exact = Program(f, jax.ShapeDtypeStruct(case.shape, np.float32)).exact
    with jax.enable_x64(True):
      x = np.random.default_rng(seed).normal(size=case.shape)
      ends = jnp.stack([x + 1e-6 * x, x - 1e-6 * x])
      whole = jax.jit(lambda x, ends: (jax.jacrev(exact)(x), lax.map(exact, ends)))
      slopes, moved = map(np.asarray, whole(x, ends))
    slopes, along = slopes.reshape(3, -1), (moved[0] - moved[1]) / 2e-6
    # JAX's derivative of a clipped scatter-max is NaN, by which nothing is certified.
    told = np.isfinite(slopes).all(1)
    np.testing.assert_allclose(slopes[told] @ x.ravel(), along[told], 1e-4, 1e-4)

  assert of_each(check, seeds)["done"] > len(seeds)


@seeds_of
def test_a_common_term_makes_logits_convex(seeds):
  def check(seed, case, f):
    with jax.enable_x64(True):
      found = convexify(f, jax.ShapeDtypeStruct(case.shape, np.float64))
      x = drawn(seed, case.shape, 20)[0].astype(np.float64)
      whole = jax.jit(jax.vmap(lambda x: (found.convex_logits(x), found.common(x), f(x))))
      total, common, own = map(np.asarray, whole(x))
      size = 1 + np.abs(total) + np.abs(common)
      assert np.max(np.abs(total - common - own) / size) < 1e-12, (seed, case.names)
      assert found.certificate, (seed, case.names)

  count = of_each(check, seeds)
  assert count["done"] > count["refused"]


@seeds_of
def test_an_export_has_the_values_of_the_program(seeds):
  def check(seed, case, f):
    program = export_cvxpy(f, jax.ShapeDtypeStruct(case.shape, np.float32))
    compiled = jax.jit(f)
    for x in drawn(seed, case.shape, 3)[0]:
      np.testing.assert_allclose(program.evaluate(x), compiled(x), 1e-5, 1e-4)
      assert all(np.max(c.violation(), initial=0) < 1e-6 for c in program.constraints)

  assert of_each(check, seeds)["done"] > len(seeds) / 4


@seeds_of
def test_rounding_errors_are_within_their_bound(seeds):
  def check(seed, case, f):
    program = Program(f, jax.ShapeDtypeStruct(case.shape, np.float32), arithmetic=F32)
    rng = np.random.default_rng(seed)
    ball = Ball(rng.normal(size=case.shape), "linf", 0.3)
    moves = rng.uniform(-0.3, 0.3, (40, *case.shape)) * 0.999
    x = np.float32(ball.centre + moves)
    got = np.asarray(jax.jit(jax.vmap(f))(x), np.float64)
    with jax.enable_x64(True):
      off = got - np.asarray(jax.jit(jax.vmap(program.exact))(np.float64(x)))
    bound = program.error(ball)
    assert (bound >= 0).all() and (np.abs(off) <= bound).all(), (seed, case.names)
    apart = np.abs(off[:, :, None] - off[:, None])
    assert (apart <= program.differences(ball)).all(), (seed, case.names)

  count = of_each(check, seeds)
  assert count["done"] > count["refused"]
