"""Exported functions against their values, their minima, and formulations by hand."""

import dataclasses
import functools
import subprocess
import sys

import cvxpy as cp
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from convex_jax.models import catalog
from convex_jax.proof import certify, export, export_cvxpy, interpreter
from convex_jax.proof.certificate import NotProved
from convex_jax.proof.minimum import minimise
from tests.support import ROOT, mutants

N = 4
RNG = np.random.default_rng(0)
FIRST, SKIP = np.float32(RNG.standard_normal((2, N, 8)))
SECOND, LAST = (np.float32(np.abs(RNG.standard_normal((8, n)))) for n in (8, 2))
KERNEL, UPPER = (
  np.float32(RNG.standard_normal((3, 3, 1, 3))),
  np.float32(RNG.uniform(size=(2, 2, 3, 2))),
)
SHIFT, EIGHTHS = np.float32(RNG.standard_normal(8)), np.arange(8, dtype=np.float32) / 8
NHWC = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}


def mlp(act):
  return lambda x: act(act(x @ FIRST) @ SECOND + x @ SKIP - 3) @ LAST


def convolutions(x):
  """Two convolutions with a maximum over windows in between, of images of 6 x 6 pixels."""
  first, second = (jnp.asarray(w, x.dtype) for w in (KERNEL, UPPER))
  z = jax.lax.conv_general_dilated(x.reshape(1, 6, 6, 1), first, (1, 1), "SAME", **NHWC)
  z = nn.max_pool(nn.relu(z), (2, 2), (2, 2))
  z = jax.lax.conv_general_dilated(z, second, (1, 1), "VALID", **NHWC)
  return nn.elu(z).sum((1, 2))


def scanned(x):
  def step(carry, row):
    return nn.softplus(carry + row), jnp.abs(row)

  carry, rows = jax.lax.scan(step, x[:2], x.reshape(2, 2))
  return carry + rows[0]


def huber(z):
  return jnp.where(jnp.abs(z) < 1.5, 0.5 * z**2, 1.5 * (jnp.abs(z) - 0.75))


FUNCTIONS = {  # Each of an input of N numbers, but for the convolutions.
  "elu": mlp(nn.elu),
  "relu": mlp(nn.relu),
  "softplus": mlp(nn.softplus),
  "leaky relu": mlp(lambda z: nn.leaky_relu(z, 0.25)),
  "celu": mlp(lambda z: nn.celu(z, 0.5)),
  "prelu": mlp(lambda z: jnp.where(z >= 0, z, EIGHTHS * z)),
  "maxout": lambda x: ((x @ FIRST).reshape(2, 4).max(0) @ SECOND[:4]).max(-1),
  "convolutions": convolutions,
  "log-sum-exp": lambda x: jax.nn.logsumexp(nn.elu(x @ FIRST).reshape(2, 4), axis=0),
  "logaddexp": lambda x: jnp.logaddexp(nn.elu(x @ FIRST), x @ SKIP) @ LAST,
  "squares": lambda x: jnp.sum((x @ FIRST - SHIFT) ** 2) + jnp.abs(x).max(),
  "exponentials": lambda x: jnp.exp(nn.relu(x)) + jnp.expm1(-x) + jnp.exp2(x) + x**4,
  "concave within": lambda x: -jnp.minimum(-nn.elu(x @ FIRST), 0.5) @ LAST,
  "concave activations": lambda x: (
    jnp.where(x < 1, x, 2 * x - 1) - jnp.where(x < 0, x, -jnp.expm1(-x))
  ),
  "several kinks": mlp(lambda z: jnp.where(z < -1, -1, jnp.where(z < 0.5, z, 3 * z - 1))),
  "several bends": lambda x: huber(x @ FIRST) @ LAST,
  "solved kinks": lambda x: jnp.where(2 * x + 1 > 3, 3 * x - 1, x + 1) @ SECOND[:N],
  "clip": lambda x: jnp.clip(x @ FIRST, min=-0.5) @ LAST + jax.lax.clamp(0.0, x[:2], jnp.inf),
  "cumulative": lambda x: (
    jax.lax.cummax(x) + jnp.cumsum(jnp.abs(x)) - jax.lax.cummin(-x, reverse=True)
  ),
  "unbound": lambda x: jnp.maximum(jnp.abs(x), jnp.array([0.5, -jnp.inf, 1, -jnp.inf])),
  "parts": lambda x: sum(i * jnp.abs(part[0]) for i, part in enumerate(jnp.split(x, [1, 3]))),
  "scan": scanned,
  "dense maps in a row": lambda x: (
    nn.elu((x @ FIRST @ FIRST.T + 1) @ FIRST) @ SECOND @ LAST - x[:2]
  ),
  "steps": lambda x: x * (x > 0.25) - 0.25 * (x > 0.25) + x * jnp.sign(x),
  "affine": lambda x: 2 - x[::-1].at[1].subtract(x[0]) @ FIRST @ SECOND,
}


