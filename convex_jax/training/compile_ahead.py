"""What a run asks of a machine that is not here: its programs, compiled for it ahead of time.

The compilers of TPUs (libtpu) and of NVIDIA GPUs work without a device. They know how much memory
a program takes and, for TPUs, how many operations it performs, how many bytes it moves and which
collectives it runs. Times are lower bounds by peak rates, not measurements. Programs are compiled
with the least effort of optimisation, five to nine times faster: the memory and the bytes of a
real run are up to a quarter less.
"""

import dataclasses
import functools
import math
import re
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import topologies
from ml_collections import ConfigDict

from convex_jax import mesh as meshes
from convex_jax.data import batches, datasets
from convex_jax.data.in_memory import is_resident
from convex_jax.data.splits import Split
from convex_jax.errors import UserError
from convex_jax.training import machines
from convex_jax.training.machines import CHIPS, MACHINES, Chip
from convex_jax.training.program import MAX_IN_FLIGHT, Computation

GIB = 2**30
RESERVED = 0.25  # GiB that the TPU's runtime keeps, by the compiler's messages for v5e.
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


# XLA's `GpuTargetConfigProto` of an H100 SXM, by the CUDA programming guide's table of compute
# capability 9.0 and the data sheet.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
runtime_version { major: 13 }
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@functools.cache
def devices_of(name: str) -> tuple[Any, ...]:
  """The devices of a machine, for which programs can be compiled but not run.

  Raises `UserError`, see `machines.check`.
  """
  machines.check(name)
  kind, topology = MACHINES[name]
  if kind == "h100":
    described = topologies.get_topology_desc(kind, "cuda", target_config=_H100, topology=topology)
    return tuple(described.devices)
  more: dict[str, Any] = {"chip_config_name": "megacore"} if kind == "v4" else {}
  if machines.chips(topology) == 1:
    more["chips_per_host_bounds"] = (1, 1, 1)
  described = topologies.get_topology_desc(
    platform="tpu", topology_name=f"{kind}:{topology}", **more
  )
  return tuple(described.devices)


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What the compiler says of a program; everything is per device.

  What a loop does is counted once: of `config.steps_per_call` steps the costs are those of one.
  """

  seconds: float  # That compiling took.
  memory: dict[str, float]  # GiB, by kind; empty where the compiler refused the program.
  flops: float = 0.0  # 0: the compiler does not say.
  bytes: float = 0.0  # Read and written, at most.
  collectives: dict[str, tuple[int, float]] = dataclasses.field(default_factory=dict)
  refused: str = ""  # The compiler's words, where memory does not suffice.

  def seconds_by(self, chip: Chip, devices: int) -> dict[str, float]:
    """The least time that each resource of the machine takes, in seconds."""
    around = (devices - 1) / devices  # A ring sends a share of the whole array for each other one.
    sent = {"all-reduce": 2 * around, "all-gather": around, "reduce-scatter": devices - 1.0}
    link = sum(sent.get(kind, around) * size for kind, (_, size) in self.collectives.items())
    return {
      "arithmetic": self.flops / chip.flops,
      "memory": self.bytes / chip.bandwidth,
      "links": link / chip.link,
    }


_FEW_WORDS = re.compile(r"RESOURCE_EXHAUSTED: (.*?)(?:\. |\n|$)")


def compiled(lowered: jax.stages.Lowered, chip: str) -> Compiled:
  """Compiles a program for the devices of its shardings, which are of this kind of chip."""
  began = time.monotonic()
  options: Any = None if chip == "h100" else {"exec_time_optimization_effort": -1.0}
  try:
    done = lowered.compile(compiler_options=options)
  except jax.errors.JaxRuntimeError as error:
    if (words := _FEW_WORDS.search(str(error))) is None:
      raise
    return Compiled(time.monotonic() - began, {}, refused=words[1])
  needs: Any = done.memory_analysis()
  costs: Any = done.cost_analysis() or {}
  memory = {
    "arguments": needs.argument_size_in_bytes,
    "results": needs.output_size_in_bytes - needs.alias_size_in_bytes,
    "temporaries": needs.temp_size_in_bytes,
    "code": needs.generated_code_size_in_bytes,
  }
  return Compiled(
    time.monotonic() - began,
    {name: size / GIB for name, size in memory.items()},
    costs.get("flops", 0.0),
    costs.get("bytes accessed", 0.0),
    collectives(done.as_text() or ""),
  )


_ARRAY = re.compile(r"\b(pred|bf16|[a-z]\d+)[a-z0-9]*\[([\d,]*)\]")
# An asynchronous collective counts where it is done: its result there is no more than the data.
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(?:-done)?\(")


def collectives(hlo: str) -> dict[str, tuple[int, float]]:
  """The number of collectives of each kind in a compiled program, and the bytes of their results."""
  found: dict[str, tuple[int, float]] = {}
  for line in hlo.splitlines():
    if match := _COLLECTIVE.search(line):
      number, size = found.get(match[2], (0, 0.0))
      found[match[2]] = number + 1, size + sum(map(_bytes, _ARRAY.findall(match[1])))
  return {kind: found[kind] for kind in KINDS if kind in found}


def _bytes(array: tuple[str, str]) -> float:
  """Of an array, given as ("f32", "8,128")."""
  kind, sides = array
  bits = 8 if kind == "pred" else int(re.sub(r"^\D+", "", kind))
  return bits / 8 * math.prod(int(n) for n in sides.split(",") if n)


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What a run takes on a machine."""

  machine: str
  devices: int
  train: Compiled
  evaluate: Compiled | None  # None: the training program was refused already.
  beside: dict[str, float]  # GiB a device that lie beside a training call's memory, by kind.

  @property
  def chip(self) -> Chip:
    """Of each device."""
    return CHIPS[MACHINES[self.machine][0]]

  @property
  def needs(self) -> float:
    """GiB a device; infinite where the compiler refused."""
    if not self.train.memory or (self.evaluate is not None and not self.evaluate.memory):
      return math.inf
    calls = [c for c in (self.train, self.evaluate) if c is not None]
    return max(sum(c.memory.values()) for c in calls) + sum(self.beside.values())

  @property
  def fits(self) -> bool:
    """Whether a device has that much."""
    return self.needs <= self.chip.memory - RESERVED


