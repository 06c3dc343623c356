"""Certificates of our networks, of runs, and of a network that is not ours."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from convex_jax.models import catalog
from convex_jax.proof import certify, counterexample
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
  logits = step.apply(model, weights, np.ones((3, PX, PX, 3), np.float32))
  assert logits.shape == (3, 2) and (logits[:, 0] != 0).all() and (logits[:, 1] == 0).all()


WIDER = [
  ("mixer", dict(parallel=True, cells=2, dense_readout=True, overlap=1)),
  ("cycle_mlp", dict(cells=2, dense_readout=True)),
  ("mlp", dict(dense_readout=True)),
]


@pytest.mark.parametrize("name,fields", WIDER, ids=str)
def test_what_the_head_sees_besides_is_proved_and_its_mutant_is_not(name, fields):
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
def test_what_breaks_the_other_twins_is_named(name, parts):
  # Mixer's fresh head is zero, and zero is convex.
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


def test_one_logit_may_fail_alone():
  model, weights, _ = trained("mlp", "ioc")
  weights = jax.tree.map(np.array, weights)
  weights["params"]["head"]["kernel"][3, 2] = -1.0
  assert certificate_of(model, weights).verdicts == [
    *("PROVED", "PROVED", "UNKNOWN", "PROVED", "PROVED")
  ]


def test_the_refuter_finds_a_pair_that_holds_in_float64():
  model, weights, _ = trained("mixer", "base")
  exact = catalog.build(config_of("mixer", "base"), classes=5, dtype=jnp.float64)
  certificate = certificate_of(
    model, weights, search_steps=200, search_function=lambda w, x: step.apply(exact, w, x)
  )
  found = certificate.counterexample
  assert certificate.verdict == "REFUTED" and certificate.verdicts.count("REFUTED") == 1
  with jax.enable_x64(True):
    a, b, middle = (
      float(step.apply(exact, weights, jnp.asarray(x)).ravel()[found.output])
      for x in (found.a, found.b, (found.a + found.b) / 2)
    )
  assert middle - (a + b) / 2 == pytest.approx(found.gap, rel=1e-6) and found.gap > 1e-9


def test_the_refuter_climbs_where_random_pairs_miss():
  """Convex but for a dent around the middle of one coordinate in fifty."""

  def dented(x):
    return jnp.sum(x**2) + 4 * jnp.exp(-8 * x[0] ** 2)

  x = jax.ShapeDtypeStruct((50,), jnp.float32)
  arguments = (dented, x.shape, None, np.array([True]), "convex", (-1.0, 1.0))
  assert counterexample.search(*arguments, steps=0) is None  # Random pairs alone.
  assert counterexample.search(*arguments, steps=200).gap > 0


@pytest.mark.parametrize("kind", ["convex", "concave", "affine"])
def test_the_refuter_finds_nothing_where_there_is_nothing(kind):
  """sqrt(1 + z^2) is convex and has no rule here: unknown, and never refuted."""
  sign = -1 if kind == "concave" else 1

  def function(x):
    return x if kind == "affine" else sign * jnp.sqrt(1 + x**2)

  x = jax.ShapeDtypeStruct((3,), jnp.float32)
  certificate = certify(function, x, kind=kind)
  assert certificate.verdict == ("PROVED" if kind == "affine" else "UNKNOWN")
  turned = certify(function, x, kind="affine" if kind != "affine" else "convex")
  assert turned.verdict == ("PROVED" if kind == "affine" else "REFUTED")


def test_what_cannot_be_certified_is_told():
  with pytest.raises(ValueError, match="allowed: convex, concave, affine"):
    certify(jnp.abs, jnp.ones(3), kind="quasiconvex")
  with pytest.raises(ValueError, match="floating-point"):
    certify(jnp.abs, jnp.ones(3, jnp.uint8))
