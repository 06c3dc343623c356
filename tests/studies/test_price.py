"""The price of convexity: what experiments/price measures, on networks of a few weights."""

import csv
import importlib
import os

import numpy as np
import pytest

from convex_jax import config_files
from convex_jax.errors import UserError
from convex_jax.studies import jobs, results
from convex_jax.training import loop
from tests.support import ROOT

pytestmark = pytest.mark.skipif(
  not (ROOT / "experiments" / "price").exists(), reason="experiments/ is not here"
)
SAVED = ROOT / "tests" / "fixtures" / "run_1_1"
SWEEP = """
from convex_jax.studies.jobs import TWINS, Job

TITLE, SCHEDULES = "Price", {"tiny": "a few steps"}
STEPS = {"steps": 40, "model.width": 16, "model.depth": 2, "eval.every_epochs": 1000.0}

def get_sweep(schedule):
  return [Job("MLP", name, "configs/mlp.py:digits", STEPS | TWINS[name]) for name in ("base", "ioc")]
"""


@pytest.fixture(scope="module")
def price():
  return importlib.import_module("experiments.price.run")


@pytest.fixture(scope="module")
def measure(price, tmp_path_factory, data_dir):
  """Returns the rows of price.csv, measured anew."""
  folder = tmp_path_factory.mktemp("price")
  (folder / "sweep.py").write_text(SWEEP)
  for task in jobs.tasks_of(jobs.read_sweep(str(folder)), "tiny", str(folder / "runs")):
    config = config_files.load([*task.job.arguments(), f"--config.data.dir={data_dir}"])
    loop.run(config, task.workdir)

  def measured(monkeypatch, sweep=folder, runs=folder / "runs"):
    words = [str(sweep), "--schedule=tiny", f"--workdir={runs}", f"--out={sweep}"]
    monkeypatch.setattr("sys.argv", ["run", *words, f"--data_dir={data_dir}"])
    price.main()
    return list(price.read(sweep).values())

  measured.folder = folder
  return measured


def test_a_network_that_is_convex_by_itself_needs_next_to_no_term(price, data_dir):
  task = jobs.Task(jobs.Job("Mixer", "ioc", ""), "tiny", str(SAVED), "digest", 1.0, "epoch")
  row = {"paper": "", "ioc": ""} | price.row_of(task, 64, data_dir)
  assert (row["verdict"], row["examples"], row["seed"]) == ("PROVED", 64, "0")
  assert row["accuracy"] == row["float32"] == row["float64"] > 0.2
  assert row["common"] < 0.01 * row["logits"]
  cells = price.table([{key: price.text(value) for key, value in row.items()}]).split("|")
  assert cells[-2].strip() == "proved"
  assert price.geometric([{"common": "0"}, {"common": "0.5"}], "common") == "0"
  assert price.geometric([{"common": "1"}, {"common": "100"}], "common") == "10"
  assert price.geometric([{"common": "1"}, {"common": "inf"}], "common") == "beyond float64"


@pytest.mark.slow
def test_a_free_network_is_as_accurate_in_its_convex_form(price, measure, monkeypatch):
  (row,) = measure(monkeypatch)
  assert row["verdict"] == "PROVED" and int(row["examples"]) == 360
  assert row["accuracy"] == row["float32"] == row["float64"] and float(row["accuracy"]) > 0.15
  assert float(row["common"]) > 0.1 * float(row["logits"]) > 0
  assert (int(row["depth"]), int(row["width"])) == (2, 16)
  assert 0 < float(row["ioc"]) < 1 and row["paper"] == ""  # The twin that was trained.


@pytest.mark.slow
def test_a_network_that_no_term_is_known_for_says_why(price, measure, monkeypatch):
  def refuse(run):
    raise UserError(f"{run.workdir}: mul: a product; use another")

  monkeypatch.setattr(price.Run, "convexify", refuse)
  (row,) = measure(monkeypatch)  # In place of the one before.
  assert (row["verdict"], row["reason"]) == ("none", "mul: a product; use another")
  assert 0 < float(row["accuracy"]) < 1 and row["float64"] == ""
  assert price.table([row]).count("\n") == 2


@pytest.mark.slow
@pytest.mark.parametrize(
  "digest, outcome, ioc",
  [("", "finished", "0.5"), ("another", "finished", ""), ("", "diverged", "")],
)
def test_a_twin_trained_elsewhere_counts_if_it_is_of_the_same_config(
  price, measure, monkeypatch, tmp_path, digest, outcome, ioc
):
  """The accuracies in results.csv stand in for runs that are not there."""
  tasks = jobs.tasks_of(jobs.read_sweep(str(measure.folder)), "tiny", str(tmp_path))
  (twin,) = (task for task in tasks if task.job.variant == "ioc")
  row = results.Result(
    *twin.key, digest or twin.digest, outcome, parameters=1, epochs=1.0, batch_size=1,
    test_accuracy=0.5
  )  # fmt: skip
  results.write(results.Results((row,)), str(tmp_path))
  (tmp_path / "sweep.py").write_text(SWEEP)
  base = next(task for task in tasks if task.job.variant == "base")
  os.makedirs(os.path.dirname(base.workdir))
  trained = base.workdir.replace(str(tmp_path), str(measure.folder / "runs"))
  os.symlink(trained, base.workdir)
  (found,) = measure(monkeypatch, tmp_path, tmp_path)
  assert found["ioc"] == ioc and found["accuracy"]


def test_the_term_grows_with_depth_and_width_and_each_point_is_proved(tmp_path):
  growth = importlib.import_module("experiments.price.growth")
  cases = [("ReLU", 8, 1, 0), ("ReLU", 8, 3, 0), ("ReLU", 64, 3, 0), ("tanh", 8, 1, 0)]
  found = growth.measured(growth.mlps(cases, examples=8))
  assert {row["verdict"] for row in found} == {"PROVED"}
  ratios = [row["ratio"] for row in found]
  assert ratios[0] < ratios[1] < ratios[2] and np.isfinite(ratios).all()
  growth.write(found, tmp_path)
  trained = {"depth": "2", "common": "30", "logits": "2"}
  growth.draw(found, [trained], tmp_path)
  with open(tmp_path / "growth.csv", newline="") as file:
    assert len(list(csv.DictReader(file))) == len(found)
  assert 0 < (tmp_path / "growth.png").stat().st_size < 300_000
