"""Command lines of docs/ that can run here, run: on one process, on two, on one of two."""

import os
import pathlib
import re
import shlex
import subprocess
import sys
import time

import pytest
import yaml

import convex_jax
from tests.support import ROOT
from tests.support.injections import free_port

PODS = pathlib.Path(__file__).parent.parent / "docs" / "tpu_pods.md"
FEW = ["--config.steps=4", "--config.batch_size=16", "--config.model.size=tiny"]
FEW += ["--config.model.patch=4", "--config.data.train_fraction=0.1"]


def command_of(marker: str, workdir, data_dir, **names) -> list[str]:
  """The marked command line, its capital names replaced, with a smaller job."""
  text = re.search(rf"<!-- test: {marker} -->\n```sh\n(.*?)```", PODS.read_text(), re.DOTALL)[1]
  for name, value in names.items():
    text = re.sub(rf"\b{name}\b", str(value), text)
  words = shlex.split(text.replace("\\\n", " "))
  assert words[0] == "python" and not re.search(r"[=:][A-Z]+\b", text), text
  words = [word for word in words[1:] if not word.startswith("--workdir")]
  return [sys.executable, *words, *FEW, f"--workdir={workdir}", f"--config.data.dir={data_dir}"]


def start(args):
  env = {**os.environ, "JAX_NUM_CPU_DEVICES": "2"}
  pipe = subprocess.PIPE
  return subprocess.Popen(args, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, env=env)


def test_the_command_for_one_box_runs_on_all_its_devices(tmp_path, data_dir):
  process = start(command_of("runs", tmp_path / "run", data_dir))
  _, errors = process.communicate(timeout=240)
  assert process.returncode == 0, errors
  assert convex_jax.load(str(tmp_path / "run")).step == 4


@pytest.mark.slow
def test_the_commands_by_hand_run_on_two_processes(tmp_path, data_dir):
  port = free_port()
  both = [
    start(command_of("runs on two processes", tmp_path / "run", data_dir, PORT=port, I=i))
    for i in range(2)
  ]
  outputs = [process.communicate(timeout=240) for process in both]
  assert [process.returncode for process in both] == [0, 0], outputs
  assert convex_jax.load(str(tmp_path / "run")).step == 4


@pytest.mark.slow
def test_what_skypilot_would_run_runs(tmp_path, data_dir):
  """The script of the file, on one node whose address SkyPilot would give."""
  task = yaml.safe_load((PODS.parent / "skypilot.yaml").read_text())
  script = task["run"].replace(".venv/bin/python", sys.executable).replace("8476", str(free_port()))
  args = [*FEW, f"--workdir={tmp_path / 'run'}", f"--config.data.dir={data_dir}"]
  env = {"CONFIG": task["envs"]["CONFIG"] + ":digits", "ARGS": " ".join(args)}
  env |= {"SKYPILOT_NODE_IPS": "127.0.0.1\n", "SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0"}
  done = subprocess.run(
    ["bash", "-euc", script], cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  assert convex_jax.load(str(tmp_path / "run")).step == 4


def test_a_process_whose_others_do_not_come_says_so(tmp_path, data_dir):
  args = command_of("runs on two processes", tmp_path / "run", data_dir, PORT=free_port(), I=0)
  began = time.monotonic()
  process = start([*args, "--join_timeout=3"])
  _, errors = process.communicate(timeout=120)
  assert process.returncode == 2 and time.monotonic() - began < 60
  assert "not all of 2 processes joined within --join_timeout=3 s" in errors
  if sys.platform == "linux":  # Its table of connections is counted: this process alone.
    assert "--join_timeout=3 s (1 did)" in errors
  assert "Check failure" not in errors and not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", sorted(PODS.parent.glob("*.md")), ids=lambda p: p.name)
def test_every_config_and_flag_of_the_documents_exists(path):
  text = path.read_text()
  from convex_jax.training import schema

  for name in re.findall(r"configs/(\w+)\.py", text):
    assert (PODS.parent.parent / "configs" / f"{name}.py").exists()
  for key in re.findall(r"--config\.([\w.]+)=", text):
    assert key in schema.RULES, key
  flags = (PODS.parent.parent / "convex_jax" / "main.py").read_text()
  for flag in ("distributed", "coordinator", "num_processes", "process_id", "join_timeout"):
    assert f'"{flag}"' in flags and f"--{flag}" in text
