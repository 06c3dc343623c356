"""What a run asks of a machine that is not here: its programs, compiled for it ahead of time.

The compilers of TPUs (libtpu) and of NVIDIA GPUs work without a device. They know how much memory
a program takes and, for TPUs, how many operations it performs, how many bytes it moves and which
collectives it runs. Times are estimates by peak rates, neither measurements nor bounds. Programs
are compiled with the least effort of optimisation, five to nine times faster: the memory and the
bytes of a real run are up to a quarter less.
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
from convex_jax import progress
from convex_jax.data import batches, datasets
from convex_jax.data.in_memory import is_resident
from convex_jax.data.splits import Split
from convex_jax.errors import UserError
from convex_jax.training import machines
from convex_jax.training.collectives import Collectives, collectives
from convex_jax.training.machines import CHIPS, MACHINES, Chip
from convex_jax.training.program import MAX_IN_FLIGHT, Computation

GIB = 2**30


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
  # GiB by kind, of the program and of what else lies there then; empty where it was refused.
  memory: dict[str, float]
  flops: float = 0.0  # 0: the compiler does not say.
  bytes: float = 0.0  # Read and written, at most.
  collectives: dict[str, Collectives] = dataclasses.field(default_factory=dict)
  refused: str = ""  # The compiler's words, where memory does not suffice.

  @property
  def needs(self) -> float:
    """GiB per device while it runs; infinite where the compiler refused."""
    return sum(self.memory.values()) if self.memory else math.inf

  def seconds_by(self, chip: Chip) -> dict[str, float]:
    """About the time that each resource of the machine takes at its peak rate, in seconds."""
    return {
      "arithmetic": self.flops / chip.flops,
      "memory": self.bytes / chip.bandwidth,
      "links": sum(each.sent for each in self.collectives.values()) / chip.link,
    }


_FEW_WORDS = re.compile(r"RESOURCE_EXHAUSTED: (.*?)(?:\. |\n|$)")


def compiled(
  lowered: jax.stages.Lowered, chip: str, devices: int, beside: dict[str, float]
) -> Compiled:
  """Compiles a program for the devices of its shardings, so many of this kind of chip.

  `beside` is what lies on a device besides while the program runs: GiB, by kind.
  """
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
    {name: size / GIB for name, size in memory.items()} | beside,
    costs.get("flops", 0.0),
    costs.get("bytes accessed", 0.0),
    collectives(done.as_text() or "", devices),
  )


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What a run takes on a machine."""

  machine: str
  devices: int
  train: Compiled
  evaluate: Compiled | None  # None: the training program was refused already.

  @property
  def chip(self) -> Chip:
    """Of each device."""
    return CHIPS[MACHINES[self.machine][0]]

  @property
  def needs(self) -> float:
    """GiB per device; infinite where the compiler refused."""
    return max(each.needs for each in (self.train, self.evaluate) if each is not None)

  @property
  def fits(self) -> bool:
    """Whether a device has that much."""
    return self.needs <= self.chip.room


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
  memory = CHIPS[chip].room * GIB * len(devices)

  def shapes(name, rows):
    split = examples.splits()[name]
    resident = isinstance(split, Split) and is_resident(config.data.loader, split, memory)
    return batches.shapes_of(split, mesh, resident, rows)

  feeds = {name: shapes(name, (config.batch_size,)) for name in examples.splits()}
  arrays, plan = shapes("train", (config.steps_per_call, config.batch_size))
  beside = {
    "other splits": _gib([held for name, (held, _) in feeds.items() if name != "train"]),
    f"{MAX_IN_FLIGHT} batches ahead": MAX_IN_FLIGHT * _gib(plan),
  }
  train = compiled(job.lower_train(arrays, plan), chip, len(devices), beside)
  if not evaluation or train.refused:
    return Verdict(machine, len(devices), train, None)
  state = job.state_shapes()
  # Before an evaluation the training calls in flight are waited for; it takes every split in turn.
  beside = {
    "rest of the training state": _gib(state) - _gib(state.weights()),
    "other splits": _gib([held for name, (held, _) in feeds.items() if name != "test"]),
    "last batch of training": _gib(plan),
    f"{MAX_IN_FLIGHT} batches ahead": MAX_IN_FLIGHT
    * max(_gib(ahead) for _, ahead in feeds.values()),
  }
  evaluate = compiled(job.lower_eval(*feeds["test"]), chip, len(devices), beside)
  return Verdict(machine, len(devices), train, evaluate)


