"""The certificate of a run: written with it, asked for by the command."""

import json
import pathlib

import numpy as np
import pytest

import convex_jax
from convex_jax.runs import certified, certify_command
from convex_jax.training import loop
from tests.support import of


@pytest.fixture(scope="module")
def run_of(data_dir, tmp_path_factory, few_digits):
  """Trains a tiny Mixer for some steps; one workdir a set of changes."""
  from configs import mixer_ioc

  def make(**changes):
    config = mixer_ioc.get_config("digits")
    config.model.size, config.model.patch, config.data.dir = "tiny", 4, data_dir
    config.batch_size, config.steps, config.eval.every_epochs = 16, 3, 9.0
    workdir = str(tmp_path_factory.mktemp("run"))
    loop.run(of(config, **changes), workdir, few_digits)
    return workdir

  return make


def test_a_convex_run_ends_with_its_certificate(run_of, capsys):
  workdir = run_of()
  assert "PROVED: 10 of 10 logits are convex in the image" in capsys.readouterr().out
  run = convex_jax.load(workdir)
  assert run.certificate["verdict"] == "PROVED"
  assert set(run.certificate["logits"].values()) == {"PROVED"}
  assert run.certificate["weights_sha256"] == certified.digest(run.weights)
  assert certify_command.main([f"--workdir={workdir}"]) == 0
  assert certify_command.main([f"--workdir={workdir}", "--kind=concave", "--search_steps=0"]) == 4


def test_a_free_run_has_none_until_asked_and_is_refuted(run_of, capsys):
  workdir = run_of(model__parts="base")
  assert convex_jax.load(workdir).certificate is None
  assert certify_command.main([f"--workdir={workdir}"]) == 4
  out = capsys.readouterr().out
  assert "REFUTED" in out and "norm_0" in out
  content = json.loads((pathlib.Path(workdir) / "certificate.json").read_text())
  pair = np.load(pathlib.Path(workdir) / content["counterexample"]["file"])
  assert pair["a"].shape == (1, 8, 8, 1) and 0 <= pair["a"].min() <= pair["b"].max() <= 255


def test_a_partly_convex_run_is_certified_in_its_features(run_of):
  workdir = run_of(model__convex_from="head", model__head_depth=2, model__head_width=7)
  certificate = convex_jax.load(workdir).certificate
  assert certificate["verdict"] == "PROVED" and "features before the head" in certificate["of"]


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
  assert certify_command.main([f"--workdir={tmp_path}"]) == 2
  assert "does not contain a run" in capsys.readouterr().err


def test_the_digest_sees_every_bit():
  weights = {"a": np.ones(3, np.float32), "b": {"c": np.zeros(2, np.float32)}}
  same = {"b": {"c": np.zeros(2, np.float32)}, "a": np.ones(3, np.float32)}
  other = {"a": np.ones(3, np.float32), "b": {"c": np.float32([0, 1e-45])}}
  assert certified.digest(weights) == certified.digest(same) != certified.digest(other)


def test_a_class_name_in_brackets_is_printed_as_it_is(monkeypatch, capsys):
  """To rich "[/x]" is markup, which closes nothing: an error."""
  content = {"kind": "convex", "of": "", "logits": {"[/x]": "PROVED"}, "verdict": "PROVED"}
  content |= {"input": "image", "reason": "", "counterexample": None}
  monkeypatch.setattr(certify_command, "load", lambda *_: None)
  monkeypatch.setattr(certified, "certify_and_write", lambda *_: content)
  assert certify_command.main(["--workdir=x"]) == 0 and "[/x]" in capsys.readouterr().out
