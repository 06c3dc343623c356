"""Neural networks that are convex in their input, and their unconstrained twins."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from convex_jax.run import Run, load

__all__ = ["Run", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
  """Loads `convex_jax.load` when it is asked for: `main --help` need not import JAX."""
  if name in __all__:
    from convex_jax import run

    return getattr(run, name)
  raise AttributeError(f"module 'convex_jax' has no attribute {name!r}")