@functools.cache
def exported(name):
  return export_cvxpy(FUNCTIONS[name], jax.ShapeDtypeStruct((size_of(name),), jnp.float32))


def size_of(name):
  return 36 if name == "convolutions" else N


compiled = functools.cache(jax.jit)


def exact(function, x):
  """The function in float64, flat."""
  with jax.enable_x64(True):
    return np.ravel(compiled(function)(jnp.asarray(x, jnp.float64)))


def solve(program, objective, constraints):
  """The least objective, and the x where it is attained."""
  problem = cp.Problem(cp.Minimize(objective), [*program.constraints, *constraints])
  problem.solve(solver=cp.CLARABEL)
  assert problem.status == cp.OPTIMAL
  return problem.value, program.x.value


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_export_has_the_functions_values(name):
  program, rng = exported(name), np.random.default_rng(1)
  assert program.y.is_affine() == (name == "affine") and program.y.is_convex()
  for scale in (0.1, 1, 10):
    x = scale * rng.standard_normal(size_of(name))
    y = exact(FUNCTIONS[name], x)
    tolerance = 1e-13 * (1 + np.abs(y).max())
    np.testing.assert_allclose(program.evaluate(x), y, rtol=0, atol=tolerance)
    for constraint in program.constraints:
      assert np.max(constraint.violation()) <= tolerance * 100


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_least_output_at_a_fixed_input_is_the_function(name):
  """Nothing is loose: the solver cannot get below f(x), and gets to it in all outputs at once."""
  x = np.random.default_rng(2).standard_normal(size_of(name))
  program, y = exported(name), exact(FUNCTIONS[name], x)
  value, _ = solve(program, cp.sum(program.y), [program.x == x])
  np.testing.assert_allclose(program.y.value, y, rtol=1e-5, atol=1e-5)
  assert value == pytest.approx(y.sum(), rel=1e-6, abs=1e-6)


SMOOTH = ("elu", "softplus", "celu", "log-sum-exp", "logaddexp")


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n not in ("affine", "unbound")])
def test_the_minimum_over_a_box_is_that_of_minimise(name):
  program, size = exported(name), size_of(name)
  value, x = solve(program, cp.sum(program.y), [program.x >= -1, program.x <= 1])
  found = minimise(lambda x: jnp.sum(FUNCTIONS[name](x)), -np.ones(size), np.ones(size), start=x)
  tolerance = 1e-6 * (1 + abs(value))
  assert found.bound - tolerance <= value <= found.value + tolerance
  assert exact(FUNCTIONS[name], x).sum() == pytest.approx(value, abs=tolerance)
  if name in SMOOTH:  # Elsewhere a tangent at a kink bounds little.
    assert found.gap < tolerance


def by_hand(name, x):
  """The same networks as compositions of CVXPY's own atoms."""
  z = x @ FIRST
  if name == "maxout":
    return cp.max(cp.maximum(z[:4], z[4:]) @ SECOND[:4])
  if name == "squares":
    return cp.sum_squares(z - SHIFT) + cp.norm_inf(x)
  act = {
    "relu": cp.pos,
    "softplus": cp.logistic,
    "leaky relu": lambda z: cp.maximum(z, z / 4),
    "prelu": lambda z: cp.maximum(z, cp.multiply(EIGHTHS, z)),
  }[name]
  return cp.sum(act(act(z) @ SECOND + x @ SKIP - 3) @ LAST)


@pytest.mark.parametrize("name", ["relu", "softplus", "leaky relu", "prelu", "maxout", "squares"])
def test_the_minimum_over_a_cut_simplex_is_that_of_a_formulation_by_hand(name):
  program, x = exported(name), cp.Variable(N)
  value, _ = solve(program, cp.sum(program.y), simplex(program.x))
  expected = cp.Problem(cp.Minimize(by_hand(name, x)), simplex(x)).solve(solver=cp.CLARABEL)
  assert value == pytest.approx(expected, rel=1e-6, abs=1e-6)


def simplex(x):
  return [x >= 0, cp.sum(x) == 2, x[0] + 2 * x[1] <= 1]


