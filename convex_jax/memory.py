"""The host's allocator, set for programs that ask for the same large buffers at every step.

XLA on the CPU takes a step's temporaries from malloc as one buffer and gives it back. By
default glibc maps what is that large anew each time, so every step has every page of it
zeroed by the kernel again: a third of a Mixer's step (308 MB at batch 128; 2 cores).
"""

import ctypes
import sys

# mallopt's parameters, from glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8


def keep_freed_memory() -> bool:
  """Makes glibc keep what is freed; says whether it could (Linux with glibc alone).

  To be called before JAX starts its threads: one arena serves all, no buffer is mapped on its
  own, the heap is never trimmed. The process then stays as large as it ever was.
  """
  if sys.platform != "linux":
    return False
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except AttributeError:  # Another C library.
    return False
  settings = {_MMAP_MAX: 0, _ARENA_MAX: 1, _TRIM_THRESHOLD: -1, _TOP_PAD: 64 << 20}
  return all([mallopt(name, value) for name, value in settings.items()])
