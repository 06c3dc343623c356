"""Faults injected, and a run that survives them: a few of each; `experiments/faults` has all."""

import contextlib
import os
import shutil
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import convex_jax
from convex_jax import files, mesh
from convex_jax.errors import Diverged, Lost, Unsaved, UserError
from convex_jax.runs import checkpoint_command, checkpoints, manifest
from convex_jax.runs.checkpoints import Checkpoints
from convex_jax.runs.workdir import FORMAT, Workdir
from convex_jax.training import loop, program, step
from tests.support import bad_input, injections, of


@pytest.fixture(scope="module")
def whole(data_dir, tmp_path_factory):
  """An undisturbed run."""
  return injections.undisturbed(data_dir, tmp_path_factory.mktemp("whole") / "run", 90)


def test_a_killed_run_goes_on_to_the_same_bits_and_rows(data_dir, tmp_path, whole):
  result, run, _ = injections.killed(data_dir, tmp_path, 2, whole)
  assert result.all_survived
  # That a kill undid a step: else it came before there was one to undo.
  assert 1 < result.redone <= 2 * injections.SAVE_EVERY
  assert len(list(run.workdir.glob("events.out.tfevents.*"))) == 1


@pytest.mark.parametrize("n", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_kill_inside_a_save_leaves_the_old_or_the_new_one(data_dir, tmp_path, whole, n):
  assert injections.killed_while_saving(data_dir, tmp_path, n, whole).all_survived


@pytest.mark.slow  # By default one of tests/test_train.py.
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_saves_and_ends_by_75(data_dir, tmp_path, number, whole):
  assert injections.signalled(data_dir, tmp_path, 1, number, whole).all_survived


@pytest.mark.slow
def test_more_signals_while_it_saves_do_no_damage(data_dir, tmp_path, whole):
  assert injections.signalled_while_saving(data_dir, tmp_path, 1, whole).all_survived


def test_damage_is_found_named_and_walked_back_from(whole, tmp_path):
  damages = [injections.flip_bit, injections.truncate, injections.delete, injections.swap]
  assert injections.damaged(whole, tmp_path, 24, damages).all_survived


def test_a_damaged_run_ends_as_an_undamaged_one(whole, tmp_path):
  assert injections.resumed_after_damage(whole, tmp_path, 1).all_survived


def test_a_run_without_a_sound_checkpoint_does_not_begin_anew(whole, tmp_path):
  assert injections.all_damaged(whole, tmp_path, 1).all_survived


@pytest.mark.parametrize("n", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_full_disk_is_told_once_and_loses_nothing(data_dir, tmp_path, whole, n):
  assert injections.full_disk(data_dir, tmp_path, n, whole=whole).all_survived


@pytest.mark.slow  # It waits for what never comes.
@pytest.mark.parametrize("n", [2])
def test_a_save_that_hangs_is_waited_for_no_longer_than_asked(data_dir, tmp_path, whole, n):
  assert injections.hung_save(data_dir, tmp_path, n, whole).all_survived


def test_a_workdir_in_use_is_refused(data_dir, tmp_path):
  assert injections.used_workdir(data_dir, tmp_path, 1).all_survived


@pytest.mark.slow
def test_a_run_moves_between_numbers_of_devices(data_dir, tmp_path):
  assert injections.other_devices(data_dir, tmp_path, 3).all_survived


@pytest.mark.slow
def test_what_happens_to_one_of_four_hosts_changes_no_bit(data_dir, tmp_path):
  """The other faults in a bucket, and all in both places in experiments/faults."""
  faults = "first killed", "warned"
  result = injections.one_of_several(data_dir, tmp_path, len(faults), 4, faults)
  assert result.all_survived, result.note


@pytest.mark.slow
def test_a_process_that_goes_outside_of_training_is_told_by_the_other(data_dir, tmp_path):
  gone = "first gone at: start", "gone at: restore", "first gone at: gather"
  result = injections.one_of_several(data_dir, tmp_path, len(gone), 2, gone)
  assert result.all_survived, result.note


def test_time_runs_out(tiny_config, few_digits, tmp_path):
  """A limit in minutes stops like a signal."""
  from convex_jax.errors import Stopped

  config = of(tiny_config, steps=100_000, time_limit=1e-4, eval__every_epochs=1e4)
  with pytest.raises(Stopped, match="Stopped at step") as caught:
    loop.run(config, str(tmp_path / "run"), few_digits)
  assert caught.value.code == 75 and convex_jax.load(str(tmp_path / "run")).step < 100_000


# Updates that cannot be made.


@pytest.mark.parametrize("factor, platform", [(np.nan, "cpu"), (np.inf, "cpu"), (np.nan, "tpu")])
def test_a_batch_that_is_no_number_changes_nothing_but_the_step(
  data_dir, few_digits, monkeypatch, factor, platform
):
  """Weights, optimizer, BatchNorm's averages and those of weights wait; the others move."""
  monkeypatch.setattr(mesh, "target", lambda: (platform, 1))  # Traced for it, and run here.
  config = bad_input.tiny_config(data_dir)
  with bad_input.poisoned(config, [2], factor):
    assert dict(bad_input.skipped_alone(config, few_digits, [2], 4)) == {2: True}


def test_the_projection_alone_does_not_stop_a_nan():
  """Why updates are skipped: max(nan, 0) is nan."""
  link = optax.keep_params_nonnegative()
  params = jnp.ones(3)
  updates, _ = link.update(jnp.full(3, jnp.nan), link.init(params), params)
  assert np.isnan(optax.apply_updates(params, updates)).all()


def test_skipped_updates_are_counted_and_told(
  tiny_config, few_digits, tmp_path, monkeypatch, capsys
):
  config = of(tiny_config, steps=12, max_skipped=3, log__every_steps=4, eval__every_epochs=5.0)
  with bad_input.poisoned(config, [1, 2, 6, 9], np.nan):
    loop.run(config, str(tmp_path / "run"), few_digits)
  run = convex_jax.load(str(tmp_path / "run"))
  assert sum(row["skipped"] for row in run.metrics("train")) == 4
  assert all(np.isfinite(row.get("loss", 0.0)) for row in run.metrics("train"))
  out = capsys.readouterr().out
  assert "Skipped the update of step 2: loss nan, gradient norm nan (and 1 more" in out
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(run.params))


def test_too_many_in_a_row_end_the_run_and_keep_the_last_good_one(data_dir, tmp_path):
  assert bad_input.bad_batches(data_dir, tmp_path, n=3, streaks=1).all_survived


@pytest.mark.parametrize("deviations", [0.0, 6.0])
def test_a_loss_spike_is_skipped_where_asked(data_dir, few_digits, deviations):
  config = bad_input.tiny_config(data_dir, skip_spikes=deviations, optimizer__learning_rate=1e-4)
  with bad_input.poisoned(config, [55], 100.0):
    found = dict(bad_input.skipped_alone(config, few_digits, [55], 58))
  assert found == {55: deviations > 0}


def test_moments_of_losses_are_those_of_numpy():
  losses = np.random.default_rng(0).gamma(2.0, size=90).astype(np.float32)
  moments = jnp.zeros(3)
  for loss in losses:
    moments = step._seen(moments, loss)
  want = [90, losses.mean(), losses.var()]
  np.testing.assert_allclose(moments, want, rtol=1e-4)


def test_a_state_that_overflowed_is_not_saved(tiny_config, few_digits, tmp_path, monkeypatch):
  """Weights that are infinite although each update was finite."""
  real = program.Program.train_call

  def overflows(job, state, plan):
    state, measured = real(job, state, plan)
    if int(state.step) == 5:
      state = state.replace(params=jax.tree.map(lambda p: p + jnp.inf, state.params))
    return state, measured

  monkeypatch.setattr(program.Program, "train_call", overflows)
  config = of(tiny_config, checkpoint__every_steps=5, eval__every_epochs=0.1)  # Each step.
  with pytest.raises(Diverged, match="Non-finite weights after step 5"):
    loop.run(config, str(tmp_path / "run"), few_digits)
  assert manifest.steps_in(str(tmp_path / "run" / "checkpoints")) == [3, 4]


# Checkpoints.


def saved(tiny_config, few_digits, folder, count=3, **options):
  job = program.Program(tiny_config, few_digits, mesh.make_mesh(jax.devices()[:1]))
  state, ours = job.init(), Checkpoints(str(folder), 2, **options)
  for i in range(count):
    ours.save(i + 1, state.items(), accuracy=None)
    ours.wait()
  return job, state, ours


def test_an_error_of_a_save_is_told_once_and_at_its_step(
  tiny_config, few_digits, tmp_path, monkeypatch
):
  """The second of three saves meets a full disk while it is sealed."""
  seal = manifest.seal

  def full(folder, at, accuracy):
    if at == 2:
      raise OSError(28, "No space left on device")
    seal(folder, at, accuracy)

  monkeypatch.setattr(manifest, "seal", full)
  told = []
  _, _, ours = saved(tiny_config, few_digits, tmp_path, report=told.append, go_on=True)
  ours.close()
  assert len(told) == 1 and "step 2 could not be written: [Errno 28] No space left" in told[0]
  assert manifest.faults(str(tmp_path)) == {1: None, 3: None}
  assert sorted(os.listdir(tmp_path)) == ["1", "3"]
  _, _, strict = saved(tiny_config, few_digits, tmp_path / "strict", count=2)
  with pytest.raises(Unsaved, match="step 2 could not be written") as caught:
    strict.check()
  assert caught.value.code == 74
  with pytest.raises(Unsaved):
    strict.close()


@pytest.mark.parametrize(("processes", "expected"), [(1, Unsaved), (2, Lost)])
@pytest.mark.parametrize("where", ["begun", "sealed"])
def test_a_save_that_waits_for_a_process_that_is_gone_says_so(
  tiny_config, few_digits, tmp_path, monkeypatch, where, processes, expected
):
  """Orbax raises a TimeoutError then; in a run of one process it is an error of the disk."""

  def late(*_, **__):
    raise TimeoutError("Timeout waiting at barrier 'x'. The original error raised was: INTERNAL")

  def fail(patch):
    if where == "sealed":
      patch.setattr(manifest, "seal", late)
      ours.save(2, state.items(), accuracy=None)
      ours.wait()
    patch.setattr(jax, "process_count", lambda: processes)
    if where == "begun":
      patch.setattr(ours._checkpointer, "save_checkpointables_async", late)
      ours.save(2, state.items(), accuracy=None)
    ours.check()

  _, state, ours = saved(tiny_config, few_digits, tmp_path, 1)
  with monkeypatch.context() as patch, pytest.raises(expected):
    fail(patch)
  with contextlib.suppress(Unsaved):
    ours.close()


def test_a_lost_process_is_no_bucket_that_cannot_be_read():
  lost, refused = TimeoutError("Timeout waiting at barrier 'x'."), TimeoutError("timed out")
  with pytest.raises(TimeoutError, match="barrier"), checkpoints._reached("gs://bucket/run"):
    raise lost
  with pytest.raises(OSError, match="cannot be read"), checkpoints._reached("gs://bucket/run"):
    raise refused


def test_a_late_checkpoint_outlives_the_failure_of_a_later_one(
  tiny_config, few_digits, tmp_path, monkeypatch
):
  """The second is written after the third was given up: it is sealed, and stays."""
  seal, gate, told = manifest.seal, threading.Event(), []

  def slow(folder, at, accuracy):
    if at == 2:
      gate.wait()
    seal(folder, at, accuracy)

  monkeypatch.setattr(manifest, "seal", slow)
  _, state, ours = saved(tiny_config, few_digits, tmp_path, 1, report=told.append, go_on=True)
  ours._patience = 0.2
  ours.save(2, state.items(), accuracy=None)
  ours.save(3, state.items(), accuracy=None)
  assert "step 3 could not be written: an older one" in told[-1] and "step 2" in told[0]
  gate.set()
  with pytest.raises(Unsaved, match="step 3"):
    ours.close()
  while not manifest.is_sealed(str(tmp_path / "2")):
    time.sleep(0.01)
  assert manifest.faults(str(tmp_path)) == {1: None, 2: None}


def test_a_run_killed_in_its_first_save_begins_anew_and_says_so(
  tiny_config, few_digits, tmp_path, capsys
):
  _, _, ours = saved(tiny_config, few_digits, tmp_path / "checkpoints", count=1)
  ours.close()
  os.remove(tmp_path / "checkpoints" / "1" / "manifest.json")
  lines = manifest.quarantine_damaged(str(tmp_path / "checkpoints"), str(tmp_path / "damaged"))
  assert len(lines) == 1 and "Checkpoint 1: not finished (it has no manifest.json)" in lines[0]
  assert os.listdir(tmp_path / "checkpoints") == [] and os.listdir(tmp_path / "damaged") == ["1"]


def test_the_command_verifies_and_seals(tiny_config, few_digits, tmp_path, capsys):
  _, _, ours = saved(tiny_config, few_digits, tmp_path / "checkpoints")
  ours.close()
  verify = ["verify", str(tmp_path)]
  assert checkpoint_command.main(verify) == 0
  assert capsys.readouterr().out == "step 2: intact\nstep 3: intact\n"
  (injections.files_of(tmp_path / "checkpoints" / "3")[0]).write_bytes(b"")
  for step_ in (2, 3):
    if step_ == 2:
      os.remove(tmp_path / "checkpoints" / "2" / "manifest.json")
  assert checkpoint_command.main(verify) == 2
  out = capsys.readouterr().out
  assert (
    "step 2: not finished (it has no manifest.json)" in out
    and "step 3: " in out
    and "0 bytes" in out
  )
  with pytest.raises(UserError, match=r"python -m convex_jax checkpoint seal"):
    manifest.quarantine_damaged(str(tmp_path / "checkpoints"), str(tmp_path / "damaged"))
  assert checkpoint_command.main(["seal", str(tmp_path)]) == 2  # 3 stays damaged.
  assert capsys.readouterr().out.startswith("step 2: intact\nstep 3: ")
  assert checkpoint_command.main(["verify", str(tmp_path / "nothing")]) == 2


PLACES = ["", "checkpoints", "checkpoints/20", "checkpoints/20/ema", "checkpoints/20/weights/d"]
STRAYS = [".DS_Store", "._manifest.json", "Thumbs.db", "a.swp", "config.json~", ".nfs01", "Icon\r"]
STRAYS += ["lost+found/x", "@eaDir/x", "__MACOSX/._x", "21", "notes.txt", "weights copy/_METADATA"]


def with_strays(folder, names=STRAYS):
  """A run, with files of a desktop anywhere in it."""
  workdir = folder / "run"
  shutil.copytree(injections.ROOT / "tests" / "fixtures" / "run_1_1", workdir)
  paths = [workdir / place / name for place in PLACES for name in names]
  for path in paths:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\0\0\0\1Bud1")
  return workdir, paths


def test_what_a_desktop_leaves_is_mentioned_and_left_alone(tmp_path, capsys, data_dir):
  workdir, paths = with_strays(tmp_path)
  with pytest.warns(UserWarning, match="Left alone, since no manifest lists .*DS_Store.* more"):
    run = convex_jax.load(str(workdir))
  want = np.load(workdir / "logits.npz")
  np.testing.assert_allclose(run.logits(want["images"]), want["logits"], atol=1e-5)
  assert checkpoint_command.main(["verify", str(workdir)]) == 0
  out = capsys.readouterr().out
  assert out.startswith("step 20: intact\nLeft alone") and out.count("Left alone") == 1
  assert checkpoint_command.main(["seal", str(workdir)]) == 0
  capsys.readouterr()
  config = of(run.config.copy_and_resolve_references(), data__dir=data_dir)
  config.steps = run.step  # Nothing to do but to restore and to evaluate.
  loop.run(config, str(workdir))
  out = capsys.readouterr().out
  assert "at step 20 of 20" in out and out.count("Left alone") == 1
  assert all(path.exists() for path in paths) and not (workdir / "damaged").exists()


def test_weights_are_averages_where_the_manifest_says_so(tmp_path):
  """Not where a folder of that name was put."""
  workdir, _ = with_strays(tmp_path, ["x"])
  path = str(workdir / "checkpoints" / "20" / manifest.NAME)
  content = files.read_json(path)
  own = {k: v for k, v in content["files"].items() if not k.startswith("ema/")}
  files.write_json(path, content | {"files": own})
  with (
    pytest.warns(UserWarning, match="ema"),
    pytest.raises(UserError, match="no averaged weights"),
  ):
    convex_jax.load(str(workdir), weights="ema")


def test_no_stray_is_sealed_and_every_file_of_orbax_is(tiny_config, few_digits, tmp_path):
  _, _, ours = saved(tiny_config, few_digits, tmp_path, count=1)
  ours.close()
  folder = tmp_path / "1"
  there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
  assert set(manifest.listed(str(folder))) == there - {manifest.NAME}
  for name in (".DS_Store", "weights/._d", "weights/@eaDir/d", "training/Thumbs.db"):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"x")
  manifest.seal(str(folder), 1, None)
  assert set(manifest.listed(str(folder))) == there - {manifest.NAME}


