"""Where in the source an operation of a jaxpr was written."""

import dataclasses
import os
import sysconfig

import flax
import jax

_STDLIB = sysconfig.get_paths()["stdlib"]
_JAX, _FLAX = (os.path.dirname(os.path.abspath(str(m.__file__))) for m in (jax, flax))
_NAMED = (os.path.join(_JAX, "_src", "nn"), os.path.join(_FLAX, "linen"))
_PLUMBING = ("module.py", "transforms.py", "summary.py")
# Ours, that a model calls: its line says more than theirs.
_LAYERS = tuple(os.path.join("convex_jax", name) for name in ("layers.py", "linear.py"))


def _is_own(path: str) -> bool:
  """Whether a file is the user's: not jax, flax or Python's."""
  if path.startswith((_JAX, _FLAX)) or path.startswith("<"):
    return False
  return not path.startswith(_STDLIB) or "site-packages" in path


@dataclasses.dataclass(frozen=True)
class Place:
  """Module path, the function that wrote it (gelu, LayerNorm), and the caller's line."""

  module: str = ""
  function: str = ""
  file: str = ""
  line: int = 0

  def within(self, eqn) -> "Place":
    """The place of an equation in a jaxpr that was called from here.

    A compiled function is traced once and called from many lines: the line is the call's.
    """
    return place_of(eqn, self)

  def __str__(self) -> str:
    line = f"{os.path.basename(self.file)}:{self.line}" if self.file else ""
    where = ", ".join(part for part in (self.function, line) if part)
    if not self.module:
      return where or "the function"
    return f"{self.module} ({where})" if where else self.module


def place_of(eqn, outer: Place) -> Place:
  """Where an equation stands; `outer`: where the call to its jaxpr stands."""
  info = eqn.source_info
  module = "/".join(part for part in (outer.module, str(info.name_stack)) if part)
  frames = info.traceback.frames if info.traceback else []
  owns = [f for f in frames if _is_own(f.file_name)]
  own = next((f for f in owns if not f.file_name.endswith(_LAYERS)), next(iter(owns), None))
  library = [
    f for f in frames if f.file_name.startswith(_NAMED) and not f.file_name.endswith(_PLUMBING)
  ]
  named = next((f for f in library if f.function_name.endswith("__call__")), None)
  named = named or next(iter(library), None)
  frame = named or own
  function = frame.function_name if frame else str(eqn.params.get("name", ""))
  function = function.removesuffix(".__call__").rsplit("<locals>.", 1)[-1]
  if outer.file:
    return Place(module, function or outer.function, outer.file, outer.line)
  return Place(module, function, own.file_name if own else "", own.line_num if own else 0)
