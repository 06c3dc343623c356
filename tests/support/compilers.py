"""The compilers of machines that are not here, for `make test-aot`: prints what pip is to install.

Their versions are those that the installed JAX asks for. No more than compiling needs: neither
drivers nor libraries that run on a GPU.
"""

import importlib.metadata
import re


def requirements() -> list[str]:
  jax = importlib.metadata.version("jax")
  asked = [re.split("[ ;]", r)[0] for r in importlib.metadata.requires("jax") or ()]
  libtpu = next(r for r in asked if r.startswith("libtpu"))
  plugin = [f"jax-cuda13-plugin=={jax}", f"jax-cuda13-pjrt=={jax}"]
  return [libtpu, *plugin, "nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-runtime"]


if __name__ == "__main__":
  print(*requirements())