def _gib(tree: Any) -> float:
  """Of one device, for arrays given as shapes with shardings."""
  sizes = (
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )
  return sum(sizes) / GIB


def lines(found: Verdict) -> Iterator[str]:
  """A verdict in words."""
  room, train = f"{found.chip.room:.4g}", found.train
  if math.isinf(found.needs):
    refused = train.refused or (found.evaluate.refused if found.evaluate else "")
    yield f"does not fit in {room} GiB per device: {refused}"
  else:
    words = "fits" if found.fits else "does not fit"
    yield f"{words}: needs {found.needs:.2f} GiB per device, which has {room}"
  for name, program in (("training", train), ("evaluation", found.evaluate)):
    if program is None or not program.memory:
      continue
    words = f"{name}: compiled in {program.seconds:.0f} s"
    if program.flops:
      words += f", {program.flops / 1e9:,.4g} GFLOP and {program.bytes / 1e9:,.3g} GB per device"
    yield f"{words} and step" if program.flops else words
    parts = ", ".join(f"{name} {size:.2f}" for name, size in program.memory.items())
    yield f"  {program.needs:.2f} GiB: {parts}"
    for kind, each in program.collectives.items():
      yield f"  {kind}: {each.number}, {each.size / 1e6:,.3g} MB"
    if program.flops:
      times = program.seconds_by(found.chip)
      bound = max(times, key=lambda name: times[name])
      each = ", ".join(f"{name} {1e3 * t:.3g}" for name, t in times.items())
      yield f"  about {1e3 * times[bound]:.3g} ms per step, bound by {bound} (ms: {each})"


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

  Where batches become smaller and more, so do steps, what is counted in them, and the decay of
  averaged weights, to the same decay per update. What remains to differ is what a batch is to
  itself: BatchNorm's statistics, the draws of dropout, mixup and CutMix, `skip_spikes`; and epochs
  are rounded up to whole calls of smaller steps.
  """
  remat = {} if config.model.remat else {"model.remat": True}
  if remat:
    yield remat
  in_steps = {
    "steps": config.steps,
    "checkpoint.every_steps": config.checkpoint.every_steps,
    "log.every_steps": config.log.every_steps,
  }
  for parts in (2, 4, 8):
    if config.batch_size % (parts * devices) == 0:
      yield {
        **remat,
        "batch_size": config.batch_size // parts,
        "optimizer.accumulate": config.optimizer.accumulate * parts,
        **{key: n * parts for key, n in in_steps.items() if n},
        **({"ema_decay": config.ema_decay ** (1 / parts)} if config.ema_decay else {}),
      }
  for parts in (n for n in (4, 8, 16) if n > config.fsdp and devices % n == 0):
    yield {**remat, "fsdp": parts}


def command(config: Any, machine: str, bisect: bool, make_fit: bool) -> int:
  """`main --compile_for`: prints what a machine says of a config; 0 if it fits, 2 if not."""
  devices = len(devices_of(machine))
  print(
    f"Compiling for {machine}, {devices} x {CHIPS[MACHINES[machine][0]].memory:.4g} GiB", flush=True
  )
  with progress.waiting("compiling"):
    found = verdict(config, machine)
  print("\n".join(lines(found)), flush=True)
  fits = found.fits
  if not fits and make_fit:
    for changes in remedies(config, devices):
      changed = changed_by(config, changes)
      try:
        with progress.waiting(f"compiling with {_options(changes)}"):
          found = verdict(changed, machine)
      except UserError as error:
        print(f"{_options(changes)}: {error}", flush=True)
        continue
      print(f"with {_options(changes)}: {next(lines(found))}", flush=True)
      if found.fits:
        break
  if bisect:
    tries = largest_batch(config, machine)
    while True:
      with progress.waiting("looking for the largest batch"):
        batch, tried = next(tries)
      if tried is None:
        break
      print(f"with {_options({'batch_size': batch})}: {next(lines(tried))}", flush=True)
    print(f"largest batch: {batch:,}")
  return 0 if fits else UserError.code


def _options(changes: dict[str, Any]) -> str:
  return " ".join(f"--config.{key}={value}" for key, value in changes.items())
