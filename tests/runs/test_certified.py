"""The certificate of a run: written with it, asked for by the command."""

import dataclasses
import errno
import json
import os
import pathlib
import shutil

import jax
import numpy as np
import pytest
from flax import core

import convex_jax
from convex_jax import files
from convex_jax.proof.radii import Radius
from convex_jax.runs import (
  certified,
  certify_command,
  checkpoint_command,
  convexify_command,
  radii_command,
)
from convex_jax.runs.run import digest
from convex_jax.studies import report, results, sweep
from convex_jax.training import loop
from tests.support import ROOT, injections, of


@pytest.fixture(scope="module")
def run_of(data_dir, tmp_path_factory, few_digits):
  """Trains a tiny Mixer for some steps; one workdir a set of changes."""
  from configs import mixer_ioc

  def make(**changes):
    config = mixer_ioc.get_config("digits")
    config.model.update(size="tiny", patch=4, depth=1)
    config.data.dir = data_dir
    config.batch_size, config.steps, config.eval.every_epochs = 16, 3, 9.0
    workdir = str(tmp_path_factory.mktemp("run"))
    loop.run(of(config, **changes), workdir, few_digits)
    return workdir

  return make


def test_a_convex_run_ends_with_its_certificate(run_of, capsys):
  workdir = run_of()
  assert "PROVED: 10 of 10 logits are convex in the image" in capsys.readouterr().out
  run = convex_jax.load(workdir)
  before = run.certificate
  assert before["verdict"] == "PROVED" and set(before["logits"].values()) == {"PROVED"}
  assert before["weights_sha256"] == run.digest
  capsys.readouterr()
  assert certify_command.main([f"--workdir={workdir}", "--kind=concave", "--search_steps=0"]) == 4
  assert "UNKNOWN: 0 of 10 logits are concave" in capsys.readouterr().out
  assert run.certificate == before  # It is of convexity, still.
  written = os.stat(f"{workdir}/certificate.json").st_mtime_ns
  assert certify_command.main([f"--workdir={workdir}", "--step=3", "--search_steps=0"]) == 0
  assert "PROVED" in capsys.readouterr().out  # And not of what --step asks for.
  assert os.stat(f"{workdir}/certificate.json").st_mtime_ns == written
  assert certify_command.main([f"--workdir={workdir}"]) == 0


def test_a_certificate_is_of_the_weights_that_it_names(tmp_path):
  workdir = shutil.copytree(ROOT / "tests" / "fixtures" / "run_1_1", tmp_path / "run")
  run = convex_jax.load(workdir)
  assert run.certificate["verdict"] == "PROVED"
  stats = jax.tree.map(lambda leaf: leaf + 1, core.unfreeze(run.stats))
  params = jax.tree.map(lambda leaf: leaf * np.float32(2), run.params)
  for other in (dataclasses.replace(run, params=params), run.replace(stats=stats)):
    assert other.certificate is None
  assert run.replace(params=core.unfreeze(run.params)).certificate == run.certificate
  content = files.read_json(str(workdir / "certificate.json"))
  files.write_json(str(workdir / "certificate.json"), content | {"weights_sha256": "0" * 64})
  assert convex_jax.load(workdir).certificate is None


def test_a_free_run_has_none_until_asked_and_is_refuted(run_of, capsys):
  workdir = run_of(model__parts="base")
  assert convex_jax.load(workdir).certificate is None
  assert certify_command.main([f"--workdir={workdir}"]) == 4
  out = capsys.readouterr().out
  assert "REFUTED" in out and "norm_0" in out
  content = json.loads((pathlib.Path(workdir) / "certificate.json").read_text())
  pair = np.load(pathlib.Path(workdir) / content["counterexample"]["file"])
  assert pair["a"].shape == (1, 8, 8, 1) and 0 <= pair["a"].min() <= pair["b"].max() <= 255


