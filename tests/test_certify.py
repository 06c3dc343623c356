"""Certificates of our networks, of runs, and of a network that is not ours."""

import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convex_jax
from configs import base
from convex_jax import certify, models, optimizer, refute, step, train
from tests import mutants
from tests.conftest import of

PX = 8


def config_of(name, parts, **changes):
  shared = {k: v for k, v in base.get_config().model.items() if k in models.SHARED}
  return {**shared, "name": name, "size": "tiny", "parts": parts, **changes}


@functools.cache
def trained(name, parts, steps=4, learning_rate=0.3):
  """(model, weights) after a few large updates on noise, and the tags."""
  config = base.get_config()
  config.model.update(config_of(name, parts))
  config.optimizer.learning_rate = learning_rate
  model = models.build(config.model, classes=5)
  _, kinds = mutants.feasible(model)
  tx = optimizer.make_optimizer(config.optimizer, steps, kinds)
  return model, mutants.after_training(model, tx, steps), kinds


def certificate_of(model, weights, **kwargs):
  example = jax.ShapeDtypeStruct((1, PX, PX, 3), jnp.float32)
  kwargs = {"search_steps": 0, **kwargs}
  return certify.certify(lambda w, x: step.apply(model, w, x), example, weights, **kwargs)


@pytest.mark.parametrize("name", models.names())
@pytest.mark.parametrize("steps", [0, 4])
def test_every_ioc_twin_is_proved_fresh_and_trained(name, steps):
  model, weights, _ = trained(name, "ioc", steps=steps)
  certificate = certificate_of(model, weights)
  assert certificate and certificate.verdict == "PROVED" and len(certificate.proved) == 5
  assert certificate.reason is None
  if steps:  # A fresh head may be zero.
    assert not certificate_of(model, weights, kind="concave")


@pytest.mark.parametrize("name", models.names())
def test_one_logit_and_so_the_difference_of_two_classes_is_proved(name):
  model = models.build({**config_of(name, "ioc"), "one_logit": True}, classes=2)
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
  model = models.build({**config_of(name, "ioc"), **fields}, classes=5)
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
  assert parts == "base" or models.module_of(name).PAPER_BREAKS


@pytest.mark.parametrize(
  "name", [n for n in models.names() if not models.module_of(n).PAPER_BREAKS]
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
  exact = models.build(config_of("mixer", "base"), classes=5, dtype=jnp.float64)
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
  assert refute.search(*arguments, steps=0) is None  # Random pairs alone.
  assert refute.search(*arguments, steps=200).gap > 0


@pytest.mark.parametrize("kind", ["convex", "concave", "affine"])
def test_the_refuter_finds_nothing_where_there_is_nothing(kind):
  """sqrt(1 + z^2) is convex and has no rule here: unknown, and never refuted."""
  sign = -1 if kind == "concave" else 1

  def function(x):
    return x if kind == "affine" else sign * jnp.sqrt(1 + x**2)

  x = jax.ShapeDtypeStruct((3,), jnp.float32)
  certificate = certify.certify(function, x, kind=kind)
  assert certificate.verdict == ("PROVED" if kind == "affine" else "UNKNOWN")
  turned = certify.certify(function, x, kind="affine" if kind != "affine" else "convex")
  assert turned.verdict == ("PROVED" if kind == "affine" else "REFUTED")


def test_what_cannot_be_certified_is_told():
  with pytest.raises(ValueError, match="allowed: convex, concave, affine"):
    certify.certify(jnp.abs, jnp.ones(3), kind="quasiconvex")
  with pytest.raises(ValueError, match="floating-point"):
    certify.certify(jnp.abs, jnp.ones(3, jnp.uint8))


# Runs.


@pytest.fixture(scope="module")
def run_of(data_dir, tmp_path_factory, few_digits):
  """Trains a tiny Mixer for some steps; one workdir a set of changes."""
  from configs import mixer_ioc

  def make(**changes):
    config = mixer_ioc.get_config("digits")
    config.model.size, config.model.patch, config.data.dir = "tiny", 4, data_dir
    config.batch_size, config.steps, config.eval.every_epochs = 16, 3, 9.0
    workdir = str(tmp_path_factory.mktemp("run"))
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(train.data, "load", lambda *a, **k: few_digits)
      train.run(of(config, **changes), workdir)
    return workdir

  return make


def test_a_convex_run_ends_with_its_certificate(run_of, capsys):
  workdir = run_of()
  assert "PROVED: 10 of 10 logits convex in the image" in capsys.readouterr().out
  run = convex_jax.load(workdir)
  assert run.certificate["verdict"] == "PROVED"
  assert set(run.certificate["logits"].values()) == {"PROVED"}
  assert run.certificate["weights_sha256"] == certify.digest(
    {"params": run.params, "stats": run.stats}
  )
  assert certify.main([f"--workdir={workdir}"]) == 0
  assert certify.main([f"--workdir={workdir}", "--kind=concave", "--search_steps=0"]) == 1


def test_a_free_run_has_none_until_asked_and_is_refuted(run_of, capsys):
  workdir = run_of(model__parts="base")
  assert convex_jax.load(workdir).certificate is None
  assert certify.main([f"--workdir={workdir}"]) == 1
  out = capsys.readouterr().out
  assert "REFUTED" in out and "norm_0" in out
  content = json.loads((pathlib.Path(workdir) / "certificate.json").read_text())
  pair = np.load(pathlib.Path(workdir) / content["counterexample"]["file"])
  assert pair["a"].shape == (1, 8, 8, 1) and 0 <= pair["a"].min() <= pair["b"].max() <= 255


def test_a_partly_convex_run_is_certified_in_its_features(run_of):
  workdir = run_of(model__convex_from="head", model__head_depth=2, model__head_width=7)
  certificate = convex_jax.load(workdir).certificate
  assert certificate["verdict"] == "PROVED" and "features before the head" in certificate["of"]


def test_no_run_is_a_mistake(tmp_path, capsys):
  assert certify.main([f"--workdir={tmp_path}"]) == 2
  assert "holds no run" in capsys.readouterr().err


def test_the_digest_sees_every_bit():
  weights = {"a": np.ones(3, np.float32), "b": {"c": np.zeros(2, np.float32)}}
  same = {"b": {"c": np.zeros(2, np.float32)}, "a": np.ones(3, np.float32)}
  other = {"a": np.ones(3, np.float32), "b": {"c": np.float32([0, 1e-45])}}
  assert certify.digest(weights) == certify.digest(same) != certify.digest(other)
