"""Whole runs: killed, stopped, resumed, in several processes; exit codes; reloading."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest
from flax import core

import convex_jax
from convex_jax import config_files, files
from convex_jax.data import datasets
from convex_jax.errors import UserError
from convex_jax.runs.workdir import FIRST_KEYS, FORMAT, FREE_KEYS, Workdir
from convex_jax.training import loading, loop, program, recorder
from tests.support import PATIENCE, ROOT, of
from tests.support.injections import free_port, rows_without_clock
from tests.support.running import run_here, run_main

TINY = [
  "--config=configs/mixer_ioc.py:digits",
  "--config.model.size=tiny",
  "--config.model.patch=4",
  "--config.model.depth=1",
  "--config.batch_size=16",
  "--config.data.train_fraction=0.2",
  "--config.eval.every_epochs=1.0",
  "--config.log.every_steps=5",
]


def options(data_dir, workdir, *more):
  return [*TINY, f"--config.data.dir={data_dir}", f"--workdir={workdir}", *more]


def command(*settings):
  return [sys.executable, "-m", "convex_jax.main", *options(*settings)]


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
  """An unbroken run of three epochs, and what it printed."""
  workdir = tmp_path_factory.mktemp("unbroken") / "run"
  result = run_here(*options(data_dir, workdir, "--config.steps=54", *SAVES))
  assert result.returncode == 0, result.stderr
  return workdir, result.stdout


SAVES = ["--config.checkpoint.every_steps=18"]


def test_a_run_ends_with_its_figures_and_where_it_lies(finished):
  workdir, out = finished
  for words in ("block_0/token_mixing/dense_1/kernel", "clamp", "shift", "constrained"):
    assert words in out  # The start-up table.
  assert "generalisation gap" in out and "exactly 0" in out and str(workdir) in out
  rows = rows_without_clock(workdir)
  final = rows[-1]
  assert final["kind"] == "final" and final["step"] == 54
  assert final["smallest_constrained"] >= 0
  assert {"train_accuracy", "train_loss", "test_accuracy", "test_loss", "gap"} <= final.keys()
  assert any(name.startswith("events.out.tfevents") for name in os.listdir(workdir))
  for kind in ("train", "eval"):
    steps = [row["step"] for row in rows if row["kind"] == kind]
    assert steps == sorted(set(steps)) and steps[-1] == 54


def test_the_same_command_on_a_finished_run_tells_its_figures_again(finished, data_dir):
  workdir, _ = finished
  before = rows_without_clock(workdir)
  result = run_here(*options(data_dir, workdir, "--config.steps=54", *SAVES))
  assert result.returncode == 0 and "generalisation gap" in result.stdout
  assert rows_without_clock(workdir) == before


def test_another_config_in_the_same_workdir_is_refused(finished, data_dir):
  workdir, _ = finished
  args = options(data_dir, workdir, "--config.steps=54", *SAVES, "--config.seed=3")
  result = run_here(*args)
  assert result.returncode == 2
  assert "config.seed: 0 there, 3 now" in result.stderr and "--workdir" in result.stderr


def test_a_run_whose_data_have_changed_is_refused(finished, data_dir):
  """A folder of data may be made anew: here its classes, its images or their number are others."""
  overrides = [*options(data_dir, "")[1:-1], "--config.steps=54", *SAVES]
  config = loading.load_config(TINY[0].partition("=")[2], overrides)
  workdir, before = str(finished[0]), (finished[0] / "config.json").read_bytes()
  data = datasets.load(config.data, config.seed, progress=False)
  fewer = data.train.subset(np.arange(len(data.train) - 1))
  darker = dataclasses.replace(data.train, images=data.train.images // 2)
  names = (*data.class_names[:-1], "ten")
  for changes, words in (
    ({"class_names": names}, "class_names: .*'9'.* in the run, .*'ten'.* now"),
    ({"train": fewer}, f"examples: .*{len(data.train)}.* in the run, .*{len(fewer)}.* now"),
    ({"train": darker}, "mean: "),
  ):
    with pytest.raises(UserError, match=words) as caught:
      loop.run(config, workdir, dataclasses.replace(data, **changes))
    assert "pass another --workdir" in str(caught.value)
  assert (finished[0] / "config.json").read_bytes() == before
  Workdir(workdir).check_same_data(data)


def test_a_run_older_than_some_keys_loads_and_is_no_other(finished, data_dir, tmp_path):
  old = tmp_path / "old"
  shutil.copytree(finished[0], old)
  path = old / "config.json"
  content = json.loads(path.read_text())
  content.pop("sha256")
  for key in config_files.defaults().keys() - FIRST_KEYS - set(FREE_KEYS):
    *section, last = key.split(".")
    del (content["config"][section[0]] if section else content["config"])[last]
  files.write_json(str(path), content)
  assert convex_jax.load(str(old)).config.data.classes == ()
  assert run_here(*options(data_dir, old, "--config.steps=54", *SAVES)).returncode == 0


def test_a_fresh_process_predicts_the_same_logits(finished, digits, tmp_path):
  """From another folder, on another number of devices, without data or config code."""
  workdir, _ = finished
  np.save(tmp_path / "images.npy", digits.test.images)
  program = (
    "import convex_jax, jax, numpy as np; jax.config.update('jax_num_cpu_devices', 3)\n"
    f"run = convex_jax.load({str(workdir)!r})\n"
    "np.save('logits.npy', run.logits(np.load('images.npy')))"
  )
  result = subprocess.run(
    [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE
  )
  assert result.returncode == 0, result.stderr
  run = convex_jax.load(str(workdir))
  logits = run.logits(digits.test.images)
  np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), logits, atol=1e-5)
  accuracy = np.mean(run.predict(digits.test.images) == digits.test.labels)
  assert accuracy == pytest.approx(run.metrics("final")[-1]["test_accuracy"], abs=1e-6)
  assert run.class_names == tuple("0123456789") and run.config.model.parts == "ioc"
  assert run.certificate["verdict"] == "PROVED" and "mixer" in repr(run) and run.step == 54
  with pytest.raises(ValueError, match="uint8 of shape"):
    run.logits(digits.test.images / 255)
  best = convex_jax.load(str(workdir), step="best")
  accuracies = {row["step"]: row["test_accuracy"] for row in run.metrics("eval")}
  assert accuracies[best.step] == max(accuracies.values())


def test_loading_what_is_not_there_says_what_is(finished, tmp_path):
  workdir, _ = finished
  with pytest.raises(UserError, match="does not contain a run"):
    convex_jax.load(str(tmp_path))
  with pytest.raises(UserError, match=r"no checkpoint 999 in .*expected one of .*54"):
    convex_jax.load(str(workdir), step=999)
  with pytest.raises(UserError, match="no averaged weights"):
    convex_jax.load(str(workdir), weights="ema")


def test_averages_are_saved_and_loaded(tiny_config, few_digits, tmp_path, monkeypatch):
  workdir, returned = str(tmp_path / "run"), []
  runtime = types.SimpleNamespace(return_freed_memory=lambda: returned.append(True))
  monkeypatch.setattr(loop, "runtime", runtime)
  loop.run(of(tiny_config, ema_decay=0.9), workdir, few_digits)
  assert len(returned) == len(Workdir(workdir).rows("eval")) > 0
  ema, raw, auto = (convex_jax.load(workdir, weights=w) for w in ("ema", "raw", "auto"))
  kernels = [
    run.params["block_0"]["channel_mixing"]["dense_0"]["kernel"] for run in (ema, raw, auto)
  ]
  assert (kernels[0] != kernels[1]).any() and (kernels[0] == kernels[2]).all()
  assert all((kernel >= 0).all() for kernel in kernels)


def test_a_run_in_views_is_evaluated_predicted_and_proved_in_them(
  tiny_config, few_digits, tmp_path
):
  views = {"data__eval_shifts": (-1, 1), "data__eval_flip": True, "eval__every_epochs": 1e38}
  loop.run(of(tiny_config, steps=40, **views), str(tmp_path), few_digits)
  run, test = convex_jax.load(tmp_path), few_digits.test
  accuracy = run.metrics("final")[-1]["test_accuracy"]
  assert np.mean(run.predict(test.images) == test.labels) == pytest.approx(accuracy)

  config = of(run.config, data__eval_shifts=(0,), data__eval_flip=False)
  alone = dataclasses.replace(run, config=config)
  assert np.mean(alone.predict(test.images) == test.labels) != pytest.approx(accuracy)
  black = np.pad(test.images, ((0, 0), (1, 1), (1, 1), (0, 0)))
  shifted = [black[:, i : i + 8, j : j + 8] for i in (0, 2) for j in (0, 2)]
  logits = [alone.logits(x) for x in (*shifted, *(x[:, :, ::-1] for x in shifted))]
  np.testing.assert_allclose(run.logits(test.images), np.mean(logits, 0), atol=1e-4)

  assert run.certificate["verdict"] == "PROVED"
  params = core.unfreeze(run.params)
  params["head"]["kernel"] = -params["head"]["kernel"]
  image = test.images[:1].astype("float32")
  assert convex_jax.certify(run.network, image).verdict == "PROVED"
  assert convex_jax.certify(run.replace(params=params).network, image).verdict != "PROVED"


def test_averages_meet_the_constraints_whatever_the_compiler_computes_twice(data_dir, tmp_path):
  """In a process of its own, with the optimizations that a user has."""
  options = [f"--workdir={tmp_path / 'run'}", f"--config.data.dir={data_dir}"]
  options += ["--config.ema_decay=0.9", "--config.steps=20"]
  command = [
    sys.executable,
    "-m",
    "convex_jax.main",
    "--config=configs/mlp_ioc.py:digits",
    *options,
  ]
  run_main(*command, env={"JAX_DISABLE_MOST_OPTIMIZATIONS": "false", "XLA_FLAGS": ""})
  run = convex_jax.load(tmp_path / "run", weights="ema")
  assert run.certificate["verdict"] == "PROVED"


@pytest.mark.parametrize("slow", [True, False])
def test_a_run_that_waits_for_its_images_says_so(
  slow, tiny_config, few_digits, tmp_path, monkeypatch, capsys
):
  """By a clock that only batches and steps advance: the speed of the machine plays no part."""
  clock = types.SimpleNamespace(now=0.0, time=time.time)
  clock.monotonic = lambda: clock.now
  for module in (loop, recorder):
    monkeypatch.setattr(module, "time", clock)
  monkeypatch.setattr(recorder, "ADVISE_AT", 4)
  batches, call = program.Program.batches, program.Program.train_call

  def batches_that_take(self, steps):
    clock.now += 1.0 if slow else 0.01
    return batches(self, steps)

  def call_that_takes(self, state, plan):
    clock.now += 0.1
    return jax.block_until_ready(call(self, state, plan))

  monkeypatch.setattr(program.Program, "batches", batches_that_take)
  monkeypatch.setattr(program.Program, "train_call", call_that_takes)
  workdir = str(tmp_path / "run")
  loop.run(of(tiny_config, log__every_steps=2, eval__every_epochs=5.0), workdir, few_digits)
  fractions = [row["input_wait_frac"] for row in convex_jax.load(workdir).metrics("train")]
  assert len(fractions) == 3 and all((fraction > 0.5) == slow for fraction in fractions)
  assert ("The devices wait for images" in capsys.readouterr().out) == slow


@pytest.mark.parametrize(
  "args,words",
  [
    (["--config=configs/mixer_ioc.py:digit"], ["Did you mean 'digits'"]),
    (["--config=configs/nothing.py"], ["configs/nothing.py", "cannot be read"]),
    (["--config=configs/"], ["--config=configs/ cannot be read: configs/ is no file"]),
    ([], ["Missing option --config"]),
    (
      ["--config=configs/mlp.py", "--config.modle.parts=ioc", "--config.batch_size=-4"],
      ["Unknown key config.modle.parts. Did you mean 'model.parts'?", "config.batch_size is -4"],
    ),
    (
      ["--config=configs/mlp.py", "--config.batch_size=x", "--config.epochs=2.5"],
      ["config.batch_size=x: expected an integer", "config.epochs=2.5: expected an integer"],
    ),
    (["--config=configs/mlp.py:digits", "stray"], ["stray"]),
  ],
)
def test_a_mistake_exits_2_with_one_line_each_and_no_traceback(args, words, tmp_path):
  workdir = tmp_path / "run"
  result = run_here(f"--workdir={workdir}", *args)
  assert result.returncode == 2
  for word in words:
    assert word in result.stderr
  assert "Traceback" not in result.stderr and not workdir.exists()


def test_a_workdir_that_cannot_be_made_is_told(tiny_config, tmp_path):
  (tmp_path / "file").write_text("in the way")
  with pytest.raises(UserError, match="not writable"):
    loop.run(tiny_config, str(tmp_path / "file" / "run"))


def test_a_run_that_ends_within_its_warm_up_is_refused(tiny_config, few_digits, tmp_path):
  changed = {"steps": 0, "epochs": 2, "optimizer__accumulate": 3, "optimizer__warmup_steps": 4}
  with pytest.raises(UserError, match="13 steps make 4 updates"):  # 100 images, 16 a step.
    loop.run(of(tiny_config, **changed), str(tmp_path / "run"), few_digits)
  assert not (tmp_path / "run").exists()


def test_an_uneven_batch_is_refused(tiny_config, data_dir, tmp_path):
  with pytest.raises(UserError, match="a multiple of 8"):
    loop.run(of(tiny_config, batch_size=12), str(tmp_path / "run"))


def start_two(data_dir, workdir, *more):
  """Two real processes of two devices each, on one workdir."""
  port = free_port()
  return [
    subprocess.Popen(
      command(
        data_dir,
        workdir,
        *more,
        "--distributed=on",
        f"--coordinator=localhost:{port}",
        "--num_processes=2",
        f"--process_id={i}",
      ),
      cwd=ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env={**os.environ, "JAX_NUM_CPU_DEVICES": "2"},
    )
    for i in range(2)
  ]


@pytest.mark.slow
def test_two_processes_train_as_one(data_dir, tmp_path):
  """Against one process of four devices; stopped on the way by a signal to one of them."""
  settings = ["--config.steps=60", "--config.optimizer.name=sgd", "--config.eval.every_epochs=2"]
  two = start_two(data_dir, tmp_path / "two", *settings)
  metrics = tmp_path / "two" / "metrics.jsonl"
  while not metrics.exists() or not metrics.stat().st_size:
    assert two[0].poll() is None
    time.sleep(0.01)
  two[1].send_signal(signal.SIGTERM)
  outputs = [process.communicate(timeout=PATIENCE) for process in two]
  assert [process.returncode for process in two] == [75, 75], outputs
  two = start_two(data_dir, tmp_path / "two", *settings)
  outputs = [process.communicate(timeout=PATIENCE) for process in two]
  assert [process.returncode for process in two] == [0, 0], outputs
  assert "Resumed" in outputs[0][0] and "generalisation gap" in outputs[0][0]
  # One speaks; Gloo's threads, which print too, may tear each other's lines.
  spoken = [
    line for line in outputs[1][0].splitlines() if "Gloo" not in line and "rank" not in line
  ]
  assert not any(line.strip("[] ") for line in spoken), spoken
  one = command(data_dir, tmp_path / "one", *settings)
  assert run_main(one, env={"JAX_NUM_CPU_DEVICES": "4"}).returncode == 0
  one, two = (
    [row for row in rows_without_clock(tmp_path / name) if row["kind"] == "eval"]
    for name in ("one", "two")
  )
  assert [row["step"] for row in one] == [row["step"] for row in two]
  for a, b in zip(one, two, strict=True):
    assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-3)
  assert convex_jax.load(str(tmp_path / "two")).step == 60


def test_the_config_file_of_a_run_is_plain_data(finished):
  workdir, _ = finished
  with open(workdir / "config.json") as file:
    saved = json.load(file)
  assert saved["format"] == FORMAT and saved["config"]["model"]["parts"] == "ioc"
  assert saved["data"]["image_shape"] == [8, 8, 1] and "jax" in saved["versions"]


@pytest.mark.slow  # By default one that goes to a bucket.
@pytest.mark.parametrize("last", [4, 99])  # Within the run, and beyond its end.
def test_a_profile_is_written_on_request(tiny_config, few_digits, tmp_path, last):
  config = of(tiny_config, log__profile_steps=(2, last), eval__every_epochs=1.0)
  loop.run(config, str(tmp_path / "run"), few_digits)
  assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
