"""Is this function convex, and if not, why?

Needs jax, numpy and scipy, and nothing else of `convex_jax`.
"""

from convex_jax.proof.certificate import Certificate, certify

__all__ = ["Certificate", "certify"]
