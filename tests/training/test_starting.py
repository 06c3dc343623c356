"""A run that begins where another ended."""

import jax
import numpy as np
import pytest

import convex_jax
from convex_jax import mesh
from convex_jax.errors import UserError
from convex_jax.runs import checkpoints
from convex_jax.runs.workdir import Workdir, digest
from convex_jax.training import loop, schema, starting
from convex_jax.training.program import Program
from tests.support import of


@pytest.fixture(scope="module")
def source(data_dir, tmp_path_factory, few_digits):
  """A finished run of six steps with averaged weights: (config, workdir)."""
  from configs import mixer_ioc

  config = mixer_ioc.get_config("digits")
  config.model.update(size="tiny", patch=4, depth=1)
  config.data.dir = data_dir
  config.update(batch_size=16, steps=6, ema_decay=0.9)
  config.eval.every_epochs = 1.0
  workdir = str(tmp_path_factory.mktemp("source") / "run")
  loop.run(config, workdir, few_digits)
  return config, workdir


def state_of(config, examples):
  program = Program(config, examples, mesh.make_mesh(jax.devices()[:1]))
  return starting.start_of(config, program).state(program.init())


def equal(a, b):
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in pairs)


def test_a_finished_run_is_trained_longer_in_another_folder(source, few_digits, tmp_path, capsys):
  config, workdir = source
  with pytest.raises(UserError) as refused:
    loop.run(of(config, steps=12), workdir, few_digits)
  assert f"--config.init_from={workdir}" in str(refused.value)
  assert "--config.init_optimizer=True" in str(refused.value)
  longer = of(config, steps=3, init_from=workdir, init_optimizer=True)
  loop.run(longer, str(tmp_path / "longer"), few_digits)
  assert f"Weights from {workdir}: step 6, with its optimizer state" in capsys.readouterr().out
  assert convex_jax.load(tmp_path / "longer").certificate["verdict"] == "PROVED"


def test_weights_alone_are_the_averaged_ones(source, few_digits):
  config, workdir = source
  state, run = state_of(of(config, init_from=workdir), few_digits), convex_jax.load(workdir)
  assert equal(state.params, run.params) and equal(state.ema["params"], run.params)
  assert int(state.step) == 0 and not equal(
    run.params, convex_jax.load(workdir, weights="raw").params
  )
  assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(state.opt_state))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_with_the_optimizer_all_but_steps_and_schedule_goes_on(
  source, few_digits, tmp_path, accumulate
):
  config, workdir = source
  if accumulate > 1:
    config, workdir = of(config, optimizer__accumulate=2), str(tmp_path / "run")
    loop.run(config, workdir, few_digits)
  state = state_of(of(config, init_from=workdir, init_optimizer=True), few_digits)
  program = Program(config, few_digits, mesh.make_mesh(jax.devices()[:1]))
  ours = checkpoints.Checkpoints(Workdir(workdir).checkpoints, 2)
  old = ours.restore(program.state_shapes().items())
  ours.close()
  assert equal(state.params, old["weights"]["params"]) and equal(state.ema, old["ema"])
  assert equal(state.losses, old["training"]["losses"]) and int(state.step) == 0
  assert jax.tree.structure(state.opt_state) == jax.tree.structure(old["training"]["opt_state"])
  named = jax.tree_util.tree_leaves_with_path(state.opt_state)
  before = jax.tree.leaves(old["training"]["opt_state"])
  changed = [
    jax.tree_util.keystr(path)
    for (path, leaf), was in zip(named, before, strict=True)
    if not np.array_equal(leaf, was)
  ]
  assert len(changed) == 1 and changed[0].endswith(".count")  # The schedule's; Adam's stays.
  assert any(np.asarray(leaf).any() for _, leaf in named)


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"model__patch": 2}, "config.model.patch: 4 there, 2 now"),
    ({"optimizer__name": "sgd", "init_optimizer": True}, "config.optimizer.name: 'adam' there, 'sgd' now"),
    ({"optimizer__accumulate": 2, "init_optimizer": True}, "config.optimizer.accumulate: 1 there, 2 now"),
  ],
)  # fmt: skip
def test_a_run_that_does_not_fit_is_told_by_its_keys(source, few_digits, tmp_path, changes, words):
  config, workdir = source
  with pytest.raises(UserError, match=words):
    loop.run(of(config, init_from=workdir, **changes), str(tmp_path / "run"), few_digits)
  assert not (tmp_path / "run").exists()


def test_a_base_that_becomes_a_twin_meets_its_constraints(source, few_digits, tmp_path):
  """Shapes agree, signs do not."""
  config, workdir = source
  free = of(config, model__parts="base", model__norm="batch")
  found = [line for line in schema.mistakes(of(free, init_optimizer=True)) if "init_from" in line]
  assert found
  state = state_of(of(config, init_from=workdir), few_digits)
  kinds = Program(config, few_digits, mesh.make_mesh(jax.devices()[:1])).constraints
  for kind, leaf in zip(jax.tree.leaves(kinds), jax.tree.leaves(state.params), strict=True):
    assert kind == "free" or np.asarray(leaf).min() >= 0


def test_what_is_no_run_is_told(source, few_digits, tmp_path):
  config, _ = source
  for change, words in (
    ({"init_from": str(tmp_path)}, "does not contain a run"),
    ({"init_from": "~/no_such_run"}, "is not a public weight file|does not exist"),
    ({"init_from": "x.npz", "init_optimizer": True}, "x.npz is no run"),
  ):
    with pytest.raises(UserError, match=words):
      state_of(of(config, **change), few_digits)


def test_the_new_key_changes_no_digest(source):
  config, _ = source
  plain = of(config)
  with plain.unlocked():
    del plain["init_optimizer"]
  assert digest(plain) == digest(config) != digest(of(config, init_optimizer=True))
