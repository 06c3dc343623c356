"""Certificates: of every architecture and twin, and of plain functions."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from convex_jax.models import catalog
from convex_jax.proof import certify
from convex_jax.training import optimizer, step
from tests.support import mutants

PX = 8


def config_of(name, parts, **changes):
  return catalog.model_config(name, "tiny", parts, **changes)


@functools.cache
def trained(name, parts, steps=4, learning_rate=0.3):
  """(model, weights) after a few large updates on noise, and the tags."""
  config = base.get_config()
  config.model.update(config_of(name, parts))
  config.optimizer.learning_rate = learning_rate
  model = catalog.build(config.model, classes=5)
  _, kinds = mutants.feasible(model)
  tx = optimizer.make_optimizer(config.optimizer, steps, kinds)
  return model, mutants.after_training(model, tx, steps), kinds


def certificate_of(model, weights, **kwargs):
  example = jax.ShapeDtypeStruct((1, PX, PX, 3), jnp.float32)
  kwargs = {"search_steps": 0, **kwargs}
  return certify(lambda w, x: step.apply(model, w, x), weights, example, **kwargs)


@pytest.mark.parametrize("name", catalog.names())
@pytest.mark.parametrize("steps", [0, 4])
def test_every_ioc_twin_is_proved_fresh_and_trained(name, steps):
  model, weights, _ = trained(name, "ioc", steps=steps)
  certificate = certificate_of(model, weights)
  assert certificate and certificate.verdict == "PROVED" and len(certificate.proved) == 5
  assert certificate.reason is None
  if steps:  # A fresh head may be zero.
    assert not certificate_of(model, weights, kind="concave")


@pytest.mark.parametrize("name", catalog.names())
def test_one_logit_and_so_the_difference_of_two_classes_is_proved(name):
  model = catalog.build({**config_of(name, "ioc"), "one_logit": True}, classes=2)
  weights, _ = mutants.feasible(model)
  assert certificate_of(model, weights).verdicts == ["PROVED"] * 2
  other_side = certificate_of(model, weights, kind="concave")
  assert other_side.verdicts == ["UNKNOWN", "PROVED"]  # The second is 0.
  logits = jax.jit(functools.partial(step.apply, model))(
    weights, np.ones((3, PX, PX, 3), np.float32)
  )
  assert logits.shape == (3, 2) and (logits[:, 0] != 0).all() and (logits[:, 1] == 0).all()


WIDER = [
  ("mixer", dict(parallel=True, cells=2, dense_readout=True, overlap=1)),
  ("cycle_mlp", dict(cells=2, dense_readout=True)),
  ("mlp", dict(dense_readout=True)),
]


@pytest.mark.parametrize("name,fields", WIDER, ids=str)
def test_a_head_that_reads_hidden_units_is_proved_and_its_mutant_is_not(name, fields):
  model = catalog.build({**config_of(name, "ioc"), **fields}, classes=5)
  weights, _ = mutants.feasible(model)
  assert certificate_of(model, weights).verdicts == ["PROVED"] * 5
  weights["params"]["head"]["kernel"][-1, 2] = -1.0  # Of the last hidden unit that it sees.
  assert certificate_of(model, weights).verdicts[2] != "PROVED"


CULPRITS = {  # The first operation that breaks each twin, by primitive and place.
  ("all_cnn", "base"): ("conv_general_dilated|dot_general", "Model/conv_1 .*all_cnn.py"),
  ("cycle_mlp", "base"): ("sub", "Model/stage_0_block_0/norm_0 .*LayerNorm.*cycle_mlp.py"),
  ("cycle_mlp", "paper"): ("sub", "Model/stage_0_block_0/norm_0 .*LayerNorm.*cycle_mlp.py"),
  ("densenet", "base"): ("dot_general|conv_general_dilated", "Model/block_0_layer_0.*densenet.py"),
  ("efficientnet", "base"): ("logistic", "silu.*efficientnet.py"),
  ("efficientnet", "paper"): ("logistic", "squeeze_excite.*efficientnet.py"),
  ("mixer", "base"): ("sub", "Model/block_0/norm_0 .*LayerNorm.*mixer.py"),
  ("mixer", "paper"): ("sub", "Model/block_0/norm_0 .*LayerNorm.*mixer.py"),
  ("mlp", "base"): ("dot_general", "Model/dense_1 .*mlp.py"),
}


@pytest.mark.parametrize("name,parts", CULPRITS, ids=str)
def test_the_operation_that_breaks_the_other_twins_is_named(name, parts):
  # A fresh head of Mixer is zero, and zero is convex.
  model, weights, _ = trained(name, parts, steps=int(name == "mixer"))
  certificate = certificate_of(model, weights)
  primitive, place = CULPRITS[name, parts]
  assert not certificate.proved.any()
  assert re.fullmatch(primitive, certificate.operation.primitive), certificate.reason
  assert re.search(place, certificate.reason), certificate.reason
  assert parts == "base" or catalog.module_of(name).PAPER_BREAKS


@pytest.mark.parametrize(
  "name", [n for n in catalog.names() if not catalog.module_of(n).PAPER_BREAKS]
)
def test_the_papers_other_twins_are_proved(name):
  model, weights, _ = trained(name, "paper")
  assert certificate_of(model, weights)


def test_a_wrong_sign_is_counted_and_named():
  model, weights, _ = trained("mixer", "ioc")
  weights = jax.tree.map(np.array, weights)
  scale = weights["params"]["block_1"]["norm_1"]["scale"]
  scale[[2, 5]] = -0.1
  reason = certificate_of(model, weights).reason
  assert f"2 of {scale.size} entries of params/block_1/norm_1/scale are negative" in reason
  assert "Model/block_1/norm_1" in reason


@pytest.mark.parametrize(
  "weight,message",
  [
    (lambda p: nn.softplus(p["raw"]) * p["sign"], "1 of 3 entries of sign are negative"),
    (
      lambda p: jnp.abs(p["raw"]) - p["shift"],
      "entries of a constant made of raw and shift are neg",
    ),
    (lambda p: p["raw"].T.reshape(4, 3), "6 of 12 entries of raw are negative"),
    (lambda p: p["shift"] * 0.1 - 0.5, "are not known to be >= 0"),
    (lambda p: p["raw"] / jnp.linalg.norm(p["raw"], 2), "are not known to be finite"),
  ],
  ids=["a sign", "a shift", "moved", "lost", "unknown"],
)
def test_the_weight_to_blame_is_named(weight, message):
  raw = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
  raw *= np.sign(raw) * np.float32([[1, -1, 1]] * 2 + [[-1, 1, -1]] * 2)  # Six are negative.
  params = {"raw": raw, "sign": np.float32([1, -1, 1]), "shift": np.float32(5)}
  found = certify(lambda p, x: nn.relu(x) @ (weight(p) * jnp.ones((4, 3))), params, np.zeros(4))
  assert message in found.reason


@pytest.mark.parametrize(
  "function,message",
  [
    (
      lambda x: jax.lax.scan(lambda z, _: (nn.relu(z) + x, None), x, None, length=1001)[0],
      "scan: a loop of more than 1,000 steps",
    ),
    (
      lambda x: jax.lax.while_loop(lambda z: z.sum() < 9, jnp.exp, x),
      "while: a loop of more than 1,000 steps, or whose length depends on the input",
    ),
    (lambda x: jnp.abs(x + 1j), "abs: a condition, an index or a complex number depends"),
    (lambda x: jnp.arange(9.0)[x.astype(int)], "gather: a condition, an index"),
  ],
  ids=["a long loop", "a loop", "complex", "an index"],
)
def test_what_has_no_rule_is_told(function, message):
  assert message in certify(function, np.zeros(4), search_steps=0).reason


def test_one_logit_may_fail_alone():
  model, weights, _ = trained("mlp", "ioc")
  weights = jax.tree.map(np.array, weights)
  weights["params"]["head"]["kernel"][3, 2] = -1.0
  assert certificate_of(model, weights).verdicts == [
    *("PROVED", "PROVED", "UNKNOWN", "PROVED", "PROVED")
  ]


def test_a_network_is_refuted_by_a_pair_that_holds_in_float64():
  model, weights, _ = trained("mixer", "base")
  exact = catalog.build(config_of("mixer", "base"), classes=5, dtype=jnp.float64)
  certificate = certificate_of(model, weights, search_steps=200)
  found = certificate.counterexample
  assert certificate.verdict == "REFUTED" and certificate.verdicts.count("REFUTED") == 1
  with jax.enable_x64(True):
    a, b, middle = (
      float(step.apply(exact, weights, jnp.asarray(x)).ravel()[found.output])
      for x in (found.a, found.b, (found.a + found.b) / 2)
    )
  assert middle - (a + b) / 2 == pytest.approx(found.gap, rel=1e-3) and found.gap > 1e-9


X = jnp.ones(3)
UNFIT = [  # (arguments of `certify`, the error)
  ((jnp.abs, X), {"kind": "quasiconvex"}, "'quasiconvex'; expected one of convex, concave, affine"),
  ((jnp.abs,), {}, "no arguments; expected at least its input"),
  ((jnp.dot, X, X), {"argnums": 2}, "argnums is 2; expected an integer from -2 to 1"),
  ((jnp.dot, X, X), {"argnums": (0, 1)}, r"argnums is \(0, 1\); expected an integer"),
  ((jnp.abs, {"image": X}), {}, "input is a dict; expected one floating-point array"),
  ((jnp.abs, [X]), {}, "input is a list; expected one floating-point array"),
  ((jnp.abs, 1.0), {}, "input is a float; expected one floating-point array"),
  ((jnp.abs, jnp.ones(3, jnp.uint8)), {}, "an array of uint8; expected one floating-point array"),
  ((lambda x: (), X), {}, "returns nothing; expected at least one array"),
  ((lambda w, x: x, {"act": "relu"}, X), {}, "act is a str; expected an array or a number"),
  ((lambda w, x: x, np.array([None]), X), {}, "w is a numpy array of object; expected an array or"),
  ((lambda w, x: x, jax.ShapeDtypeStruct((3,), jnp.float32), X), {}, "w is a ShapeDtypeStruct"),
  ((jnp.abs, X), {"box": (1.0, -1.0)}, r"box is \(1.0, -1.0\); expected two finite numbers, the"),
  ((jnp.abs, X), {"box": (0.0, np.inf)}, r"box is \(0.0, inf\); expected two finite numbers"),
]


@pytest.mark.parametrize("args,options,message", UNFIT, ids=[row[2][:20] for row in UNFIT])
def test_unfit_arguments_are_refused(args, options, message):
  with pytest.raises(ValueError, match=message):
    certify(*args, **options)


WEIGHTS = {"first": np.float32([[1, -2], [3, 4]]), "second": np.float32([1, -1])}


def network(weights, x):
  return nn.softplus(x @ weights["first"]) @ weights["second"]


@pytest.mark.parametrize("sign", [1, -1])
def test_weights_may_be_closed_over_or_stand_on_either_side(sign):
  x, weights = jnp.ones(2), {**WEIGHTS, "second": np.float32([1, sign])}
  ways = [
    certify(lambda x: network(weights, x), x),
    certify(network, weights, x),
    certify(lambda x, weights: network(weights, x), x, weights, argnums=0),
  ]
  assert {c.verdict for c in ways} == {"PROVED" if sign > 0 else "REFUTED"}
  gaps = [c.counterexample and c.counterexample.gap for c in ways]
  assert gaps == pytest.approx([gaps[0]] * 3) if sign < 0 else gaps == [None] * 3


def test_weights_are_named_by_their_path_and_if_need_be_by_their_argument():
  def reason(f, *args):
    return certify(f, *args, search_steps=0).reason

  x, first, second = jnp.ones(2), WEIGHTS["first"], WEIGHTS["second"]
  assert "1 of 2 entries of second are negative" in reason(network, WEIGHTS, x)
  assert "entries of scales/second are" in reason(
    lambda scales, shift, x: network(scales, x + shift["first"]), WEIGHTS, {"first": second}, x
  )
  assert "entries of v are" in reason(lambda v, x: nn.relu(x) @ v, second, x)
  assert "entries of v are" in reason(lambda w, v, x: nn.relu(x @ w) @ v, first, second, x)
  assert "entries of argument 1 are" in reason(
    lambda *args: nn.relu(args[2] @ args[0]) @ args[1], first, second, x
  )
  assert "1 of 2 entries of v are not finite" in reason(
    lambda v, x: nn.relu(x) @ v, np.float32([1, np.nan]), x
  )


def test_a_certificate_is_printed_as_its_verdict_and_why():
  x = jnp.ones(2)
  assert repr(certify(network, {**WEIGHTS, "second": np.ones(2)}, x)) == (
    "PROVED: 1 of 1 outputs are convex"
  )
  verdict, why, points = str(certify(network, WEIGHTS, x)).splitlines()
  assert verdict == "REFUTED: 0 of 1 outputs are convex"
  assert why.startswith("first broken by dot_general: 1 of 2 entries of second are negative")
  assert "in network, test_certificate.py:" in why
  assert points.startswith("refuted by two points: at their midpoint output 0 violates")


def test_a_search_that_was_stopped_says_so():
  text = str(certify(lambda x: jnp.argmax(x), jnp.ones(2)))
  assert "\nthe search for a counterexample stopped: no output in question is a float" in text


def test_certificates_can_be_compared_and_hashed():
  one, other = (certify(jnp.abs, jnp.ones(2)) for _ in range(2))
  assert one != other and len({one, other}) == 2


@pytest.mark.parametrize(
  "options, expected",
  [
    ({"kind": []}, "kind is"),
    ({"box": None}, "box is None"),
    ({"box": (0, 1, 2)}, "box is"),
    ({"box": "ab"}, "box is 'ab'"),
    ({"search_steps": "a"}, "search_steps is 'a'"),
    ({"search_steps": -1}, "search_steps is -1"),
    ({"seed": 1.5}, "seed is 1.5"),
  ],
)
def test_odd_options_are_refused_in_a_sentence(options, expected):
  with pytest.raises(ValueError, match=expected):
    certify(jnp.sin, jnp.ones(2), **options)


def test_weights_that_are_traced_are_refused_in_a_sentence():
  def inside(w):
    return bool(certify(lambda w, x: jax.nn.relu(x @ w), w, jnp.ones(2)))

  with pytest.raises(ValueError, match="a weight is traced by jit"):
    jax.jit(inside)(jnp.eye(2))
