"""Trains one network: `python -m convex_jax.main --config=configs/mixer_ioc.py`.

Flags and exit codes only; what happens is in `train.run`, where notebooks and tests can
import it. Exit codes: 0 done, 2 a mistake of the user's, 3 diverged, 74 a checkpoint could not
be written, 75 stopped and saved, or another process lost.
"""

import os
import re
import sys
import threading
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "Config file[:data set].", lock_config=True)
flags.DEFINE_string("workdir", None, "Folder of the run; default: runs/<config>_<data set>.")
flags.DEFINE_enum("distributed", "auto", ["auto", "on", "off"], "Start jax.distributed.")
flags.DEFINE_string("coordinator", None, "host:port of process 0, where no cluster tells it.")
flags.DEFINE_integer("num_processes", None, "Processes, where no cluster tells it.")
flags.DEFINE_integer("process_id", None, "This process, where no cluster tells it.")
flags.DEFINE_integer("join_timeout", 300, "Seconds to wait for the other processes.", 1)

# Set by schedulers whose clusters `jax.distributed.initialize()` knows by itself.
CLUSTERS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES")


def _in_cluster() -> bool:
  values = [os.environ.get(name, "") for name in CLUSTERS]
  return any("," in value or (value.isdigit() and int(value) > 1) for value in values)


def parse(argv: list[str]) -> list[str]:
  """Absl's parsing, but every mistake in the config is told at once, one line each."""
  sys.path.insert(0, os.getcwd())  # A config imports `configs.base` from where it is run.
  try:
    return FLAGS(argv)
  except Exception as error:
    print("\n".join(_config_mistakes(argv) or [str(error)]), file=sys.stderr)
    sys.exit(2)


def _config_mistakes(argv: list[str]) -> list[str]:
  """Tries each `--config.KEY=VALUE` alone; then checks the config that the good ones make."""
  from convex_jax import check

  file = [arg for arg in argv if re.match(r"--?config=", arg)][-1:]
  if not file:
    return []
  try:
    known = [path for path, _ in check.flatten(load_config(file))]
  except Exception as error:
    return [f"{file[0]} cannot be read: {error.__cause__ or error}"]
  good, lines = [], []
  for arg in argv:
    match = re.match(r"--?(?:no)?config\.([\w.]+)", arg)
    if not match:
      continue
    path = match[1]
    try:
      load_config([*file, arg])
      good.append(arg)
    except (AttributeError, KeyError):
      lines.append(f"config.{path} is no key{check.nearest(path, known)}")
    except Exception as error:
      rule = check.RULES.get(path)
      allowed = f"; allowed: {rule.allowed}" if rule else f": {error}"
      lines.append(f"{arg.lstrip('-')} does not fit{allowed}")
  if lines:
    lines += [f"config.{line}" for line in check.mistakes(load_config([*file, *good]))]
  return lines


def load_config(args: list[str]) -> Any:
  """The config that the arguments ["--config=FILE", "--config.KEY=VALUE", ...] make."""
  command = ["convex_jax", *args]
  values = flags.FlagValues()
  config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=command)
  values(command)
  return values["config"].value


def main(argv: list[str]) -> None:
  """Starts `jax.distributed` where asked, runs, and exits by the run's end."""
  from convex_jax import errors, startup

  startup.keep_compiled_programs()
  startup.tune_cpu()
  from convex_jax import checkpoint, train
  from convex_jax.check import check

  checkpoint.quieten_orbax()
  try:
    if len(argv) > 1:
      raise errors.Mistake(f"unknown arguments {argv[1:]}; flags begin with --")
    if FLAGS.config is None:
      raise errors.Mistake("--config is missing: --config=configs/mixer_ioc.py[:digits], say")
    if lines := _config_mistakes(sys.argv):
      raise errors.Mistake("\n".join(lines))  # A file that cannot be read: absl waits with it.
    check(FLAGS.config)
    if FLAGS.distributed == "on" or (FLAGS.distributed == "auto" and _in_cluster()):
      _join()
    train.run(FLAGS.config, FLAGS.workdir or _default_workdir())
  except errors.Ended as end:
    print(end, file=sys.stderr, flush=True)
    if end.at_once:
      os._exit(end.code)
    sys.exit(end.code)


def _join() -> None:
  """Starts `jax.distributed`; ends the process by exit code 2 where others do not come."""
  import jax

  def alone():
    count, came = FLAGS.num_processes or "the cluster's", _joined()
    here = f" ({came} did)" if came else ""
    print(
      f"not all of {count} processes joined within --join_timeout={FLAGS.join_timeout} s{here}\n"
      "  start the rest: the same command on every host (gcloud ... ssh --worker=all, srun, or"
      " by hand with its own --process_id, from 0)\n"
      f"  or they cannot reach {FLAGS.coordinator or 'host 0'}: open its port, or give another"
      " --coordinator",
      file=sys.stderr,
      flush=True,
    )
    os._exit(2)  # JAX would abort the process, with a stack trace, a while later.

  patience = threading.Timer(FLAGS.join_timeout, alone)
  patience.daemon = True
  patience.start()
  jax.distributed.initialize(
    FLAGS.coordinator,
    FLAGS.num_processes,
    FLAGS.process_id,
    initialization_timeout=FLAGS.join_timeout + 60,
  )
  patience.cancel()


def _joined() -> int | None:
  """How many processes are connected to the coordinator, if it is here: JAX tells nobody.

  From Linux's table of TCP connections: local address, remote address, state (1: established).
  """
  from jax._src import distributed

  address = FLAGS.coordinator or distributed.global_state.coordinator_address
  port, lines = (address or "").rpartition(":")[2], []
  if not port.isdigit():
    return None
  for path in ("/proc/net/tcp", "/proc/net/tcp6"):
    if os.path.exists(path):
      with open(path) as file:
        lines += [line.split() for line in file.readlines()[1:]]
  return (
    sum(int(x[1].rpartition(":")[2], 16) == int(port) and int(x[3], 16) == 1 for x in lines) or None
  )


def _default_workdir() -> str:
  file = config_flags.get_config_filename(FLAGS["config"]).split(":")[0]
  name = os.path.splitext(os.path.basename(file))[0]
  return os.path.join("runs", f"{name}_{FLAGS.config.data.name}")


if __name__ == "__main__":
  logging.set_verbosity(logging.ERROR)  # TFDS and Orbax talk at length below that.
  app.run(main, flags_parser=parse)
