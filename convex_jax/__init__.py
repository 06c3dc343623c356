"""Neural networks that are convex in their input, and their unconstrained twins."""

from convex_jax.run import Run, load

__all__ = ["Run", "load"]
