"""Photographs: decoding, streams, caches; preparing ImageNet without TensorFlow."""

import functools
import io
import json
import os
import pathlib
import shutil
import signal
import struct
import subprocess
import sys
import time
import types

import jax
import numpy as np
import PIL.Image
import pytest

import convex_jax
from configs import base, mixer_ioc
from convex_jax import files, mesh
from convex_jax.data import catalog, command, datasets, prepare, sampling, tfrecord
from convex_jax.data.photos import cache, chunks, decode, stream, worker
from convex_jax.data.photos.records import Records, source_of
from convex_jax.errors import UserError
from convex_jax.training import loop, program
from tests.support import ROOT, SHARED_DATA, injections, of, photos
from tests.support.bad_input import children, lost_workers, streaming


def config_of(photo_dir, **changes):
  config = base.get_config().data
  small = {"name": "imagenet2012", "dir": photo_dir, "image_size": 16, "workers": 0}
  changes = {**small, "loader": "stream", **changes}
  return of(config, **changes)


# Decoding.


@pytest.mark.parametrize("kind", ["grey", "cmyk", "png", "tiny", "progressive"])
def test_odd_images_are_read_as_pillow_reads_them(kind):
  content = photos.odd(np.random.default_rng(0))[kind]
  image, state = decode.central_crop(content, 24, share=0.875)
  with PIL.Image.open(io.BytesIO(content)) as theirs:
    side = max(1, round(0.875 * min(theirs.size)))
    left, top = ((n - side) // 2 for n in theirs.size)
    part = theirs.convert("RGB").crop((left, top, left + side, top + side))
    want = np.asarray(part.resize((24, 24), PIL.Image.Resampling.BILINEAR), int)
  assert state == decode.FINE and image.shape == (24, 24, 3) and image.dtype == np.uint8
  assert np.abs(image - want).mean() < 1.5  # CMYK: two roundings.


COLOURS, ALPHA = {0: 1, 2: 3, 3: 1, 4: 1, 6: 3}, (4, 6)  # By colour type.


@pytest.mark.parametrize(
  "kind,depth",
  [
    *((0, depth) for depth in (1, 2, 4, 8, 16)),
    *((3, depth) for depth in (1, 2, 4, 8)),
    *((kind, depth) for kind in (2, 4, 6) for depth in (8, 16)),
  ],
)
def test_every_kind_of_png_is_scaled_to_8_bits(kind, depth):
  """By the arithmetic of its standard: v * 255 / (2^depth - 1); a palette's colours."""
  rng, most = np.random.default_rng(depth), 2**depth - 1
  values = rng.integers(0, most + 1, (24, 24, COLOURS[kind] + (kind in ALPHA)))
  values[0, 0], values[-1, -1] = 0, most
  palette = rng.integers(0, 256, (most + 1 if kind == 3 else 0, 3)).astype(np.uint8)
  extra = photos.chunk(b"PLTE", palette.tobytes()) if kind == 3 else b""
  extra += photos.chunk(b"tRNS", bytes(2 * COLOURS[kind])) if kind not in ALPHA else b""
  content = photos.png(values, depth, kind, extra)
  want = np.broadcast_to(values[..., : COLOURS[kind]] * 255 / most, (24, 24, 3))
  want = palette[values[..., 0]] if kind == 3 else want
  image, state = decode.central_crop(content, 24)
  off = 0 if depth < 16 else 0.5 if kind == 0 else 1  # Pillow cuts colours of 16 bits: v >> 8.
  assert state == decode.FINE and np.abs(image - want).max() <= off
  crop, state = decode.random_crop(content, np.random.default_rng(0), 24, (1.0, 1.0))
  np.testing.assert_array_equal(crop, image)
  channels = COLOURS[kind] if kind not in (3, 4) else 3 + (kind == 4)
  if kind < 4:  # Another number of channels is refused, not guessed.
    whole = decode.whole_image(content, (24, 24, channels))
    assert whole.dtype == np.uint8
    np.testing.assert_array_equal(np.broadcast_to(whole, (24, 24, 3)), image)
  else:
    with pytest.raises(decode.Unreadable, match="expected"):
      decode.whole_image(content, (24, 24, 5))


@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.uint16])
def test_other_formats_are_unreadable(dtype):
  content = photos.encoded(PIL.Image.fromarray(np.ones((9, 9), dtype)), "TIFF")
  with pytest.raises(decode.Unreadable):
    decode.central_crop(content, 8)


