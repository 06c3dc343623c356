"""Neural networks that are convex in their input, their unconstrained twins, and the proof."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from convex_jax.models.catalog import create_model
  from convex_jax.proof.certificate import Certificate, certify
  from convex_jax.runs.run import Run, load

__version__ = "0.2.0"
__all__ = ["Certificate", "Run", "__version__", "certify", "create_model", "load"]
_WHERE = {  # Imported when asked for: `--help` need not import JAX, nor `certify` a trainer.
  "Certificate": "convex_jax.proof.certificate",
  "Run": "convex_jax.runs.run",
  "certify": "convex_jax.proof.certificate",
  "create_model": "convex_jax.models.catalog",
  "load": "convex_jax.runs.run",
}


def __getattr__(name: str) -> Any:
  if name in _WHERE:
    return getattr(importlib.import_module(_WHERE[name]), name)
  raise AttributeError(f"module 'convex_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
