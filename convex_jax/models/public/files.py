"""Reads the arrays of a public weight file; nothing in a file is executed.

| format | published by | read by |
|---|---|---|
| `.npz` | the official code of Mixer | numpy, without pickles |
| `.safetensors` | timm, or any state dict | safetensors |
| `.pth`, `.pt`, `.bin` | torchvision, CycleMLP | torch if installed, `weights_only` |
"""

import os
import zipfile
import zlib

import numpy as np

from convex_jax.errors import UserError

Arrays = dict[str, np.ndarray]
MAX_GROWTH = 20  # Weights hardly compress; zeros compress a thousandfold.
MIN_BOMB = 2**26  # Bytes; no machine's memory is too small for so few.


def read(path: str) -> Arrays:
  """The float32 arrays of a file by key, without batch counters. Raises `UserError`."""
  reader = {".npz": _read_npz, ".safetensors": _read_safetensors}
  reader |= dict.fromkeys((".pth", ".pt", ".bin"), _read_torch)
  suffix = os.path.splitext(path)[1]
  if suffix not in reader:
    raise UserError(f"{path} is not a public weight file; expected {', '.join(reader)}")
  if not os.path.isfile(path):
    raise UserError(f"{path} does not exist; expected a file in {', '.join(reader)}")
  _refuse_bomb(path)
  arrays = {}
  for key, array in reader[suffix](path).items():
    if key.endswith(".num_batches_tracked"):
      continue
    if not np.issubdtype(array.dtype, np.floating):
      raise UserError(f"{path}: {key} holds {array.dtype}; expected floating-point numbers")
    with np.errstate(over="ignore"):
      array = array.astype(np.float32)
    if not np.isfinite(array).all():
      raise UserError(f"{path}: {key} holds values that are not finite in float32")
    if key.endswith("running_var") and (array < 0).any():
      raise UserError(f"{path}: {key} holds negative variances")
    arrays[key] = array
  return arrays


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
  return arrays


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
  try:
    content = torch.load(path, map_location="cpu", weights_only=True)
  except Exception as error:  # Damage makes torch raise almost anything.
    raise UserError(
      f"{path} holds more than weights, or is damaged: {_first_line(error)}\n  nothing in it was"
      " executed; if you trust its source, load it in torch, save only its state dict, and use that"
    ) from error
  for inner in ("model", "state_dict"):
    if isinstance(content, dict) and isinstance(content.get(inner), dict):
      content = content[inner]
  tensors = isinstance(content, dict) and {
    key: value
    for key, value in content.items()
    if isinstance(key, str) and isinstance(value, torch.Tensor)
  }
  if not tensors:
    raise UserError(f"{path} holds no state dict; expected torch.save(net.state_dict(), path)")
  dense = {key: value.detach().to_dense() for key, value in tensors.items()}
  return {k: (v.float() if v.is_floating_point() else v).numpy() for k, v in dense.items()}
