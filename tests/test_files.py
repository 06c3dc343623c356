"""Atomic writes, signed JSON, locks; manifests and the damage they find."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from convex_jax import files
from convex_jax.errors import Unsaved, UserError
from convex_jax.runs import manifest, metrics_file
from convex_jax.runs.workdir import Workdir
from tests.support import ROOT, injections


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
  path = tmp_path / "a.json"
  files.write_json(str(path), {"a": 1})

  def fails():
    with files.atomic_write(str(path)) as file:
      file.write("half")
      raise RuntimeError

  with pytest.raises(RuntimeError):
    fails()
  assert files.read_json(str(path)) == {"a": 1} and os.listdir(tmp_path) == ["a.json"]


def test_text_is_utf_8_in_every_locale(tmp_path):
  program = "import sys; from convex_jax import files\n"
  program += "with files.atomic_write(sys.argv[1]) as file: file.write(chr(177))"
  env = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
  subprocess.run([sys.executable, "-c", program, tmp_path / "a"], cwd=ROOT, env=env, check=True)
  assert (tmp_path / "a").read_bytes() == "±".encode()


def test_a_write_that_the_disk_refuses_says_which_file_and_why(tmp_path):
  path = tmp_path / "absent" / "a.json"
  with pytest.raises(Unsaved, match=r"absent/a\.json could not be written: No such file"):
    files.write_json(str(path), {})


def test_json_knows_when_it_was_changed(tmp_path):
  path = tmp_path / "a.json"
  content = {"numbers": [1, 2.5, None], "words": {"ü": True}}
  files.write_json(str(path), content)
  assert files.read_json(str(path)) == content
  text = path.read_text()
  path.write_text(text.replace("2.5", "2.6"))
  with pytest.raises(files.Damaged, match="was changed after"):
    files.read_json(str(path))
  path.write_text(json.dumps(content))  # By hand, without a digest.
  with pytest.raises(files.Damaged):
    files.read_json(str(path))


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 10**5, "\xff", "nan"])
def test_a_file_that_is_not_a_json_object_is_damaged(tmp_path, text):
  (tmp_path / "a.json").write_bytes(text.encode("latin1"))
  with pytest.raises(files.Damaged):
    files.read_json(str(tmp_path / "a.json"))


def test_a_lock_has_one_holder_and_a_dead_process_releases_it(tmp_path):
  lock = str(tmp_path / ".lock")
  program = (
    "from convex_jax import files; import os, sys, time\n"
    f"with files.exclusive_lock({lock!r}, 'it is in use'):\n"
    "  print(os.getpid(), flush=True); time.sleep(60)"
  )
  with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE) as other:
    pid = int(other.stdout.readline())
    with (
      pytest.raises(UserError, match=f"it is in use \\(process {pid} on"),
      files.exclusive_lock(lock, "it is in use"),
    ):
      pass
    other.kill()
  with files.exclusive_lock(lock, "it is in use"):
    pass


@pytest.fixture
def sealed(tmp_path):
  folder = tmp_path / "20"
  (folder / "weights" / "d").mkdir(parents=True)
  rng = np.random.default_rng(0)
  for name in ("a", "weights/b", "weights/d/c"):
    (folder / name).write_bytes(rng.bytes(24))
  manifest.seal(str(folder), 20, 0.5)
  assert manifest.fault(str(folder), 20) is None
  return folder


def test_a_manifest_finds_any_flipped_bit(sealed):
  """Every bit of three small files, and every byte of the manifest itself."""
  for path in [p for p in sealed.rglob("*") if p.is_file()]:
    good = path.read_bytes()
    bits = range(8 * len(good)) if path.name != manifest.NAME else range(0, 8 * len(good), 8)
    for bit in bits:
      bad = bytearray(good)
      bad[bit // 8] ^= 1 << bit % 8
      path.write_bytes(bad)
      reason = manifest.fault(str(sealed), 20)
      assert reason and path.name in reason, (path, bit)
    path.write_bytes(good)
  assert manifest.fault(str(sealed), 20) is None


def swap(folder):
  a, b = folder / "a", folder / "weights" / "b"
  first, second = a.read_bytes(), b.read_bytes()
  a.write_bytes(second)
  b.write_bytes(first)


@pytest.mark.parametrize(
  "change,words",
  [
    (lambda f: (f / "weights" / "b").write_bytes(b"short"), "weights/b has 5 bytes instead of 24"),
    (lambda f: os.remove(f / "weights" / "d" / "c"), "weights/d/c is missing"),
    (swap, "a is damaged"),
    (lambda f: os.remove(f / manifest.NAME), "not finished"),
    (lambda f: (f / manifest.NAME).write_text("{}"), "manifest.json is damaged"),
  ],
)
def test_a_manifest_names_the_file(sealed, change, words):
  change(sealed)
  assert words in manifest.fault(str(sealed), 20)


def test_a_link_out_of_the_folder_is_never_followed(sealed, tmp_path):
  secret = tmp_path / "secret"
  shutil.copy(sealed / "a", secret)
  os.remove(sealed / "a")
  os.symlink(secret, sealed / "a")
  assert "a is not a regular file" in manifest.fault(str(sealed), 20)


def test_a_checkpoint_of_another_step_is_told(sealed):
  assert manifest.fault(str(sealed), 30) == "it is the checkpoint of step 20"


def test_a_newer_format_is_refused_and_not_called_damaged(sealed):
  path = str(sealed / manifest.NAME)
  files.write_json(path, files.read_json(path) | {"format": manifest.FORMAT + 1})
  with pytest.raises(UserError, match=r"expected 1\. Install that version"):
    manifest.fault(str(sealed), 20)


@pytest.mark.parametrize(
  "wrong", [{"files": []}, {"files": {}}, {"files": {"a": 3}}, {"files": None}, {"step": []}]
)
def test_a_forged_manifest_is_an_answer_not_a_crash(sealed, wrong):
  """Whoever can write the folder can sign: the digest is against damage, not against them."""
  path = str(sealed / manifest.NAME)
  files.write_json(path, files.read_json(path) | wrong)
  assert manifest.fault(str(sealed), 20)


# Rows.


def row(step, kind="train", **more):
  return {"step": step, "kind": kind, "time": 1e9 + step, **more}


def test_after_a_resume_rows_and_events_hold_every_step_once(tmp_path):
  first = metrics_file.MetricsFile(Workdir(str(tmp_path)), 0)
  for step in (2, 4, 6):
    first.append(row(step, loss=float(step)))
  del first  # Killed: nothing is closed.
  with open(tmp_path / "metrics.jsonl", "a") as file:
    file.write('{"step": 8, "ki')
  again = metrics_file.MetricsFile(Workdir(str(tmp_path)), 4)
  again.append(row(6, loss=6.0))
  assert again.close() is None and again.damaged == 0
  assert [r["step"] for r in Workdir(str(tmp_path)).rows()] == [2, 4, 6]
  want = [(step, "train", {"train/loss": float(step)}) for step in (2, 4, 6)]
  assert injections.events(tmp_path) == want


def test_damaged_lines_are_counted(tmp_path):
  lines = [json.dumps(row(2)), "garbage", "[]", '{"step": "x", "kind": 1}', json.dumps(row(4))]
  (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
  again = metrics_file.MetricsFile(Workdir(str(tmp_path)), 4)
  assert again.damaged == 3 and [r["step"] for r in Workdir(str(tmp_path)).rows()] == [2, 4]


def test_rows_that_cannot_be_written_wait(tmp_path, monkeypatch):
  ours = metrics_file.MetricsFile(Workdir(str(tmp_path)), 0)
  ours.append(row(1))
  monkeypatch.setattr(ours, "_file", str(tmp_path / "no" / "such"))
  assert "No such file" in ours.append(row(2)) and ours.append(row(3))
  monkeypatch.undo()
  assert ours.append(row(4)) is None and ours.close() is None
  assert [r["step"] for r in Workdir(str(tmp_path)).rows()] == [1, 2, 3, 4]


def test_events_that_could_not_be_written_come_with_the_close(tmp_path, monkeypatch):
  ours = metrics_file.MetricsFile(Workdir(str(tmp_path)), 0)

  def full(*_):
    raise OSError(28, "No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr(metrics_file, "_write_events", full)
    assert "No space left" in ours.append(row(1, loss=1.0))
  assert ours.close() is None
  assert injections.events(tmp_path) == [(1, "train", {"train/loss": 1.0})]
