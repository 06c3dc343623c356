"""Several processes, as on several hosts: photographs streamed, weights split, one training."""

import os
import subprocess
import sys

import numpy as np
import pytest

import convex_jax
from tests.support import PATIENCE, ROOT
from tests.support.injections import free_port, rows_without_clock
from tests.support.running import run_main

pytestmark = pytest.mark.slow


def command(photo_dir, workdir, *more):
  settings = {
    "data.dir": photo_dir,
    "data.image_size": 16,
    "data.cache_size": 0,
    "data.workers": 0,
    "model.patch": 4,
    "model.depth": 1,
    "batch_size": 24,
    "steps": 6,
    "eval.every_epochs": 1.0,
    "optimizer.name": "sgd",
    "optimizer.learning_rate": 0.1,
  }
  program = [sys.executable, "-m", "convex_jax.main", "--config=configs/mixer_ioc.py:imagenet2012"]
  flags = [f"--config.{key}={value}" for key, value in settings.items()]
  return [*program, *flags, f"--workdir={workdir}", *more]


def start(photo_dir, workdir, devices, fsdp):
  """A process for each entry of `devices`, with so many of them."""
  port = free_port()
  return [
    subprocess.Popen(
      command(
        photo_dir,
        workdir,
        "--distributed=on",
        f"--coordinator=localhost:{port}",
        f"--num_processes={len(devices)}",
        f"--process_id={i}",
        f"--config.fsdp={fsdp}",
      ),
      cwd=ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env={**os.environ, "JAX_NUM_CPU_DEVICES": str(count)},
    )
    for i, count in enumerate(devices)
  ]


@pytest.fixture(scope="module")
def alone(photo_dir, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("alone") / "run"
  done = run_main(command(photo_dir, workdir), env={"JAX_NUM_CPU_DEVICES": "8"})
  assert done.returncode == 0, done.stderr
  return workdir


@pytest.mark.parametrize("devices,fsdp", [((4, 4), 2), ((2, 2, 2, 2), 2)], ids=str)
def test_processes_train_as_one(photo_dir, alone, tmp_path, devices, fsdp):
  """Photographs streamed, and weights of which a process holds a part."""
  processes = start(photo_dir, tmp_path / "run", devices, fsdp)
  outputs = [process.communicate(timeout=PATIENCE) for process in processes]
  assert [process.returncode for process in processes] == [0] * len(devices), outputs
  one, several = (
    [row for row in rows_without_clock(workdir) if row["kind"] in ("eval", "final")]
    for workdir in (alone, tmp_path / "run")
  )
  assert len(one) == len(several) > 1
  for a, b in zip(one, several, strict=True):
    assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)
    assert a["test_loss"] == pytest.approx(b["test_loss"], rel=1e-4)
  one, several = (convex_jax.load(str(workdir)) for workdir in (alone, tmp_path / "run"))
  assert one.step == several.step == 6 and several.certificate["verdict"] == "PROVED"
  images = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8)
  np.testing.assert_allclose(one.logits(images), several.logits(images), atol=1e-3)


def test_processes_with_unlike_numbers_of_devices_are_told_so(photo_dir, tmp_path):
  processes = start(photo_dir, tmp_path / "run", (3, 1), fsdp=1)
  for process in processes:
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert "process 0: 3, process 1: 1" in errors and "Traceback" not in errors