def test_a_free_run_is_convexified(run_of, data_dir, capsys):
  workdir = run_of(model__parts="base", model__norm="batch")
  options = ["--examples=70", f"--data_dir={data_dir}"]
  assert convexify_command.main([f"--workdir={workdir}", *options]) == 0
  out = capsys.readouterr().out
  assert "PROVED: 10 of 10 logits" in out and "decimal digits" in out
  content = json.loads((pathlib.Path(workdir) / "convexified.json").read_text())
  sizes = content["sizes"]
  assert content["verdict"] == "PROVED" and sizes["examples"] == 70
  assert sizes["agreement"] == {"float32": 1.0, "float64": 1.0}
  assert sizes["convex_accuracy"]["float64"] == sizes["accuracy"]
  assert len(sizes["layers"]) == 2  # GELUs.
  run = convex_jax.load(workdir)
  assert run.certificate is None  # What is proved is not of the run itself.
  image = np.zeros((1, *run.image_shape), np.float32)
  found = run.convexify()
  functions = (found.convex_logits, found.logits, found.common)
  convex, logits, common = jax.jit(lambda x: [function(x) for function in functions])(image)
  np.testing.assert_allclose(convex, logits + common, atol=1e-3)


def test_a_run_with_layer_norm_is_not_convexified(run_of, data_dir, capsys):
  workdir = run_of(model__parts="base")
  assert convexify_command.main([f"--workdir={workdir}", f"--data_dir={data_dir}"]) == 2
  assert "BatchNorm in place of LayerNorm" in " ".join(capsys.readouterr().err.split())
  assert not (pathlib.Path(workdir) / "convexified.json").exists()


def test_radii_are_of_the_convexified_logits_on_request(tmp_path, monkeypatch):
  asked = []
  radii = radii_command.Measured(np.zeros(1), [Radius(0, {"l2": 0.5})])
  monkeypatch.setattr(radii_command, "measure", lambda *given: asked.append(given[-1]) or radii)
  workdir = shutil.copytree(ROOT / "tests" / "fixtures" / "run_1_1", tmp_path / "run")
  for option in ([], ["--convexified"]):
    assert radii_command.main([f"--workdir={workdir}", "--norms=l2", *option]) == 0
  assert asked == [False, True]


@pytest.mark.slow
def test_the_certificate_of_averaged_weights_is_not_of_raw_ones(run_of):
  workdir = run_of(ema_decay=0.5)
  assert convex_jax.load(workdir).certificate["verdict"] == "PROVED"
  assert convex_jax.load(workdir, weights="raw").certificate is None


@pytest.mark.parametrize("of", [{"kind": "concave"}, {"step": 10}])
def test_a_report_tells_whether_the_run_is_convex_at_its_end(tmp_path, of):
  """A certificate of another kind or step, as earlier versions wrote them, is made again."""
  workdir = shutil.copytree(ROOT / "tests" / "fixtures" / "run_1_1", tmp_path / "run")
  file = str(workdir / "certificate.json")
  (row,) = results.of_workdir(str(workdir), "p", "v").rows
  assert row.certificate == "PROVED" and not sweep._lacks_certificate(str(workdir))
  files.write_json(file, files.read_json(file) | of)
  (row,) = results.of_workdir(str(workdir), "p", "v").rows
  assert row.certificate == "" and sweep._lacks_certificate(str(workdir))


def test_a_partly_convex_run_is_certified_in_its_features(run_of):
  workdir = run_of(model__convex_from="head", model__head_depth=2, model__head_width=7)
  certificate = convex_jax.load(workdir).certificate
  assert certificate["verdict"] == "PROVED" and "features before the head" in certificate["of"]


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_run_that_cannot_be_written_has_its_verdict(tmp_path, capsys, number):
  """The copy of a colleague's run, on a read-only mount: never an exit code of its own."""
  workdir = tmp_path / "run"
  shutil.copytree(ROOT / "tests" / "fixtures" / "run_1_1", workdir)
  before = {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}
  with injections.unwritable(tmp_path, number):
    assert certify_command.main([f"--workdir={workdir}", "--search_steps=0"]) == 0
  told = capsys.readouterr()
  assert "PROVED: 10 of 10 logits are convex" in told.out
  want = f"certificate.json could not be written: {os.strerror(number)}; the result above holds"
  assert want in told.err
  assert before == {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}


