"""Two classes, one convex logit: what experiments/cats_dogs measures, on cases that are known."""

import csv
import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convex_jax import config_files
from convex_jax.proof.radii import NORMS, one_sided_radius
from convex_jax.studies import jobs
from convex_jax.training import loop
from tests.support import ROOT

pytestmark = pytest.mark.skipif(
  not (ROOT / "experiments" / "cats_dogs").exists(), reason="experiments/ is not here"
)
SWEEP = """
from convex_jax.studies.jobs import TWINS, Job

TITLE, SCHEDULES = "3 against 8", {"memorise": "a few steps"}
CHANGED = TWINS["ioc"] | {"data.classes": ("3", "8"), "model.one_logit": True, "steps": 60}

def get_sweep(schedule):
  return [Job("MLP", "ioc", "configs/mlp.py:digits", CHANGED | {"eval.every_epochs": 1000.0})]
"""


@pytest.fixture(scope="module")
def cats():
  return importlib.import_module("experiments.cats_dogs.run")


@pytest.mark.parametrize(
  ("y", "sensitive", "accuracies"),
  [
    ([1, 2, 3, 4], [0, 0, 1, 1], (1, 1)),  # All positive: a threshold of 0 finds one class only.
    ([-4, -3, -2, -1], [0, 0, 1, 1], (1, 1)),
    ([4, 3, 2, 1], [0, 0, 1, 1], (0, 0)),  # The wrong way round.
    ([1, 2, 3, 4, 5, 6], [0, 0, 0, 1, 0, 1], (1, 3 / 4)),
    ([1, 1, 1, 2], [0, 1, 0, 1], (1 / 2, 1)),  # Equal logits are on one side.
  ],
)
def test_both_classes_are_as_accurate_as_each_other(cats, y, sensitive, accuracies):
  y, sensitive = np.array(y, float), np.array(sensitive, bool)
  above = y > cats.balance(y, sensitive)
  found = above[sensitive].mean(), (~above)[~sensitive].mean()
  assert abs(found[0] - found[1]) <= abs(accuracies[0] - accuracies[1]) + 1e-12
  assert not np.isclose(y, cats.balance(y, sensitive)).any()


def test_features_are_the_pixel_and_its_distance_from_the_mean_colour(cats):
  images = np.array([0, 99, 100, 255], np.uint8).reshape(2, 2, 1, 1) + np.zeros(3, np.uint8)
  z = cats.features(images, np.array([0, 100, 255], np.int16))
  assert z.dtype == np.uint8 and z.shape == (2, 2, 1, 6)
  np.testing.assert_array_equal(z[..., :3], images)
  expected = [[0, 100, 255], [99, 1, 156], [100, 0, 155], [255, 155, 0]]
  np.testing.assert_array_equal(z[..., 3:].reshape(4, 3), expected)


def slopes(logit, z_NxHxWxC):
  return map(np.asarray, jax.vmap(jax.value_and_grad(logit))(jnp.asarray(z_NxHxWxC)))


def phi(p_HxWxC, centre):
  return jnp.concatenate([p_HxWxC, jnp.abs(p_HxWxC - centre)], -1)


@pytest.mark.parametrize("norm", NORMS)
def test_a_radius_through_the_features_is_exact_where_both_move_together(cats, norm):
  def logit(z):
    return 130 - z[0, 0].sum()  # 130 - p - |p - 100|, which is 10 at 110 and 0 at 115.

  with jax.enable_x64(True):
    p = jnp.full((2, 2, 1), 110.0).at[1].set(30.0)
    at = tuple(slopes(logit, phi(p, 100)[None]))
    (radius,) = 255 * cats.radii_of(*at, norm, True)
    np.testing.assert_allclose(radius, 5)
    assert logit(phi(p.at[0, 0].add(0.999 * radius), 100)) > 0
    assert logit(phi(p.at[0, 0].add(1.001 * radius), 100)) < 0
    np.testing.assert_allclose(255 * cats.by_pixel(*at, norm), 5)
    (in_features,) = 255 * cats.radii_of(*at, norm, False)
  np.testing.assert_allclose(in_features, 5 * cats.LIPSCHITZ[norm])  # Not a radius in p.


@pytest.mark.parametrize("norm", NORMS)
def test_no_step_inside_a_radius_changes_the_side(cats, norm):
  rng = np.random.default_rng(0)
  matrix, signs = rng.normal(size=(8, 8)), rng.choice([-1.0, 1.0], (400, 2, 1, 2))
  sizes = {"l1": 4, "l2": 2, "linf": 1}  # Of a vector of four signs.
  tried = 0
  with jax.enable_x64(True):

    def logit(z):
      return jnp.logaddexp.reduce(matrix @ z.ravel() / 30) - 1

    for p in rng.uniform(0, 255, (20, 2, 1, 2)):
      z = phi(p, 100)
      at = tuple(slopes(logit, z[None]))
      (radius,), (of_map,) = 255 * cats.by_pixel(*at, norm), 255 * cats.radii_of(*at, norm, True)
      in_features = one_sided_radius(logit, z, norm)[1]
      np.testing.assert_allclose(of_map, in_features / cats.LIPSCHITZ[norm])
      assert radius >= of_map * (1 - 1e-12) and (norm != "linf" or np.isclose(radius, of_map))
      steps = np.concatenate([signs / sizes[norm], np.eye(4).reshape(4, 2, 1, 2)])
      moved = p + 0.9999 * radius * np.concatenate([steps, -steps])
      assert radius == 0 or jax.vmap(lambda p: logit(phi(p, 100)))(moved).min() > 0
      tried += radius > 0
  assert tried >= 5


def test_a_misclassified_image_is_certified_at_no_radius(cats):
  radii = np.array([0.0, 0.0, 1.0, 2.0])
  assert [cats.certified_share(radii, r) for r in (0, 1, 1.5, 3)] == [0.5, 0.5, 0.25, 0]


@pytest.mark.slow
def test_the_command_trains_measures_and_counts(cats, tmp_path, monkeypatch, data_dir):
  (tmp_path / "sweep.py").write_text(SWEEP)
  (task,) = jobs.tasks_of(jobs.read_sweep(str(tmp_path)), "memorise", str(tmp_path))
  loop.run(
    config_files.load([*task.job.arguments(), f"--config.data.dir={data_dir}"]), task.workdir
  )
  digits = dataclasses.replace(cats.TASKS[0], name="digits", data="digits", epochs=1, padding=0)
  monkeypatch.setattr(cats, "TASKS", (digits,))
  monkeypatch.setattr(cats, "FOLDER", tmp_path)
  words = [f"--workdir={tmp_path}", f"--data_dir={data_dir}", f"--out={tmp_path}"]
  monkeypatch.setattr("sys.argv", ["run", *words])
  cats.main()
  with open(tmp_path / "memorised.csv", newline="") as file:
    (row,) = csv.DictReader(file)
  train = cats.prepared(digits, False, data_dir).train
  assert row["convex"] == "PROVED" and int(row["images"]) == len(train) > 200
  assert (int(row["errors"]) == 0) == (float(row["least margin"]) > 0)
  with open(tmp_path / "protocol.csv", newline="") as file:
    rows = list(csv.DictReader(file))
  assert len(rows) == 4 * 3 * 5 and {row["convex"] for row in rows} == {"PROVED"}
  assert {(row["feature map"], row["Jacobian"]) for row in rows} == {
    (mapped, smooth) for mapped in ("(x, |x|)", "") for smooth in (str(cats.JACOBIAN), "")
  }
  assert (tmp_path / "protocol.png").stat().st_size < 300_000
