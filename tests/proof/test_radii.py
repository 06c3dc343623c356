"""Certified radii against attacks and brute force, bounds on slopes, global minima."""

import functools
from fractions import Fraction

import cvxpy as cp
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from ml_collections import FrozenConfigDict

from configs import base
from convex_jax.errors import UserError
from convex_jax.models import catalog
from convex_jax.proof import interpreter, minimum, rays, rounding_errors, slopes
from convex_jax.proof import radii as certificates
from convex_jax.proof.arithmetic import ARITHMETICS
from convex_jax.proof.certificate import NotProved
from convex_jax.proof.radii import NORMS, Certifier, Radius, one_sided_radius
from convex_jax.runs import certified, radii_command
from convex_jax.runs.run import Run
from tests.support import attacks, mutants

CLASSES = 5


def make_run(name="mlp", parts="ioc", workdir="nowhere", **changes):
  """A run of random weights on 8 x 8 x 3 images, logits of a few units."""
  config = base.get_config()
  config.model.update({"name": name, "size": "tiny", "parts": parts, **changes})
  config.data.image_size = 8
  names = "ab" if config.model.one_logit else "abcde"
  model = catalog.build(config.model, len(names))
  weights, _ = mutants.feasible(model)
  weights["params"]["head"] = jax.tree.map(lambda w: w / 10, weights["params"]["head"])
  return Run(
    workdir,
    FrozenConfigDict(config),
    0,
    weights["params"],
    weights["stats"],
    tuple(names),
    (8, 8, 3),
    (0.5,) * 3,
    (0.25,) * 3,
  )


def images(count, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3)).astype(np.uint8)


def exact_logits(run):
  weights = {"params": run.params, "stats": run.stats}
  return functools.partial(run.apply, weights, dtype=jnp.float64)


@pytest.mark.parametrize("name", catalog.names())
def test_slopes_stay_within_their_bounds(name):
  run, rng = make_run(name), np.random.default_rng(0)
  x = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
  (logits,), _ = interpreter.analyse(run.apply, {"params": run.params, "stats": run.stats}, x)
  between = slopes.sensitivities(logits, x.shape)
  alone = slopes.sensitivities(logits, x.shape, alone=True)
  with jax.enable_x64(True):
    f = jax.jit(exact_logits(run))
    a = rng.uniform(0, 255, (40, 8, 8, 3))
    d = rng.standard_normal(a.shape) * 10.0 ** rng.uniform(-2, 2, (40, 1, 1, 1))
    change = np.asarray(f(a + d) - f(a))
    gradients = np.asarray(jax.jit(jax.jacrev(lambda x: f(x[None])[0]))(jnp.asarray(a[0])))
  size = np.abs(d).reshape(40, -1)
  for i in range(40):
    apart = np.abs(change[i][:, None] - change[i][None])
    assert (apart <= between @ size[i] * (1 + 1e-9) + 1e-9).all()
    assert (np.abs(change[i]) <= alone @ size[i] * (1 + 1e-9)).all()
  fraction = (np.abs(gradients.reshape(CLASSES, -1)) / alone).max()
  assert fraction <= 1 + 1e-9
  # The control: bounds of shallow networks are not too large by orders of magnitude.
  assert fraction > 0.02 or name not in ("mlp", "mixer")


def test_the_bound_of_one_hidden_layer_is_the_product_of_magnitudes():
  rng = np.random.default_rng(0)
  first, second = rng.standard_normal((4, 3)), np.abs(rng.standard_normal((3, 2)))
  x = jax.ShapeDtypeStruct((4,), jnp.float32)
  (out,), _ = interpreter.analyse(lambda x: nn.elu(x @ first + 1) @ second, x)
  rows = slopes.sensitivities(out, x.shape, alone=True)
  np.testing.assert_allclose(rows, (np.abs(first) @ second).T, rtol=1e-6)
  apart = np.abs(first) @ np.abs(second[:, 0] - second[:, 1])
  np.testing.assert_allclose(slopes.sensitivities(out, x.shape)[0, 1], apart, rtol=1e-6)


@pytest.mark.parametrize("function", [jnp.exp, jax.nn.logsumexp, lambda x: x**2])
def test_a_function_without_a_bound_is_refused(function):
  (out,), _ = interpreter.analyse(function, jax.ShapeDtypeStruct((4,), jnp.float32))
  with pytest.raises(ValueError, match="bound"):
    slopes.magnitude(out)(jnp.ones(4))


