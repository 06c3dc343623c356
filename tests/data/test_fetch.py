"""Data sets in a bucket, on a server of this machine, copied to a disk."""

import fcntl
import os
import pathlib
import shutil

import pytest

from convex_jax import buckets, files
from convex_jax.data import command, datasets, fetch
from convex_jax.errors import UserError
from tests.support import of

SPLITS = ("digits-train.array_record-00000-of-00001", "digits-test.array_record-00000-of-00001")


@pytest.fixture
def source(bucket, data_dir, tmp_path):
  """The address of a folder of data sets: of digits."""
  address = bucket.address(f"data/{tmp_path.name}")
  folder = pathlib.Path(data_dir, "digits", "1.0.0")
  for path in folder.iterdir():
    buckets.write(f"{address}/digits/1.0.0/{path.name}", path.read_bytes())
  return address


@pytest.fixture
def fetched(monkeypatch):
  """The files that are fetched, in order."""
  done, pieces = [], buckets.pieces
  monkeypatch.setattr(buckets, "pieces", lambda path: done.append(path) or pieces(path))
  return done


def prepare(source, folder):
  return command.main(["prepare", "digits", f"--from={source}", f"--data_dir={folder}"])


def test_it_is_copied_once_and_read(source, tmp_path, fetched, capsys):
  folder = tmp_path / "data"
  assert prepare(source, folder) == 0
  out, err = capsys.readouterr()
  assert out == f"copied digits to {folder}/digits/1.0.0\n"
  assert f"Copying {source}/digits/1.0.0 (0.6 MB) to {folder}/digits/1.0.0" in err
  assert command.main(["check", "digits", f"--data_dir={folder}"]) == 0
  count = len(fetched)
  assert count == 4 and prepare(source, folder) == 0 and len(fetched) == count
  assert "Copying" not in capsys.readouterr().err


def test_a_copy_that_was_interrupted_goes_on(source, tmp_path, fetched, monkeypatch, capsys):
  folder, pieces = tmp_path / "data", buckets.pieces

  def failing(path):
    yield from [] if path.endswith(SPLITS[0]) else pieces(path)
    if path.endswith(SPLITS[0]):
      yield b"half"
      raise OSError(5, "the bucket cannot be reached", path)

  with monkeypatch.context() as patch:
    patch.setattr(buckets, "pieces", failing)
    patch.setattr(fetch, "AT_ONCE", 1)
    assert prepare(source, folder) == 2
  assert "the bucket cannot be reached\n  The same command goes on" in capsys.readouterr().err
  assert not (folder / "digits" / "1.0.0").exists()  # Nothing reads half a data set.
  before = set(fetched)
  fetched.clear()
  assert prepare(source, folder) == 0
  assert f"{source}/digits/1.0.0/{SPLITS[0]}" in fetched and not before & {*fetched} - {
    f"{source}/digits/1.0.0/{SPLITS[0]}"
  }


def test_files_of_an_earlier_version_do_not_become_part_of_it(source, tmp_path):
  folder = tmp_path / "data" / "digits"
  stale = folder / "1.0.0.partial" / "old" / "x"
  stale.parent.mkdir(parents=True)
  stale.write_text("old")
  assert prepare(source, tmp_path / "data") == 0
  assert (
    files.listing(f"{folder}/1.0.0").keys() == buckets.described(f"{source}/digits/1.0.0").keys()
  )


def test_a_complete_copy_needs_no_lock(source, tmp_path, monkeypatch):
  """It may be on a disk that is read-only."""
  folder = tmp_path / "data"

  def refuses(*_):
    raise OSError(95, "Operation not supported")

  monkeypatch.setattr(fcntl, "flock", refuses)
  assert prepare(source, folder) == 0
  (lock,) = (folder / "digits").glob("*.lock")
  lock.unlink()
  assert prepare(source, folder) == 0 and not lock.exists()


def test_archives_are_no_part_of_a_copy(source, tmp_path, capsys):
  line = ["prepare", "digits", f"--from={source}", f"--data_dir={tmp_path}", "--manual_dir=/tmp"]
  assert command.main(line) == 2 and "expected one of the two" in capsys.readouterr().err