@pytest.mark.parametrize("name", ["mlp", pytest.param("mixer", marks=pytest.mark.slow)])
def test_a_twin_is_exported_and_minimised(name):
  model = catalog.create_model(name, "tiny", "ioc", 2)
  weights, _ = mutants.feasible(model)
  network = functools.partial(mutants.infer, model)
  program = export_cvxpy(network, weights, jax.ShapeDtypeStruct((1, *mutants.SHAPE), jnp.float32))
  low, high = np.zeros((1, *mutants.SHAPE)), np.full((1, *mutants.SHAPE), 255.0)

  def logit(x):
    return network(weights, x, jnp.float64)[0, 1]

  value, x = solve(program, program.y[1], [program.x >= 0, program.x <= 255])
  found = minimise(logit, low, high)
  assert value == pytest.approx(found.value, rel=1e-4)
  assert exact(lambda x: network(weights, x, jnp.float64), x.reshape(low.shape))[
    1
  ] == pytest.approx(value, rel=1e-5)


# What may be done with an output, and what is refused.


def test_cvxpy_refuses_an_output_where_a_convex_one_may_not_stand():
  program = exported("elu")
  assert cp.Problem(cp.Minimize(cp.sum(program.y)), program.constraints).is_dcp()
  assert cp.Problem(cp.Minimize(0), [program.y <= 1]).is_dcp()
  assert not cp.Problem(cp.Maximize(cp.sum(program.y)), program.constraints).is_dcp()
  assert not cp.Problem(cp.Minimize(0), [program.y >= 1]).is_dcp()
  assert not cp.Problem(cp.Minimize(0), [program.y == 1]).is_dcp()


WEIGHTS = {"first": FIRST, "second": SECOND, "last": LAST[:, 0]}


def network(weights, x):
  return nn.softplus(nn.elu(x @ weights["first"]) @ weights["second"]) @ weights["last"]


def test_the_input_may_be_any_argument():
  x = jnp.ones(N)
  programs = [
    export_cvxpy(network, WEIGHTS, x),
    export_cvxpy(lambda x, weights: network(weights, x), x, WEIGHTS, argnums=0),
  ]
  values = [program.evaluate(x) for program in programs]
  assert values[0] == values[1] == pytest.approx(exact(functools.partial(network, WEIGHTS), x))


@pytest.mark.parametrize("leaf", ["second", "last"])
@pytest.mark.parametrize("number", [-0.25, np.nan])
def test_one_wrong_weight_is_refused(leaf, number):
  weights = {**WEIGHTS, leaf: WEIGHTS[leaf].copy()}
  weights[leaf][-1] = number
  with pytest.raises(NotProved, match=rf"entries of {leaf} are (negative|not finite)"):
    export_cvxpy(network, weights, jnp.ones(N))


@pytest.mark.parametrize(
  "function, message",
  [
    (nn.gelu, "in gelu"),
    (lambda x: -jnp.abs(x), "which is not convex"),
    (lambda x: x[0] * x[1], "a product of two values"),
  ],
)
def test_what_is_not_proved_is_refused(function, message):
  with pytest.raises(NotProved, match=message):
    export_cvxpy(function, jnp.ones(N))


def test_several_outputs_are_refused():
  with pytest.raises(ValueError, match="returns 2 arrays; expected one"):
    export_cvxpy(lambda x: (x, x), jnp.ones(N))
  with pytest.raises(ValueError, match=r"shape \(0,\); expected some entries"):
    export_cvxpy(lambda x: x[:0], jnp.zeros(3))
  with pytest.raises(NotProved, match="does not depend on the input"):
    export_cvxpy(lambda x: jnp.ones(2), jnp.ones(N))


@pytest.fixture
def believing(monkeypatch):
  """A proof that proves everything: what is left is what the export checks itself."""

  def proved(f, *args, argnums=-1):
    (output,), _ = interpreter.analyse(f, *args, argnums=argnums)
    return output

  def without_masks(self, value, plan):
    no = np.zeros(value.shape, bool)
    return bounded(self, dataclasses.replace(value, not_convex=no, not_concave=no), plan)

  bounded = export._Export._vector
  monkeypatch.setattr(export, "proved", proved)
  monkeypatch.setattr(export._Export, "_vector", without_masks)


FORM = np.float32(np.round(FIRST @ FIRST.T) + 2 * np.eye(N))
QUADRATIC = {  # Whose rules look at more than signs.
  "norm": lambda x: jnp.linalg.norm(x @ FIRST - SHIFT),
  "norms": lambda x: jnp.linalg.norm((x @ FIRST).reshape(2, 4), axis=1) @ LAST[:2],
  "root of 1 + squares": lambda x: jnp.sqrt(1 + x**2),
  "root of a mean": lambda x: jnp.sqrt(jnp.mean(nn.softplus(x @ FIRST) ** 2)),
  "product with itself": lambda x: x @ x,
  "form": lambda x: x @ FORM @ x + 3 * x[0],
  "form of two dense maps": lambda x: (y := x @ FIRST @ SECOND - 1) @ (y + SHIFT),
  "product": lambda x: (x + 1) * (2 * x + 2),
  "squares of convex values": lambda x: nn.elu(nn.relu(x @ FIRST) ** 2) @ LAST,
  "powers": lambda x: nn.relu(x @ FIRST) ** 2.5 @ LAST + nn.relu(x[:2]) ** 3,
  "cosh": lambda x: jnp.cosh(x) + jnp.zeros(N).at[jnp.array([1, 1, 2])].add(jnp.abs(x[1:])),
  "masked maximum": lambda x: jnp.max(x, where=jnp.arange(N) > 1, initial=-jnp.inf),
}


