"""Config files: found, loaded, flattened; and the defaults, which are `configs/base.py`'s.

The configs that come with the package are a folder next to it in a clone and inside it in a
wheel. They import each other as `configs.NAME`, and so may a user's own.
"""

import functools
import os
import runpy
import sys
import types
from collections.abc import Iterator
from typing import Any

_PACKAGE = os.path.dirname(os.path.abspath(__file__))


def bundled() -> str:
  """The folder of the configs that come with the package."""
  inside = os.path.join(_PACKAGE, "configs")
  return inside if os.path.isdir(inside) else os.path.join(os.path.dirname(_PACKAGE), "configs")


def make_importable() -> None:
  """Lets `from configs import base` find the working directory's configs, then the bundled."""
  configs = sys.modules.setdefault("configs", types.ModuleType("configs"))
  folders = [os.path.join(os.getcwd(), "configs"), bundled()]
  configs.__path__ = list(dict.fromkeys([*folders, *getattr(configs, "__path__", [])]))


def find(path: str) -> str:
  """`path`, or for configs/NAME.py that does not exist, the bundled config of that name."""
  file, colon, argument = path.partition(":")
  folder, name = os.path.split(os.path.normpath(file))
  inside = os.path.join(bundled(), name)
  if folder == "configs" and not os.path.exists(file) and os.path.exists(inside):
    return inside + colon + argument
  return path


def load(arguments: list[str]) -> Any:
  """The config that the arguments ["--config=FILE", "--config.KEY=VALUE", ...] make.

  Raises whatever a file that cannot be read, an unknown key, or a value that does not fit makes
  ml_collections raise.
  """
  # Of the extra `train`; what comes before, `--help` included, works without it.
  from absl import flags
  from ml_collections import config_flags

  make_importable()
  found = [
    f"--config={find(a.partition('=')[2])}" if a.startswith("--config=") else a for a in arguments
  ]
  command, values = ["convex_jax", *found], flags.FlagValues()
  config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=command)
  values(command)
  config: Any = values["config"].value
  list(config.items())  # A file that cannot be read raises here, and not before.
  return config


@functools.cache
def defaults() -> dict[str, Any]:
  """Every key that all configs share, by path ("data.name"), and its default."""
  return dict(flatten(runpy.run_path(os.path.join(bundled(), "base.py"))["get_config"]()))


def flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
  """The (path, value) pairs of a nested config."""
  for key, value in config.items():
    if hasattr(value, "items"):
      yield from flatten(value, f"{prefix}{key}.")
    else:
      yield prefix + key, value
