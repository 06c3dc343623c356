"""Which processes train together, by every launcher's variables, whole and in parts."""

import os
import subprocess
import sys

import jax
import pytest

from convex_jax import cluster
from convex_jax.cluster import Place
from convex_jax.errors import UserError
from tests.support import PATIENCE, ROOT
from tests.support.injections import free_port

SLURM = {
  "SLURM_JOB_ID": "1",
  "SLURM_NTASKS": "4",
  "SLURM_STEP_NUM_TASKS": "4",
  "SLURM_STEP_NODELIST": "node[1-4]",
  "SLURM_PROCID": "2",
  "SLURM_LOCALID": "0",
}
MPI = {
  "OMPI_COMM_WORLD_SIZE": "4",
  "OMPI_COMM_WORLD_RANK": "2",
  "OMPI_COMM_WORLD_LOCAL_RANK": "2",
  "OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp://10.0.0.1:43370",
}
TPU = {"TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "2"}
ALL = [SLURM, MPI, TPU]
FOUND = Place(None, 4, 2)
FLAGS = ("h:1", 2, 0)


@pytest.mark.parametrize("variables", ALL, ids=lambda v: next(iter(v)))
def test_a_whole_set_of_variables_means_together(variables):
  assert cluster.place("auto", environment=variables) == (FOUND, "")
  assert cluster.place("off", environment=variables) == (None, "")
  # An address that JAX could not reach is replaced, the rest stays.
  assert cluster.place("auto", "h:1", environment=variables) == (Place("h:1", 4, 2), "")


@pytest.mark.parametrize(
  "variables, gone",
  [(v, name) for v in ALL for name in v if name not in ("OMPI_MCA_orte_hnp_uri", "SLURM_STEP_NUM_TASKS")],
)  # fmt: skip
def test_a_set_that_lacks_one_means_alone_and_is_told(variables, gone):
  environment = {name: value for name, value in variables.items() if name != gone}
  here, note = cluster.place("auto", environment=environment)
  assert here is None
  of_count = gone in ("OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES")
  assert note == "" if of_count else gone in note and "trains alone" in note
  assert cluster.place("off", environment=environment) == (None, "")


@pytest.mark.parametrize(
  "environment",
  [
    {},
    {"SLURM_NTASKS": "1", "SLURM_JOB_ID": "1"},
    {"SLURM_NTASKS": "", "SLURM_JOB_ID": "1"},
    {"SLURM_NTASKS": "many", "SLURM_JOB_ID": "1"},
    {**SLURM, "SLURM_STEP_NUM_TASKS": "1"},  # A shell that salloc or srun --pty has opened.
    {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
    {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},
    {"TPU_WORKER_HOSTNAMES": ""},
    {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"},
  ],
  ids=str,
)
def test_one_process_is_alone_and_nothing_is_told(environment):
  assert cluster.place("auto", environment=environment) == (None, "")


@pytest.mark.parametrize("odd", ["x", "-1", "4", ""])
def test_a_number_that_is_none_counts_as_not_set(odd):
  here, note = cluster.place("auto", environment={**SLURM, "SLURM_PROCID": odd})
  assert here is None and "SLURM_PROCID" in note


def test_an_address_that_a_launcher_does_not_tell_is_asked_for():
  environment = {name: value for name, value in MPI.items() if "uri" not in name}
  with pytest.raises(UserError, match=r"pass --coordinator=HOST:PORT.*--distributed=off"):
    cluster.place("auto", environment=environment)


def test_one_process_on_each_host_has_all_of_its_devices(monkeypatch):
  """JAX alone would give it the first."""
  given = {}
  monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **more: given.update(more))
  monkeypatch.setattr(cluster, "_end_as_lost_when_aborted", lambda: None)
  for per_host, want in (("1(x4)", []), ("1", []), ("8(x4)", None), ("2,1", None)):
    here, _ = cluster.place("auto", environment={**SLURM, "SLURM_STEP_TASKS_PER_NODE": per_host})
    cluster.join(here, 1)
    assert given["local_device_ids"] == want


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_options_of_a_cluster_mean_on(mode):
  assert cluster.place(mode, *FLAGS, environment={}) == (Place(*FLAGS), "")
  variable = {"JAX_COORDINATOR_ADDRESS": "h:1"}
  assert cluster.place(mode, None, 2, 0, environment=variable) == (Place(*FLAGS), "")
  assert cluster.place("off", *FLAGS, environment={}) == (None, "")
  assert cluster.place(mode, None, 1, 0, environment={}) == (None, "")


@pytest.mark.parametrize(
  "options, words",
  [
    (("h:1", None, None), "--coordinator needs --num_processes and --process_id"),
    ((None, 2, None), "--num_processes needs --coordinator and --process_id"),
    ((None, None, 0), "--process_id needs --coordinator and --num_processes"),
    (("h:1", 2, None), "needs --process_id"),
    (("h:1", 2, 2), "--process_id=2 with --num_processes=2; expected 0 to 1"),
    (("h:1", 1, 1), "expected 0 to 0"),
    (("h", 2, 0), "expected HOST:PORT"),
    (("h:port", 2, 0), "expected HOST:PORT"),
    (("h:99999", 2, 0), "expected HOST:PORT"),
    ((":8476", 2, 0), "expected HOST:PORT"),
  ],
)
def test_options_that_do_not_fit_together_are_told(options, words):
  with pytest.raises(UserError, match=words):
    cluster.place("auto", *options, environment={})


def run(data_dir, workdir, *more, **env):
  args = ["--config=configs/mlp.py:digits", "--config.steps=2", "--config.batch_size=16"]
  args += [f"--config.data.dir={data_dir}", f"--workdir={workdir}", *more]
  clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "OMPI", "TPU"))}
  return subprocess.run(
    [sys.executable, "-m", "convex_jax.main", *args],
    cwd=ROOT,
    env={**clean, "JAX_PLATFORMS": "cpu", **env},
    capture_output=True,
    text=True,
    timeout=PATIENCE,
  )