def verdict(config: Any, machine: str, evaluation: bool = True) -> Verdict:
  """Compiles the training program of a config for a machine, and the one that evaluates.

  Raises `UserError`, see `machines.check`, and where the batch or the weights cannot be split over
  the machine's devices.
  """
  devices = devices_of(machine)
  meshes.check_divisible(len(devices), config.batch_size, config.fsdp)
  mesh = meshes.make_mesh(devices, config.fsdp)
  examples = datasets.outline(config.data)
  job = Computation(config, examples, mesh)
  chip = MACHINES[machine][0]
  memory = CHIPS[chip].memory * GIB * len(devices)
  feeds = {
    name: batches.shapes_of(
      split,
      mesh,
      isinstance(split, Split) and is_resident(config.data.loader, split, memory),
      (config.steps_per_call, config.batch_size) if name == "train" else (config.batch_size,),
    )
    for name, split in examples.splits().items()
  }
  train = compiled(job.lower_train(*feeds["train"]), chip)
  evaluate = None
  if evaluation and not train.refused:
    evaluate = compiled(job.lower_eval(*feeds["test"]), chip)
  others = [arrays for name, (arrays, _) in feeds.items() if name != "train"]
  beside = {
    "other splits": _gib(others) / len(devices),
    f"{MAX_IN_FLIGHT} batches ahead": MAX_IN_FLIGHT * _gib(feeds["train"][1]) / len(devices),
  }
  return Verdict(machine, len(devices), train, evaluate, beside)


def _gib(tree: Any) -> float:
  return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(tree)) / GIB