def test_a_damaged_image_is_told_and_its_good_part_kept():
  odd = photos.odd(np.random.default_rng(0))
  image, state = decode.central_crop(odd["cut"], 24)
  whole, _ = decode.central_crop(odd["png"], 24)
  assert state == decode.DAMAGED
  assert (
    np.abs(image[:6].astype(int) - whole[:6]).mean()
    < 6
    < np.abs(image[-6:].astype(int) - whole[-6:]).mean()
  )


@pytest.mark.parametrize("kind", ["garbage", "empty", "header"])
def test_what_is_no_image_is_refused(kind):
  content = photos.odd(np.random.default_rng(0))[kind]
  for crop in (decode.central_crop, functools.partial(decode.random_crop, area=(0.1, 1.0))):
    args = (24,) if crop is decode.central_crop else (np.random.default_rng(0), 24)
    with pytest.raises(decode.Unreadable):
      crop(content, *args)


def test_an_image_of_hostile_size_is_refused_by_its_header():
  content = bytearray(photos.encoded(photos.photo(np.random.default_rng(0), 8, 8)))
  at = content.index(b"\xff\xc0") + 5  # The frame header: height, width.
  content[at : at + 4] = b"\x7f\xff\x7f\xff"
  with pytest.raises(decode.Unreadable, match="32767 x 32767 px; expected at most"):
    decode.central_crop(bytes(content), 24)


def test_mutated_images_are_read_or_refused():
  """No crash, no other exception, with 1 to 19 of the first 600 bytes turned at random."""
  rng = np.random.default_rng(1)
  for content in photos.odd(rng).values():
    for _ in range(40 if content else 0):
      mutated = bytearray(content)
      for at in rng.integers(0, min(len(content), 600), rng.integers(1, 20)):
        mutated[at] = rng.integers(256)
      try:
        image, _ = decode.random_crop(bytes(mutated), rng, 8, (0.1, 1.0))
        assert image.shape == (8, 8, 3)
      except decode.Unreadable:
        pass


def test_inception_crops_have_the_shares_and_ratios_asked_for():
  rng = np.random.default_rng(0)
  crops = np.array([decode.inception_crop(rng, 300, 400, (0.2, 0.6)) for _ in range(500)])
  top, left, height, width = crops.T
  assert (top >= 0).all() and (left >= 0).all()
  assert (top + height <= 300).all() and (left + width <= 400).all()
  share, ratio = height * width / 120_000, width / height
  assert share.min() > 0.19 and share.max() < 0.61 and abs(share.mean() - 0.4) < 0.02
  assert ratio.min() > 0.74 and ratio.max() < 1.35
  assert decode.inception_crop(rng, 10, 1000, (1.0, 1.0)) == (0, 493, 10, 13)  # None fits.


def test_a_scaled_decoding_shows_the_crop_that_a_whole_one_shows():
  rng = np.random.default_rng(0)
  large = photos.photo(rng, 400, 500)
  content = photos.encoded(large, quality=95)
  for seed in range(5):
    image, _ = decode.random_crop(content, np.random.default_rng(seed), 20, (0.3, 1.0))
    box = decode.inception_crop(np.random.default_rng(seed), 400, 500, (0.3, 1.0))
    top, left, height, width = box

    def differs(shift, left=left, top=top, width=width, height=height, image=image):
      part = large.crop((left + shift, top, left + shift + width, top + height))
      want = np.asarray(part.resize((20, 20), PIL.Image.Resampling.BOX), int)
      return np.abs(image - want).mean()

    assert differs(0) < 3.5 < 5 < min(differs(-20), differs(20))


# Preparing.


def test_imagenet_is_prepared_without_tensorflow_from_its_archives(photo_dir):
  got = datasets.load(config_of(photo_dir), 0, progress=False)
  assert (len(got.train), len(got.test)) == (70, 11) and len(got.class_names) == 1000
  assert got.statistics == catalog.IMAGENET and got.train.image_shape == (16, 16, 3)
  labels = [got.train.read(i)["label"] for i in range(70)]
  assert sorted(labels) == [0] * 35 + [1] * 35


def test_archives_are_checked_before_any_work(tmp_path):
  folder, manual = tmp_path / "data", tmp_path / "manual"
  with pytest.raises(UserError, match=r"register.*img_train.tar \(147.9 GB\).*--manual_dir"):
    prepare.prepare("imagenet2012", str(folder))
  manual.mkdir()
  with pytest.raises(UserError, match=r"img_val.tar has 0 of 6,744,924,160 bytes"):
    prepare.prepare("imagenet2012", str(folder), str(manual))
  photos.write_archives(manual, 2, 1)
  with pytest.raises(UserError, match="bytes: resume or repeat"):
    prepare.prepare("imagenet2012", str(folder), str(manual))
  assert not folder.exists()


