"""The rules of the house: who may import whom, and what nobody does."""

import ast
import subprocess
import sys

import pytest

from tests.support import ROOT

PACKAGE = ROOT / "convex_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
# A room imports the rooms before it and the ground, which imports nothing of ours.
GROUND = ("errors", "files", "mesh", "config_files", "command_line")
ROOMS = ("proof", "models", "data", "runs", "training", "main", "studies")


def imports_of(path):
  """Modules of ours that a file names in its imports, wherever they stand."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "convex_jax":
      inside = node.module.split(".")[1:]
      yield from inside[:1] or [alias.name for alias in node.names]
    if isinstance(node, ast.Import):
      yield from [a.name.split(".")[1] for a in node.names if a.name.startswith("convex_jax.")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_import_the_rooms_before_them(path):
  room = path.relative_to(PACKAGE).with_suffix("").parts[0]
  if room in ("__init__", "__main__"):  # The faces name everything, and import it when asked.
    return
  allowed = {*GROUND, *ROOMS[: ROOMS.index(room) + 1]} if room in ROOMS else {*GROUND}
  if room == "proof":
    allowed = {"proof"}
  assert set(imports_of(path)) <= allowed


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_hidden_defaults_of_config_keys(path):
  """`config.get(key, default)` would be a key that configs/base.py does not show."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Attribute) and node.attr in ("get", "get_oneway_ref"):
      assert "config" not in ast.unparse(node.value).lower(), f"{path}:{node.lineno}"


def test_configs_are_pure_data():
  for path in (ROOT / "configs").glob("*.py"):
    assert not list(imports_of(path)), path


def test_every_test_passes_without_the_experiments():
  for path in [*FILES, *(ROOT / "tests").rglob("*.py")]:
    roots = {
      (node.module or "").split(".")[0]
      for node in ast.walk(ast.parse(path.read_text()))
      if isinstance(node, ast.ImportFrom)
    }
    assert "experiments" not in roots, path


def test_nothing_imports_tensorflow():
  program = (
    "import sys, convex_jax, convex_jax.main, convex_jax.train, convex_jax.data.prepare\n"
    "sys.exit('tensorflow' in sys.modules)"
  )
  assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_help_is_quick_to_import():
  """`--help` loads flags, not JAX."""
  program = "import sys, convex_jax.main; sys.exit('orbax' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", program]).returncode == 0
