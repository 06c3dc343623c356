"""Runs in a bucket, on a server of this machine; `experiments/faults` has more of each fault."""

import os
import random
import shutil
import sys

import numpy as np
import pytest

import convex_jax
from convex_jax import bucket_locks, buckets, files
from convex_jax.errors import Unsaved, UserError
from convex_jax.runs import certify_command, checkpoint_command, manifest
from convex_jax.runs.checkpoints import Checkpoints
from convex_jax.runs.workdir import Workdir
from convex_jax.studies import report
from convex_jax.training import loop
from tests.support import bucket_faults, injections, of
from tests.support.bucket import Network
from tests.support.running import run_main


@pytest.fixture(scope="module")
def settings(data_dir):
  """A run of 40 steps in a few seconds: checkpoints, evaluations, a profile."""
  from configs import mixer_ioc

  config = mixer_ioc.get_config("digits")
  changes = {"model__size": "tiny", "model__patch": 4, "data__dir": data_dir, "batch_size": 16}
  changes |= {"steps": 12, "ema_decay": 0.9, "log__every_steps": 2, "checkpoint__every_steps": 4}
  changes |= {"model__depth": 1}
  return of(config, **changes)


@pytest.fixture(scope="module")
def whole(bucket, settings, few_digits):
  """The address of a finished run."""
  address = bucket.address("runs/whole")
  loop.run(of(settings, log__profile_steps=(10, 99)), address, few_digits)
  return address


@pytest.fixture
def copied(bucket, whole, request):
  """The address of a copy of that run."""
  address = bucket.address(f"runs/{request.node.name}")
  shutil.copytree(bucket.file(whole), bucket.file(address))
  return address


def test_a_bucket_gets_what_a_folder_gets(bucket, whole, settings, few_digits, tmp_path):
  folder = tmp_path / "run"
  loop.run(of(settings, log__profile_steps=(10, 99)), str(folder), few_digits)
  fetched = bucket.fetch(whole, tmp_path / "fetched")
  assert injections.last_bits(fetched) == injections.last_bits(folder)
  assert injections.rows_without_clock(fetched) == injections.rows_without_clock(folder)
  told = [[event[:2] for event in injections.events(path)] for path in (fetched, folder)]
  assert told[0] == told[1] != []
  names = [
    {p.relative_to(path).parts[0].split(".1")[0] for p in path.iterdir()}
    for path in (fetched, folder)
  ]
  assert names[0] == names[1] - {".lock"}
  assert list((fetched / "profile").rglob("*.xplane.pb"))  # Of steps beyond the end as well.
  # Copied to a disk, it is a run as any other.
  assert convex_jax.load(fetched).step == 12
  assert checkpoint_command.main(["verify", str(fetched)]) == 0


def test_it_is_read_at_its_address(whole, tmp_path):
  run = convex_jax.load(whole)
  assert run.step == 12 and run.workdir == whole and convex_jax.load(whole, 8).step == 8
  assert run.certificate["verdict"] == "PROVED"
  assert [row["step"] for row in run.metrics("train")] == [2, 4, 6, 8, 10, 12]
  found = report.gather([whole])
  assert found.rows[0].certificate == "PROVED" and found.rows[0].test_accuracy > 0


def test_what_commands_write_goes_there(bucket, copied, capsys):
  os.remove(bucket.file(copied) / "certificate.json")
  assert certify_command.main([f"--workdir={copied}", "--search_steps=0"]) == 0
  assert convex_jax.load(copied).certificate["step"] == 12


def test_one_that_may_only_be_read_is_certified_all_the_same(bucket, copied, monkeypatch, capsys):
  with Network(bucket.url, lambda method, path: "" if method == "GET" else "403") as network:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", network.url)
    buckets._client.cache_clear()
    try:
      assert certify_command.main([f"--workdir={copied}", "--search_steps=0"]) == 0
    finally:
      buckets._client.cache_clear()
  out, err = capsys.readouterr()
  assert "PROVED" in out and "permission denied" in err and "the result above holds" in err


def damage(bucket, address):
  """A bit of the newest checkpoint, where the server keeps it."""
  newest = bucket.file(address) / "checkpoints" / "12"
  path = random.Random(0).choice(injections.files_of(newest))
  injections.flip_bit(path, random.Random(0))
  return path.relative_to(newest).as_posix()


