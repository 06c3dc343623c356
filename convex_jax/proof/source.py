"""Where in the source code an operation of a jaxpr was written."""

import dataclasses
import functools
import os
import sys
import sysconfig
from collections.abc import Iterable

# Files of layers that models call. The caller's line says more than theirs, so that an operation
# is attributed to a line in one of these only if there is no other. Any package may add its own.
PLUMBING: set[str] = set()

_HERE = os.path.join(os.path.dirname(__file__), "")  # The proof traces functions through its own.
_STDLIB = sysconfig.get_paths()["stdlib"]
# Folders whose functions (gelu, LayerNorm) name what was computed, but for Flax's machinery.
_NAMED = (("jax", "_src", "nn"), ("flax", "linen"))
_MACHINERY = ("module.py", "transforms.py", "summary.py")


@dataclasses.dataclass(frozen=True)
class Place:
  """The module's path, the function that computes (gelu, LayerNorm), and the caller's line."""

  module: str = ""
  function: str = ""
  file: str = ""
  line: int = 0

  def __str__(self) -> str:
    line = f"{os.path.basename(self.file)}:{self.line}" if self.file else ""
    where = ", ".join(part for part in (self.function, line) if part)
    if not self.module:
      return where or "the function"
    return f"{self.module} ({where})" if where else self.module


def place_of(eqn, outer: Place) -> Place:
  """Where an equation was written, in a jaxpr that was called from `outer`.

  A compiled function is traced once and called from many lines: the line is that of the call.
  """
  info = eqn.source_info
  module = "/".join(part for part in (outer.module, str(info.name_stack)) if part)
  frames = info.traceback.frames if info.traceback else []
  owns = [f for f in frames if _is_own(f.file_name)]
  own = next((f for f in owns if f.file_name not in PLUMBING), next(iter(owns), None))
  named = [f for f in frames if _is_named(f.file_name)]
  calls = [f for f in named if f.function_name.endswith("__call__")]
  frame = next(iter([*calls, *named]), own)
  function = frame.function_name if frame else str(eqn.params.get("name", ""))
  function = function.removesuffix(".__call__").rsplit("<locals>.", 1)[-1]
  if outer.file:
    return Place(module, function or outer.function, outer.file, outer.line)
  return Place(module, function, own.file_name if own else "", own.line_num if own else 0)


# By file, as thousands of frames ask; code that runs is of libraries that are loaded.
@functools.cache
def _is_named(path: str) -> bool:
  """Whether a file's functions name what they compute."""
  return path.startswith(_folders(_NAMED)) and not path.endswith(_MACHINERY)


@functools.cache
def _is_own(path: str) -> bool:
  """Whether a file is the user's: not jax's, Flax's, Python's, nor of this package."""
  if path.startswith((*_folders([("jax",), ("flax",)]), _HERE, "<")):
    return False
  return not path.startswith(_STDLIB) or "site-packages" in path


def _folders(places: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
  """Folders of libraries, of those that are loaded: code can come from no other."""
  loaded = [(sys.modules[name], path) for name, *path in places if name in sys.modules]
  return tuple(os.path.join(os.path.dirname(str(m.__file__)), *path, "") for m, path in loaded)
