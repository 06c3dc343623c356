"""What a command sets in its own process before JAX computes."""

import ctypes
import hashlib
import importlib.metadata
import os
import platform
import sys

from convex_jax import files

# mallopt's parameters, from glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_COMPILED = "/jax/core/compile/backend_compile_duration"  # An event of JAX's, with its seconds.


def tune_cpu() -> None:
  """Speeds up training on the CPU. To be called before JAX computes."""
  convolve_with_eigen()
  keep_freed_memory()


def keep_freed_memory() -> bool:
  """Makes glibc keep freed memory; returns whether it could (Linux with glibc alone).

  XLA on the CPU takes a step's temporaries from malloc as one buffer and frees it. By default
  glibc maps it again each time, and the kernel zeroes every page: a quarter of a Mixer's step
  (308 MB at batch 128), two thirds of an EfficientNet's (3.8 GB at batch 16; 2 cores).

  To be called before JAX computes; imports it. The process stays as large as its largest step was,
  until `return_freed_memory`; what the compiler frees is returned at once, 0.3 GB for an All-CNN
  whose step takes 0.65 GB. Only the main thread's heap can hold such buffers, so computations on
  one CPU run in the calling thread. (One heap for all threads is fragmented where XLA has just
  compiled: malloc's search took 19 % of an EfficientNet's step.)
  """
  if sys.platform != "linux":
    return False
  libc = ctypes.CDLL(None)
  if not (hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")):  # Another C library.
    return False
  import jax

  def give_back(event: str, duration_secs: float, **_) -> None:
    if event == _COMPILED and duration_secs > 0.1:  # Small programs leave little.
      return_freed_memory()

  settings = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1, _TOP_PAD: 64 << 20}
  jax.config.update("jax_cpu_enable_async_dispatch", False)
  jax.monitoring.register_event_duration_secs_listener(give_back)
  return all([libc.mallopt(name, value) for name, value in settings.items()])


def return_freed_memory() -> None:
  """Returns to the system what malloc keeps of the memory that was freed; glibc alone keeps any.

  The buffers of training and of evaluation, taken in turn, leave holes between what stays: a
  Mixer's process (batch 512) grew from 1.82 to 2.17 GB in nine turns, and to 1.89 with a call of this
  after each. The next step maps its buffer anew, once.
  """
  if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
    libc.malloc_trim(0)


def convolve_with_eigen() -> None:
  """Leaves convolutions on the CPU to XLA's older library; products and sums keep the newer.

  YNNPACK's 3x3 convolution of 96 features takes 150 ms where Eigen's takes 107 (batch 128,
  32 px, 2 cores), an All-CNN's step 1.42 s against 1.21. The flag is experimental, and XLA
  ends the process at a flag that it does not know: for the jaxlib that it was measured with.
  """
  flag = "--xla_cpu_experimental_ynn_fusion_type="
  flags = os.environ.get("XLA_FLAGS", "")
  if importlib.metadata.version("jaxlib").startswith("0.10.") and flag not in flags:
    kinds = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"
    os.environ["XLA_FLAGS"] = f"{flags} {flag}{kinds}".strip()


def keep_compiled_programs() -> str:
  """Sets JAX's persistent compilation cache, unless the user has; returns its folder.

  Below `$XDG_CACHE_HOME/convex_jax` (default `~/.cache`), one for each kind of processor and
  each jaxlib: JAX does not tell apart machines whose instructions differ (jax-ml/jax#38445).
  Sets environment variables, so that JAX need not be imported; `JAX_ENABLE_COMPILATION_CACHE=0`
  turns it off.
  """
  kind = f"{platform.machine()} {_instructions()} jaxlib {importlib.metadata.version('jaxlib')}"
  folder = os.path.join(files.cache_folder(), hashlib.sha256(kind.encode()).hexdigest()[:16])
  chosen = os.environ.get("JAX_COMPILATION_CACHE_DIR", folder)
  os.environ["JAX_COMPILATION_CACHE_DIR"] = files.expand(chosen)
  # Seconds; JAX's own threshold of 1 leaves out most of a small run's programs.
  os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
  return os.environ["JAX_COMPILATION_CACHE_DIR"]


def _instructions() -> str:
  """The processor's model and features, where the system tells (Linux)."""
  try:
    with open("/proc/cpuinfo") as file:
      lines = {line.partition(":")[0].strip(): line for line in file}
  except OSError:
    return platform.processor()
  return "".join(lines.get(key, "") for key in ("model name", "flags", "Features"))
