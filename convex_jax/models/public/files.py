"""Reads the arrays of a public weight file; nothing in a file is executed.

| content | published by | read by |
|---|---|---|
| `.npz` | the official code of Mixer | numpy, without pickles |
| safetensors | timm, or any state dict | safetensors |
| `torch.save` | torchvision, CycleMLP, Lightning | torch if installed, `weights_only` |

The content decides, whatever the file is called: `.pth`, `.pt`, `.ckpt`, `.bin` and `.pth.tar`
are all written by `torch.save`.
"""

import argparse
import contextlib
import os
import re
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from convex_jax.errors import UserError

Arrays = dict[str, np.ndarray]
MAX_GROWTH = 20  # Weights hardly compress; zeros compress a thousandfold.
MIN_BOMB = 2**26  # Bytes; no machine's memory is too small for so few.
SAFE_TORCH = (2, 6)  # Before it, files could execute code despite `weights_only` (CVE-2025-32434).


def read(path: str) -> Arrays:
  """The arrays of a file by key, in nested dicts by all keys with dots between them.

  Arrays of half precision are in float32. Raises `UserError` for a file that cannot be read, or
  that holds negative variances.
  """
  if not os.path.isfile(path):
    raise UserError(f"{path} {'is a folder' if os.path.isdir(path) else 'does not exist'}; {_WHAT}")
  _refuse_bomb(path)
  arrays = {key: _at_least_float32(array) for key, array in _reader(path)(path).items()}
  for key, array in arrays.items():
    if key.endswith("running_var") and (array < 0).any():
      raise UserError(f"{path}: {key} holds negative variances")
  return arrays


_WHAT = "expected a file of weights: .npz, .safetensors, or what torch.save writes"


def _reader(path: str) -> Any:
  """The function that reads a file, by its first bytes."""
  with open(path, "rb") as file:
    first = file.read(9)
  if first[8:] == b"{":  # After its length, which may start with any bytes, the header.
    return _read_safetensors
  if first.startswith(b"PK"):
    with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
      if any(os.path.basename(name) == "data.pkl" for name in archive.namelist()):
        return _read_torch
    return _read_npz
  if first.startswith(b"\x80"):  # A pickle: torch's format before release 1.6.
    return _read_torch
  raise UserError(f"{path} holds no weights; {_WHAT}. Download it again")


def _at_least_float32(array: np.ndarray) -> np.ndarray:
  half = jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.itemsize < 4
  return array.astype(np.float32) if half else array


def _refuse_bomb(path: str) -> None:
  """Raises `UserError` for an archive that would fill the memory: weights hardly compress."""
  if not zipfile.is_zipfile(path):
    return
  with zipfile.ZipFile(path) as archive:
    unpacked = sum(entry.file_size for entry in archive.infolist())
  if unpacked > max(MIN_BOMB, MAX_GROWTH * os.path.getsize(path)):
    raise UserError(
      f"{path} of {os.path.getsize(path):,} bytes would unpack to {unpacked:,}; expected at most"
      f" {MAX_GROWTH} times its size, as of weights"
    )


def _first_line(error: Exception) -> str:
  return (str(error) or repr(error)).splitlines()[0]


def _damaged(path: str, error: Exception) -> UserError:
  return UserError(f"{path} cannot be read: {_first_line(error)}. Download it again.")


# All that the readers raise for a damaged or hostile file.
_DAMAGE = (ValueError, OSError, EOFError, KeyError, TypeError, AttributeError, MemoryError)
_DAMAGE += (RuntimeError, zipfile.BadZipFile, zlib.error)


def _read_npz(path: str) -> Arrays:
  try:
    with np.load(path, allow_pickle=False) as file:
      arrays = {key: file[key] for key in file.files}
  except _DAMAGE as error:
    raise _damaged(path, error) from error
  if wrong := [key for key, value in arrays.items() if not isinstance(value, np.ndarray)]:
    raise UserError(f"{path}: {', '.join(wrong)}: not an array. Download it again.")
  # numpy has no name for bfloat16, and stores it as two bytes without meaning.
  return {k: v.view(jnp.bfloat16) if v.dtype == "V2" else v for k, v in arrays.items()}


def _read_safetensors(path: str) -> Arrays:
  import safetensors
  from safetensors import numpy as reader

  try:
    return reader.load_file(path)
  except (safetensors.SafetensorError, *_DAMAGE) as error:
    raise _damaged(path, error) from error


def _read_torch(path: str) -> Arrays:
  try:  # Torch is heavy and optional.
    import torch  # pyright: ignore[reportMissingImports]
  except ImportError as error:
    raise UserError(
      f"{path} is a torch file and torch is not installed: run pip install torch, or convert the"
      " file to .safetensors on a machine that has it"
    ) from error
  if torch.__version__ < SAFE_TORCH:
    raise UserError(
      f"torch {torch.__version__} can be made to execute what is in {path}; expected"
      f" {'.'.join(map(str, SAFE_TORCH))} or newer: run pip install --upgrade torch"
    )
  try:
    with torch.serialization.safe_globals(_inert()):
      content = torch.load(path, map_location="cpu", weights_only=True)
    arrays = {}
    for key, tensor in _tensors(content, torch.Tensor):
      dense = tensor.detach().to_dense()
      arrays[key] = (dense.float() if dense.is_floating_point() else dense).numpy()
  except Exception as error:  # Damage makes torch raise almost anything.
    held = re.search(r"GLOBAL (\S+)", str(error))  # torch's own advice is to execute the file.
    reason = f"it holds a {held[1]}" if held else _first_line(error)
    raise UserError(
      f"{path} holds more than weights, or is damaged: {reason}\n  nothing in it was"
      " executed; if you trust its source, load it in torch, save only its state dict, and use that"
    ) from error
  if not arrays:
    raise UserError(f"{path} holds no state dict; expected torch.save(net.state_dict(), path)")
  return arrays


def _inert() -> list[Any]:
  """What checkpoints hold besides weights, and what does nothing: arguments, numpy's scalars."""
  dtypes = [type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int32, np.int64)]
  scalar = np.float64(0).__reduce__()[0]
  names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")  # Before 2.0, since.
  return [argparse.Namespace, np.dtype, *dtypes, *((scalar, name) for name in names)]


def _tensors(content: Any, kind: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
  """The (key, tensor) pairs in nested dicts."""
  if isinstance(content, dict):
    for key, value in content.items():
      if isinstance(value, kind):
        yield f"{prefix}{key}", value
      else:
        yield from _tensors(value, kind, f"{prefix}{key}.")