def test_an_archive_with_a_turned_bit_is_refused(tmp_path, monkeypatch):
  photos.write_archives(tmp_path, 2, 1)
  photos.official_archives.folder = tmp_path
  known = photos.official_archives(None)
  monkeypatch.setattr(prepare, "official_archives", lambda _: known)
  content = bytearray((tmp_path / "ILSVRC2012_img_val.tar").read_bytes())
  content[700] ^= 1
  (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(content)
  with pytest.raises(UserError, match=r"img_val.tar is not the official file"):
    prepare.prepare("imagenet2012", str(tmp_path / "data"), str(tmp_path))


def as_tfrecords(photo_dir, folder):
  """The photographs once more in TFRecord form, as TensorFlow frames records."""
  source = pathlib.Path(photo_dir) / "imagenet2012" / "5.1.0"
  target = folder / "imagenet2012" / "5.1.0"
  target.mkdir(parents=True)
  for name in ("train", "validation"):
    read = source_of(str(source), name).data_source
    content = b""
    for i in range(len(read)):
      head = struct.pack("<Q", len(read[i]))
      content += head + struct.pack("<I", tfrecord.masked(head))
      content += read[i] + struct.pack("<I", tfrecord.masked(read[i]))
    (target / f"imagenet2012-{name}.tfrecord-00000-of-00001").write_bytes(content)
  for name in ("features.json", "label.labels.txt"):
    shutil.copy(source / name, target)
  about = (source / "dataset_info.json").read_text().replace("array_record", "tfrecord")
  (target / "dataset_info.json").write_text(about)
  return target


def test_checksums_of_tfrecords_are_tensorflows():
  """Of an empty record and of the length 0, as TensorFlow 2.21 writes them."""
  assert (tfrecord.masked(b""), tfrecord.masked(bytes(8))) == (2726488792, 127402793)


def test_tfrecords_are_converted_to_the_same_examples(photo_dir, tmp_path, capsys):
  (as_tfrecords(photo_dir, tmp_path / "old") / "convex_jax_80px").mkdir()  # A cache beside it.
  with pytest.raises(UserError, match=r"data convert imagenet2012 --data_dir=.* --to="):
    datasets.load(config_of(str(tmp_path / "old")), 0)
  args = ["convert", "imagenet2012", f"--data_dir={tmp_path / 'old'}", f"--to={tmp_path / 'new'}"]
  assert command.main(args) == 0 and "2 shards" in capsys.readouterr().out
  ours, theirs = (datasets.load(config_of(f), 0) for f in (str(tmp_path / "new"), photo_dir))
  for a, b in ((ours.train, theirs.train), (ours.test, theirs.test)):
    assert [a.read(i) for i in range(len(a))] == [b.read(i) for i in range(len(b))]
  assert command.main(args) == 0 and "already" in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["bit", "length", "cut", "count"])
def test_damaged_tfrecords_are_named_and_nothing_half_made_is_left(
  photo_dir, tmp_path, capsys, fault
):
  shard = as_tfrecords(photo_dir, tmp_path / "old") / "imagenet2012-train.tfrecord-00000-of-00001"
  content = bytearray(shard.read_bytes())
  if fault == "bit":
    content[200] ^= 4
  elif fault == "length":
    content[6] ^= 255  # A record of petabytes.
  elif fault == "cut":
    content = content[:-7]
  else:
    info = shard.parent / "dataset_info.json"
    info.write_text(info.read_text().replace('"70"', '"71"'))
  shard.write_bytes(content)
  args = ["convert", "imagenet2012", f"--data_dir={tmp_path / 'old'}", f"--to={tmp_path / 'new'}"]
  assert command.main(args) == 2
  assert shard.name in capsys.readouterr().err
  assert not (tmp_path / "new" / "imagenet2012" / "5.1.0").exists()


# Streams.


def batches(photo_dir, devices, workers, steps, batch_size=8):
  """(images, labels) of these training steps."""
  train_records = datasets.load(config_of(photo_dir), 0, progress=False).train
  over = mesh.make_mesh(jax.devices()[:devices])
  fed = stream.Stream(train_records, over, workers, max_unreadable=0.0)
  plan = fed.train_plan(steps, batch_size, seed=3)
  fed.close()
  return np.asarray(plan["image"]), np.asarray(plan["label"]), np.asarray(plan["position"])