def test_a_read_only_run_is_loaded_verified_measured_and_reported(tmp_path, capsys, monkeypatch):
  workdir = tmp_path / "run"
  shutil.copytree(ROOT / "tests" / "fixtures" / "run_1_1", workdir)
  radii = radii_command.Measured(np.zeros(1), [Radius(0, {"l2": 0.5})])
  monkeypatch.setattr(radii_command, "measure", lambda *_: radii)
  with injections.unwritable(workdir):
    assert convex_jax.load(str(workdir)).certificate["verdict"] == "PROVED"
    assert checkpoint_command.main(["verify", str(workdir)]) == 0
    assert radii_command.main([f"--workdir={workdir}", "--norms=l2"]) == 0
    told = capsys.readouterr()
    assert "radii.csv could not be written: Read-only" in told.err and "100.0 %" in told.out
    assert report.main([str(workdir), f"--out={tmp_path / 'out'}"]) == 0
    assert report.main([str(workdir), f"--out={workdir / 'out'}"]) == 2
  assert "run is not writable; pass another --out" in capsys.readouterr().err


@pytest.mark.parametrize(
  "options,told",
  [
    (["--arithmetic=float32"], "expected --radii=l1 with it"),
    (["--radii=l3"], "--radii=l3; expected some of l1,l2,linf"),
    (["--radii=l1", "--kind=concave"], "expected --kind=convex"),
  ],
)
def test_options_of_radii_that_do_not_fit_are_refused(tmp_path, capsys, options, told):
  assert certify_command.main([f"--workdir={tmp_path}", *options]) == 2
  assert told in capsys.readouterr().err


def test_radii_follow_the_certificate(tmp_path, capsys, monkeypatch):
  workdir, asked = tmp_path / "run", []
  shutil.copytree(ROOT / "tests" / "fixtures" / "run_1_1", workdir)
  radii = [Radius(0, {"l1": 0.5})]

  def measure(run, norms, examples, data_dir, arithmetic, *_):
    asked.append((norms, examples, arithmetic))
    return radii_command.Measured(np.zeros(1), radii, arithmetic)

  monkeypatch.setattr(radii_command, "measure", measure)
  options = ["--radii=l1", "--arithmetic=float32", "--examples=3", "--search_steps=0"]
  assert certify_command.main([f"--workdir={workdir}", *options]) == 0
  assert asked == [(("l1",), 3, "float32")] and "in float32" in capsys.readouterr().out
  assert (workdir / "radii.csv").read_text().splitlines()[1] == "0,0,0,0.5,float32,20"


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
  assert certify_command.main([f"--workdir={tmp_path}"]) == 2
  assert "does not contain a run" in capsys.readouterr().err


def test_the_digest_sees_every_bit():
  weights = {"a": np.ones(3, np.float32), "b": {"c": np.zeros(2, np.float32)}}
  same = {"b": {"c": np.zeros(2, np.float32)}, "a": np.ones(3, np.float32)}
  other = {"a": np.ones(3, np.float32), "b": {"c": np.float32([0, 1e-45])}}
  assert digest(weights) == digest(same) != digest(other)


def test_a_class_name_in_brackets_is_printed_as_it_is(monkeypatch, capsys):
  """To rich "[/x]" is markup, which closes nothing: an error."""
  content = {"kind": "convex", "of": "", "logits": {"[/x]": "PROVED"}, "verdict": "PROVED"}
  content |= {"input": "image", "reason": "", "counterexample": None}
  monkeypatch.setattr(certify_command, "load", lambda *_: None)
  monkeypatch.setattr(certified, "certify_run", lambda *_: (content, None))
  monkeypatch.setattr(certified, "write", lambda *_: None)
  assert certify_command.main(["--workdir=x"]) == 0 and "[/x]" in capsys.readouterr().out
