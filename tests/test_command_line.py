"""What users type: paths, and numbers that no command can use."""

import os
import pathlib
import re
import subprocess
import sys

import pytest
from jax.errors import JaxRuntimeError

import convex_jax
from convex_jax import __main__, command_line, config_files, files
from convex_jax import mesh as meshes
from convex_jax.errors import UserError
from convex_jax.models import catalog
from convex_jax.models.public.importer import load_public
from convex_jax.runs import checkpoints
from convex_jax.studies import report, results
from convex_jax.training import loop, program, runtime
from tests.support import ROOT


@pytest.mark.parametrize("platform", ["cuda", "tpu", "nonsense"])
def test_a_platform_that_is_not_here_is_told(platform, tmp_path):
  """In one sentence, whatever JAX raises: without words for cuda."""
  args = ["-m", "convex_jax", "certify", f"--workdir={ROOT / 'tests' / 'fixtures' / 'run_1_1'}"]
  env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": platform}
  done = subprocess.run(
    [sys.executable, *args], cwd=tmp_path, env=env, capture_output=True, text=True
  )
  if done.returncode == 0:
    pytest.skip(f"this machine has {platform}")
  assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
  assert done.stderr.startswith(f"JAX cannot start '{platform}' (JAX_PLATFORMS): ")