@pytest.mark.parametrize("name", QUADRATIC)
def test_what_further_rules_prove_has_its_values(name, believing):
  function, x = QUADRATIC[name], np.random.default_rng(3).standard_normal(N)
  program, y = export_cvxpy(function, jnp.ones(N)), exact(function, x)
  np.testing.assert_allclose(program.evaluate(x), y, rtol=1e-12, atol=1e-12)
  solve(program, cp.sum(program.y), [program.x == x])
  np.testing.assert_allclose(program.y.value, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  "function",
  [
    lambda x: -jnp.exp(x),
    lambda x: jnp.exp(x) - jnp.abs(x),
    lambda x: jnp.minimum(x, 0),
    lambda x: jnp.maximum(-jnp.abs(x), -1),
    lambda x: nn.elu(x) @ jnp.array([1, 1, -1, 1.0]),
    lambda x: nn.elu(-nn.elu(x)),
    lambda x: jax.nn.logsumexp(-nn.elu(x)),
    lambda x: jnp.exp(-jnp.exp(x)),
    lambda x: x[0] * x[1],
    lambda x: jnp.sqrt(x[0] ** 2 - x[1] ** 2),
    lambda x: -jnp.sqrt(x @ x),
    nn.gelu,
    nn.selu,
  ],
)
def test_a_wrong_proof_is_found_out_by_the_signs(function, believing):
  """The negative control: the export looks at the signs itself."""
  with pytest.raises(ValueError, match=r"no conic form|signs"):
    export_cvxpy(function, jnp.ones(N))


def softening(base, x):
  return jnp.log1p(base(-jnp.abs(x - x[::-1])))


@pytest.mark.parametrize(
  "function",
  [
    lambda x: (jnp.maximum(x, x[::-1]) + 1) + softening(jnp.exp, x),
    lambda x: jnp.maximum(x, x[::-1]) + softening(jnp.exp2, x),
    lambda x: jnp.maximum(x, x[::-1]) + 0.5 * softening(jnp.exp, x),
  ],
)
def test_what_is_nearly_a_logaddexp_is_not_taken_for_one(function):
  """It is proved, and as convex as one, but its values are others."""
  assert certify(function, jnp.ones(N)).verdict == "PROVED"
  with pytest.raises(ValueError, match="log1p has no conic form"):
    export_cvxpy(function, jnp.ones(N))


def test_a_proved_primitive_without_a_conic_form_is_named(believing):
  """Here a hyperbolic tangent; where it does not reach the output it does no harm."""

  def network(x):
    return nn.relu(jnp.tanh(x)) @ LAST[:N]

  with pytest.raises(ValueError, match=r"tanh has no conic form, in network, test_export.py:\d+"):
    export_cvxpy(network, jnp.ones(N))
  harmless = export_cvxpy(lambda x: jnp.concatenate([jnp.tanh(x), jnp.abs(x)])[N:], jnp.ones(N))
  np.testing.assert_allclose(harmless.evaluate(np.array([1, -2, 3, -4])), [1, 2, 3, 4])


def test_without_cvxpy_the_extra_is_named():
  code = """
import sys
sys.modules["cvxpy"] = None
from convex_jax.proof import certify
from convex_jax.proof import export_cvxpy
"""
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 1 and "line 5" in done.stderr
  assert "export_cvxpy needs cvxpy: pip install 'convex_jax[cvxpy]'" in done.stderr


def test_sums_of_exponentials_are_not_turned_silently():
  """A broadcast that transposes puts each sum in another's place."""

  def function(dimensions):
    def f(x):
      sums = jnp.exp((x @ FIRST).reshape(2, 2, 2)).sum(2)
      return jnp.log(lax.broadcast_in_dim(sums, (2, 1, 2), dimensions))

    return f

  x = jax.ShapeDtypeStruct((N,), jnp.float32)
  with pytest.raises(ValueError, match="log has no conic form"):
    export_cvxpy(function((2, 0)), x)
  assert export_cvxpy(function((0, 2)), x) is not None