def test_a_stray_that_an_older_version_sealed_may_change(tmp_path):
  workdir, _ = with_strays(tmp_path, [])
  path = str(workdir / "checkpoints" / "20" / manifest.NAME)
  content = files.read_json(path)
  content["files"] |= {".DS_Store": [1, "0"], "ema/._d": [1, "0"]}
  files.write_json(path, content)
  assert convex_jax.load(str(workdir)).step == 20


def test_a_folder_with_nothing_of_a_checkpoint_is_none(tmp_path, capsys):
  """What Finder leaves where a checkpoint was deleted; Orbax would take it for the newest."""
  workdir, _ = with_strays(tmp_path, [])
  (workdir / "checkpoints" / "30").mkdir()
  (workdir / "checkpoints" / "30" / ".DS_Store").write_bytes(b"x")
  assert convex_jax.load(str(workdir)).step == 20
  assert checkpoint_command.main(["verify", str(workdir)]) == 0
  for name in ("30", "30.1"):  # What was set aside before stays there.
    (workdir / "checkpoints" / "30").mkdir(exist_ok=True)
    (workdir / "checkpoints" / "30" / ".DS_Store").write_bytes(b"x")
    ours = Workdir(str(workdir))
    (line,) = manifest.quarantine_damaged(ours.checkpoints, ours.damaged)
    assert line.endswith(f"damaged/{name}") and os.path.isdir(workdir / "damaged" / name)