@pytest.mark.parametrize("name", ["mlp", "mixer"])
def test_no_attack_within_a_certified_radius_changes_the_class(name):
  run = make_run(name)
  certifier, total = certified.certifier(run), 0
  with jax.enable_x64(True):
    attacker = attacks.Attacker(exact_logits(run), restarts=16, steps=10)
    for x in images(3).astype(np.float64):
      radius = certifier.radius(x)
      for norm in NORMS:
        inside = 0.9999 * radius.radii[norm] * 255
        assert inside > 0
        outcome = attacker.attack(x, norm, inside)
        assert outcome.changes == 0
        total += outcome.attempts
        # The control: a ball 1,000 times as large contains another class.
        assert attacker.attack(x, norm, 1000 * inside).changes > 0
  assert total == 3 * 3 * 2 * 160


HEADS = {  # Convex in x, of weights (D, K); the slopes of some have no bound.
  "log-sum-exp": lambda w, x: nn.logsumexp(x[..., None] * w, axis=1),
  "distances": lambda w, x: jnp.linalg.norm(x[..., None] - w, axis=1),
  "squared distances": lambda w, x: ((x[..., None] - w) ** 2).sum(1),
  "squared units": lambda w, x: nn.relu(x @ w) ** 2 @ np.eye(w.shape[1], dtype=np.float32),
  "exponentials": lambda w, x: jnp.exp(x @ w),
  "running maxima": lambda w, x: lax.cummax(x @ w, 1) - 0.1 * np.arange(4, dtype=np.float32),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_slope_without_a_bound_is_no_obstacle(name):
  f, rng = HEADS[name], np.random.default_rng(0)
  w = rng.normal(size=(6, 4)).astype(np.float32)
  certifier, found = Certifier(f, w, (6,)), 0.0
  with jax.enable_x64(True):
    attacker = attacks.Attacker(functools.partial(f, w), restarts=16, steps=10)
    for x in rng.normal(size=(2, 6)):
      radius = certifier.radius(x)
      for norm in NORMS:
        inside = min(0.9999 * radius.radii[norm], 100.0)
        found += inside
        assert attacker.attack(x, norm, inside).changes == 0
  assert found > 0


def test_a_loop_without_derivatives_is_refused_at_once():
  def logits(w, x):
    return lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, nn.relu(s[1] @ w)), (0, x))[1]

  with pytest.raises(ValueError, match=r"radii need derivatives .* reverse mode: .*fori_loop"):
    Certifier(logits, np.eye(3, dtype=np.float32), (3,))


@pytest.mark.parametrize("scale", [np.float32(2), np.float64(2), 2.0, 2])
def test_a_weight_may_be_a_number_of_any_kind(scale):
  def logits(weights, x):
    return nn.relu(x @ weights["w"]) * weights["scale"]

  weights = {"w": np.float32([[1, 0], [0, 1]]), "scale": scale}
  assert Certifier(logits, weights, (2,)).radius(np.array([3.0, 1.0])).radii["l1"] > 1.9


