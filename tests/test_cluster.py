"""Which processes train together, by every launcher's variables, whole and in parts."""

import http.server
import os
import subprocess
import sys
import threading

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


@pytest.mark.parametrize(
  "more, want",
  [
    ({"MEGASCALE_SLICE_ID": "1"}, (Place(None, 8, 6), "")),
    ({"MEGASCALE_SLICE_ID": "1", "TPU_WORKER_HOSTNAMES": "a", "TPU_WORKER_ID": "0"},
     (Place(None, 2, 1), "")),
    ({}, "MEGASCALE_SLICE_ID is not set, or out of range"),
    ({"MEGASCALE_SLICE_ID": "2"}, "MEGASCALE_SLICE_ID is not set, or out of range"),
    ({"MEGASCALE_NUM_SLICES": "1"}, (FOUND, "")),
  ],
)  # fmt: skip
def test_slices_of_a_pod_are_counted_together(more, want):
  found = cluster.place("auto", environment={**TPU, "MEGASCALE_NUM_SLICES": "2", **more})
  assert found == want or (found[0] is None and want in found[1])


HOSTS = "worker-network-endpoints"
VM = {"TPU_ML_PLATFORM": "JAX"}  # What JAX leaves in the environment of a TPU VM.


@pytest.fixture
def metadata():
  """(what a metadata server answers by name, the variables of a TPU VM that asks it, what it has
  been asked)."""
  answers, asked = {}, []

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      folder, _, name = self.path.rpartition("/")
      assert folder == "/computeMetadata/v1/instance/attributes"
      assert self.headers["Metadata-Flavor"] == "Google"
      asked.append(name)
      answer = answers.get(name, 404)
      answer = answer.pop(0) if isinstance(answer, list) else answer
      self.send_response(answer if isinstance(answer, int) else 200)
      self.end_headers()
      self.wfile.write(b"" if isinstance(answer, int) else answer.encode())

    def log_message(self, *_):
      pass

  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
    threading.Thread(target=server.serve_forever).start()
    yield answers, {**VM, "GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"}, asked
    server.shutdown()


@pytest.mark.parametrize(
  "answers, count",
  [
    ({HOSTS: "unknown:unknown:10.0.0.2,unknown:unknown:10.0.0.3"}, 2),
    ({HOSTS: "t1v-n-0,t1v-n-1,t1v-n-2,t1v-n-3"}, 4),
    ({HOSTS: "t1v-n-0"}, 1),
    ({HOSTS: "unknown:unknown:10.0.0.2"}, 1),
    ({}, 1),
    ({HOSTS: "a,b", "tpu-env": "ZONE: 'z'\nMEGASCALE_NUM_SLICES: '3'\nWORKER_ID: '0'\n"}, 6),
    ({HOSTS: "a", "tpu-env": "MEGASCALE_NUM_SLICES: '2'"}, 2),
    ({HOSTS: "a,b", "tpu-env": "ZONE: 'z'"}, 2),
    ({HOSTS: [503, 500, "a,b"]}, 2),  # A server that is busy is asked again.
  ],
  ids=str,
)
def test_a_tpu_vm_trains_with_the_hosts_of_its_slice(metadata, answers, count):
  known, environment, _ = metadata
  known |= answers
  want = Place(None, count) if count > 1 else None
  assert cluster.place("auto", environment=environment) == (want, "")


@pytest.mark.parametrize(
  "more, proxy",
  [
    ({"MEGASCALE_NUM_SLICES": "2"}, False),
    ({}, True),  # Of the metadata server no proxy knows.
  ],
)
def test_a_tpu_vm_asks_no_more_than_it_must(metadata, monkeypatch, more, proxy):
  known, environment, asked = metadata
  known |= {HOSTS: "a,b"}
  if proxy:
    for name in ("no_proxy", "NO_PROXY"):
      monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
  here, _ = cluster.place("auto", environment={**environment, **more})
  assert here == Place(None, 4 if more else 2)
  assert asked == ([HOSTS] if more else [HOSTS, "tpu-env"])


@pytest.mark.parametrize(
  "mode, options, environment",
  [
    ("auto", (), {}),
    ("auto", (), {"TPU_SKIP_MDS_QUERY": "1"}),  # What JAX sets where it finds no TPU.
    ("auto", (), {**VM, "TPU_SKIP_MDS_QUERY": "1"}),
    ("auto", (), {**VM, "JAX_PLATFORMS": "cpu"}),
    ("auto", (), {**VM, "TPU_WORKER_HOSTNAMES": "localhost"}),
    ("auto", (), {**VM, "TPU_PROCESS_BOUNDS": "1,1,1"}),  # A part of a host's chips.
    ("auto", (), {**VM, **SLURM}),
    ("auto", FLAGS, VM),
    ("on", (), VM),
    ("off", (), VM),
  ],
)
def test_no_other_machine_is_asked_for_metadata(metadata, mode, options, environment):
  known, where, asked = metadata
  known |= {HOSTS: "a,b"}
  where = {"GCE_METADATA_IP": where["GCE_METADATA_IP"]}
  cluster.place(mode, *options, environment={**where, **environment})
  assert not asked


@pytest.mark.skipif("TPU_SKIP_MDS_QUERY" not in os.environ, reason="this machine has a TPU")
def test_jax_says_where_there_is_no_tpu():
  """The variable that the above relies on."""
  code = "import os, jax; print(os.environ['TPU_SKIP_MDS_QUERY'], 'TPU_ML_PLATFORM' in os.environ)"
  clean = {k: v for k, v in os.environ.items() if not k.startswith("TPU")}
  done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True)
  assert done.stdout.split() == ["1", "False"], done.stderr


def test_a_tpu_vm_that_cannot_ask_says_so(monkeypatch):
  """Alone it would wait for the rest of its slice for ever."""
  monkeypatch.setattr(cluster, "METADATA_PATIENCE", 0.0)
  environment = {**VM, "GCE_METADATA_IP": f"127.0.0.1:{free_port()}"}
  with pytest.raises(UserError, match=r"Connection refused.*--distributed=on.*--distributed=off"):
    cluster.place("auto", environment=environment)


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
  program = """
import ctypes, threading
from convex_jax import cluster
cluster._end_as_lost_when_aborted()
thread = threading.Thread(target=ctypes.CDLL(None).abort)  # Which holds no lock of Python's.
thread.start()
thread.join()
"""
  done = subprocess.run(
    [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
  )
  assert done.returncode == 75 and "the same command on every host to resume" in done.stderr