def test_what_is_damaged_on_the_way_is_no_copy(source, tmp_path, monkeypatch, capsys):
  pieces = buckets.pieces
  monkeypatch.setattr(buckets, "pieces", lambda path: (p[:-1] + b"?" for p in pieces(path)))
  assert prepare(source, tmp_path / "data") == 2
  assert "it was damaged on the way" in capsys.readouterr().err
  assert not (tmp_path / "data" / "digits" / "1.0.0").exists()


def test_another_data_set_of_that_name_is_left_alone(source, tmp_path, data_dir, capsys):
  folder = tmp_path / "data"
  shutil.copytree(data_dir, folder)
  path = folder / "digits" / "1.0.0" / SPLITS[1]
  path.write_bytes(path.read_bytes()[:-1])
  assert prepare(source, folder) == 2
  assert f"{path} is not as in {source}/digits/1.0.0" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("place", "words"),
  [
    ("gs://bucket/nothing/here", "Data set 'digits' is not in gs://bucket/nothing/here"),
    ("gs://nobody/data", "there is no bucket gs://nobody"),
    ("/tmp", "--from=/tmp; expected gs://BUCKET/FOLDER"),
  ],
)
def test_where_there_is_none_it_is_told(bucket, tmp_path, place, words, capsys):
  assert prepare(place, tmp_path) == 2
  assert words in capsys.readouterr().err


@pytest.mark.parametrize(
  "name", ["../../../x", "/tmp/x", "a/../x", "a//x", "./x", "..", "a\\..\\x", "a\0x"]
)
def test_a_name_that_leads_elsewhere_is_refused_before_anything_is_copied(
  tmp_path, monkeypatch, capsys, name
):
  """Whoever owns the bucket chooses the names."""
  folder, written = tmp_path / "data", []
  monkeypatch.setattr(buckets, "described", lambda _: {"ok": (1, ""), name: (1, "")})
  monkeypatch.setattr(buckets, "pieces", lambda path: written.append(path) or iter([b"1"]))
  assert prepare("gs://foreign/data", folder) == 2
  assert f"has an object named {name!r}" in capsys.readouterr().err
  assert not written and not folder.exists()


def test_no_room_is_told_before_anything_is_copied(source, tmp_path, monkeypatch, capsys):
  usage = shutil.disk_usage(tmp_path)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
  assert prepare(source, tmp_path) == 2
  assert "0.0 GB free, and" in capsys.readouterr().err


def test_a_small_one_is_copied_at_the_start_of_a_run(
  source, tiny_config, tmp_path, monkeypatch, digits, capsys
):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  config = of(tiny_config, data__dir=source).data
  for _ in range(2):
    found = datasets.load(config, seed=0, progress=False)
    assert (found.train.images == digits.train.images).all()
  where = pathlib.Path(files.cache_folder(), "data", source.removeprefix("gs://"))
  err = capsys.readouterr().err
  assert err.count(f"Copying {source}/digits/1.0.0 (0.6 MB) to {where}/digits/1.0.0\n") == 1
  assert os.path.isdir(where / "digits" / "1.0.0")


def test_a_large_one_is_not(source, tiny_config, monkeypatch, fetched):
  monkeypatch.setattr(fetch, "SMALL", 10**5)
  words = rf"has 0\.0 GB, and a run copies .* data prepare digits --from={source} --data_dir=FOLDER"
  with pytest.raises(UserError, match=rf"(?s){words}"):
    datasets.load(of(tiny_config, data__dir=source).data, seed=0)
  assert not fetched


@pytest.mark.parametrize(
  ("command_line", "option"),
  [
    ("list", "--data_dir=gs://bucket/x"),
    ("prepare digits", "--data_dir=gs://bucket/x"),
    ("prepare imagenet2012", "--manual_dir=gs://bucket/x"),
    ("convert digits --to=x", "--data_dir=gs://bucket/x"),
    ("convert digits", "--to=gs://bucket/x"),
    ("cache imagenet2012 --image_size=16", "--to=gs://bucket/x"),
  ],
)
def test_commands_that_need_a_disk_say_so(command_line, option, capsys):
  assert command.main([*command_line.split(), option]) == 2
  assert capsys.readouterr().err == f"{option} is a URL; expected a path of this machine\n"
