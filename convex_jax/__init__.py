"""Neural networks that are convex in their input, their unconstrained twins, and the proof."""

import importlib.util
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from convex_jax import data as data
  from convex_jax import models as models
  from convex_jax import proof as proof
  from convex_jax import runs as runs
  from convex_jax import studies as studies
  from convex_jax import training as training
  from convex_jax.models.catalog import create_model
  from convex_jax.proof.certificate import Certificate, certify
  from convex_jax.runs.run import Run, load

__version__ = "0.2.0"
__all__ = ["Certificate", "Run", "__version__", "certify", "create_model", "load"]
_WHERE = {  # Imported on first use: `--help` does not need JAX, nor `certify` a trainer.
  "Certificate": "convex_jax.proof.certificate",
  "Run": "convex_jax.runs.run",
  "certify": "convex_jax.proof.certificate",
  "create_model": "convex_jax.models.catalog",
  "load": "convex_jax.runs.run",
}
_PACKAGES = ("data", "models", "proof", "runs", "studies", "training")


def __getattr__(name: str) -> Any:
  if name not in _WHERE and name not in _PACKAGES:
    message = f"convex_jax has no attribute {name!r}; it has {', '.join(__dir__())}"
    raise AttributeError(message, name=name, obj=sys.modules[__name__])
  try:
    if name in _PACKAGES:
      return importlib.import_module(f"convex_jax.{name}")
    return getattr(importlib.import_module(_WHERE[name]), name)
  except ModuleNotFoundError as error:
    if importlib.util.find_spec("flax"):  # The extra is installed: something else is wrong.
      raise
    message = f"convex_jax.{name} needs {error.name}: pip install 'convex_jax[train]'"
    raise ModuleNotFoundError(message, name=error.name) from error


def __dir__() -> list[str]:
  return sorted([*__all__, *_PACKAGES])
