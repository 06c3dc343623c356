"""Objects in a bucket, on a server of this machine: names, conditions, locks, errors."""

import json
import os
import re
import subprocess
import sys
import time

import pytest

from convex_jax import __main__, bucket_locks, buckets, files
from convex_jax.errors import Unsaved, UserError
from convex_jax.runs import checkpoint_command, checkpoints, manifest, metrics_file
from convex_jax.runs.run import load
from convex_jax.runs.workdir import Workdir
from tests.support import ROOT
from tests.support.bucket import Network


@pytest.mark.parametrize(
  ("given", "used"),
  [
    ("gs://bucket/runs/x", "gs://bucket/runs/x"),
    ("gs://bucket/runs/x/", "gs://bucket/runs/x"),
    ("gs://bucket//runs/./x", "gs://bucket/runs/x"),
    ("gs://my-bucket.1_a/x y/ü", "gs://my-bucket.1_a/x y/ü"),
    ("./gs:/x", "./gs:/x"),  # A folder of this machine.
  ],
)
def test_an_address_has_one_form(given, used):
  assert files.expand(given) == used


@pytest.mark.parametrize(
  "given",
  [
    "gs:/",
    "gs://",
    "gs://b",
    "gs://bucket",
    "gs://bucket/",
    "gs:/bucket/x",
    "gs:///x",
    "GS://bucket/x",
    "gs://Bucket/x",
    "gs://-bucket/x",
    "gs://bucket/../x",
    "gs://bucket/a/../../x",
    "gs://bucket/x#1",
    "gs://bucket/*",
    "gs://bucket/x?y",
    "gs://bucket/x[0]",
    "gs://my bucket/x",
    "gs://bucket/x\ny",
  ],
)
def test_what_looks_like_an_address_is_refused(given):
  with pytest.raises(UserError, match="expected gs://BUCKET/FOLDER"):
    files.expand(given)


@pytest.mark.parametrize("url", ["s3://b/x", "https://host/x", "gcs://bucket/x", "file:///x"])
def test_other_storage_is_refused(url):
  with pytest.raises(UserError, match="is a URL; expected a path of this machine, or gs://"):
    load(url)


@pytest.mark.parametrize(
  ("command", "option"),
  [
    ("train", "--config=gs://bucket/config.py"),
    ("evaluate --config=configs/mixer_ioc.py:digits", "--config.init_from=gs://bucket/w.npz"),
    ("report x", "--out=gs://bucket/x"),
    ("sweep experiments/mlp", "--workdir=gs://bucket/x"),
    ("sweep experiments/mlp --workdir=x", "--out=gs://bucket/x"),
  ],
)
def test_what_is_not_read_or_written_in_a_bucket_is_refused(command, option, capsys):
  assert __main__.main([*command.split(), option]) == 2
  assert capsys.readouterr().err == f"{option} is a URL; expected a path of this machine\n"


def test_without_the_extra_one_sentence_says_what_to_install(monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, "google.auth.exceptions", None)
  buckets._client.cache_clear()
  try:
    assert checkpoint_command.main(["verify", "gs://bucket/x"]) == 2
  finally:
    buckets._client.cache_clear()
  said = "gs:// addresses need an extra: pip install 'convex_jax[gcs]'\n"
  assert capsys.readouterr() == ("", said)


@pytest.fixture
def folder(bucket, request):
  """An address that no other test uses."""
  return bucket.address(re.sub(r"\W", "_", request.node.name))


def test_files_and_folders_of_a_bucket(folder):
  assert not files.exists(folder) and files.listing(folder) == {} and files.folders(folder) == []
  with files.atomic_write(f"{folder}/a/b/c.bin", "wb") as file:
    file.write(b"123")
  with files.atomic_write(f"{folder}/ab") as file:
    file.write("ü\n")
  assert files.listing(folder) == {"a/b/c.bin": 3, "ab": 3}
  assert files.folders(folder) == ["a"]
  assert files.is_file(f"{folder}/ab") and not files.is_file(f"{folder}/a")
  assert not files.exists(f"{folder}/a/b/c") and files.exists(f"{folder}/a/b")
  assert files.read(f"{folder}/ab") == "ü\n".encode()
  files.move_tree(f"{folder}/a", f"{folder}/damaged/a")
  assert files.listing(folder) == {"damaged/a/b/c.bin": 3, "ab": 3}


def test_a_write_that_fails_leaves_what_was_there(folder):
  files.write_json(f"{folder}/a.json", {"a": 1})

  def fails():
    with files.atomic_write(f"{folder}/a.json") as file:
      file.write("half")
      raise RuntimeError

  with pytest.raises(RuntimeError):
    fails()
  assert files.read_json(f"{folder}/a.json") == {"a": 1} and list(files.listing(folder)) == [
    "a.json"
  ]


