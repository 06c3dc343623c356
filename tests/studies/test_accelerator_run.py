"""`experiments/accelerator`: its budget of time, what it packs, and all of it at tiny sizes."""

import importlib
import json
import subprocess
import sys
import tarfile
import time

import pytest

from tests.support import PATIENCE, ROOT

FOLDER = ROOT / "experiments" / "accelerator"
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="experiments/ is not here")


@pytest.fixture
def command():
  return importlib.import_module("experiments.accelerator.run")


def context(command, out, seconds, tiny=False):
  deadline = time.monotonic() + command.GRACE + seconds
  return command.Context(out, "", tiny, deadline)


def test_a_step_is_run_once_and_only_where_it_fits(command, tmp_path):
  ran = []
  step = command.Step("x", lambda _: 50, lambda _: ran.append(1) or ("done", "42"))
  assert (
    "not started: needs 50 s" in command.run_step(step, context(command, tmp_path, 40))["outcome"]
  )
  assert not ran and not list(tmp_path.iterdir())
  for _ in range(2):
    line = command.run_step(step, context(command, tmp_path, 60))
  assert ran == [1] and line["figure"] == "42"
  assert json.loads((tmp_path / "x.json").read_text()) == line


def test_a_step_is_stopped_at_the_end_of_the_time_and_goes_on_later(command, tmp_path):
  (tmp_path / "wait.py").write_text("import time\nprint('begun', flush=True)\ntime.sleep(3600)")
  words = ["wait", "wait"]
  limited, ran = context(command, tmp_path, 0.5), []
  assert limited.python(*words, PYTHONPATH=str(tmp_path)) == "stopped"
  step = command.Step("x", lambda _: 0, lambda _: ran.append(1) or ("stopped", ""))
  for _ in range(2):
    command.run_step(step, context(command, tmp_path, 60))
  assert ran == [1, 1]


def test_the_most_epochs_that_fit_are_taken(command, tmp_path):
  step = next(step for step in command.STEPS if step.name == "all_cnn")
  (tmp_path / "rates.csv").write_text(
    "network,way,batch,images_per_second\nAll-CNN-C,ioc,64,50000\nAll-CNN-C,ioc,1024,99999\n"
  )
  whole = command.START + 2 * 100  # Two runs of 100 epochs, a second an epoch.
  assert step.seconds(context(command, tmp_path, whole + 1)) == whole
  assert step.seconds(context(command, tmp_path, whole - 1)) == command.START + 2 * 30
  assert step.seconds(context(command, tmp_path, 0)) == command.START + 2 * 10
  (tmp_path / "runs" / "all_cnn" / "all_cnn_100").mkdir(parents=True)  # Has begun: goes on.
  assert step.seconds(context(command, tmp_path, 50)) == command.START


def unpack(*words):
  script = [sys.executable, str(FOLDER / "unpack.py")]
  return subprocess.run([*script, *map(str, words)], capture_output=True, text=True)


def test_what_is_packed_in_parts_is_unpacked(tmp_path):
  pack = importlib.import_module("experiments.accelerator.pack")
  source, parts, to = tmp_path / "source", tmp_path / "parts", tmp_path / "to"
  source.mkdir(), parts.mkdir()
  content = bytes(range(256)) * 1000
  (source / "images").write_bytes(content)
  with pack.Parts(parts, 100_000) as stream, tarfile.open(fileobj=stream, mode="w|") as archive:
    archive.add(source, "data/digits")
  names = sorted(path.name for path in parts.glob("pack.0*"))
  assert len(names) >= 3 and (parts / names[0]).stat().st_size == 100_000
  (parts / names[1]).rename(tmp_path / "later")
  assert f"still missing in {parts}: {names[1]}" in unpack(parts, f"--to={to}").stderr
  (tmp_path / "later").rename(parts / names[1])
  printed = unpack(parts, f"--to={to}")
  assert f"--data_dir={to / 'data'}" in printed.stdout, printed.stderr
  assert (to / "data" / "digits" / "images").read_bytes() == content
  (parts / names[1]).write_bytes(b"other")
  assert f"{names[1]} is damaged" in unpack(parts, f"--to={to}").stderr


def test_what_the_measurements_need_is_read_from_setup_cfg():
  pack = importlib.import_module("experiments.accelerator.pack")
  names = {pack.name_of(line) for line in pack.requirements()}
  assert {"jax", "flax", "tensorboard", "matplotlib", "pytest", "pytest-xdist"} <= names
  assert not {"convex-jax", "ruff", "torch"} & names


@pytest.mark.slow
def test_all_of_it_runs_at_tiny_sizes(tmp_path):
  words = ["experiments.accelerator.run", "--minutes=30", "--tiny", f"--out={tmp_path}"]
  done = subprocess.run(
    [sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, timeout=2 * PATIENCE
  )
  assert done.returncode == 0, done.stderr
  lines = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
  steps = ["tests", "rates", "epoch", "table_1", "all_cnn", "cycle_mlp", "densenet"]
  assert [lines[name]["outcome"] for name in steps] == ["done"] * 7, done.stdout
  assert "passed" in lines["tests"]["figure"] and "images in" in lines["epoch"]["figure"]
  for name in steps[3:]:
    assert "proved" in lines[name]["figure"]
