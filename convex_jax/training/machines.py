"""Machines that programs can be compiled for without having one: what they are, what it takes.

Nothing here imports JAX, which reads the variables that `prepare_process` sets.
"""

import dataclasses
import importlib.util
import math
import os

from convex_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
  """What a device has, in JAX's sense of the word, at its peak."""

  memory: float  # GiB, without what a TPU's runtime keeps.
  flops: float  # FLOP/s, bfloat16.
  bandwidth: float  # B/s of its memory.
  link: float  # B/s that it can send to others: half of the two-way bandwidth of all its links.
  fraction: bool = False  # Whether JAX takes only a fraction of the memory.

  @property
  def room(self) -> float:
    """GiB that a run can have.

    Raises `UserError` for a fraction in the environment that is none.
    """
    return self.memory * _fraction() if self.fraction else self.memory


# As jaxlib reads them, in this order.
_FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


def _fraction() -> float:
  """The fraction of a GPU's memory that JAX takes, by the environment; 0.75 by default."""
  name = next((name for name in _FRACTIONS if os.environ.get(name)), None)
  if name is None:
    return 0.75
  try:
    value = float(os.environ[name])
  except ValueError:
    value = math.nan
  if not 0 < value <= 1:
    raise UserError(f"{name}={os.environ[name]}: expected a fraction of memory, > 0 and <= 1")
  return value


# docs.cloud.google.com/tpu/docs/v4, /v5e, /tpu7x (with v5p and v6e), read in November 2026; each
# of the two devices of a TPU7x has half the chip. Memory is what
# libtpu's messages have. H100 SXM: NVIDIA's data sheet; memory as a card has it, in bytes.
CHIPS = {
  "v4": Chip(30.75, 275e12, 1.2e12, 300e9),
  "v5e": Chip(15.75, 197e12, 0.819e12, 200e9),
  "v5p": Chip(95.74, 459e12, 2.765e12, 600e9),
  "v6e": Chip(31.25, 918e12, 1.638e12, 400e9),
  "tpu7x": Chip(94.75, 1153.5e12, 3.69e12, 300e9),
  "h100": Chip(84_942_979_072 / 2**30, 989e12, 3.35e12, 450e9, fraction=True),
}

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_DEEP = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")


def chips(topology: str) -> int:
  """Their number."""
  return math.prod(map(int, topology.split("x")))


# By Google's names: v5e and v6e count chips, the others TensorCores, two a chip.
MACHINES: dict[str, tuple[str, str]] = {  # Chip, topology.
  **{f"v4-{2 * chips(t)}": ("v4", t) for t in _DEEP},
  **{f"v5e-{chips(t)}": ("v5e", t) for t in _FLAT},
  **{f"v5p-{2 * chips(t)}": ("v5p", t) for t in _DEEP},
  **{f"v6e-{chips(t)}": ("v6e", t) for t in _FLAT},
  **{f"tpu7x-{2 * chips(t)}": ("tpu7x", t) for t in _DEEP},
  "h100-8": ("h100", "1x1x8"),
}


def check(name: str) -> None:
  """Raises `UserError` for a machine that is unknown, or whose compiler is not installed."""
  if name not in MACHINES:
    raise UserError(f"Unknown machine --compile_for={name}; expected one of {', '.join(MACHINES)}")
  if MACHINES[name][0] == "h100":
    if _cuda_folder() is None:
      raise UserError(
        f"--compile_for={name} needs the CUDA compiler, which is not installed:"
        " pip install 'convex_jax[cuda]'"
      )
  elif importlib.util.find_spec("libtpu") is None:
    raise UserError(
      f"--compile_for={name} needs the TPU's compiler, which is not installed:"
      " pip install 'convex_jax[aot]'"
    )


def prepare_process(name: str) -> None:
  """Sets the variables that compiling for a machine needs; to be called before JAX is imported."""
  os.environ |= {
    "JAX_ENABLE_COMPILATION_CACHE": "0",  # Nothing is written.
    "JAX_PLATFORMS": "cpu",  # No search for devices.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # No device is held, so that there is nothing to lock.
    # What libtpu would look for on a TPU's host, and miss, in a page of warnings.
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
  }
  if MACHINES[name][0] == "h100":
    os.environ |= {"JAX_PLATFORMS": "cuda,cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    # Without a device nothing can be timed, and Triton's products need timings.
    flags = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
    flags += f" --xla_gpu_cuda_data_dir={_cuda_folder()}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()


def _cuda_folder() -> str | None:
  """The folder of NVIDIA's compiler as pip installs it, if JAX's plugin is there too."""
  if importlib.util.find_spec("jax_cuda13_plugin") is None:
    return None
  found = importlib.util.find_spec("nvidia")
  places = found.submodule_search_locations if found is not None else None
  folders = [os.path.join(place, "cu13") for place in places or ()]
  return next((f for f in folders if os.path.exists(os.path.join(f, "bin", "ptxas"))), None)