def test_what_8_devices_saved_fewer_restore(data_dir, tmp_path):
  assert bad_input.other_meshes(data_dir, tmp_path, 3).all_survived


@pytest.mark.parametrize("fixture", bad_input.FIXTURES, ids=lambda path: path.name)
def test_runs_of_every_format_load_and_go_on(fixture, tmp_path, data_dir):
  """Written by the version that first had the format; logits as they were then."""
  want = np.load(fixture / "logits.npz")
  run = convex_jax.load(str(fixture))
  np.testing.assert_allclose(run.logits(want["images"]), want["logits"], atol=1e-5)
  workdir = tmp_path / "run"
  shutil.copytree(fixture, workdir)
  config = of(run.config.copy_and_resolve_references(), data__dir=data_dir)
  config.steps = run.step  # Nothing to do but to restore and to evaluate.
  loop.run(config, str(workdir))
  again = convex_jax.load(str(workdir))
  np.testing.assert_allclose(again.logits(want["images"]), want["logits"], atol=1e-5)


def test_there_is_a_fixture_of_the_present_format():
  assert (
    injections.ROOT.joinpath(f"tests/fixtures/run_{FORMAT}_{manifest.FORMAT}") in bad_input.FIXTURES
  )


# Readers, fuzzed.


def test_mutated_descriptions_are_refused_or_change_nothing(whole, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(whole.workdir, workdir)
  assert bad_input.mutated_descriptions(workdir, 600).all_survived


def test_a_config_that_lies_about_its_values_is_refused(whole, tmp_path):
  """Signed anew, as an attacker would."""
  workdir = tmp_path / "run"
  shutil.copytree(whole.workdir, workdir)
  path = str(workdir / "config.json")
  good = files.read_json(path)
  lies = [
    lambda c: c["config"]["model"].update(name="os.system"),
    lambda c: c["config"].update(batch_size="many"),
    lambda c: c["data"].update(image_shape=[8, 8]),
    lambda c: c["data"].update(mean=["x"]),
    lambda c: c.update(data=None),
    lambda c: c.update(config=[]),
    lambda c: c.pop("format"),
    lambda c: c.update(format=99),
  ]
  for lie in lies:
    files.write_json(path, good)
    content = files.read_json(path)
    lie(content)
    files.write_json(path, content)
    with pytest.raises(UserError):
      convex_jax.load(str(workdir))


def test_odd_images_are_read_or_refused():
  assert bad_input.odd_images(100).all_survived


def test_no_data_is_told_with_a_cure(data_dir, photo_dir, tmp_path):
  assert bad_input.no_data(data_dir, photo_dir, tmp_path, 99).all_survived


def test_bad_configs_are_told_whole_and_before_any_device():
  assert bad_input.bad_configs(40).all_survived


def test_no_update_leaves_a_constrained_weight_below_zero():
  assert bad_input.constrained_updates(36).all_survived
