"""Config files and their overrides as people write them."""

import itertools
import os
import subprocess
import sys

import pytest

from convex_jax import config_files
from convex_jax.training import schema
from tests.support import ROOT

CONFIG = str(ROOT / "configs" / "mixer_ioc.py")


def loaded(text):
  """{key: value} of the keys that overrides, separated by blanks, set."""
  overrides, others = config_files.split(text.split())
  assert not others
  config = config_files.load([f"--config={CONFIG}", *overrides])
  assert schema.mistakes(config) == []
  keys = {override.partition(".")[2].partition("=")[0] for override in overrides}
  return {key: value for key, value in config_files.flatten(config) if key in keys}


@pytest.mark.parametrize(
  "text, want",
  [
    ("--config.steps=3", {"steps": 3}),
    ("--config.steps 3 --config.seed=4", {"steps": 3, "seed": 4}),
    ("-config.steps=3 -config.seed 4", {"steps": 3, "seed": 4}),
    ("--config.steps=3 --config.steps 5", {"steps": 5}),
    ("--config.steps 1e3 --config.seed 1_000 --config.batch_size=0x10", {"steps": 1000, "seed": 1000, "batch_size": 16}),
    ("--config.data.workers -1", {"data.workers": -1}),
    ("--config.data.flip", {"data.flip": True}),
    ("--config.data.flip True --config.steps 3", {"data.flip": True, "steps": 3}),
    ("--config.data.flip --config.steps 3", {"data.flip": True, "steps": 3}),
    ("--noconfig.data.flip", {"data.flip": False}),
    ("--config.model.gelu=None", {"model.gelu": None}),
    ("--config.model.patch none --config.model.dense_readout=None", {"model.patch": None, "model.dense_readout": None}),
    ("--config.model.patch=4 --config.model.patch=None", {"model.patch": None}),
    ("--config.init_from=None --config.data.dir=", {"init_from": "", "data.dir": ""}),
    ("--config.optimizer.learning_rate=1", {"optimizer.learning_rate": 1.0}),
    ("--config.data.crop_area=(0.08,1)", {"data.crop_area": (0.08, 1.0)}),
    ("--config.data.crop_area [0.08,1]", {"data.crop_area": (0.08, 1.0)}),
    ("--config.data.crop_area=0.08,1", {"data.crop_area": (0.08, 1.0)}),
    ("--config.log.profile_steps=(1e1,2e1)", {"log.profile_steps": (10, 20)}),
    ("--config.data.randaugment=(2,9)", {"data.randaugment": (2, 9)}),
    ("--config.data.classes=cat,dog", {"data.classes": ("cat", "dog")}),
    ("--config.data.classes=('cat','dog')", {"data.classes": ("cat", "dog")}),
    ("--config.data.classes=cat --config.data.classes=dog", {"data.classes": ("cat", "dog")}),
    ("--config.data.classes=(3,8)", {"data.classes": ("3", "8")}),
    ("--config.checkpoint.patience=inf", {"checkpoint.patience": float("inf")}),
  ],
)  # fmt: skip
def test_values_are_taken_as_they_are_written(text, want):
  found = loaded(text)
  assert found == want
  assert str(found) == str({key: want[key] for key in found})  # 1 is no 1.0 in a digest.


@pytest.mark.parametrize(
  "text, error",
  [
    ("--config.steps", ValueError),
    ("--config.steps --config.seed=3", ValueError),
    ("--config.steps=2.5", ValueError),
    ("--config.steps=nan", ValueError),
    ("--config.steps=1e999", ValueError),
    ("--config.steps=", ValueError),
    ("--config.init_from", ValueError),
    ("--config.data.flip=3", ValueError),
    ("--config.data={}", ValueError),
    ("--config.optimizer=adam", ValueError),
    ("--config.epocs=3", LookupError),
    ("--config.data.name.x=3", LookupError),
  ],
)
def test_values_that_do_not_fit_are_refused(text, error):
  with pytest.raises(error):
    loaded(text)


def test_options_may_stand_in_any_order():
  words = [["--config=F"], ["--config.steps", "3"], ["--workdir", "x"], ["--config.seed=4"]]
  for order in itertools.permutations(words):
    overrides, others = config_files.split(list(itertools.chain.from_iterable(order)))
    assert sorted(overrides) == ["--config.seed=4", "--config.steps=3"]
    assert sorted(others) == ["--config=F", "--workdir", "x"]


OWN = """
from configs import base, mine

def get_config(name="digits"):
  config = base.get_config()
  config.data.name = name
  config.seed = mine.SEED
  return config
"""


@pytest.fixture
def project(tmp_path):
  """A folder with configs of its own, one of which replaces a bundled one."""
  configs = tmp_path / "project" / "configs"
  configs.mkdir(parents=True)
  (configs / "own.py").write_text(OWN)
  (configs / "mine.py").write_text("SEED = 7")
  (tmp_path / "elsewhere" / "deeper").mkdir(parents=True)
  (tmp_path / "elsewhere" / "link.py").symlink_to(configs / "own.py")
  (tmp_path / "elsewhere" / "bundled.py").symlink_to(CONFIG)
  return tmp_path


@pytest.mark.parametrize(
  "file, seed",
  [
    ("{project}/configs/own.py", 7),
    ("{project}/configs/own.py:mnist", 7),
    ("../../project/configs/own.py", 7),
    ("~/project/configs/own.py", 7),
    ("../link.py", 7),
    ("../bundled.py:digits", 0),
    (CONFIG + ":digits", 0),
    ("configs/mixer_ioc.py", 0),
  ],
)
def test_a_config_file_loads_from_another_folder(project, file, seed, monkeypatch):
  monkeypatch.chdir(project / "elsewhere" / "deeper")
  monkeypatch.setenv("HOME", str(project))
  config = config_files.load([f"--config={file.format(project=project / 'project')}"])
  assert config.seed == seed


def test_configs_of_two_projects_do_not_mix(project, tmp_path, monkeypatch):
  other = tmp_path / "other" / "configs"
  other.mkdir(parents=True)
  (other / "own.py").write_text(OWN)
  (other / "mine.py").write_text("SEED = 8")
  for folder, seed in ((other, 8), (project / "project" / "configs", 7), (other, 8)):
    assert config_files.load([f"--config={folder / 'own.py'}"]).seed == seed


def test_the_command_takes_an_absolute_config_in_another_folder(tmp_path):
  """It gets as far as the data set's name."""
  args = ["-m", "convex_jax.main", f"--config={ROOT}/configs/mlp.py:digit", "--config.steps", "3"]
  env = {**os.environ, "PYTHONPATH": str(ROOT)}
  run = subprocess.run(
    [sys.executable, *args], cwd=tmp_path, env=env, capture_output=True, text=True
  )
  assert run.returncode == 2 and "Did you mean 'digits'" in run.stderr
  assert "Traceback" not in run.stderr and not list(tmp_path.iterdir())
