"""Which Python `make` takes."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.support import ROOT

pytestmark = pytest.mark.skipif(
  not (shutil.which("make") and (ROOT / "Makefile").exists()), reason="needs make and the Makefile"
)
SHIM = '#!/bin/sh\necho "$(basename $0): command not found" >&2\nexit 127\n'
RUNS = f'#!/bin/sh\nexec {sys.executable} "$@"\n'


@pytest.mark.parametrize(
  "commands,chosen",
  [
    ({"python3.13": SHIM, "python3.12": RUNS, "python3.11": RUNS}, "python3.12"),
    ({"python3.13": RUNS, "python3.12": SHIM}, "python3.13"),
    ({"python3.13": SHIM, "python3.12": SHIM, "python3.11": SHIM}, "python3"),
  ],
)
def test_make_takes_the_newest_python_that_runs(tmp_path, commands, chosen):
  for name, text in {"python3.11": SHIM, **commands}.items():
    (tmp_path / name).write_text(text)
    (tmp_path / name).chmod(0o755)
  words = ["make", "-n", f"VENV={tmp_path}/venv", "lint"]
  # What the `make` that runs these tests was given is not for this one.
  given = {"PYTHON", "MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS"}
  environment = {name: value for name, value in os.environ.items() if name not in given}
  environment["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
  printed = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
  assert f"{chosen} -m venv {tmp_path}/venv" in printed.stdout, printed.stderr
