"""Which processes train together, and joining them: the one place that reads launchers' variables."""

import ctypes
import dataclasses
import http.client
import os
import re
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping

import jax

from convex_jax.errors import Lost, UserError

METADATA_PATIENCE = 20.0  # Seconds to wait for a server that answers in milliseconds.


@dataclasses.dataclass(frozen=True)
class Launcher:
  """What a launcher tells each process, in variables of the environment."""

  name: str
  command: str  # That starts the processes.
  count: tuple[str, ...]  # Their number, or a list of their hosts; the first that is set counts.
  index: str  # This process, from 0.
  needed: tuple[str, ...]  # By JAX, besides.
  address: str | None = None  # What JAX finds process 0 by, where that may be absent.
  per_host: str = ""  # The number of processes on this host.
  slices: tuple[str, str] = ("", "")  # How many such groups there are, and which this one is.


LAUNCHERS = (
  Launcher(
    "Slurm",
    "srun",
    ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),  # An interactive step has the job's SLURM_NTASKS.
    "SLURM_PROCID",
    ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_LOCALID"),
    per_host="SLURM_STEP_TASKS_PER_NODE",
  ),
  Launcher(
    "Open MPI",
    "mpirun",
    ("OMPI_COMM_WORLD_SIZE",),
    "OMPI_COMM_WORLD_RANK",
    ("OMPI_COMM_WORLD_LOCAL_RANK",),
    address="OMPI_MCA_orte_hnp_uri",  # Version 5 has none.
    per_host="OMPI_COMM_WORLD_LOCAL_SIZE",
  ),
  Launcher(
    "the TPU runtime",
    "the pod's own launcher",
    ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"),
    "TPU_WORKER_ID",
    (),
    slices=("MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID"),
  ),
)


@dataclasses.dataclass(frozen=True)
class Place:
  """Where this process stands among those that train together; None: JAX finds out."""

  coordinator: str | None = None
  count: int | None = None
  index: int | None = None
  all_devices: bool = False  # Of its host; by default JAX takes one for each process of a launcher.


def place(
  mode: str,
  coordinator: str | None = None,
  count: int | None = None,
  index: int | None = None,
  environment: Mapping[str, str] = os.environ,
) -> tuple[Place | None, str]:
  """(place of this process, None if it trains alone; what to tell the user, "" if nothing).

  Args:
    mode: of --distributed: auto, on, off.
    coordinator: of --coordinator.
    count: of --num_processes.
    index: of --process_id.
    environment: the variables.

  Raises:
    UserError: options that do not fit together, a launcher that does not tell enough, or a TPU VM
      whose metadata server does not answer.
  """
  if mode == "off":
    return None, ""
  coordinator = coordinator or environment.get("JAX_COORDINATOR_ADDRESS")
  launcher, launched, missing = _launched(environment)
  if coordinator or count is not None or index is not None:
    known = launched if launcher is not None and not missing else Place()
    count = known.count if count is None else count
    index = known.index if index is None else index
    _check(coordinator, count, index, launcher is not None and not missing)
    here = Place(coordinator, count, index, known.all_devices)
    return (None if count == 1 else here), ""
  if mode == "on":
    return Place(), ""
  if launcher is None:
    count = _hosts_of_slice(environment)
    return (Place(None, count) if count > 1 else None), ""
  if missing:
    return None, (
      f"{launcher.name} tells of {launched.count} processes, but {' and '.join(missing)} is not set, or"
      " out of range:"
      f" this process was not started by {launcher.command}, and trains alone.\n"
      f"  To train together: {launcher.command} python -m convex_jax train ...; not to be told:"
      " --distributed=off"
    )
  if launcher.address is not None and launcher.address not in environment:
    raise UserError(
      f"{launcher.name} started {launched.count} processes, but does not tell where the first one"
      f" runs ({launcher.address} is not set); pass --coordinator=HOST:PORT, its address, or"
      " --distributed=off to train alone"
    )
  return launched, ""


def _launched(environment: Mapping[str, str]) -> tuple[Launcher | None, Place, list[str]]:
  """(the launcher that tells of several processes, the place it gives this one, what it lacks)."""
  for launcher in LAUNCHERS:
    set_ = [environment[name] for name in launcher.count if environment.get(name)]
    count = _count(set_[0]) if set_ else 1
    slices, which = (environment.get(name, "") for name in launcher.slices)
    groups = _count(slices) if set_ else 1
    if count * groups > 1:
      index, group = _number(environment.get(launcher.index, "")), _number(which) or 0
      missing = [name for name in launcher.needed if not environment.get(name)]
      if index is None or index >= count:
        missing.append(launcher.index)
      if group >= groups or (groups > 1 and not which):
        missing.append(launcher.slices[1])
      if index is not None:
        index += group * count
      count *= groups
      alone = re.fullmatch(r"1(\(x\d+\))?", environment.get(launcher.per_host, ""))
      return launcher, Place(None, count, index, bool(alone)), missing
  return None, Place(), []


# Names by which a launcher, or whoever divides a host's chips, says how many processes there are.
_TOLD = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_BOUNDS", "TPU_HOST_BOUNDS")


