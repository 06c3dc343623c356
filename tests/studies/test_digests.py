"""The committed results belong to the configs that the committed sweeps describe today."""

import copy
import functools

import pytest

from convex_jax import config_files
from convex_jax.runs import workdir
from convex_jax.studies import jobs, results
from tests.support import ROOT

FOLDERS = sorted(path.parent for path in (ROOT / "experiments").glob("*/sweep.py"))
pytestmark = pytest.mark.skipif(not FOLDERS, reason="experiments/ is not here")


def listed(folder):
  """{key: job} of every schedule of a sweep."""
  module = jobs.read_sweep(str(folder))
  return {
    (job.panel, job.variant, schedule, job.seed): job
    for schedule in module.SCHEDULES
    for job in module.get_sweep(schedule)
  }


@functools.cache
def config_of(file, overrides):
  """The config with seed 0; one for all seeds, since loading it takes long."""
  return config_files.load([f"--config={file}", *overrides])


def digest_of(job, **changes):
  overrides = tuple(f"--config.{key}={v}" for key, v in {**job.overrides, **changes}.items())
  config = copy.deepcopy(config_of(job.config, overrides))
  config.seed = job.seed
  return workdir.digest(config)


def test_no_digest_of_a_committed_result_has_moved():
  checked = 0
  for folder in FOLDERS:
    known = listed(folder)
    for row in results.read(str(folder)).rows:
      assert row.key in known, f"{folder.name} has a result of no job: {row.key}"
      assert digest_of(known[row.key]) == row.digest, (folder.name, row.key)
      checked += 1
  assert checked >= 150


def test_a_changed_learning_rate_changes_the_digest():
  job = next(iter(listed(FOLDERS[0]).values()))
  assert digest_of(job) != digest_of(job, **{"optimizer.learning_rate": 0.123})


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_schedule_of_a_committed_sweep_can_be_run(folder):
  module = jobs.read_sweep(str(folder))
  for schedule in module.SCHEDULES:
    assert jobs.tasks_of(module, schedule, "runs/x"), schedule
