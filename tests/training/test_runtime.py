"""What a command sets before JAX starts."""

import os
import platform
import subprocess
import sys

import pytest

from convex_jax.training import runtime

GLIBC = sys.platform == "linux" and platform.libc_ver()[0] == "glibc"
FAULTS = """
import ctypes, resource, sys
from convex_jax.training import runtime
if sys.argv[1] == "keep":
  assert runtime.keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
def once():
  buffer = libc.malloc(64 << 20)
  ctypes.memset(buffer, 1, 64 << 20)
  libc.free(buffer)
once()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
  once()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not GLIBC, reason="glibc's allocator")
def test_a_large_buffer_is_not_mapped_anew():
  def faults(how):
    command = [sys.executable, "-c", FAULTS, how]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

  assert faults("keep") < 100
  assert faults("default") > 4 * (64 << 20) // (2 << 20) - 4  # Even with pages of 2 MiB.


def test_flags_of_the_user_stay(monkeypatch):
  monkeypatch.setattr(runtime.importlib.metadata, "version", lambda name: "0.10.2")
  monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
  runtime.convolve_with_eigen()
  first, second = os.environ["XLA_FLAGS"].split()
  assert first == "--xla_force_host_platform_device_count=2" and "INDIVIDUAL_DOT" in second
  runtime.convolve_with_eigen()
  assert len(os.environ["XLA_FLAGS"].split()) == 2


def test_flags_are_not_given_to_another_jaxlib(monkeypatch):
  monkeypatch.setattr(runtime.importlib.metadata, "version", lambda name: "0.11.0")
  monkeypatch.setenv("XLA_FLAGS", "")
  runtime.convolve_with_eigen()
  assert not os.environ["XLA_FLAGS"]


def test_computing_happens_in_the_calling_thread():
  command = [
    sys.executable,
    "-c",
    "from convex_jax.training import runtime; runtime.keep_freed_memory()",
  ]
  command[-1] += "; import jax; print(jax.config.read('jax_cpu_enable_async_dispatch'))"
  out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
  assert out.strip() == str(not GLIBC)


GARBAGE = """
import ctypes, resource
import jax
from convex_jax.training import runtime
runtime.keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
def resident():
  with open("/proc/self/statm") as file:
    return int(file.read().split()[1])
def compiled(event, seconds, **_):  # JAX's own events, of a program that takes long to compile.
  if event == runtime._COMPILED:
    events.append(event)
events = []
jax.monitoring.register_event_duration_secs_listener(compiled)
jax.jit(lambda x: x + 1)(1.0)
blocks = [libc.malloc(1 << 16) for _ in range(1024)]
for block in blocks:
  ctypes.memset(block, 1, 1 << 16)
for i, block in enumerate(blocks):
  if i % 16:  # The others keep the heap from shrinking.
    libc.free(block)
before = resident()
{what}
print((before - resident()) * resource.getpagesize() >> 20)
"""


@pytest.mark.skipif(not GLIBC, reason="glibc's allocator")
@pytest.mark.parametrize(
  "what",
  ["jax.monitoring.record_event_duration_secs(events[-1], 1.0)", "runtime.return_freed_memory()"],
)
def test_memory_that_the_compiler_or_an_evaluation_freed_is_returned(what):
  command = [sys.executable, "-c", GARBAGE.format(what=what)]
  out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
  assert int(out) > 32  # MB, of the 60 that are free.


def test_another_c_library_is_left_alone(monkeypatch):
  monkeypatch.setattr(runtime.ctypes, "CDLL", lambda name: object())
  assert not runtime.keep_freed_memory()
  runtime.return_freed_memory()


@pytest.fixture
def without_cache(monkeypatch, tmp_path):
  monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")  # So that it is restored.
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  return tmp_path


def test_programs_of_another_jaxlib_or_processor_lie_elsewhere(without_cache, monkeypatch):
  folders = set()
  for version, kind in (("1", "a"), ("2", "a"), ("1", "b")):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setattr(runtime.importlib.metadata, "version", lambda name, v=version: v)
    monkeypatch.setattr(runtime, "_instructions", lambda k=kind: k)
    folders.add(runtime.keep_compiled_programs())
  assert len(folders) == 3
  assert all(folder.startswith(str(without_cache / "convex_jax")) for folder in folders)


def test_a_cache_of_the_users_own_is_kept(without_cache, monkeypatch):
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/mine")
  assert runtime.keep_compiled_programs() == "/mine"
  assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "/mine"


def test_a_second_process_finds_the_programs(without_cache):
  program = """
import os
from convex_jax.training import runtime
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
runtime.keep_compiled_programs()
import jax
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
print(jax.jit(lambda x: x @ x)(jax.numpy.ones((64, 64)))[0, 0])
print(sum("cache_hits" in name for name in hits))
"""

  def run():
    out = subprocess.run(
      [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert not out.stderr
    value, hits = out.stdout.split()
    assert value == "64.0"
    return int(hits)

  assert run() == 0
  assert run() > 0