def _hosts_of_slice(environment: Mapping[str, str]) -> int:
  """The number of hosts of the Cloud TPU VM that this is; 1 on any other machine.

  Only a TPU VM's metadata server knows. JAX, when it is imported, sets TPU_ML_PLATFORM where it
  finds a TPU and TPU_SKIP_MDS_QUERY where it finds none: no other machine is asked for metadata.

  Raises `UserError` where the server does not answer: alone, a host of several would wait for the
  others for ever.
  """
  here = "TPU_ML_PLATFORM" in environment and "TPU_SKIP_MDS_QUERY" not in environment
  platforms = environment.get("JAX_PLATFORMS") or "tpu"
  if not here or "tpu" not in platforms.split(",") or any(map(environment.get, _TOLD)):
    return 1
  hosts = _metadata("worker-network-endpoints", environment)
  if hosts is None:  # A virtual machine with a TPU, but of no slice.
    return 1
  slices = environment.get("MEGASCALE_NUM_SLICES")
  if slices is None:
    described = _metadata("tpu-env", environment) or ""
    found = re.search(r"^\s*MEGASCALE_NUM_SLICES:\s*'?(\d+)", described, re.MULTILINE)
    slices = found[1] if found else ""
  return _count(hosts) * (_number(slices) or 1)


def _metadata(name: str, environment: Mapping[str, str]) -> str | None:
  """An attribute of this virtual machine; None if it has none of that name.

  Raises `UserError` where the metadata server does not answer for `METADATA_PATIENCE`.
  """
  server = environment.get("GCE_METADATA_IP", "metadata.google.internal")  # As JAX asks.
  request = urllib.request.Request(
    f"http://{server}/computeMetadata/v1/instance/attributes/{name}",
    headers={"Metadata-Flavor": "Google"},
  )
  direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
  end = time.monotonic() + METADATA_PATIENCE
  while True:
    try:
      with direct.open(request, timeout=5) as answer:
        return answer.read().decode()
    except urllib.error.HTTPError as error:
      if error.code == 404:
        return None
      why = str(error)
    except (OSError, http.client.HTTPException) as error:
      why = str(error) or type(error).__name__
    if time.monotonic() > end:
      raise UserError(
        f"This host has a TPU, but its metadata server {server} does not say how many hosts the slice"
        f" has ({why}); pass --distributed=on if there are several, --distributed=off to train alone"
      )
    time.sleep(0.5)


def _count(text: str) -> int:
  """Of processes, given as a number or as a list of hosts; 1 where it is neither."""
  return text.count(",") + 1 if "," in text else _number(text) or 1


def _number(text: str) -> int | None:
  return int(text) if text.isascii() and text.isdigit() else None


def _check(coordinator: str | None, count: int | None, index: int | None, found: bool) -> None:
  """Raises `UserError` where the options do not make a place; `found`: a launcher's is known."""
  if count == 1 and not index:
    return
  given = {"--coordinator": coordinator, "--num_processes": count, "--process_id": index}
  missing = [name for name, value in given.items() if value is None]
  if found:  # JAX finds the address.
    missing = [name for name in missing if name != "--coordinator"]
  if missing:
    raise UserError(
      f"{' and '.join(name for name in given if given[name] is not None)} needs"
      f" {' and '.join(missing)} as well; expected --coordinator=HOST:PORT --num_processes=N"
      " --process_id=I, or --distributed=off to train alone"
    )
  assert count is not None and index is not None
  if index >= count:
    raise UserError(f"--process_id={index} with --num_processes={count}; expected 0 to {count - 1}")
  port = (coordinator or ":1").rpartition(":")
  if coordinator and not (port[0] and 0 < (_number(port[2]) or 0) < 2**16):
    raise UserError(f"--coordinator={coordinator}; expected HOST:PORT, for example 10.0.0.1:8476")


def join(here: Place, timeout: int) -> None:
  """Starts `jax.distributed`; ends the process by exit code 2 where others do not come.

  Raises `UserError` where it cannot be started.
  """

  def give_up():
    count = here.count or "the cluster's"
    why = (
      f"Not all of {count} processes joined within --join_timeout={timeout} s.\n"
      "  Run the same command on every host (gcloud ... ssh --worker=all, srun, or by hand with\n"
      "  its own --process_id, from 0). If all of them run, they cannot reach"
      f" {here.coordinator or 'host 0'}:\n  open its port, or pass another --coordinator."
    )
    print(why, file=sys.stderr, flush=True)
    os._exit(UserError.code)  # JAX would abort the process, with a stack trace, a while later.

  patience = threading.Timer(min(timeout, threading.TIMEOUT_MAX), give_up)
  patience.daemon = True
  patience.start()
  try:
    jax.distributed.initialize(
      here.coordinator,
      here.count,
      here.index,
      local_device_ids=[] if here.all_devices else None,
      initialization_timeout=timeout + 60,
      shutdown_timeout_seconds=24 * 3600,  # At the end process 0 may certify while others wait.
    )
  except Exception as error:  # Of whatever cluster JAX has recognised.
    reason = (str(error).splitlines() or [repr(error)])[0]
    raise UserError(
      f"This process cannot join others: {reason}\n"
      "  expected --coordinator=HOST:PORT --num_processes=N --process_id=I, or --distributed=off"
      " to train alone"
    ) from error
  finally:
    patience.cancel()
  if here.count != 1:
    _end_as_lost_when_aborted()


def _end_as_lost_when_aborted() -> None:
  """From now on an abort of this process ends it as `Lost` does.

  JAX aborts a process by itself where it cannot reach process 0, or has not heard of another for
  100 s, and may do so before a collective fails. No exception tells, and what it could call instead
  (missed_heartbeat_callback) cannot be a function of Python (jaxlib 0.10: std::bad_cast). The
  handler needs the interpreter's lock: it waits while another thread holds that in C.
  """
  ctypes.CDLL(None).signal(signal.SIGABRT, _aborted)


_ABORTED = (
  b"\nThis process was aborted, most likely by JAX because another process is gone or cannot be reached;"
  b" the message above says more.\n"
  b"  Run the same command on every host to resume from the newest checkpoint. If that ends in the"
  b" same way, the cause is another one.\n"
)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _aborted(_: int) -> None:
  os.write(2, _ABORTED)
  os._exit(Lost.code)