def test_a_batch_script_without_srun_trains_alone_and_says_so(data_dir, tmp_path):
  """It gets as far as the devices, whose number does not suit it."""
  fsdp = "--config.fsdp=7"
  done = run(data_dir, tmp_path / "run", fsdp, SLURM_NTASKS="4", SLURM_JOB_ID="1")
  assert "Slurm tells of 4 processes" in done.stderr and "trains alone" in done.stderr
  assert "config.fsdp is 7" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
  "more, env",
  [
    (["--distributed=on"], {}),
    (["--distributed=on"], {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}),
    ([], TPU),  # On a machine that has none.
  ],
)
def test_what_cannot_join_says_so(data_dir, tmp_path, more, env):
  done = run(data_dir, tmp_path / "run", *more, **env)
  assert done.returncode == 2 and "--distributed=off" in done.stderr, done.stderr
  assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_options_alone_wait_for_the_others(data_dir, tmp_path):
  flags = [f"--coordinator=localhost:{free_port()}", "--num_processes=2", "--process_id=0"]
  done = run(data_dir, tmp_path / "run", *flags, "--join_timeout=3")
  assert done.returncode == 2 and "Not all of 2 processes joined" in done.stderr


def test_an_abort_by_jax_tells_of_a_lost_process():
  """As it does, at once, where process 0 is killed: LOG(FATAL), in a thread of its own."""
  program = f"""
import os, threading
from convex_jax import cluster
cluster.join(cluster.Place("localhost:{free_port()}", 1, 0), 60)
thread = threading.Thread(target=os.abort)
thread.start()
thread.join()
"""
  done = subprocess.run(
    [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
  )
  assert done.returncode == 75 and "the same command on every host to resume" in done.stderr
