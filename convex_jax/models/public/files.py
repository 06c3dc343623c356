"""Reads a public checkpoint's arrays by key; nothing in a file is executed.

| format | whose | read by |
|---|---|---|
| `.npz` | the official Mixer's | numpy, pickles refused |
| `.safetensors` | timm's, or any state dict | safetensors |
| `.pth`, `.pt`, `.bin` | torch state dicts: torchvision's, CycleMLP's | torch where it is, `weights_only` |
"""

import os
import zipfile
import zlib

import numpy as np

from convex_jax.errors import UserError

Arrays = dict[str, np.ndarray]
MAX_GROWTH = 20  # Weights hardly compress; zeros a thousandfold.
MIN_BOMB = 2**26  # Bytes that no memory lacks.


def read(path: str) -> Arrays:
  """A file's arrays by key, float32, without what is no weight. Raises `UserError`."""
  reader = {".npz": _read_npz, ".safetensors": _read_safetensors}
  reader |= dict.fromkeys((".pth", ".pt", ".bin"), _read_torch)
  suffix = os.path.splitext(path)[1]
  if suffix not in reader:
    raise UserError(f"{path} is no public checkpoint; allowed: files in {', '.join(reader)}")
  if not os.path.isfile(path):
    raise UserError(f"{path} does not exist; give the path of a file in {', '.join(reader)}")
  _refuse_bomb(path)
  arrays = {}
  for key, array in reader[suffix](path).items():
    if key.endswith(".num_batches_tracked"):
      continue
    if key.endswith((".sfc_h.offset", ".sfc_w.offset")):
      _check_offsets(path, key, array)
      continue
    if not np.issubdtype(array.dtype, np.floating):
      raise UserError(f"{path}: {key} holds {array.dtype}; allowed: floating-point numbers")
    with np.errstate(over="ignore"):
      array = array.astype(np.float32)
    if not np.isfinite(array).all():
      raise UserError(f"{path}: {key} holds values that are no finite float32 numbers")
    if key.endswith("running_var") and (array < 0).any():
      raise UserError(f"{path}: {key} holds variances below 0")
    arrays[key] = array
  return arrays


def _refuse_bomb(path: str) -> None:
  """Raises `UserError` for an archive that grows as no weights do, before it fills the memory."""
  if not zipfile.is_zipfile(path):
    return
  with zipfile.ZipFile(path) as archive:
    unpacked = sum(entry.file_size for entry in archive.infolist())
  if unpacked > max(MIN_BOMB, MAX_GROWTH * os.path.getsize(path)):
    raise UserError(
      f"{path} of {os.path.getsize(path):,} bytes would unpack to {unpacked:,}; allowed:"
      f" {MAX_GROWTH} times its size. It is no file of weights"
    )


def _damaged(path: str, error: Exception) -> UserError:
  reason = (str(error) or repr(error)).splitlines()[0]
  return UserError(f"{path} cannot be read: {reason}. Download it again.")


# What a damaged or hostile file makes the readers meet; no other error is theirs to raise.
_DAMAGE = (ValueError, OSError, EOFError, KeyError, TypeError, AttributeError, MemoryError)
_DAMAGE += (RuntimeError, zipfile.BadZipFile, zlib.error)


def _read_npz(path: str) -> Arrays:
  try:
    with np.load(path, allow_pickle=False) as file:
      arrays = {key: file[key] for key in file.files}
  except _DAMAGE as error:
    raise _damaged(path, error) from error
  if wrong := [key for key, value in arrays.items() if not isinstance(value, np.ndarray)]:
    raise UserError(f"{path}: {', '.join(wrong)} are no arrays. Download it again.")
  return arrays


def _read_safetensors(path: str) -> Arrays:
  import safetensors
  from safetensors import numpy as reader

  try:
    return reader.load_file(path)
  except (safetensors.SafetensorError, *_DAMAGE) as error:
    raise _damaged(path, error) from error


def _read_torch(path: str) -> Arrays:
  try:
    import torch  # pyright: ignore[reportMissingImports]
  except ImportError as error:
    raise UserError(
      f"{path} is a torch file and torch is not installed: pip install torch, or convert the file"
      " to .safetensors where it is"
    ) from error
  try:
    content = torch.load(path, map_location="cpu", weights_only=True)
  except Exception as error:  # torch raises what the damage makes it meet.
    raise UserError(
      f"{path} holds more than weights, or is damaged: {(str(error) or repr(error)).splitlines()[0]}\n"
      "  nothing in it was executed; where you trust its source, load it in torch, save its state"
      " dict alone, and give that file"
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
    raise UserError(
      f"{path} holds no state dict; allowed: what torch.save(net.state_dict()) writes"
    )
  dense = {key: value.detach().to_dense() for key, value in tensors.items()}
  return {k: (v.float() if v.is_floating_point() else v).numpy() for k, v in dense.items()}


def _check_offsets(path: str, key: str, offset: np.ndarray) -> None:
  """CycleMLP's files hold the shifts that its formula gives; others would be another model."""
  axis = 1 if ".sfc_h." in key else 0  # Pairs (dy, dx).
  pairs = offset.reshape(-1, 2) if offset.size % 2 == 0 else np.zeros((1, 2))
  want = np.zeros_like(pairs)
  want[:, axis] = (np.arange(len(pairs)) + 1) % 3 - 1
  if not np.array_equal(pairs, want):
    raise UserError(f"{path}: {key} shifts channels otherwise than CycleFC does; another model")