@pytest.mark.parametrize(
  "error, code, words",
  [
    (KeyboardInterrupt(), 130, "Interrupted"),
    (OSError(28, "No space left", "x"), 2, "x: No space"),
  ],
)
def test_ends_that_have_a_name_show_no_trace(error, code, words, capsys):
  def fail():
    raise error

  assert command_line.exit_code(fail) == code and words in capsys.readouterr().err
  with pytest.raises(ZeroDivisionError):  # What has none does.
    command_line.exit_code(lambda: 1 // 0)


FULL = [  # (error, its words in the message)
  (
    JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 68 bytes.\nAllocator"),
    "68 bytes",
  ),
  (JaxRuntimeError("INTERNAL: RESOURCE_EXHAUSTED: Failed to allocate 7 bytes"), "to allocate 7"),
  (ValueError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 68 bytes."), "68 bytes"),
  (MemoryError("Unable to allocate 3 TiB for an array"), "3 TiB"),
  (MemoryError(), "MemoryError"),
]


@pytest.mark.parametrize("error, words", FULL, ids=lambda x: repr(x)[:40])
def test_a_full_memory_is_told_with_what_takes_less(error, words, capsys):
  def fail():
    raise error

  assert command_line.exit_code(fail) == 2
  err = capsys.readouterr().err
  assert err.startswith("Memory is full in convex_jax.command_line.") and words in err
  assert "Traceback" not in err and "RESOURCE" not in err
  keys = re.findall(r"--config\.([\w.]+)", err)
  assert len(keys) > 3 and {*keys} <= {*config_files.defaults()}


def test_a_full_memory_in_training_is_told_with_its_place(
  tiny_config, few_digits, tmp_path, monkeypatch, capsys
):
  def fail(*_):
    raise JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 68 bytes.")

  monkeypatch.setattr(program.Program, "train_call", fail)
  assert command_line.exit_code(loop.run, tiny_config, str(tmp_path / "run"), few_digits) == 2
  assert "Memory is full in convex_jax.training.loop.train: " in capsys.readouterr().err


def test_another_error_of_xlas_is_no_full_memory():
  def fail():
    raise JaxRuntimeError("INTERNAL: something was RESOURCE_EXHAUSTED: elsewhere")

  with pytest.raises(JaxRuntimeError):
    command_line.exit_code(fail)
  assert not meshes.is_collective_error(ValueError("INTERNAL: RESOURCE_EXHAUSTED: 7 bytes"))
  assert not meshes.is_collective_error(TimeoutError("The read operation timed out"))


@pytest.fixture
def home(tmp_path, monkeypatch):
  """A home folder; the working directory is another, empty one."""
  (tmp_path / "home").mkdir()
  (tmp_path / "here").mkdir()
  monkeypatch.chdir(tmp_path / "here")
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  monkeypatch.setattr(checkpoints, "quieten_orbax", lambda: None)  # This process is no command.
  for name in ("keep_compiled_programs", "tune_cpu"):
    monkeypatch.setattr(runtime, name, lambda: None)
  yield str(tmp_path / "home")
  assert not list((tmp_path / "here").iterdir())  # No folder named ~, above all.


@pytest.mark.parametrize(
  "command",
  [
    "train --config=~/x.py",
    "train --config=configs/mlp.py:digits --config.init_from=~/x.npz --workdir ~/run --config.data.dir ~/data",
    "train --config=configs/mlp.py:mnist --config.data.dir=~/x --workdir=~/run",
    "certify --workdir=~/x",
    "radii --workdir ~/x",
    "radii --workdir=~/x --data_dir=~/y",
    "report ~/x",
    "sweep ~/x",
    "checkpoint verify ~/x",
    "checkpoint seal ~/x",
    "data check mnist --data_dir=~/x",
    "data convert mnist --data_dir=~/x --to=~/y",
    "data cache imagenette --data_dir=~/x --image_size=8",
    "data prepare imagenet2012 --data_dir=~/x --manual_dir=~/x",
  ],
)  # fmt: skip
def test_every_command_knows_the_home_folder(command, home, capsys):
  code = __main__.main(command.split())
  err = capsys.readouterr().err
  assert code == 2 and home in err and "Traceback" not in err, err


def test_what_is_written_lies_in_the_home_folder(home):
  command = "train --config=configs/mlp.py:digits --workdir ~/run --config.data.dir ~/data"
  assert __main__.main([*command.split(), "--config.fsdp=7"]) == 2  # Once the data are read.
  assert os.listdir(home) == ["data"]


def test_every_function_that_takes_a_path_knows_the_home_folder(home):
  model = catalog.create_model("mlp", "800x3")
  for call in (
    lambda: convex_jax.load("~/x"),
    lambda: convex_jax.load(pathlib.Path("~/x")),
    lambda: load_public(model, "~/x.npz", (8, 8, 1)),
    lambda: report.gather(["~/x"]),
    lambda: results.of_workdirs(["~/x"]),
  ):
    with pytest.raises(UserError, match=home):
      call()


def test_a_user_who_is_not_there_is_told(home, capsys):
  for command in ("certify --workdir=~nobody_of_this_name/x", "report ~nobody_of_this_name"):
    with pytest.raises(SystemExit, match="2"):
      __main__.main(command.split())
    assert "no home folder of ~nobody_of_this_name is known" in capsys.readouterr().err
  with pytest.raises(UserError, match="nobody_of_this_name"):
    convex_jax.load("~nobody_of_this_name/x")


@pytest.mark.parametrize(
  "command",
  [
    "train --config=configs/absent.py --workdir=",
    "certify --workdir=",
    "radii --workdir=x --data_dir=",
    "radii --workdir=x --norms=",
    "certify --workdir=x --radii=",
    "report x --out=",
    "sweep absent --workdir=",
    "checkpoint verify ",
    "report ",
    "data prepare mnist --data_dir=",
  ],
)
def test_an_option_left_empty_is_told(command, capsys):
  """As by a variable that is not set: nothing is to be done with a default in its place."""
  try:
    code = __main__.main(command.split(" "))
  except SystemExit as end:
    code = end.code
  err = capsys.readouterr().err
  assert code == 2 and re.search("('' given|='');? expected", err), err


@pytest.mark.parametrize("path", [None, 3, b"runs/x", ["runs/x"], "runs\0x"], ids=repr)
def test_what_is_no_path_is_told(path):
  with pytest.raises(UserError, match="is no path"):
    convex_jax.load(path)


def test_a_tilde_elsewhere_in_a_path_is_a_letter():
  assert files.expand("runs/~/x") == "runs/~/x" and files.expand("") == ""
  assert files.expand("~") == os.path.expanduser("~")


@pytest.mark.parametrize(
  "command",
  [
    "radii --workdir=x --examples=0",
    "radii --workdir=x --examples=-3",
    "certify --workdir=x --search_steps=-1",
    "train --config=configs/mlp.py --num_processes=0",
    "train --config=configs/mlp.py --process_id=-1",
    "train --config=configs/mlp.py --join_timeout=0",
    "train --config=configs/mlp.py --join_timeout=1.5",
    "sweep experiments/mlp --at_once=0",
    "data cache imagenette --image_size=0",
  ],
)
def test_a_number_out_of_range_is_told(command, capsys):
  with pytest.raises(SystemExit, match="2"):
    __main__.main(command.split())
  assert "expected an integer >= " in capsys.readouterr().err