def test_a_flipped_bit_is_found_named_and_walked_back_from(
  bucket, copied, settings, few_digits, capsys
):
  name = damage(bucket, copied)
  assert checkpoint_command.main(["verify", copied]) == 2
  assert f"step 12: {name} is damaged: its SHA-256 differs" in capsys.readouterr().out
  with pytest.raises(UserError, match=r"checkpoint 12 in .*intact ones: \[8\]"):
    convex_jax.load(copied)
  loop.run(settings, copied, few_digits)
  out = capsys.readouterr().out
  assert f"Checkpoint 12: {name} is damaged" in out and f"Moved to {copied}/damaged/12" in out
  assert f"Resumed {copied} at step 8 of 12" in out
  assert set(manifest.faults(f"{copied}/checkpoints").values()) == {None}
  assert files.listing(f"{copied}/damaged/12").keys() >= {name, manifest.NAME}
  assert [row["step"] for row in Workdir(copied).rows("train")] == [2, 4, 6, 8, 10, 12]
  assert len([n for n in files.listing(copied) if n.startswith("events")]) == 1


def test_a_run_without_an_intact_checkpoint_does_not_begin_anew(
  bucket, copied, settings, few_digits
):
  before = files.listing(copied)
  for step in ("8", "12"):
    os.remove(bucket.file(copied) / "checkpoints" / step / "commit_success.txt")
  with pytest.raises(
    UserError, match=r"(?s)No checkpoint in .* is intact:.*commit_success.txt is missing"
  ):
    loop.run(settings, copied, few_digits)
  assert len(files.listing(copied)) == len(before) - 2


def test_what_orbax_did_not_finish_is_no_checkpoint(bucket, copied, settings, few_digits, capsys):
  """What a kill inside a save leaves: objects, and no commit_success.txt."""
  there = bucket.file(copied) / "checkpoints"
  shutil.copytree(there / "12", there / "13")
  for name in ("manifest.json", "commit_success.txt"):
    os.remove(there / "13" / name)
  assert checkpoint_command.main(["verify", copied]) == 0
  assert convex_jax.load(copied).step == 12


def test_another_config_is_refused(whole, settings, few_digits):
  with pytest.raises(UserError, match=r"config\.seed: 0 there, 1 now"):
    loop.run(of(settings, seed=1), whole, few_digits)


def test_of_two_runs_one_is_refused(copied, settings, few_digits, monkeypatch):
  monkeypatch.setattr(bucket_locks, "RENEW", 0.1)
  with (
    bucket_locks.BucketLock(f"{copied}/.lock", ""),
    pytest.raises(UserError, match=rf"{copied} is in use by another run \(process {os.getpid()}"),
  ):
    loop.run(settings, copied, few_digits)
  loop.run(settings, copied, few_digits)


def test_a_run_that_was_taken_over_writes_no_checkpoint_any_more(
  bucket, settings, few_digits, monkeypatch
):
  address = bucket.address("runs/taken")
  save, first = Checkpoints.save, []

  def patched(ours, step, *args):
    if step == 8:
      ours.wait()
      held = files.read(f"{address}/.lock")
      first.append(held)
      buckets.write(f"{address}/.lock", held.replace(b'"claim": "', b'"claim": "other'))
    save(ours, step, *args)

  monkeypatch.setattr(Checkpoints, "save", patched)
  with pytest.raises(Unsaved, match=r"step 8 could not be written: gs://.* was taken over"):
    loop.run(settings, address, few_digits)
  assert first and list(manifest.saved_steps(f"{address}/checkpoints")) == [4]
  assert b'"other' in files.read(f"{address}/.lock")


@pytest.mark.slow
def test_weights_start_from_a_run_in_a_bucket(whole, settings, few_digits, tmp_path, capsys):
  loop.run(of(settings, init_from=whole, steps=2), str(tmp_path / "run"), few_digits)
  assert f"Weights from {whole}: step 12" in capsys.readouterr().out


def test_folders_that_a_mount_does_not_rename_are_told(settings, few_digits, tmp_path, monkeypatch):
  """As gcsfuse does in a flat bucket, by EMFILE."""
  rename = os.rename

  def refused(source, target, **kwargs):
    if os.path.isdir(source):
      raise OSError(24, "Too many open files", os.fspath(source), None, os.fspath(target))
    rename(source, target, **kwargs)

  monkeypatch.setattr(os, "rename", refused)
  words = r"(?s)Too many open files.*mounted by gcsfuse.*--workdir=gs://.*--rename-dir-limit"
  with pytest.raises(Unsaved, match=words):
    loop.run(settings, str(tmp_path / "run"), few_digits)