def lines(found: Verdict) -> Iterator[str]:
  """A verdict in words."""
  room, train = found.chip.memory - RESERVED, found.train
  if found.fits:
    yield f"fits: {found.needs:.2f} of {room:g} GiB a device"
  elif math.isinf(found.needs):
    refused = train.refused or (found.evaluate.refused if found.evaluate else "")
    yield f"does not fit in {room:g} GiB a device: {refused}"
  else:
    yield f"does not fit: {found.needs:.2f} of {room:g} GiB a device"
  if train.memory:
    parts = train.memory | found.beside
    yield "  " + ", ".join(f"{name} {size:.2f}" for name, size in parts.items()) + " GiB"
  for name, program in (("training", train), ("evaluation", found.evaluate)):
    if program is None or not program.memory:
      continue
    words = f"{name}: compiled in {program.seconds:.0f} s"
    if program.flops:
      words += f", {program.flops / 1e9:,.4g} GFLOP and {program.bytes / 1e9:,.3g} GB a device"
    yield f"{words} and step" if program.flops else words
    for kind, (number, size) in program.collectives.items():
      yield f"  {kind}: {number}, {size / 1e6:,.3g} MB"
    if program.flops:
      times = program.seconds_by(found.chip, found.devices)
      bound = max(times, key=lambda name: times[name])
      each = ", ".join(f"{name} {1e3 * t:.3g}" for name, t in times.items())
      yield f"  at best {1e3 * times[bound]:.3g} ms a step, bound by {bound} (ms: {each})"


def largest_batch(config: Any, machine: str) -> Iterator[tuple[int, Verdict | None]]:
  """Bisects for the largest batch that fits, to 1/16: each that is tried, then the largest, or 0.

  Batches are multiples of the number of devices.
  """
  unit = len(devices_of(machine))
  low, high = 0, math.inf  # Of units: fit, do not fit.
  at = max(1, config.batch_size // unit)
  while high - low > max(1, low / 16):
    found = verdict(changed_by(config, {"batch_size": at * unit}), machine, evaluation=False)
    yield at * unit, found
    low, high = (at, high) if found.fits else (low, at)
    at = 2 * low if math.isinf(high) else int(low + high) // 2
  yield low * unit, None


def changed_by(config: Any, changes: dict[str, Any]) -> ConfigDict:
  """A copy of a config with some keys, given by their paths, changed."""
  copy = ConfigDict(config.to_dict())
  copy.update_from_flattened_dict(changes)
  return copy


def remedies(config: Any, devices: int) -> Iterator[dict[str, Any]]:
  """Changes of a config that leave its updates what they are and need less memory, mildest first.

  Accumulation does change BatchNorm: its statistics are those of a smaller batch.
  """
  remat = {} if config.model.remat else {"model.remat": True}
  if remat:
    yield remat
  for parts in (2, 4, 8):
    if config.batch_size % (parts * devices) == 0:
      yield {
        **remat,
        "batch_size": config.batch_size // parts,
        "optimizer.accumulate": config.optimizer.accumulate * parts,
      }
  for parts in (n for n in (4, 8, 16) if n > config.fsdp and devices % n == 0):
    yield {**remat, "fsdp": parts}


def command(config: Any, machine: str, bisect: bool, make_fit: bool) -> int:
  """`main --compile_for`: prints what a machine says of a config; 0 if it fits, 2 if not."""
  devices = len(devices_of(machine))
  print(
    f"Compiling for {machine}, {devices} x {CHIPS[MACHINES[machine][0]].memory:g} GiB", flush=True
  )
  found = verdict(config, machine)
  print("\n".join(lines(found)), flush=True)
  fits = found.fits
  if not fits and make_fit:
    for changes in remedies(config, devices):
      changed = changed_by(config, changes)
      try:
        found = verdict(changed, machine)
      except UserError as error:
        print(f"{_options(changes)}: {error}", flush=True)
        continue
      print(f"with {_options(changes)}: {next(lines(found))}", flush=True)
      if found.fits:
        break
  if bisect:
    for batch, tried in largest_batch(config, machine):
      if tried is not None:
        print(f"with {_options({'batch_size': batch})}: {next(lines(tried))}", flush=True)
      else:
        print(f"largest batch: {batch:,}")
  return 0 if fits else UserError.code


def _options(changes: dict[str, Any]) -> str:
  return " ".join(f"--config.{key}={value}" for key, value in changes.items())