def test_of_two_writers_one_wins(folder):
  files.write_json(f"{folder}/a.json", {"a": 1}, new=True)
  with pytest.raises(Unsaved, match="another process wrote it"):
    files.write_json(f"{folder}/a.json", {"a": 2}, new=True)
  assert files.read_json(f"{folder}/a.json") == {"a": 1}


@pytest.fixture
def network(bucket, monkeypatch):
  """A network between; `fault` is to be set."""
  with Network(bucket.url, lambda method, path: "") as net:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", net.url)
    buckets._client.cache_clear()
    yield net
  buckets._client.cache_clear()


def test_a_write_whose_answer_is_lost_knows_its_own_work(network, folder):
  faults = ["lost"]
  network.fault = lambda method, path: faults.pop() if method == "POST" and faults else ""
  files.write_json(f"{folder}/a.json", {"a": 1}, new=True)
  assert network.done["lost"] == 1 and files.read_json(f"{folder}/a.json") == {"a": 1}


@pytest.mark.parametrize("fault", ["503", "429", "reset", "cut", "lost"])
def test_what_fails_once_is_repeated(network, folder, fault):
  for method, action in (
    ("POST", lambda: files.write_json(f"{folder}/a.json", {"a": 1})),
    ("GET", lambda: files.read_json(f"{folder}/a.json")),
  ):
    faults = [fault]
    network.fault = lambda m, path: faults.pop() if m == method and faults else ""
    action()
    assert not faults


@pytest.mark.parametrize(
  ("status", "words"),
  [
    ("401", "no valid credentials .*gcloud auth application-default login"),
    ("403", r"permission denied .*roles/storage\.objectUser"),
    ("404", "there is no bucket gs://bucket; .*gcloud storage buckets create gs://bucket"),
  ],
)
def test_what_is_wrong_with_a_bucket_is_told(network, folder, status, words, capsys):
  network.fault = lambda *_: status
  assert checkpoint_command.main(["verify", folder]) == 2
  out, err = capsys.readouterr()
  assert not out and err.startswith("gs://bucket/") and len(err.splitlines()) == 1
  with pytest.raises(UserError, match=words):
    load(folder)


@pytest.mark.parametrize("fault", ["503", "reset"])
def test_a_bucket_that_cannot_be_reached_is_never_taken_for_an_empty_one(
  network, folder, fault, monkeypatch, capsys
):
  monkeypatch.setattr(buckets, "PATIENCE", 0.1)
  network.fault = lambda *_: fault
  for question in (files.exists, files.is_file, files.listing, files.folders):
    with pytest.raises(OSError, match="the bucket cannot be reached"):
      question(folder)
  assert checkpoint_command.main(["verify", folder]) == 2
  assert "the bucket cannot be reached" in capsys.readouterr().err


@pytest.mark.parametrize(
  "question",
  [
    lambda folder: manifest.quarantine_damaged(folder, f"{folder}/damaged"),
    lambda folder: manifest.fault(f"{folder}/2", 2),
    lambda folder: manifest.saved_steps(folder),
    lambda folder: checkpoints.has_averages(folder, 2),
  ],
)
def test_a_manifest_out_of_reach_is_not_a_damaged_one(network, folder, monkeypatch, question):
  monkeypatch.setattr(buckets, "PATIENCE", 0.1)
  for step in (1, 2):
    buckets.write(f"{folder}/{step}/ema/a", b"1")
    manifest.seal(f"{folder}/{step}", step, 0.5)
  # Names are told, contents are not.
  network.fault = lambda _, path: "503" if "2%2Fmanifest.json?alt=media" in path else ""
  with pytest.raises((OSError, UserError), match="the bucket cannot be reached"):
    question(folder)
  network.fault = lambda *_: ""
  assert manifest.saved_steps(folder) == {1: 0.5, 2: 0.5}
  assert checkpoints.has_averages(folder, 2)


def test_weights_out_of_reach_are_not_another_optimizers(network, folder, monkeypatch):
  monkeypatch.setattr(buckets, "PATIENCE", 0.1)
  buckets.write(f"{folder}/1/training/a", b"1")
  manifest.seal(f"{folder}/1", 1, None)

  def fails(*_, **__):
    network.fault = lambda *_: "503"
    raise RuntimeError("whatever a client raises")

  monkeypatch.setattr(checkpoints.ocp, "load", fails)
  monkeypatch.setattr(checkpoints.ocp, "metadata", fails)
  with pytest.raises(OSError, match="the bucket cannot be read: whatever"):
    checkpoints.read_weights(folder, 1, "raw")
  with pytest.raises(OSError, match="the bucket cannot be reached"):
    checkpoints.read_training(folder, 1, {})


@pytest.mark.parametrize("status", ["401", "403"])
def test_rows_that_a_lost_role_keeps_back_do_not_replace_how_a_run_ends(network, folder, status):
  rows = metrics_file.MetricsFile(workdir := Workdir(folder), 0)
  rows.append({"step": 1, "kind": "train"})
  network.fault = lambda *_: status
  with pytest.raises(Unsaved):
    workdir.publish()
  assert folder in rows.close()