def test_a_bucket_that_stays_out_of_reach_is_told_at_each_save(tmp_path, monkeypatch):
  said, items = [], {"weights": {"a": np.zeros(2)}}
  ours = Checkpoints(str(tmp_path), 1, go_on=True, report=said.append)

  def fails(*_, **__):
    raise OSError(5, "the bucket cannot be read")

  with monkeypatch.context() as patch:
    patch.setattr(ours, "_open", fails)
    patch.setattr(ours._checkpointer, "save_checkpointables_async", fails)
    for step in (1, 2):
      ours.save(step, items, None)
  ours.save(3, items, None)
  ours.close()
  assert len(said) == 2 and all("could not be written: [Errno 5]" in line for line in said)
  assert list(manifest.saved_steps(str(tmp_path))) == [3]


@pytest.mark.parametrize(
  ("place", "words"),
  [
    ("gs://nobody/x", "there is no bucket gs://nobody"),
    ("gs://bucket", "names a whole bucket"),
    ("gs:/bucket/x", "is not an address in a bucket"),
    ("s3://bucket/x", "is a URL; expected a path of this machine, or gs://BUCKET/FOLDER"),
  ],
)
def test_an_address_that_is_none_is_refused_at_once(bucket, settings, place, words):
  with pytest.raises(UserError, match=words):
    loop.run(settings, place)


def test_a_report_and_a_sweep_are_written_to_a_disk(bucket, whole, capsys):
  assert report.main([whole, f"--out={bucket.address('report')}"]) == 2
  assert "is a URL; expected a path of this machine" in capsys.readouterr().err


# In processes of their own.


@pytest.mark.slow
def test_a_kill_inside_a_save_is_resumed_to_the_same_bits(bucket, data_dir, tmp_path):
  assert bucket_faults.killed_while_saving(bucket, data_dir, tmp_path, 3).all_survived


@pytest.mark.slow
def test_a_network_that_fails_in_every_way_changes_no_bit(bucket, data_dir, tmp_path):
  """All in one run; experiments/faults has a run for each."""
  result = bucket_faults.bad_network(bucket, data_dir, tmp_path, 1, (bucket_faults.FAULTS,))
  assert result.all_survived, result.note


@pytest.mark.slow
def test_a_network_that_is_gone_ends_a_run_in_bounded_time(bucket, data_dir, tmp_path):
  assert bucket_faults.no_network(bucket, data_dir, tmp_path, 1).all_survived


@pytest.mark.slow
def test_what_happens_to_one_of_two_hosts_changes_no_bit(bucket, data_dir, tmp_path):
  """One of four, and the other faults, in experiments/faults."""
  faults = "killed", "late"
  result = bucket_faults.one_of_several(bucket, data_dir, tmp_path, len(faults), 2, faults)
  assert result.all_survived, result.note


@pytest.mark.slow
def test_a_second_run_is_refused_and_the_first_goes_on(bucket, data_dir, tmp_path):
  assert bucket_faults.two_writers(bucket, data_dir, tmp_path, 1).all_survived


@pytest.mark.slow
def test_another_process_loads_it(bucket, whole):
  """As a user's does, from an address in its arguments."""
  program = "import sys, convex_jax; print(convex_jax.load(sys.argv[1]).step)"
  done = run_main(sys.executable, "-c", program, whole)
  assert (done.returncode, done.stdout) == (0, "12\n"), done.stderr


@pytest.mark.slow
def test_nobody_but_this_machine_is_contacted(bucket, data_dir, tmp_path):
  if shutil.which("strace") is None:
    pytest.skip("needs strace")
  trace = tmp_path / "trace"
  run = bucket_faults.BucketRun(bucket, data_dir, tmp_path / "run", 8)
  command = ["strace", "-f", "-qq", "-e", "trace=connect,sendto", "-o", str(trace), sys.executable]
  command += ["-m", "convex_jax.main", *run.arguments, f"--workdir={run.address}"]
  done = run_main(command)
  assert done.returncode == 0, done.stderr
  lines = [line for line in trace.read_text().splitlines() if "sa_family=AF_INET" in line]
  assert len(lines) > 5
  others = [line for line in lines if '"127.0.0.1"' not in line]
  assert not others, others[:3]
