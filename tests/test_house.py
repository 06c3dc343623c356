"""The rules of the house: which package may import which, and what no module does."""

import ast
import os
import re
import subprocess
import sys

import pytest

import convex_jax
from tests.support import ROOT

PACKAGE = ROOT / "convex_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
# A package imports those before it and the ground, which imports nothing else of ours.
GROUND = {
  "buckets",
  "bucket_locks",
  "errors",
  "files",
  "mesh",
  "cluster",
  "streams",
  "signals",
  "progress",
  "config_files",
  "command_line",
}
ORDER = ["proof", "models", "data", "runs", "training", "studies", "main", "evaluate"]
FACES = {"__init__", "__main__"}  # They name everything, and import it on first use.


def imports_of(path):
  """The dotted names of the modules that a file imports, inside functions too."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    if isinstance(node, ast.ImportFrom):
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_there_is_something_to_look_at():
  assert {p.relative_to(PACKAGE).with_suffix("").parts[0] for p in FILES} == {
    *GROUND, *ORDER, *FACES
  }  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_package_imports_only_those_before_it(path):
  here = path.relative_to(PACKAGE).with_suffix("").parts[0]
  before = ORDER[: ORDER.index(here) + 1] if here in ORDER else []
  allowed = {"proof"} if here == "proof" else {*GROUND, *before}
  ours = {name.split(".")[1] for name in imports_of(path) if name.startswith("convex_jax.")}
  assert here in FACES or ours <= allowed


def test_no_message_advises_to_delete_anything():
  """What is moved aside can be moved back."""
  advice = re.compile(r"\b(delete|remove|erase|rm) ", re.IGNORECASE)
  for path in FILES:
    tree = ast.parse(path.read_text())
    texts = {n: n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
    for node in ast.walk(tree):
      if isinstance(node, ast.Expr):  # A docstring.
        texts.pop(node.value, None)
    wrong = [text for text in texts.values() if isinstance(text, str) and advice.search(text)]
    assert not wrong, path


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_hidden_defaults_of_config_keys(path):
  """`config.get(key, default)` would be a key that configs/base.py does not show."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Attribute) and node.attr in ("get", "get_oneway_ref"):
      assert "config" not in ast.unparse(node.value).lower(), f"{path}:{node.lineno}"


def test_configs_are_pure_data():
  configs = list((ROOT / "configs").glob("*.py"))
  assert configs
  for path in configs:
    assert not [n for n in imports_of(path) if n.startswith("convex_jax")], path


def test_every_test_passes_without_the_experiments():
  tests = list((ROOT / "tests").rglob("test_*.py"))
  assert tests
  for path in [*FILES, *tests, *(ROOT / "tests" / "support").glob("*.py")]:
    assert not [n for n in imports_of(path) if n.split(".")[0] == "experiments"], path


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_imports_tensorflow(path):
  """Not even where it is installed; tests/test_wheel.py trains in an environment without it."""
  assert "tensorflow" not in {name.split(".")[0] for name in imports_of(path)}


def test_no_library_of_ours_imports_one_where_it_is_installed(tmp_path):
  """torch alone takes 470 MB of memory. The last import is the control."""
  seen, others = tmp_path / "seen", ("torch", "tensorflow")
  for name in others:
    words = f"open({str(seen)!r}, 'a').write(__name__ + ' ')\nraise RuntimeError(__name__)\n"
    (tmp_path / f"{name}.py").write_text(words)
  modules = [path.relative_to(ROOT).with_suffix("") for path in FILES if path.stem != "__main__"]
  names = [".".join(path.parts).removesuffix(".__init__") for path in modules]
  code = f"import importlib, contextlib\nfor name in {names}: importlib.import_module(name)\n"
  code += "with contextlib.suppress(RuntimeError): import torch"
  path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
  environment = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
  subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
  assert seen.read_text() == "torch "


def test_the_version_is_the_same_everywhere():
  changelog, citation = ((ROOT / n).read_text() for n in ("CHANGELOG.md", "CITATION.cff"))
  date = re.search(r"^date-released: (\S+)$", citation, re.MULTILINE)[1]
  assert f"\nversion: {convex_jax.__version__}\n" in citation
  assert f"\n## [{convex_jax.__version__}] - {date}\n" in changelog


def test_what_an_experiment_is_given_wrongly_is_told_as_by_a_command(tmp_path):
  programs = [p for p in (ROOT / "experiments").rglob("*.py") if "\ndef main(" in p.read_text()]
  bare = [p.name for p in programs if "exit(command_line.exit_code(main))" not in p.read_text()]
  assert bare in ([], ["unpack.py"])  # The latter runs where nothing is installed.
  if programs:
    command = [sys.executable, "-m", "experiments.robustness.run", str(tmp_path / "absent")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "absent does not contain a run" in done.stderr
