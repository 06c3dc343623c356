"""The rules of the house: who may import whom, and what nobody does."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOM = {  # module: what it may import of ours; see CONTRIBUTING.md.
  "main": {"check", "checkpoint", "errors", "startup", "train"},
  "train": {
    "augment",
    "certify",
    "check",
    "checkpoint",
    "constraints",
    "data",
    "data.feed",
    "describe",
    "errors",
    "manifest",
    "mesh",
    "metrics",
    "models",
    "optimizer",
    "run",
    "step",
    "stopping",
    "watch",
    "weights",
  },
  "run": {"augment", "checkpoint", "describe", "errors", "files", "models", "rows", "step"},
  "describe": {"check", "errors", "files"},
  "certify": {
    "curvature",
    "dcp",
    "errors",
    "explain",
    "files",
    "models",
    "radii_report",
    "refute",
    "run",
  },
  "sweep": {"describe", "errors", "files", "jobs", "report", "results"},
  "jobs": {"check", "describe", "errors", "main", "results"},
  "report": {"errors", "files", "results", "tables"},
  "tables": {"results"},
  "results": {"check", "describe", "errors", "files", "models", "rows", "step"},
  "refute": set(),
  "lipschitz": {"dcp"},
  "robustness": {"curvature", "dcp", "errors", "explain", "lipschitz", "run"},
  "minima": {"robustness", "run"},
  "radii_report": {"data", "errors", "robustness", "run"},
  "explain": {"dcp"},
  "curvature": {"dcp", "fold", "piecewise", "places"},
  "dcp": {"places"},
  "fold": set(),
  "piecewise": set(),
  "places": set(),
  "check": {"constraints", "data", "errors", "layers", "models", "optimizer"},
  "checkpoint": {"errors", "manifest", "step"},
  "manifest": {"errors", "files"},
  "files": {"errors"},
  "watch": {"errors", "rows"},
  "rows": {"files"},
  "stopping": set(),
  "weights": {"constraints", "errors", "layers", "public_files", "step"},
  "public_files": {"errors"},
  "step": {"metrics"},
  "metrics": set(),
  "startup": set(),
  "data": {"data.cache", "data.decode", "data.prepare", "data.splits", "errors"},
  "data.__main__": {"data", "data.cache", "data.convert", "data.prepare", "data.stream", "errors"},
  "data.cache": {"data.reader", "data.splits", "data.stream", "errors", "files"},
  "data.convert": {"errors"},
  "data.decode": set(),
  "data.feed": {"data.order", "data.splits", "data.stream", "mesh"},
  "data.order": set(),
  "data.prepare": {"errors"},
  "data.reader": {"data.decode", "data.order", "data.splits", "errors"},
  "data.splits": {"data.decode"},
  "data.stream": {"data.order", "data.reader", "data.splits", "errors", "mesh"},
  "mesh": {"errors"},
  "randaugment": set(),
  "augment": {"randaugment"},
  "optimizer": {"constraints"},
  "layers": {"constraints", "initializers", "linear"},
  "linear": set(),
  "initializers": set(),
  "constraints": set(),
  "errors": set(),
  "models": {"layers"},
  **{
    f"models.{path.stem}": {"initializers", "layers", "linear"}
    for path in pathlib.Path("convex_jax/models").glob("*.py")
  },
  "models.__main__": {"layers", "models"},
  "": {"run"},
}
FILES = sorted(pathlib.Path("convex_jax").rglob("*.py"))


def name_of(path):
  return ".".join(p for p in path.with_suffix("").parts[1:] if p != "__init__")


def imports_of(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "convex_jax":
      inside = node.module.split(".")[1:]
      for alias in node.names:  # A name of a module, or a module of a package.
        file = pathlib.Path("convex_jax", *inside, f"{alias.name}.py")
        yield ".".join([*inside, alias.name] if file.exists() or not inside else inside)
    if isinstance(node, ast.Import):
      yield from [a.name[11:] for a in node.names if a.name.startswith("convex_jax.")]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_arrows_point_down(path):
  name = name_of(path)
  assert name in ROOM, f"a new room: say in tests/test_house.py what {path} may import"
  ours = {target for target in imports_of(path) if target not in ("Run", "load")}
  assert ours <= ROOM[name], f"{path} may not import {sorted(ours - ROOM[name])}"


def test_the_table_has_no_cycle():
  done, path = set(), []

  def visit(room):
    assert room not in path, " -> ".join([*path, room])
    if room not in done:
      path.append(room)
      for below in ROOM[room]:
        visit(below)
      done.add(path.pop())

  for room in ROOM:
    visit(room)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_hidden_defaults_of_config_keys(path):
  """`config.get(key, default)` would be a key that configs/base.py does not show."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Attribute) and node.attr in ("get", "get_oneway_ref"):
      assert "config" not in ast.unparse(node.value).lower(), f"{path}:{node.lineno}"


def test_configs_are_pure_data():
  for path in pathlib.Path("configs").glob("*.py"):
    assert not list(imports_of(path)), path


def test_every_test_passes_without_the_experiments():
  for path in [*FILES, *pathlib.Path("tests").glob("*.py")]:
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