def test_order_and_crops_are_the_same_for_any_number_of_workers_and_devices(photo_dir):
  images, labels, positions = batches(photo_dir, 1, 0, range(6, 12))
  assert images.shape == (6, 8, 16, 16, 3)
  np.testing.assert_array_equal(positions.ravel(), np.arange(48, 96))
  records = datasets.load(config_of(photo_dir), 0, progress=False).train
  for row, position in enumerate(positions.ravel()):  # Each on its own, from its definition.
    example = records.read(int(sampling.examples_at(np.array([position]), 3, 70)[0]))
    rng = np.random.default_rng([3, 3, int(position)])
    want, _ = decode.random_crop(example["image"], rng, 16, (0.08, 1.0))
    np.testing.assert_array_equal(images.reshape(48, 16, 16, 3)[row], want)
    assert labels.ravel()[row] == example["label"]
  for devices, workers in ((8, 0), (2, 3)):
    others = batches(photo_dir, devices, workers, range(6, 12))
    for ours, theirs in zip((images, labels, positions), others, strict=True):
      np.testing.assert_array_equal(ours, theirs)


def test_hosts_read_disjoint_shares_of_the_same_batches(photo_dir):
  """What two processes would read, from the rows that each has devices for."""
  records = datasets.load(config_of(photo_dir), 0, progress=False).train
  whole = worker.Training(records, np.arange(8), 8, seed=3, chunk=4)
  first, second = (
    worker.Training(records, rows, 8, seed=3, chunk=4) for rows in (np.arange(4), np.arange(4, 8))
  )
  for step in range(4):
    halves = [whole(2 * step), whole(2 * step + 1)]
    for host, want in zip((first, second), halves, strict=True):
      got = host(step)
      for name in want:
        np.testing.assert_array_equal(got[name], want[name])


def test_a_stream_goes_on_at_any_step(photo_dir):
  records = datasets.load(config_of(photo_dir), 0, progress=False).train
  fed = stream.Stream(records, mesh.make_mesh(jax.devices()[:1]), 0, 0.0)
  for steps in (range(2), range(2, 3), range(6, 7)):  # The last after a jump, as by a resume.
    plan = fed.train_plan(steps, 8, seed=3)
    want, _, _ = batches(photo_dir, 1, 0, steps)
    np.testing.assert_array_equal(plan["image"], want)
  fed.close()


@pytest.mark.parametrize("limit,want", [(0, 11), (5, 5)])
def test_evaluation_reads_each_photograph_once(photo_dir, limit, want):
  test = datasets.load(config_of(photo_dir), 0, progress=False).test
  fed = stream.Stream(test, mesh.make_mesh(), 0, 0.0)
  plans = list(fed.eval_plans(8, limit))
  masks = np.concatenate([np.asarray(p["mask"]) for p in plans])
  images, labels = (
    np.concatenate([np.asarray(p[name]) for p in plans])[masks] for name in ("image", "label")
  )
  assert len(images) == want
  np.testing.assert_array_equal(images, test.first(want).images)
  np.testing.assert_array_equal(labels, test.first(want).labels)


