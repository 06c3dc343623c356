"""Order, splits, noise, batches; preparing without TensorFlow; missing data."""

import dataclasses
import gzip
import io
import os
import subprocess
import sys
import tarfile
import time

import jax
import numpy as np
import pytest

from configs import base
from convex_jax import mesh
from convex_jax.data import batches, command, datasets, prepare, sampling, splits
from convex_jax.data.in_memory import InMemory, is_resident
from convex_jax.errors import UserError
from convex_jax.training import program
from tests.support import ROOT, SHARED_DATA, of


@pytest.mark.parametrize("batch_size", [1, 7, 32])
def test_every_example_comes_once_an_epoch(batch_size):
  n = 100
  position = np.arange(3 * n)
  parts = [
    sampling.examples_at(position[i : i + batch_size], seed=5, n=n)
    for i in range(0, 3 * n, batch_size)
  ]
  sequence = np.concatenate(parts)
  for epoch in range(3):
    assert sorted(sequence[epoch * n : (epoch + 1) * n]) == list(range(n))
  assert (sequence[:n] != sequence[n : 2 * n]).any()  # Shuffled again.
  np.testing.assert_array_equal(sequence, sampling.examples_at(position, seed=5, n=n))
  assert (sequence != sampling.examples_at(position, seed=6, n=n)).any()


def test_repeats_show_each_example_several_times_in_a_row():
  position = np.arange(3 * 20)
  once = sampling.examples_at(np.arange(20), seed=5, n=10)
  np.testing.assert_array_equal(
    sampling.examples_at(position, seed=5, n=10, repeats=3), np.repeat(once, 3)
  )


def test_digits_are_the_scans_of_scikit_learn(digits):
  from sklearn.datasets import load_digits

  raw = load_digits()
  assert (len(digits.train), len(digits.test)) == (1437, 360)
  assert digits.train.images.shape == (1437, 8, 8, 1) and digits.valid is None
  ours = np.concatenate([digits.train.images, digits.test.images])[..., 0]
  theirs = np.round(raw.images * 255 / 16).astype(np.uint8)
  assert sorted(a.tobytes() for a in ours) == sorted(a.tobytes() for a in theirs)
  labels = np.concatenate([digits.train.labels, digits.test.labels])
  np.testing.assert_array_equal(np.bincount(labels), np.bincount(raw.target))


def test_statistics_are_exact(digits):
  mean, std = digits.train.statistics()
  x = digits.train.images / 255.0
  np.testing.assert_allclose([mean[0], std[0]], [x.mean(), x.std()], rtol=1e-12)
  still = splits.Split(np.zeros((3, 2, 2, 1), np.uint8), np.zeros(3, np.int32))
  assert still.statistics() == ((0.0,), (1.0,))


def config_of(data_dir, **changes):
  config = base.get_config().data
  config.name, config.dir = "digits", data_dir
  return of(config, **changes)


def test_held_out_and_kept_fractions_are_disjoint_and_fixed_by_the_seed(data_dir, digits):
  config = config_of(data_dir, validation_fraction=0.2, train_fraction=0.5)
  first, again, other = (datasets.load(config, seed, progress=False) for seed in (1, 1, 2))
  assert first.valid is not None
  assert (len(first.train), len(first.valid), len(first.test)) == (575, 287, 360)
  np.testing.assert_array_equal(first.train.images, again.train.images)
  assert (first.train.images != other.train.images).any()
  train = {image.tobytes() for image in first.train.images}
  assert not train & {image.tobytes() for image in first.valid.images}
  np.testing.assert_array_equal(first.test.labels, digits.test.labels)


def test_a_few_classes_are_kept_in_the_order_of_their_names(data_dir, digits):
  pair = datasets.load(config_of(data_dir, classes=("8", "3"), label_noise=0.5), 0, progress=False)
  assert pair.class_names == ("8", "3")
  for ours, whole in ((pair.train, digits.train), (pair.test, digits.test)):
    here = np.isin(whole.labels, (3, 8))
    np.testing.assert_array_equal(ours.images, whole.images[here])
    right = np.where(whole.labels[here] == 8, 0, 1)
    assert set(ours.labels) == {0, 1}
    assert np.mean(ours.labels != right) == pytest.approx(0.25 * (ours is pair.train), abs=0.06)


def test_the_test_split_alone_is_that_of_all(data_dir, monkeypatch):
  read, decode = [], datasets.decode_split

  def recorded(builder, split, progress):
    read.append(split)
    return decode(builder, split, progress)

  monkeypatch.setattr(datasets, "decode_split", recorded)
  for classes in ((), ("8", "3")):
    config = config_of(data_dir, classes=classes, label_noise=0.5)
    whole, alone = datasets.load(config, 0, progress=False).test, datasets.load_test(config, False)
    np.testing.assert_array_equal(alone.images, whole.images)
    np.testing.assert_array_equal(alone.labels, whole.labels)
  assert read == ["train", "test", "test"] * 2
  with pytest.raises(UserError, match=r"data\.classes has 'cat'"):
    datasets.load_test(config_of(data_dir, classes=("cat",)))


