"""The wheel, in an environment with its own requirements alone and in an empty folder."""

import email
import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
import venv
import zipfile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support import ROOT

pytestmark = pytest.mark.slow
TINY = ["model.size=tiny", "model.patch=4", "batch_size=16", "steps=3"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  """Built from a copy: what an earlier build left in build/ would be packed again."""
  source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
  for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, source)
  for name in ("convex_jax", "configs"):
    shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
  options = ["--no-deps", "--no-build-isolation", "--no-index", f"--wheel-dir={out}"]
  subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", *options, source], check=True)
  return next(out.glob("*.whl"))


def metadata(wheel):
  with zipfile.ZipFile(wheel) as archive:
    name = next(n for n in archive.namelist() if n.endswith("/METADATA"))
    return email.message_from_string(archive.read(name).decode())


def required(wheel, extra):
  """The distributions that `pip install convex_jax[extra]` would bring."""
  found, todo = {}, [(r, extra) for r in metadata(wheel).get_all("Requires-Dist")]
  while todo:
    text, extra = todo.pop()
    requirement = Requirement(text)
    if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
      continue
    name = canonicalize_name(requirement.name)
    for extra in {"", *requirement.extras} - found.setdefault(name, set()):
      found[name].add(extra)
      todo += [(r, extra) for r in importlib.metadata.requires(name) or ()]
  return set(found)


def install(wheel, extra, folder):
  """A python that finds the wheel and its requirements, linked from the running environment."""
  venv.create(folder)
  python = folder / "bin" / "python"
  pip = [sys.executable, "-m", "pip", f"--python={python}", "install", "-q", "--no-deps"]
  subprocess.run([*pip, "--no-index", wheel], check=True)
  packages = next(folder.glob("lib/python*/site-packages"))
  for name in required(wheel, extra):
    for file in importlib.metadata.files(name):
      link, target = packages / file, pathlib.Path(file.locate())
      if ".." not in file.parts and target.exists() and not link.exists():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target)
  return python


def run(python, *args, cwd):
  """A command in an empty home; neither PYTHONPATH nor the folder of the tests helps it."""
  env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | {"HOME": str(cwd)}
  command = [python, *args]
  return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=600)


def passes(python, *args, cwd):
  result = run(python, *args, cwd=cwd)
  assert result.returncode == 0, result.stdout + result.stderr
  return result.stdout


def test_the_wheel_holds_every_module_and_config(wheel):
  inside = set(zipfile.ZipFile(wheel).namelist())
  modules = {str(p.relative_to(ROOT)) for p in (ROOT / "convex_jax").rglob("*.py")}
  configs = {f"convex_jax/{p.relative_to(ROOT)}" for p in (ROOT / "configs").glob("*.py")}
  assert modules and configs
  assert modules | configs | {"convex_jax/py.typed"} == {n for n in inside if "dist-info" not in n}


def test_the_installed_wheel_trains_certifies_and_loads(wheel, tmp_path):
  python, home = install(wheel, "train", tmp_path / "venv"), tmp_path / "empty"
  assert "tensorflow" not in required(wheel, "train")
  home.mkdir()
  tiny = [f"--config.{change}" for change in TINY]
  passes(python, "-m", "convex_jax.main", "--config=configs/mixer_ioc.py:digits", *tiny, cwd=home)
  workdir = "runs/mixer_ioc_digits"
  proved = passes(python, "-m", "convex_jax", "certify", f"--workdir={workdir}", cwd=home)
  assert "PROVED" in proved
  program = f"import convex_jax as c; print(c.load({workdir!r}).certificate['verdict'], c.__file__)"
  verdict, file = passes(python, "-c", program, cwd=home).split()
  assert verdict == "PROVED"
  assert pathlib.Path(file).is_relative_to(tmp_path / "venv")

  # A config of the user's own builds on a bundled one, with the console script.
  (home / "configs").mkdir()
  (home / "configs" / "mine.py").write_text(
    "from configs import mixer_ioc\n\n\ndef get_config(dataset):\n"
    "  config = mixer_ioc.get_config(dataset)\n  config.seed = 5\n  return config\n"
  )
  script = python.parent / "convex-jax"
  passes(python, script, "train", "--config=configs/mine.py:digits", *tiny, cwd=home)
  program = "import convex_jax as c; print(c.load('runs/mine_digits').config.seed)"
  assert passes(python, "-c", program, cwd=home).split() == ["5"]


def test_the_proof_needs_no_more_than_the_base_installation(wheel, tmp_path):
  python = install(wheel, "", tmp_path / "venv")
  assert required(wheel, "") == {"jax", "jaxlib", "ml-dtypes", "numpy", "opt-einsum", "scipy"}
  program = (
    "import jax.numpy as jnp\nfrom convex_jax import certify\n"
    "print(certify(lambda x: jnp.exp(x), jnp.zeros(2)).verdict,"
    " bool(certify(lambda x: -jnp.exp(x), jnp.zeros(2))))"
  )
  assert passes(python, "-c", program, cwd=tmp_path).split() == ["PROVED", "False"]
  for command in (["-m", "convex_jax", "train"], ["-m", "convex_jax.main"]):
    result = run(python, *command, "--config=configs/mlp.py:digits", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr == "absl is not installed: pip install 'convex_jax[train]'\n"
  result = run(python, "-c", "import convex_jax; convex_jax.load", cwd=tmp_path)
  assert re.search(r"convex_jax\.load needs \w+: pip install 'convex_jax\[train\]'", result.stderr)
