"""The proof stands alone: jax, numpy and scipy, and nothing else of convex_jax."""

import os
import subprocess
import sys

import pytest

from tests.support import ROOT

# As in an environment in which nothing else is installed.
ONLY = """
import sys

ALLOWED = {"jax", "jaxlib", "numpy", "scipy", "ml_dtypes", "opt_einsum"}
ALLOWED |= {*sys.stdlib_module_names, *sys.builtin_module_names}
FINDERS = [*sys.meta_path]


class Only:
  def find_spec(self, name, path=None, target=None):
    top, _, rest = name.partition(".")
    ours = top == "convex_jax" and rest.split(".")[0] in ("", "proof")
    # Of the standard library, too, but named after the platform: _sysconfigdata.
    if top in ALLOWED or ours or top.startswith("_sysconfigdata"):
      return next(filter(None, (f.find_spec(name, path, target) for f in FINDERS)), None)


sys.meta_path[:] = [Only()]
"""

EXAMPLE = """
import jax
import jax.numpy as jnp

from convex_jax.proof import certify


def network(weights, x):
  z = jax.nn.softplus(x @ weights["first"])
  z = jax.nn.softplus(z @ weights["second"] + x @ weights["passthrough"])
  return z @ weights["last"]


keys = jax.random.split(jax.random.key(0), 4)
shapes = {"first": (8, 16), "second": (16, 16), "passthrough": (8, 16), "last": (16, 1)}
weights = {n: jax.random.normal(k, s) for (n, s), k in zip(shapes.items(), keys)}
broken = certify(network, weights, jnp.zeros(8))
assert broken.verdict == "REFUTED" and "entries of second are negative" in broken.reason, broken
assert "network, example.py:" in broken.reason, broken
weights |= {n: jnp.abs(weights[n]) for n in ("second", "last")}
proved = certify(network, weights, jnp.zeros(8))
assert proved and str(proved) == "PROVED: 1 of 1 outputs are convex"
print(sorted(m for m in sys.modules if m.startswith("convex_jax.") and "proof" not in m))
print([m for m in ("scipy.optimize", "flax", "optax") if m in sys.modules])
"""

REST = """
from convex_jax.proof import counterexample, minimum, radii, slopes
"""


def run(path, code):
  path.write_text(ONLY + code)
  environment = {**os.environ, "PYTHONPATH": str(ROOT)}
  return subprocess.run(
    [sys.executable, path], env=environment, capture_output=True, text=True, timeout=600
  )


def test_a_function_is_certified_with_jax_alone(tmp_path):
  done = run(tmp_path / "example.py", EXAMPLE + REST)
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines() == ["[]", "[]"]


@pytest.mark.parametrize("module", ["flax", "optax", "convex_jax.models", "rich"])
def test_nothing_else_can_be_imported_there(module, tmp_path):
  """The negative control of the test above."""
  done = run(tmp_path / "control.py", f"import {module}")
  assert done.returncode == 1 and f"No module named '{module}'" in done.stderr