# Locks.


@pytest.fixture
def hasty(monkeypatch):
  monkeypatch.setattr(bucket_locks, "RENEW", 0.1)
  monkeypatch.setattr(bucket_locks, "STALE", 0.5)


def lock(folder):
  return bucket_locks.BucketLock(f"{folder}/.lock", f"{folder} is in use")


def test_a_lock_has_one_holder_and_is_free_afterwards(folder, hasty, capsys):
  for _ in range(2):
    with (
      lock(folder),
      pytest.raises(UserError, match=f"is in use \\(process {os.getpid()} on .*Wait until it ends"),
      lock(folder),
    ):
      pass
    assert files.listing(folder) == {}


def abandoned(folder, **changes):
  """The lock of a holder who is gone."""
  one = lock(folder)
  one._own |= changes
  one._take()
  return one


def test_a_lock_of_another_machine_is_taken_over_once_it_is_stale(folder, hasty, capsys):
  """By a clock of one's own: the times that it names are of another's."""
  other = abandoned(folder, holder="process 1 on far", process=["another boot", "pid", 1, 1])
  began = time.monotonic()
  with lock(folder):
    assert time.monotonic() - began >= bucket_locks.STALE
    assert "was last used by process 1 on far; waiting up to 0.5 s" in capsys.readouterr().err
    with pytest.raises(Unsaved, match="taken over by another process"):
      other.renew()
    other.__exit__()  # It does not take away what is no longer its own.
    assert list(files.listing(folder)) == [".lock"]


def test_a_lock_that_has_ended_is_held_no_longer(folder):
  with lock(folder) as held:
    held.renew()
  with pytest.raises(Unsaved, match="no longer"):
    held.renew()
  assert files.listing(folder) == {}


def test_a_process_that_this_user_cannot_see_is_not_gone(monkeypatch):
  """/proc with hidepid=2 shows nothing of another user's processes."""
  pid = os.getppid()
  content = json.dumps({"process": bucket_locks._identity(pid)}).encode()

  def hiding(path, *args):
    if path == f"/proc/{pid}/stat":
      raise FileNotFoundError(path)
    return open(path, *args)

  monkeypatch.setattr(bucket_locks, "open", hiding, raising=False)
  assert bucket_locks._identity(pid) is None and not bucket_locks._is_gone((0, content))


def test_a_lock_of_a_process_that_was_killed_here_is_free_at_once(folder, monkeypatch):
  program = f"from convex_jax.bucket_locks import BucketLock; BucketLock({folder + '/.lock'!r}, '')._take(); print(1, flush=True); input()"
  with subprocess.Popen(
    [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
  ) as other:
    assert other.stdout.readline()
    content = json.loads(files.read(f"{folder}/.lock"))
    assert not bucket_locks._is_gone((0, json.dumps(content).encode()))
    other.kill()
    other.wait()
  with lock(folder):  # Which would else wait for minutes.
    pass


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"process": 1}', b'{"process": [1]}'])
def test_a_lock_that_cannot_be_read_becomes_stale_as_well(folder, hasty, content):
  buckets.write(f"{folder}/.lock", content)
  with lock(folder) as held:
    assert json.loads(files.read(f"{folder}/.lock"))["claim"] == held._own["claim"]
  assert not files.exists(f"{folder}/.lock")


def test_of_two_who_take_over_one_gets_it(folder, hasty):
  other = abandoned(folder, process=None)
  generation = other._generation
  first, second = lock(folder), lock(folder)
  first._write(generation)
  with pytest.raises(FileExistsError):
    second._write(generation)


def test_a_lock_outlives_a_network_that_fails(network, folder, hasty, monkeypatch):
  monkeypatch.setattr(buckets, "PATIENCE", 0.1)
  with lock(folder) as held:
    network.fault = lambda *_: "503"
    while network.done["503"] < 3:
      time.sleep(0.01)
    network.fault = lambda *_: ""
    before = held._generation
    held.renew()
    assert held._generation != before
    assert json.loads(files.read(f"{folder}/.lock"))["claim"] == held._own["claim"]


def test_a_spool_brings_what_has_changed(bucket, folder, monkeypatch):
  spool = files.Spool(folder)
  (wrote, write) = ([], buckets.write)
  monkeypatch.setattr(
    buckets, "write", lambda path, content: wrote.append(path) or write(path, content)
  )
  buckets.write(f"{folder}/events.1", b"of an earlier start")
  buckets.write(f"{folder}/notes", b"of somebody else")
  for name in ("rows", "events.2", "profile/x"):
    path = os.path.join(spool.folder, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
      file.write(name)
  spool.upload("events.")
  assert set(files.listing(folder)) == {"rows", "events.2", "profile/x", "notes"}
  wrote.clear()
  with open(os.path.join(spool.folder, "rows"), "a") as file:
    file.write("more")
  spool.upload("events.")
  assert wrote == [f"{folder}/rows"] and files.read(f"{folder}/rows") == b"rowsmore"