def test_an_unknown_class_is_refused(data_dir):
  with pytest.raises(
    UserError, match=r"data\.classes has 'cat', unknown in 'digits'; expected names among 0, 1"
  ):
    datasets.load(config_of(data_dir, classes=("cat", "3")), 0, progress=False)


@pytest.mark.parametrize("key", ["validation_fraction", "train_fraction"])
def test_a_fraction_that_selects_no_example_is_refused(data_dir, key):
  with pytest.raises(UserError, match=f"data.{key} is 1e-06, which selects none"):
    datasets.load(config_of(data_dir, **{key: 1e-6}), 0, progress=False)


@pytest.mark.parametrize("fraction", [0.0, 0.4, 1.0])
def test_label_noise_redraws_that_fraction_of_training_labels_only(data_dir, digits, fraction):
  noisy = datasets.load(config_of(data_dir, label_noise=fraction), seed=0, progress=False)
  changed = np.mean(noisy.train.labels != digits.train.labels)
  assert changed == pytest.approx(0.9 * fraction, abs=0.04)  # A tenth draws its own class again.
  np.testing.assert_array_equal(noisy.test.labels, digits.test.labels)
  np.testing.assert_array_equal(noisy.train.images, digits.train.images)
  again = datasets.load(config_of(data_dir, label_noise=fraction), seed=0, progress=False)
  np.testing.assert_array_equal(noisy.train.labels, again.train.labels)