def test_what_cannot_be_read_is_replaced_counted_and_named_up_to_a_share(tmp_path, monkeypatch):
  photos.write_archives(tmp_path, train=20, val=3, broken=2)
  photos.official_archives.folder = tmp_path
  monkeypatch.setattr(prepare, "official_archives", photos.official_archives)
  prepare.prepare("imagenet2012", str(tmp_path / "data"), str(tmp_path))
  records = datasets.load(config_of(str(tmp_path / "data")), 0, progress=False).train
  over = mesh.make_mesh(jax.devices()[:1])
  fed = stream.Stream(records, over, 0, max_unreadable=0.1)
  plan = fed.train_plan(range(5), 4, seed=0)
  assert len(fed.damaged) == 2 and plan["image"].shape == (5, 4, 16, 16, 3)
  assert {fed.name_of(r) for r in fed.damaged} == {"n01440764_0.JPEG", "n01443537_1.JPEG"}
  examples = sampling.examples_at(np.arange(20), 0, 20)
  for row, example in enumerate(examples):  # The next that can be read, label and all.
    while records.read(int(example))["image"] == b"broken":
      example = (example + 1) % 20
    assert plan["label"][row // 4, row % 4] == records.read(int(example))["label"]
  fed.close()
  masks = [p["mask"] for p in stream.Stream(records, over, 0, 0.1).eval_plans(4, 0)]
  assert int(np.concatenate(masks).sum()) == 18  # An evaluation counts no stand-ins.
  strict = stream.Stream(records, over, 0, max_unreadable=0.09)
  with pytest.raises(UserError, match=r"2 of 20 images .*n0144.*max_unreadable"):
    strict.train_plan(range(5), 4, seed=0)
  strict.close()


# What workers need.


@pytest.mark.parametrize(
  "code,line",
  [
    ("refuse()", 1),
    ("def main():\n  refuse()\n\nmain()", 4),
    ("import os\nif os.sep:\n  refuse()", 3),
    ("for _ in range(1):\n  with open('/dev/null'):\n    refuse()\nif __name__: pass", 3),
    ("if __name__ == '__main__':\n  pass\nrefuse()", 3),
    ("def main():\n  refuse()\n\nif __name__ == '__main__':\n  main()", None),
    ("if '__main__' == __name__ and True:\n  for _ in range(1):\n    refuse()", None),
    ("import multiprocessing as m\nif m.parent_process() is None:\n  refuse()", None),
  ],
)
def test_a_script_that_workers_would_run_again_is_told(tmp_path, monkeypatch, code, line):
  path = tmp_path / "script.py"
  path.write_text(code)
  script = types.ModuleType("__main__")
  script.__file__, script.refuse = str(path), chunks.refuse_unguarded
  monkeypatch.setitem(sys.modules, "__main__", script)
  run = functools.partial(exec, compile(code, str(path), "exec"), vars(script))
  if line is None:
    return run()
  with pytest.raises(UserError, match=rf"script\.py, line {line}: .*if __name__ == .__main__"):
    run()
  script.__spec__ = types.SimpleNamespace(name="package.__main__")  # Which workers do not import.
  run()
  del script.__file__  # A notebook.
  run()


@pytest.mark.skipif(not os.path.isdir(chunks.SHARED), reason="no /dev/shm")
@pytest.mark.parametrize(
  "free,workers,ahead",  # In chunks of a megabyte.
  [(1000, 2, 4), (20, 2, 4), (19, 2, 3), (8, 2, 1), (7, 2, 0), (64, 16, 1), (63, 16, 0), (0, 1, 0)],
)
def test_workers_are_ahead_as_far_as_shared_memory_reaches(monkeypatch, free, workers, ahead):
  size = 10**6
  blocks = free * (-(-size // 4096) + 3)
  found = types.SimpleNamespace(f_bavail=blocks, f_blocks=2**40, f_frsize=4096)
  monkeypatch.setattr(os, "statvfs", lambda _: found)
  if ahead:
    assert chunks._ahead(size, workers) == ahead
    return
  words = rf"{workers} need [\d.]+ MB .* [\d.]+ MB free.*--shm-size.*fewer workers.* 0"
  with pytest.raises(UserError, match=words):
    chunks._ahead(size, workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_too_little_shared_memory_is_told_before_any_worker_starts(photo_dir, monkeypatch, workers):
  found = types.SimpleNamespace(f_bavail=16, f_blocks=16, f_frsize=4096)
  monkeypatch.setattr(os, "statvfs", lambda _: found)
  records = datasets.load(config_of(photo_dir, image_size=64), 0, progress=False).train
  fed = stream.Stream(records, mesh.make_mesh(jax.devices()[:1]), workers, 0.0)
  if not workers:  # One of the cures.
    assert fed.train_plan(range(1), 8, seed=3)["image"].shape == (1, 8, 64, 64, 3)
    return fed.close()
  with pytest.raises(UserError, match=r"2 need 0\.9 MB of it, and /dev/shm has 0\.1 MB free"):
    fed.train_plan(range(1), 8, seed=3)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("unshare") or os.getuid() > 0, reason="it mounts /dev/shm")
def test_a_container_with_little_shared_memory(photo_dir):
  small = 'mount -t tmpfs -o size=64k tmpfs /dev/shm || exit 32; exec "$@"'
  cached = ["data", "cache", "imagenet2012", "--image_size=40", f"--data_dir={photo_dir}"]
  program = ["unshare", "-m", "sh", "-c", small, "sh", sys.executable, "-m", "convex_jax", *cached]
  ended = subprocess.run([*program, "--workers=2"], cwd=ROOT, capture_output=True, text=True)
  if ended.returncode == 32 or ended.stderr.startswith("unshare:"):
    pytest.skip(ended.stderr)
  assert ended.returncode == 2 and "docker run --shm-size" in ended.stderr
  assert "Traceback" not in ended.stderr and "leaked" not in ended.stderr
  assert subprocess.run([*program, "--workers=0"], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
  "error,words",
  [
    (RuntimeError("terminated unexpectedly with exit code -7."), "shared memory.*--shm-size"),
    (OSError(28, "No space left on device"), "shared memory.*--shm-size"),
    (RuntimeError("terminated unexpectedly with exit code -9."), "died.*out of memory, lower"),
    (RuntimeError("terminated unexpectedly with exit code 1."), "died.*__main__"),
    (RuntimeError("\n\n  An attempt ... its bootstrapping phase."), "^each decoding.*__main__"),
    (OSError(38, "Function not implemented"), "died: .*Function not implemented"),
  ],
)
def test_why_a_worker_died_is_told(error, words):
  with pytest.raises(UserError, match=f"(?s){words}"), chunks._explained():
    raise error


# Caches.


def cached(photo_dir, size, **changes):
  return datasets.load(config_of(photo_dir, loader="resident", cache_size=size, **changes), 0)


def test_a_cache_holds_the_central_squares_and_is_written_once(photo_dir, capsys):
  args = ["cache", "imagenet2012", "--image_size=20", f"--data_dir={photo_dir}", "--workers=0"]
  assert command.main(args) == 0
  assert "70 images of 20 px" in capsys.readouterr().out
  got = cached(photo_dir, 20)
  assert got.train.images.shape == (70, 20, 20, 3) and len(got.test) == 11
  records = datasets.load(config_of(photo_dir, loader="stream"), 0).test
  for i in range(11):
    example = records.read(i)
    want, _ = decode.central_crop(example["image"], 20)
    np.testing.assert_array_equal(got.test.images[i], want)
    assert got.test.labels[i] == example["label"]
  assert command.main(args) == 0 and "already exists" in capsys.readouterr().out
  check = ["check", "imagenet2012", "--image_size=20", f"--data_dir={photo_dir}"]
  assert command.main(check) == 2  # 70 examples are not the official 1.28 million.
  assert "expected 1,281,167" in capsys.readouterr().err


def test_an_interrupted_cache_goes_on(photo_dir, monkeypatch):
  monkeypatch.setattr(cache, "BLOCK", 16)
  monkeypatch.setattr(cache, "SAVE_EVERY", 2)
  folder = os.path.join(photo_dir, "imagenet2012", "5.1.0")
  write = functools.partial(cache.write, "imagenet2012", folder, "train", 70, 12, 0)
  made, whole = [], worker.Evaluation.__call__

  def dies(rows, number):
    if number == 3 and not made:
      made.append(number)
      raise KeyboardInterrupt
    return whole(rows, number)

  monkeypatch.setattr(worker.Evaluation, "__call__", dies)
  with pytest.raises(KeyboardInterrupt):
    write()
  with pytest.raises(UserError, match="is not decoded at 12 px"):
    cache.read("imagenet2012", folder, "train", 12, 0.0)
  with open(cache.path_of(folder, "train", 12) + ".partial") as file:
    assert len(json.load(file)["crc32"]) == 2  # Two blocks of 16 are done.
  write()
  records = Records(folder, "train", np.arange(70), 12, (1.0, 1.0), 1.0)
  want = records.first(70)
  got = cache.read("imagenet2012", folder, "train", 12, 0.0)
  np.testing.assert_array_equal(got.images, want.images)
  np.testing.assert_array_equal(got.labels, want.labels)
  with open(got.images.filename, "r+b") as file:  # The last image.
    file.seek(-5, os.SEEK_END)
    file.write(b"x")
  with pytest.raises(UserError, match="images 64 to 79 are damaged"):
    cache.read("imagenet2012", folder, "train", 12, 0.0)


def test_a_cache_that_does_not_fit_is_refused(photo_dir, monkeypatch, capsys):
  monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
  args = ["cache", "imagenet2012", "--image_size=24", f"--data_dir={photo_dir}"]
  assert command.main(args) == 2
  assert "Make room, or choose a smaller --image_size" in capsys.readouterr().err
  assert command.main(["cache", "cifar10", "--image_size=24"]) == 2
  assert "expected imagenet2012, imagenette" in capsys.readouterr().err


def test_a_cache_leaves_out_what_cannot_be_read_up_to_a_share(tmp_path, monkeypatch):
  photos.write_archives(tmp_path, train=20, val=3, broken=2)
  photos.official_archives.folder = tmp_path
  monkeypatch.setattr(prepare, "official_archives", photos.official_archives)
  folder = prepare.prepare("imagenet2012", str(tmp_path / "data"), str(tmp_path))
  cache.write("imagenet2012", folder, "train", 20, 12, 0)
  got = cache.read("imagenet2012", folder, "train", 12, max_unreadable=0.1)
  records = Records(folder, "train", np.arange(20), 12, (1.0, 1.0), 1.0)
  want = records.first(20)
  assert len(got) == len(want) == 18 and isinstance(got.images, np.memmap)
  np.testing.assert_array_equal(got.take(np.arange(18)), want.images)
  np.testing.assert_array_equal(got.labels, want.labels)
  assert got.statistics() == want.statistics()
  half = got.subset(np.arange(0, 18, 2))
  np.testing.assert_array_equal(half.first(3).images, want.images[[0, 2, 4]])
  with pytest.raises(UserError, match=r"2 of the 20 images .* could not be read"):
    cache.read("imagenet2012", folder, "train", 12, max_unreadable=0.09)


def test_damaged_descriptions_and_files_are_told(tmp_path, photo_dir):
  shutil.copytree(os.path.join(photo_dir, "imagenet2012", "5.1.0"), tmp_path / "copy")
  folder = str(tmp_path / "copy")
  cache.write("imagenet2012", folder, "train", 70, 8, 0)
  path = cache.path_of(folder, "train", 8)
  images, labels = (path.replace(".json", f"_{part}.npy") for part in ("images", "labels"))
  about = json.loads(pathlib.Path(path).read_text())

  def refuses(words):
    with pytest.raises(UserError, match=words):
      cache.read("imagenet2012", folder, "train", 8, 0.0)

  for wrong in ({**about, "format": 99}, {**about, "crc32": []}, {**about, "examples": 71}, []):
    pathlib.Path(path).write_text(json.dumps(wrong))
    refuses("is damaged: .*Move the folder aside")
  pathlib.Path(path).write_text("{")
  refuses("is damaged")
  pathlib.Path(path).write_text(json.dumps(about))
  os.truncate(images, os.path.getsize(images) - 100)
  refuses("is damaged")
  os.remove(labels)
  refuses("is damaged")


def test_beside_read_only_photographs_a_cache_goes_elsewhere(photo_dir, tmp_path, capsys):
  args = ["cache", "imagenet2012", "--image_size=36", f"--data_dir={photo_dir}", "--workers=0"]
  for _ in range(2):  # Again, as from a mount that has moved, links are made anew.
    with injections.unwritable(photo_dir):
      assert command.main(args) == 2
      words = capsys.readouterr().err
      assert "cannot be written: [Errno 30] Read-only" in words and "--to=FOLDER" in words
      assert command.main([*args, f"--to={tmp_path}"]) == 0
      got = cached(str(tmp_path), 36)
    assert got.train.images.shape == (70, 36, 36, 3) and len(got.test) == 11
    (link,) = tmp_path.glob("imagenet2012/5.1.0/*train.array_record*")
    os.remove(link)
    link.symlink_to(tmp_path / "moved")
  records = datasets.load(config_of(photo_dir), 0, progress=False).train
  want, _ = decode.central_crop(records.read(0)["image"], 36)
  np.testing.assert_array_equal(got.train.images[0], want)


def test_a_data_set_is_not_prepared_in_a_read_only_folder(tmp_path, capsys):
  with injections.unwritable(tmp_path):
    assert command.main(["prepare", "digits", f"--data_dir={tmp_path / 'data'}"]) == 2
  assert "Read-only file system" in (words := capsys.readouterr().err)
  assert "pass another folder: --data_dir" in words and "manual_dir" not in words


def test_a_data_set_is_not_prepared_in_a_file(tmp_path, capsys):
  (tmp_path / "data").write_text("")
  assert command.main(["prepare", "mnist", f"--data_dir={tmp_path / 'data'}"]) == 2
  assert "Not a directory" in (words := capsys.readouterr().err)
  assert "pass another folder: --data_dir" in words and "manual_dir" not in words


def test_two_commands_do_not_write_one_cache(photo_dir):
  folder = os.path.join(photo_dir, "imagenet2012", "5.1.0")
  path = cache.path_of(folder, "train", 28)
  os.makedirs(os.path.dirname(path))
  alone = files.exclusive_lock(path + ".lock", "")
  with alone, pytest.raises(UserError, match="written by another command"):
    cache.write("imagenet2012", folder, "train", 70, 28, 0)


# Whole runs.


def natural_config(photo_dir, **changes):
  config = mixer_ioc.get_config("imagenet2012")
  changes = {"data__dir": photo_dir, "data__workers": 0, "data__image_size": 16, **changes}
  small = {"model__size": "tiny", "model__patch": 4, "model__depth": 1}
  small |= {"batch_size": 16, "steps": 6}
  small["data__randaugment"] = (0, 9.0)  # Most of what would be compiled.
  return of(config, **small, eval__every_epochs=0.6, **changes)


@pytest.mark.parametrize("loader", ["stream", pytest.param("resident", marks=pytest.mark.slow)])
def test_a_run_on_photographs_trains_resumes_and_reloads(photo_dir, tmp_path, loader):
  changes = {"data__loader": loader, "data__cache_size": 20, "data__repeats": 3}
  if loader == "resident":
    folder = f"--data_dir={photo_dir}"
    command.main(["cache", "imagenet2012", "--image_size=20", folder, "--workers=0"])
  whole = loop.run(natural_config(photo_dir, **changes), str(tmp_path / "whole"))
  assert np.isfinite(whole["test_loss"])
  part = natural_config(photo_dir, **changes)
  original = program.Program.batches
  with pytest.MonkeyPatch.context() as patch:

    def stops(job, steps):
      if steps.start == 4:
        raise KeyboardInterrupt
      return original(job, steps)

    patch.setattr(program.Program, "batches", stops)
    with pytest.raises(KeyboardInterrupt):
      loop.run(part, str(tmp_path / "part"))
  resumed = loop.run(part, str(tmp_path / "part"))
  assert resumed == whole  # To the last bit.
  run = convex_jax.load(str(tmp_path / "part"))
  side = 20 if loader == "resident" else 16
  assert run.image_shape == (side, side, 3) and run.certificate["verdict"] == "PROVED"
  assert all("input_wait_frac" in row for row in run.metrics("train"))


def gone(pids, seconds=20):
  """Whether all these processes end in time."""
  until = time.monotonic() + seconds
  while any(os.path.exists(f"/proc/{pid}") for pid in pids) and time.monotonic() < until:
    time.sleep(0.2)
  return not any(os.path.exists(f"/proc/{pid}") for pid in pids)


@pytest.mark.skipif(not os.path.exists("/proc"), reason="looks at /proc")
@pytest.mark.parametrize(
  "number", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)], ids=str
)
def test_a_signal_to_the_whole_group_saves_and_leaves_no_worker(photo_dir, tmp_path, number):
  """Ctrl-C reaches the workers too, and must not keep the trainer from saving."""
  process = streaming(photo_dir, tmp_path / "run")
  workers = children(process.pid)
  assert len(workers) >= 2
  if number == signal.SIGKILL:
    process.kill()
  else:
    os.killpg(process.pid, number)
  _, errors = process.communicate(timeout=120)
  assert process.returncode == (-9 if number == signal.SIGKILL else 75), errors
  assert number == signal.SIGKILL or "leaked" not in errors  # Shared memory, which Python frees.
  assert gone(workers)


@pytest.mark.skipif(not os.path.exists("/proc"), reason="looks at /proc")
def test_a_worker_that_dies_ends_the_run_with_one_message(photo_dir, tmp_path):
  result = lost_workers(photo_dir, tmp_path, 1)
  assert result.survived == 1, result


@pytest.mark.slow
@pytest.mark.skipif(not SHARED_DATA.exists(), reason="no real photographs on this machine")
@pytest.mark.parametrize("name", ["mixer_ioc", "densenet_ioc"])
def test_real_photographs_train_and_a_stopped_run_goes_on(name, tmp_path):
  """From the command line, on one device: eight simulated ones wait too long for each other."""
  args = [f"--config=configs/{name}.py:imagenet2012", f"--config.data.dir={SHARED_DATA}"]
  args += ["--config.batch_size=8", "--config.steps=4", "--config.checkpoint.every_steps=2"]
  if name == "densenet_ioc":  # At 224 px it takes minutes to compile where two cores are busy.
    args.append("--config.data.image_size=64")
  program = [sys.executable, "-m", "convex_jax.main", *args, f"--workdir={tmp_path / 'run'}"]
  with subprocess.Popen(program, cwd=ROOT, stdout=subprocess.PIPE, text=True) as first:
    # A checkpoint's folder appears before it is sealed; one without a manifest is set aside.
    while not (tmp_path / "run" / "checkpoints" / "2" / "manifest.json").exists():
      assert first.poll() is None
      time.sleep(0.2)
    first.kill()
  second = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=500)
  assert second.returncode == 0, second.stderr
  assert "at step 2 of 4" in second.stdout and "PROVED" in second.stdout
  assert convex_jax.load(str(tmp_path / "run")).step == 4
