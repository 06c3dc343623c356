"""Which processes train together: the one place that reads the variables of launchers."""

import ctypes
import dataclasses
import os
import re
import signal
import sys
import threading
from collections.abc import Mapping

import jax

from convex_jax.errors import Lost, UserError


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
    UserError: options that do not fit together, or a launcher that does not tell enough.
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
    return None, ""
  if missing:
    return None, (
      f"{launcher.name} tells of {launched.count} processes, but {' and '.join(missing)} is not set:"
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
    if count > 1:
      index = _number(environment.get(launcher.index, ""))
      missing = [name for name in launcher.needed if not environment.get(name)]
      if index is None or index >= count:
        missing.append(launcher.index)
      alone = re.fullmatch(r"1(\(x\d+\))?", environment.get(launcher.per_host, ""))
      return launcher, Place(None, count, index, bool(alone)), missing
  return None, Place(), []


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
  _end_as_lost_when_aborted()


def _end_as_lost_when_aborted() -> None:
  """From now on an abort of this process ends it as `Lost` does.

  JAX aborts a process by itself where it cannot reach process 0, or has not heard of another for
  100 s, and may do so before a collective fails. No exception tells, and what it could call instead
  (missed_heartbeat_callback) cannot be a function of Python (jaxlib 0.10: std::bad_cast).
  """
  ctypes.CDLL(None).signal(signal.SIGABRT, _aborted)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _aborted(_: int) -> None:
  os.write(2, f"\n{Lost('see above what JAX says')}\n".encode())
  os._exit(Lost.code)