FREE = [  # Networks that are not convex, of which there are radii nevertheless.
  dict(name="mlp"),
  pytest.param(dict(name="mlp", one_logit=True), marks=pytest.mark.slow),
  pytest.param(dict(name="mixer", norm="batch"), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("network", FREE, ids=str)
def test_no_attack_within_the_radius_of_a_convexified_network_changes_the_class(network):
  run = make_run(**network, parts="base")
  certifier = certified.certifier(run, convexified=True)
  with jax.enable_x64(True):
    f = jax.jit(exact_logits(run))  # The network itself, without the common term.
    attacker = attacks.Attacker(f, restarts=16, steps=10)
    for x in images(2).astype(np.float64):
      radius = certifier.radius(x)
      assert radius.predicted == int(np.asarray(f(x[None])).argmax())
      for norm in NORMS:
        inside = 0.9999 * radius.radii[norm] * 255
        assert inside > 0
        assert attacker.attack(x, norm, inside).changes == 0
        assert attacker.attack(x, norm, 1000 * inside).changes > 0


def test_the_radius_of_a_concave_logit_ends_where_its_class_does():
  """Of 1 - relu(x) against 0 at -0.1: its tangent, which is 1, knows nothing of where it falls."""

  def logits(weights, x):
    return jnp.concatenate([1 - nn.relu(x @ weights), 0 * x], axis=-1)

  weights = np.eye(1, dtype=np.float32)
  radius = Certifier(logits, weights, (1,), convexified=True).radius(np.array([-0.1]))
  assert all(0.9 * 1.1 < r < 1.1 for r in radius.radii.values())
  with pytest.raises(NotProved):
    Certifier(logits, weights, (1,))


@pytest.mark.parametrize(
  "identity",
  [jax.lax.stop_gradient, lambda x: jnp.where(x == 0, 0.0, x)],
  ids=["without a gradient", "of another slope at a kink"],
)
def test_a_tangent_is_that_of_the_function(identity):
  """Of x + 1 against 0, at 0, where JAX's own gradient of x is 0."""

  def logits(_, x):
    return jnp.concatenate([identity(x) + 1, 0 * x], axis=-1)

  radius = Certifier(logits, (), (1,)).radius(np.zeros(1))
  assert all(0.999 < r < 1 for r in radius.radii.values())
  found = minimum.minimise(identity, np.float64([-1.0]), np.float64([1.0]), np.zeros(1))
  assert -1 - 1e-6 < found.bound <= -1 <= found.value < -1 + 1e-6
  for norm in NORMS:
    y, closed = one_sided_radius(lambda x: jnp.sum(identity(x)) + 1, jnp.zeros(1), norm)
    assert y == 1 and 0.999 < closed < 1


def test_a_derivative_that_is_no_number_gives_no_radius():
  """Of the norm of what is 0 all around: 0 / 0."""

  def norm_of(x):
    return jnp.sqrt(jnp.sum(nn.relu(x) ** 2))

  for norm in NORMS:
    assert one_sided_radius(lambda x: 1 + norm_of(x), -jnp.ones(2), norm) == (1, 0)
  found = minimum.minimise(norm_of, -np.ones(2), np.ones(2), -np.ones(2))
  assert found.value >= 0 and found.bound <= 0


def test_slopes_of_a_broadcast_that_transposes():
  """JAX's own gradient of it is that of one that does not."""
  weights, high = np.array([[1.0, -2.0], [3.0, -5.0]]), np.array([1.0, 2.0, 3.0, 4.0])

  def f(x):
    turned = jax.lax.broadcast_in_dim(x.reshape(2, 2), (2, 2, 1), (1, 0))
    return jnp.sum(turned[..., 0] * weights)

  assert (jax.grad(f)(high) != weights.T.ravel()).any()  # Else the rest of this test shows nothing.
  found = minimum.minimise(f, np.zeros(4), high)
  assert -2 * 3 - 5 * 4 - 1e-6 < found.bound <= -26 <= found.value
  slopes = weights.T.ravel() * high
  for norm, dual in (("l1", np.inf), ("l2", 2), ("linf", 1)):
    _, radius = one_sided_radius(lambda x: f(x * high) + 30, jnp.zeros(4), norm)
    np.testing.assert_allclose(radius, 30 / np.linalg.norm(slopes, dual), 1e-6)


@pytest.mark.parametrize("bias", [1e8, 1e12, 1e15])
@pytest.mark.parametrize("weight,at", [(1.0, 0.002), (0.3, 0.002), (0.3, 0.3)])
def test_large_numbers_that_cancel_are_allowed_for(bias, weight, at):
  """Of w x, computed as (w x + b) - b, against 0."""

  def logits(w, x):
    return jnp.concatenate([nn.relu(x * w + bias) - bias, 0 * x], axis=-1)

  radius = Certifier(logits, np.float32(weight), (1,)).radius(np.array([at]))
  least = 0.999 * at if bias == 1e8 else 0
  assert all(least <= r < at for r in radius.radii.values())
  _, radius = one_sided_radius(lambda x: logits(weight, x)[0], jnp.full(1, at), "l2")
  assert least <= radius < at
  with jax.enable_x64(True):
    lowest = minimum.minimise(lambda x: logits(weight, x)[0], np.zeros(1), np.full(1, at))
  assert lowest.bound <= 0


def test_a_distance_has_a_radius_around_its_centre():
  """A root has no bounded slope at 0, so that no bound on its rounding is known there."""

  def logits(_, x):
    return jnp.stack([jnp.linalg.norm(x, axis=-1), jnp.full(len(x), 5.0)], -1)

  radius = Certifier(logits, (), (2,)).radius(np.array([0.1, 0.2]), ("l1",))
  assert 3 < radius.radii["l1"] < 5


@pytest.mark.parametrize("at", [1e6, 2.0**24, 1e8])
def test_a_tangent_is_taken_aside_of_large_inputs_too(at):
  def logits(_, x):
    return jnp.concatenate([jnp.where(x == at, at, x) - at + 1, 0 * x], axis=-1)

  radius = Certifier(logits, (), (1,)).radius(np.array([at]))
  assert all(0.99 < r < 1 for r in radius.radii.values())


def test_radii_over_the_reals_know_nothing_of_the_precision_of_the_program():
  """Of x + y / 3 against 0, which the program computes in bfloat16."""

  def logits(weights, x):
    return (x.astype(jnp.bfloat16) @ weights.astype(jnp.bfloat16)).astype(jnp.float32)

  weights = np.float32([[1, 0], [1 / 3, 0]])
  radius = Certifier(logits, weights, (2,)).radius(np.array([0.1, 0.003]), ("l1",))
  assert 0.1009 < radius.radii["l1"] < 0.101


@pytest.mark.slow
def test_the_deployed_program_of_a_convexified_network_has_smaller_radii():
  run = make_run("mlp", "base")
  x = images(1)[0]
  real, deployed = (
    certified.certifier(run, arithmetic, convexified=True).radius(x).radii
    for arithmetic in ("reals", "float32")
  )
  # For l2 and linf more has been seen of the rays by then: what rounding costs may be made up for.
  assert all(0.9 * real[norm] < deployed[norm] < real[norm] * (1 + 1e-6) for norm in NORMS)
  assert deployed["l1"] < real["l1"]


def test_what_has_no_convex_form_has_no_radii():
  with pytest.raises(UserError, match=r"mul.*LayerNorm.*use"):
    certified.certifier(make_run("mlp", "base", norm="layer"), convexified=True)


@pytest.mark.parametrize(
  "name,arithmetic",
  [
    ("mlp", "float32"),
    pytest.param("mixer", "float32", marks=pytest.mark.slow),
    pytest.param("mlp", "float16", marks=pytest.mark.slow),
  ],
)
def test_no_attack_on_the_deployed_program_changes_its_class(name, arithmetic):
  """In the program's own arithmetic, inside its radii and at their rim."""
  run, total = make_run(name), 0
  certifier, real = certified.certifier(run, arithmetic), certified.certifier(run)
  dtype = ARITHMETICS[arithmetic].dtype
  attacker = attacks.Attacker(functools.partial(run.network, dtype=dtype), restarts=16, steps=10)
  for x in images(1 if arithmetic == "float32" else 2).astype(np.float32):
    found = certifier.radius(x)
    over_the_reals = real.radius(x).radii
    for norm in NORMS:
      radius = found.radii[norm]
      assert 0.9 * (arithmetic == "float32") * over_the_reals[norm] < radius + 1e-12
      assert radius < over_the_reals[norm] or arithmetic == "float32"  # There it may cost nothing.
      for inside in (0.3, 0.9999):
        outcome = attacker.attack(x, norm, inside * radius * 255)
        assert outcome.changes == 0
        total += outcome.attempts * (radius > 0)
      assert attacker.attack(x, norm, 1000 * over_the_reals[norm] * 255).changes > 0
    if any(found.radii.values()):
      assert int(run.predict(x.astype(np.uint8)[None])[0]) == found.predicted
  assert total > 0


def as_products(weights, x_BxD):
  return x_BxD @ weights


def as_sums(weights, x_BxD):
  """Without factors that a tensor core would cut off."""
  return (x_BxD[:, :, None] * weights).sum(1)


def test_radii_hold_for_every_program_that_may_be_deployed():
  weights = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)

  def radius(*programs):
    arithmetic = ARITHMETICS["tensorfloat32"]
    first, *others = programs
    certifier = Certifier(first, weights, (8,), arithmetic=arithmetic, others=others)
    return certifier.radius(np.ones(8)).radii["l1"]

  products, sums = radius(as_products), radius(as_sums)
  assert products < sums
  both = [radius(as_sums, as_products), radius(as_products, as_sums)]
  assert both == pytest.approx([products, products], rel=1e-12)  # The centre is computed by one.


def test_convolutions_are_certified_in_both_of_their_forms():
  assert len(certified.certifier(make_run("mlp"), "float32")._programs) == 1
  assert len(certified.certifier(make_run("mixer"), "float32")._programs) == 2


def test_the_arithmetic_is_known_or_refused():
  with pytest.raises(UserError, match="arithmetic is 'float8'; expected reals, float32"):
    certified.certifier(make_run("mlp"), "float8")


def test_the_l1_radius_is_where_the_first_corner_fails():
  """By brute force over all corners: none fails just below the radius, one does just above."""
  run = make_run("mixer")
  certifier = certified.certifier(run)
  with jax.enable_x64(True):
    f = jax.jit(exact_logits(run))
    x = images(1)[0].astype(np.float64)
    y = np.asarray(f(x[None]))[0]
    jacobian = np.asarray(jax.jacrev(lambda x: f(x[None])[0])(jnp.asarray(x)))
    radius, k = certifier.radius(x, ("l1",)).radii["l1"] * 255, int(y.argmax())

    def worst(e):
      corners = e * np.concatenate([np.eye(x.size), -np.eye(x.size)])
      at = np.asarray(f(x + corners.reshape(-1, *x.shape)))
      slack = y[k] + corners @ jacobian[k].ravel() - np.delete(at, k, axis=1).T
      return slack.min()

    assert worst(0.999 * radius) > 0 > worst(1.002 * radius)


def kinked(weights, x_BxD):
  """Logits (0, -1 + ...): the steepest at 0 are the first inputs, the first to fail is the last."""
  y_B = x_BxD[:, :-1] @ weights - 1 + nn.relu(10 * x_BxD[:, -1] - 0.1)
  return jnp.stack([0 * y_B, y_B], axis=-1)


@pytest.mark.parametrize("norm,radius", [("l1", 0.11), ("l2", 0.11), ("linf", 1 / (1 / 0.11 + 10))])
def test_a_ray_that_fails_first_is_found_however_flat_it_is_at_the_input(monkeypatch, norm, radius):
  monkeypatch.setattr(certificates, "BATCH", 8)  # Of 42 rays.
  weights = np.full(20, 0.5, np.float32)
  certifier = Certifier(kinked, weights, (21,))
  found = certifier.radius(np.zeros(21), (norm,)).radii[norm]
  if norm == "l2":
    radius = 1 / np.sqrt(1 / 0.11**2 + 20 / 2**2)
  assert (1 - 1 / 1000) * radius < found <= radius
  # The control: without that ray the radius is another.
  flat = Certifier(lambda w, x: kinked(w, x * (jnp.arange(21) < 20)), weights, (21,))
  assert flat.radius(np.zeros(21), (norm,)).radii[norm] > 1.5 * found


def test_many_radii_are_those_of_one_input_at_a_time(monkeypatch):
  run, few = make_run("mlp"), images(5)
  certifier = certified.certifier(run)
  monkeypatch.setattr(certificates, "IMAGES", 2)
  together = list(certifier.radii(few))
  for image, found in zip(few, together, strict=True):
    alone = certifier.radius(image)
    assert alone.predicted == found.predicted
    for norm in NORMS:
      assert found.radii[norm] == pytest.approx(alone.radii[norm], rel=1e-9)


def test_the_l1_radius_takes_one_evaluation_of_each_vertex_and_a_few_more(monkeypatch):
  certifier, evaluated = certified.certifier(make_run("mlp")), []
  monkeypatch.setattr(rays, "FIRST", 32)
  monkeypatch.setattr(rays, "FEW", 4)
  look = rays.Around.look

  def counted(around, along, steps):
    evaluated.append(len(along))
    look(around, along, steps)

  monkeypatch.setattr(rays.Around, "look", counted)
  l1 = certifier.radius(images(1)[0], ("l1",)).radii
  assert sum(evaluated) < 1.5 * 2 * 192
  evaluated.clear()
  assert certifier.radius(images(1)[0]).radii["l1"] == pytest.approx(l1["l1"], rel=1 / 4000)
  assert sum(evaluated) > 2 * 2 * 192  # The control: those of other norms take more.


@pytest.mark.parametrize(("error", "tried"), [(1e9, [0.0]), (0.0, [])])
def test_where_rounding_at_the_input_is_too_much_no_smaller_ball_is_tried(
  monkeypatch, error, tried
):
  certifier, balls = certified.certifier(make_run("mlp"), "float32"), []

  def differences(_, ball):
    balls.append(ball.radius)
    return np.full((5, 5), error)

  monkeypatch.setattr(rounding_errors.Program, "differences", differences)
  assert any(certifier.radius(images(1)[0]).radii.values()) == (error == 0)
  assert balls[len(NORMS) :] == tried


def test_norms_are_ordered_as_their_balls_are():
  radius = certified.certifier(make_run("mlp")).radius(images(1)[0])
  r, d = radius.radii, 8 * 8 * 3
  assert r["l1"] >= r["l2"] >= r["linf"] > 0
  assert r["l2"] >= r["l1"] / np.sqrt(d) * (1 - 1e-9) and r["linf"] >= r["l1"] / d * (1 - 1e-9)


def test_a_tie_has_no_radius():
  run = make_run("mlp")
  head = jax.tree.map(np.zeros_like, run.params["head"])
  run = run.replace(params={**run.params, "head": head})
  assert certified.certifier(run).radius(images(1)[0]).radii == dict.fromkeys(NORMS, 0)


def test_a_run_that_is_not_proved_is_refused():
  with pytest.raises(UserError, match=r"proved networks only.*LayerNorm.*parts=ioc"):
    certified.certifier(make_run("mixer", "base"))
  with pytest.raises(UserError, match="proved networks only"):
    certified.minimise_logit(make_run("mlp", "base"), 0)
  with pytest.raises(UserError, match="only the head is convex"):
    certified.certifier(make_run("mlp", convex_from="head", head_depth=1))


def test_the_one_sided_radius_is_exact_for_an_affine_logit():
  w = np.float32([3, -4])
  for norm, size in (("l1", 4), ("l2", 5), ("linf", 7)):
    y, radius = one_sided_radius(lambda x: x @ w + 10, jnp.zeros(2), norm)
    assert y == 10 and radius == pytest.approx(10 / size)
  assert one_sided_radius(lambda x: x @ w - 10, jnp.zeros(2), "l2") == (-10, 0)


def test_a_one_logit_network_has_the_closed_form_on_its_side_and_a_radius_on_the_other():
  run, sides = make_run("mlp", one_logit=True), set()
  with jax.enable_x64(True):
    f = jax.jit(exact_logits(run))
    middle = float(np.median(np.asarray(f(images(40).astype(float)))[:, 0]))
    head = {**run.params["head"], "bias": run.params["head"]["bias"] - middle}
    run = run.replace(params={**run.params, "head": head})  # So that both sides occur.
    certifier, f = certified.certifier(run), jax.jit(exact_logits(run))
    attacker = attacks.Attacker(f)
    every = images(5).astype(float)
    logit_N = np.asarray(f(every))[:, 0]
    for x in every[[logit_N.argmin(), logit_N.argmax()]]:
      r, y = certifier.radius(x), float(f(x[None])[0, 0])
      assert float(f(x[None])[0, 1]) == 0 and r.predicted == (y < 0)
      for norm in NORMS:
        _, closed = one_sided_radius(lambda x: f(x[None])[0, 0], jnp.asarray(x), norm)
        if y > 0:
          assert r.radii[norm] * 255 == pytest.approx(closed, rel=1e-5)
        assert r.radii[norm] > 0
        assert not attacker.attack(x, norm, 0.9999 * 255 * r.radii[norm]).changes
      sides.add(r.predicted)
  assert sides == {0, 1}


@pytest.mark.parametrize("norm", NORMS)
def test_the_one_sided_radius_withstands_attacks(norm):
  rng = np.random.default_rng(0)
  first, second = rng.standard_normal((6, 20)), np.abs(rng.standard_normal(20))

  def logit(x):
    return nn.elu(x @ first) @ second - 5

  checked = 0
  with jax.enable_x64(True):
    for x in 2 * rng.standard_normal((40, 6)):
      y, radius = one_sided_radius(logit, jnp.asarray(x), norm)
      d = rng.standard_normal((500, 6)) ** rng.choice([1, 3], (500, 1))
      d *= radius / np.linalg.norm(
        d, {"l1": 1, "l2": 2, "linf": np.inf}[norm], axis=1, keepdims=True
      )
      assert (np.asarray(logit(x + d)) >= -1e-9).all() or y <= 0
      checked += y > 0
  assert checked > 10


def test_the_minimum_of_a_quadratic_over_a_box_is_known():
  centre = np.array([0.5, 3.0, -2.0])
  found = minimum.minimise(lambda x: jnp.sum((x - centre) ** 2), -np.ones(3), np.ones(3))
  np.testing.assert_allclose(found.x, [0.5, 1, -1], atol=1e-6)
  assert found.value == pytest.approx(5) and 0 <= found.gap < 1e-6


def test_the_bound_is_below_the_minimum_of_affine_functions():
  """Exactly: float64 rounds it to either side."""
  for seed in range(10):
    rng = np.random.default_rng(seed)
    slope, low = rng.standard_normal((2, 4)) * [[100], [1]]
    start, high = rng.normal() * 1000, low + rng.uniform(size=4)
    found = minimum.minimise(lambda x: jnp.sum(jnp.asarray(slope) * x) + start, low, high)
    least = np.where(slope > 0, low, high)
    exact = sum(map(lambda a, b: Fraction(a) * Fraction(b), slope, least), Fraction(start))
    assert Fraction(found.bound) < exact and found.gap < 1e-5


@pytest.mark.parametrize("ends", [(-np.inf, np.inf), (0, np.inf), (1, 0), (0, np.nan)])
def test_a_box_that_is_empty_or_not_finite_is_refused(ends):
  with pytest.raises(ValueError, match="box"):
    minimum.minimise(
      lambda x: jnp.sum(x**2), np.full(2, ends[0], float), np.full(2, ends[1], float)
    )


def test_the_minimum_of_a_small_network_is_cvxpys():
  rng = np.random.default_rng(0)
  w1, w2 = rng.standard_normal((4, 8)), np.abs(rng.standard_normal((8, 8)))
  w3, v = np.abs(rng.standard_normal(8)), rng.standard_normal((4, 8))

  def network(x):
    return nn.softplus(nn.softplus(x @ w1) @ w2 + x @ v - 8) @ w3

  x = cp.Variable(4)
  hidden = cp.logistic(w2.T @ cp.logistic(w1.T @ x) + v.T @ x - 8)
  problem = cp.Problem(cp.Minimize(w3 @ hidden), [x >= -1, x <= 1])
  problem.solve(solver=cp.CLARABEL)
  found = minimum.minimise(network, -np.ones(4), np.ones(4))
  assert found.value == pytest.approx(problem.value, rel=1e-5)
  assert found.bound <= problem.value + 1e-7 and found.gap < 1e-4 * abs(found.value)


BOXED = [  # Function, box, start, least value.
  (lambda x: jnp.sum(jnp.where(x < 0, 5 - x, x**2)), (0, 1), 0.0, 0.0),  # Convex in the box alone.
  (lambda x: jnp.sum(x * jnp.log(x)), (0, 1), 0.0, -2 / np.e),
  (lambda x: jnp.sum(1e6 * x), (0, 1), 0.3, 0.0),
  (lambda x: -jnp.sum(jnp.sqrt(1 - x)), (0, 1), 0.3, -2.0),
  (lambda x: jnp.sum(jnp.abs(x)), (2, 2), None, 4.0),  # A point.
]


@pytest.mark.parametrize(("function", "box", "start", "least"), BOXED)
def test_the_bound_is_never_above_the_least_value_in_the_box(function, box, start, least):
  low, high = (np.full(2, float(end)) for end in box)
  found = minimum.minimise(function, low, high, None if start is None else np.full(2, start))
  assert found.bound <= least and least - found.bound < 1e-5 * (1 + abs(least))
  assert least <= found.value < least + 1e-5


def test_the_bound_of_a_concave_function_is_broken():
  """The negative control: for a concave function it does not hold; none where the value shows it."""

  def f(x):  # Its minimum is f(-1, -1) = -3.
    return jnp.sum(x / 2 - x**2)

  ends = -np.ones(2), np.ones(2)
  assert -3 < minimum.minimise(f, *ends, start=[1, 1]).bound <= -1
  assert minimum.minimise(f, *ends, start=[0.5, 0.5]).bound == -np.inf


def test_a_logit_is_minimised_over_all_images():
  run = make_run("mixer")
  found = certified.minimise_logit(run, 2)
  assert found.x.shape == (8, 8, 3) and found.x.min() >= 0 and found.x.max() <= 255
  assert 0 <= found.gap < 1e-3 * (1 + abs(found.value))
  with jax.enable_x64(True):
    corners = np.random.default_rng(0).uniform(0, 255, (500, 8, 8, 3))
    assert np.asarray(exact_logits(run)(corners))[:, 2].min() > found.value


def test_logits_may_come_of_several_rows():
  """Where the last matrix makes two of four logits from each half of the input."""
  rows = np.float32([[1, -1], [0.5, 2]])
  radius = Certifier(lambda w, x: (x.reshape(1, 2, 2) @ w).reshape(1, 4), rows, (4,)).radius(
    np.float32([3, 0, 0, 0])
  )
  assert radius.predicted == 0 and radius.radii["linf"] == pytest.approx(3 / 4.5, rel=1e-6)


@pytest.mark.parametrize(
  "f",
  [lambda w, x: x[:, :1], lambda w, x: x[:, 0], lambda w, x: x[:, :0], lambda w, x: x[0]],
  ids=["one", "no axis", "none", "no batch"],
)
def test_fewer_than_two_logits_are_refused(f):
  with pytest.raises(ValueError, match="two or more"):
    Certifier(f, {}, (3,))


def test_an_input_of_another_shape_is_refused():
  certifier = Certifier(lambda w, x: jnp.concatenate([x, -x], 1), {}, (1,))
  with pytest.raises(ValueError, match="expected \\(1,\\)"):
    certifier.radius(np.ones(2))


def test_a_program_of_margins_that_never_change_has_radii():
  """Over the reals they are infinite or huge, and so is rounding in such a ball."""
  radius = Certifier(
    lambda w, x: 0.5 * x[:, :1] + jnp.float32([2, 1]), {}, (1,), arithmetic=ARITHMETICS["float32"]
  ).radius(np.zeros(1))
  assert 10 < radius.radii["l1"] < np.inf


def test_norms_are_read_or_refused():
  assert radii_command.norms_of("l1,linf,l1") == ("l1", "linf")
  for text in ("l3", "", "l1,"):
    with pytest.raises(UserError, match="expected some of l1,l2,linf"):
      radii_command.norms_of(text)


def test_a_report_is_written(tmp_path):
  radii = [Radius(1, {"l1": r, "l2": r / 2}) for r in (0.1, 0.2, 0.3, 0.4)]
  measured = radii_command.Measured(np.array([1, 1, 0, 1]), radii)
  assert measured.certified_accuracy("l1", 0.15) == 0.5  # 0.1 too small, 0.3 is wrong.
  table = radii_command.table_of(measured, ("l1", "l2"))
  radii_command.write(make_run(workdir=str(tmp_path)), measured, ("l1", "l2"))
  assert table.row_count == 2 and "75.0 %" in table.title
  lines = (tmp_path / "radii.csv").read_text().splitlines()
  assert lines[0] == "example,label,predicted,l1,l2,arithmetic,step"
  assert lines[3] == "2,0,1,0.3,0.15,reals,0"
  assert (tmp_path / "radii.png").stat().st_size > 5000


def test_a_bound_above_the_value_is_none():
  """Numbers of 1e10 cancel, and leave errors of 1e-6."""

  def f(x):
    return jnp.sum(x * 1e10 + 1e10) - 2e10 - jnp.sum(x) * 1e10 + 0.5 + jnp.sum(x**2)

  found = minimum.minimise(f, np.full(2, -1.0), np.full(2, 1.0))
  assert found.bound <= 0.5 and found.bound <= found.value


def test_radii_beyond_the_range_of_squares():
  """Of slopes below 1e-154 and reaches above 1e154, in every norm."""
  w = [np.float32(1e-33)] * 5  # Their product is 1e-165.

  def network(w, x):
    for a in w:
      x = x * a
    return jnp.stack([1 + x[..., 0], -x[..., 0] + 0 * x[..., 1]], -1)

  radii = Certifier(network, w, (2,)).radius(np.ones(2)).radii
  assert all(4.99e164 < radii[norm] <= 5e164 for norm in NORMS)
  for norm in NORMS:
    _, radius = one_sided_radius(lambda x: network(w, x[None])[0, 0], jnp.ones(2), norm)
    assert 0.99e165 < radius <= 1.0001e165


@pytest.mark.parametrize(
  "call, expected",
  [
    (lambda c: c.radius(np.ones(2), None), "norms are None"),
    (lambda c: c.radius(np.ones(2), ([],)), "norms are"),
    (lambda c: c.radius(np.ones(2) + 1j), "complex128; expected real numbers"),
    (lambda c: next(c.radii(x for x in np.ones((1, 2)))), "images are a generator"),
    (lambda _: Certifier(lambda w, x: x @ w, jnp.eye(2), (2,), scale=-1), "scale is -1"),
    (lambda _: Certifier(lambda w, x: x @ w, jnp.eye(2), (2,), scale=np.nan), "scale is nan"),
    (lambda _: Certifier(lambda w, x: x @ w, jnp.eye(2), 2), "shape is 2"),
    (lambda _: Certifier(lambda w, x: x @ w, jnp.eye(2), (0,)), r"shape is \(0,\)"),
    (
      lambda _: Certifier(lambda w, x: x @ w, jnp.eye(2), (2,), arithmetic="float32"),
      "arithmetic is 'float32'",
    ),
    (lambda _: one_sided_radius(jnp.sum, jnp.ones(2), "l3"), "norm is 'l3'"),
  ],
)
def test_odd_arguments_are_refused_in_a_sentence(call, expected):
  certifier = Certifier(lambda w, x: x @ w, jnp.eye(2), (2,))
  with pytest.raises(ValueError, match=expected):
    call(certifier)


@pytest.mark.parametrize(
  "arguments, expected",
  [
    ((np.zeros(3), np.ones(2)), "ends of the shapes"),
    ((np.zeros(0), np.ones(0)), "with entries"),
    ((np.zeros(3), np.ones(3), np.ones(2)), "start is"),
    ((np.zeros(3), np.ones(3), np.full(3, np.nan)), "start is"),
  ],
)
def test_odd_arguments_of_a_minimum_are_refused_in_a_sentence(arguments, expected):
  with pytest.raises(ValueError, match=expected):
    minimum.minimise(jnp.sum, *arguments)
  with pytest.raises(ValueError, match="expected a scalar"):
    minimum.minimise(jnp.abs, np.zeros(3), np.ones(3))


def test_norms_may_come_one_by_one():
  certifier = Certifier(lambda w, x: x @ w, jnp.eye(2), (2,))
  norms = iter(["l1", "l2"])
  assert set(certifier.radius(np.array([1.0, 3.0]), norms).radii) == {"l1", "l2"}
