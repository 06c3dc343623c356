"""What a network is."""

import pathlib

from convex_jax.proof import source

# Layers shared by the architectures: an operation is written where an architecture calls them.
_HERE = pathlib.Path(__file__).parent
source.PLUMBING |= {
  str(_HERE / f"{name}.py") for name in ("layers", "parts", "fast_forms", "tiles")
}
