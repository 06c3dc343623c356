"""What `import convex_jax` and `python -m convex_jax` offer, and what they do not yet import."""

import subprocess
import sys

import pytest

import convex_jax
from convex_jax import __main__, config_files
from tests.support import ROOT

HEAVY = ("jax", "flax", "numpy", "absl", "tensorflow_datasets")


def run(*args):
  return subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True)


def imported(program):
  """Which of HEAVY a program has imported at its end."""
  program = f"import sys\n{program}\nprint(*[m for m in {HEAVY} if m in sys.modules])"
  result = run("-c", program)
  assert result.returncode == 0, result.stderr
  return set(result.stdout.splitlines()[-1].split())


def test_importing_the_package_imports_nothing_heavy():
  assert imported("import convex_jax, convex_jax.__main__") == set()
  assert imported("import convex_jax.main") == set()
  assert "jax" in imported("import convex_jax; convex_jax.certify")  # The check can fail.


@pytest.mark.parametrize("name", convex_jax.__all__)
def test_each_name_resolves_and_is_listed(name):
  assert getattr(convex_jax, name)
  assert name in dir(convex_jax)


def test_each_package_is_an_attribute():
  program = f"import convex_jax; [getattr(convex_jax, name) for name in {convex_jax._PACKAGES}]"
  assert run("-c", program).returncode == 0
  assert set(convex_jax._PACKAGES) <= set(dir(convex_jax))


def test_every_package_is_named():
  folders = {p.parent.name for p in (ROOT / "convex_jax").glob("*/__init__.py")}
  assert folders == set(convex_jax._PACKAGES)


def test_an_unknown_name_is_an_attribute_error_that_lists_the_known():
  with pytest.raises(AttributeError, match=r"no attribute 'certfy'; it has .*\bcertify\b"):
    convex_jax.certfy  # noqa: B018
  with pytest.raises(ImportError, match="certfy"):
    from convex_jax import certfy  # noqa: F401


@pytest.mark.parametrize("command", ["", *__main__.COMMANDS])
def test_help_has_a_usage_and_an_example(command, capsys):
  try:
    code = __main__.main([*command.split(), "--help"])
  except SystemExit as end:
    code = end.code
  out, err = capsys.readouterr()
  assert (code, err) == (0, "")
  assert f"usage: python -m convex_jax {command or 'COMMAND'}" in out
  assert "example:\n  python -m convex_jax" in out


def test_help_of_training_needs_no_jax():
  program = "from convex_jax.__main__ import main\ntry: main(['train', '--help'])\n"
  assert "jax" not in imported(program + "except SystemExit as end: assert end.code == 0")


def test_an_unknown_command_is_invalid_input():
  result = run("-m", "convex_jax", "trian")
  assert result.returncode == 2
  assert "trian" in result.stderr
  assert "Traceback" not in result.stderr
  assert run("-m", "convex_jax").returncode == 2


def test_a_bundled_config_stands_in_for_one_that_does_not_exist(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  bundled = str(ROOT / "configs" / "mlp.py")
  assert config_files.find("configs/mlp.py:digits") == f"{bundled}:digits"
  assert config_files.find("./configs/mlp.py") == bundled
  for own in ("mine/mlp.py", "mlp.py", "configs/mlpp.py:digits"):  # Typing errors stay errors.
    assert config_files.find(own) == own
  (tmp_path / "configs").mkdir()
  (tmp_path / "configs" / "mlp.py").write_text("")
  assert config_files.find("configs/mlp.py:digits") == "configs/mlp.py:digits"