@pytest.mark.parametrize("devices,side", [(1, 8), (2, 8), (8, 8), (8, 7)])  # 64 bytes, and 49.
def test_resident_and_sent_batches_are_the_same_on_any_number_of_devices(digits, devices, side):
  over = mesh.make_mesh(jax.devices()[:devices])
  cut = splits.Split(digits.train.images[:, :side, :side], digits.train.labels)
  digits = dataclasses.replace(digits, train=cut)
  made = []
  for resident in (True, False):
    fed = InMemory(digits.train, over, resident)
    plan = fed.train_plan(range(88, 91), 16, seed=3)  # Across the end of an epoch.
    batch_of = jax.jit(lambda a, p: jax.lax.map(lambda step: batches.batch_of(a, step, over), p))
    made.append(batch_of(fed.arrays, plan))
    if resident:  # A part on each device, filled up to parts of one size.
      shards = fed.arrays["image"].addressable_shards
      assert {len(shard.data) for shard in shards} == {-(-len(digits.train) // devices)}
    assert made[-1]["image"].shape == (3, 16, side, side, 1)
  index = sampling.examples_at(np.arange(88 * 16, 91 * 16), 3, len(digits.train)).reshape(3, 16)
  for batch in made:
    np.testing.assert_array_equal(batch["image"], digits.train.images[index])
    np.testing.assert_array_equal(batch["label"], digits.train.labels[index])
    np.testing.assert_array_equal(batch["position"].ravel(), np.arange(88 * 16, 91 * 16))


@pytest.mark.parametrize("limit,want", [(0, 50), (20, 20), (500, 50)])
def test_evaluation_reads_each_example_once(few_digits, limit, want):
  fed = InMemory(few_digits.test, mesh.make_mesh(), resident=False)
  seen = [np.asarray(plan["image"])[np.asarray(plan["mask"])] for plan in fed.eval_plans(16, limit)]
  np.testing.assert_array_equal(np.concatenate(seen), few_digits.test.images[:want])


def test_what_fits_is_resident():
  split = splits.Split(np.zeros((2, 8, 8, 1), np.uint8), np.zeros(2, np.int32))
  assert is_resident("auto", split) and is_resident("resident", split)
  assert not is_resident("host", split)
  labels = np.broadcast_to(np.int32(0), 2**45)  # Never allocated: a broadcast of one number.
  huge = splits.Split(split.images, labels, labels)
  assert not is_resident("auto", huge)


def test_missing_data_is_refused_immediately_with_folder_and_remedy(tmp_path):
  config = config_of(str(tmp_path), name="cifar100")
  start = time.monotonic()
  with pytest.raises(UserError) as caught:
    datasets.load(config, 0, progress=False)
  assert time.monotonic() - start < 5  # TFDS alone would try for minutes.
  for words in (str(tmp_path), "convex_jax data prepare cifar100", ":digits", "data.dir"):
    assert words in str(caught.value)
  assert os.listdir(tmp_path) == []  # Nothing half-built.


def test_the_command_lists_prepares_and_checks(tmp_path, capsys):
  folder = f"--data_dir={tmp_path}"
  program = [sys.executable, "-m", "convex_jax", "data", "list", folder]
  listed = subprocess.run(program, capture_output=True, text=True, cwd=ROOT, timeout=300)
  assert "at first use" in listed.stdout
  assert command.main(["prepare", "digits", folder]) == 0
  assert command.main(["check", "digits", folder]) == 0
  assert "1,437 images (8, 8, 1)" in capsys.readouterr().out
  assert command.main(["check", "mnist", folder]) == 2
  with pytest.raises(SystemExit, match="2"):
    command.main(["prepare", "nonsense", folder])


def cifar_archive(path, per_file):
  """The official layout: a tar of five training files and one test file of records."""
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (6, per_file, 3, 32, 32), np.uint8)
  labels = rng.integers(0, 10, (6, per_file), np.uint8)
  with tarfile.open(path, "w:gz") as tar:

    def add(name, content):
      info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
      info.size = len(content)
      tar.addfile(info, io.BytesIO(content))

    for i, name in enumerate([f"data_batch_{k}.bin" for k in range(1, 6)] + ["test_batch.bin"]):
      add(name, b"".join(bytes([y]) + x.tobytes() for x, y in zip(images[i], labels[i])))
    names = [
      "airplane",
      "automobile",
      "bird",
      "cat",
      "deer",
      "dog",
      "frog",
      "horse",
      "ship",
      "truck",
    ]
    add("batches.meta.txt", "\n".join(names).encode())
  return images.transpose(0, 1, 3, 4, 2), labels


@pytest.fixture
def manual_dir(tmp_path, monkeypatch):
  """A folder for small archives in the official layout, whose checksums are not the official."""
  import tensorflow_datasets as tfds

  manager = tfds.download.DownloadManager
  monkeypatch.setattr(manager, "_register_or_validate_checksums", lambda *a, **k: None)
  (tmp_path / "manual").mkdir()
  return tmp_path / "manual"


def test_cifar_is_prepared_without_tensorflow_from_the_official_archive(tmp_path, manual_dir):
  images, labels = cifar_archive(manual_dir / "cifar-10-binary.tar.gz", per_file=3)
  prepare.prepare("cifar10", str(tmp_path / "data"), str(manual_dir))
  got = datasets.load(config_of(str(tmp_path / "data"), name="cifar10"), 0, progress=False)
  for split, want_x, want_y in (
    (got.train, images[:5], labels[:5]),
    (got.test, images[5:], labels[5:]),
  ):
    want = {(x.tobytes(), int(y)) for x, y in zip(want_x.reshape(-1, 32, 32, 3), want_y.ravel())}
    assert {(x.tobytes(), int(y)) for x, y in zip(split.images, split.labels)} == want
  assert got.class_names[3] == "cat"


def test_mnist_is_prepared_without_tensorflow_from_the_official_files(
  tmp_path, monkeypatch, manual_dir
):
  from tensorflow_datasets.image_classification import mnist

  rng = np.random.default_rng(0)
  wants = {}
  for split, n in (("train", 7), ("test", 4)):
    images = rng.integers(0, 256, (n, 28, 28, 1), np.uint8)
    labels = rng.integers(0, 10, n, np.uint8)
    wants[split] = {(x.tobytes(), int(y)) for x, y in zip(images, labels)}
    for kind, header, content in (("images-idx3", 16, images), ("labels-idx1", 8, labels)):
      name = f"{'t10k' if split == 'test' else 'train'}-{kind}-ubyte.gz"
      (manual_dir / name).write_bytes(gzip.compress(bytes(header) + content.tobytes()))
  monkeypatch.setattr(mnist, "_TRAIN_EXAMPLES", 7)
  monkeypatch.setattr(mnist, "_TEST_EXAMPLES", 4)
  prepare.prepare("fashion_mnist", str(tmp_path / "data"), str(manual_dir))
  got = datasets.load(config_of(str(tmp_path / "data"), name="fashion_mnist"), 0, progress=False)
  for split in ("train", "test"):
    part = getattr(got, split)
    assert {(x.tobytes(), int(y)) for x, y in zip(part.images, part.labels)} == wants[split]


@pytest.mark.skipif(not SHARED_DATA.exists(), reason="real CIFAR-10 is not on this machine")
def test_real_cifar_has_the_published_statistics():
  got = datasets.load(config_of(str(SHARED_DATA), name="cifar10"), 0, progress=False)
  assert (len(got.train), len(got.test)) == (50_000, 10_000)
  mean, std = got.train.statistics()
  np.testing.assert_allclose(mean, [0.49139968, 0.48215841, 0.44653091], atol=1e-7)
  np.testing.assert_allclose(std, [0.24703223, 0.24348513, 0.26158784], atol=1e-7)
  np.testing.assert_array_equal(np.bincount(got.train.labels), [5000] * 10)


@pytest.mark.parametrize("loader", ["resident", "host"])
def test_synthetic_images_train_at_any_size_without_any_data(tiny_config, loader, tmp_path):
  config = of(tiny_config, data__name="synthetic", data__loader=loader, data__dir="nowhere")
  config = of(config, data__cache_size=12, data__train_fraction=1e-4, eval__train_examples=16)
  examples = datasets.load(config.data, 0)
  assert (len(examples.train), len(examples.test)) == (128, 50_000)
  assert examples.train.image_shape == (12, 12, 3) and len(examples.class_names) == 1000
  examples = dataclasses.replace(examples, test=examples.test.first(20))
  job = program.Program(config, examples, mesh.make_mesh())
  state, measured = job.train_call(job.init(), job.batches(range(1)))
  assert np.isfinite(measured["loss"])
  assert np.isfinite(job.evaluate(state, final=False)["test_loss"])
