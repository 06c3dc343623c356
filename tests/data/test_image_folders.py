"""Images of one's own: from folders to a data set, and to a run."""

import pathlib

import numpy as np
import PIL.Image
import pytest

import convex_jax
from configs import base
from convex_jax.data import command, datasets, prepare
from convex_jax.errors import UserError
from convex_jax.training import loop, schema

SMALL, VARIOUS = ((6, 5), (6, 5)), ((6, 5), (9, 12))


def write(folder: pathlib.Path, sizes=SMALL, mode="RGB", suffix="png") -> dict[str, np.ndarray]:
  """Writes train and test folders of two classes, two images each; returns the images by path."""
  rng, images = np.random.default_rng(0), {}
  for split in ("train", "test"):
    for name in ("zebra", "grey cat"):
      (folder / split / name).mkdir(parents=True)
      for i, size in enumerate(sizes):
        path = folder / split / name / f"{i}.{suffix}"
        image = rng.integers(0, 256, (*size, len(mode)), np.uint8)
        PIL.Image.fromarray(image.squeeze(), mode).save(path)
        images[f"{split}/{name}/{i}"] = image
  (folder / "train" / ".DS_Store").write_bytes(b"")
  return images


def imported(tmp_path, **form) -> dict[str, np.ndarray]:
  images = write(tmp_path / "images", **form)
  args = ["import", "pets", f"--from={tmp_path}/images", f"--data_dir={tmp_path}/data"]
  assert command.main(args) == 0
  return images


def config_of(tmp_path, **changes):
  config = base.get_config().data
  config.update({"name": "pets", "dir": str(tmp_path / "data"), "image_size": 6, **changes})
  return config


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_images_of_one_size_are_those_of_the_folder(tmp_path, capsys, mode):
  images = imported(tmp_path, mode=mode)
  data = datasets.load(config_of(tmp_path), 0, progress=False)
  assert data.class_names == ("grey cat", "zebra")
  for name, split in (("train", data.train), ("test", data.test)):
    found = {
      (image.tobytes(), label) for image, label in zip(split.images, split.labels, strict=True)
    }
    want = {
      (image.tobytes(), data.class_names.index(path.split("/")[1]))
      for path, image in images.items()
      if path.startswith(name)
    }
    assert found == want and split.image_shape == (6, 5, len(mode))
  assert command.main(["check", "pets", f"--data_dir={tmp_path}/data"]) == 0
  assert "pets test: 4 images (6, 5" in capsys.readouterr().out
  assert command.main(["list", f"--data_dir={tmp_path}/data"]) == 0
  assert "pets " in capsys.readouterr().out


def test_photographs_are_copied_unchanged_and_streamed(tmp_path):
  imported(tmp_path, sizes=VARIOUS, suffix="jpg")
  entry = prepare.entry_of("pets", str(tmp_path / "data"))
  assert entry.is_natural and (entry.train_examples, entry.test_examples) == (4, 4)
  records = datasets.load(config_of(tmp_path, loader="stream"), 0).train
  found = {(records.read(i)["image"], records.read(i)["label"]) for i in range(4)}
  paths = (tmp_path / "images" / "train").glob("*/*.jpg")
  assert found == {(path.read_bytes(), int(path.parent.name == "zebra")) for path in paths}
  args = ["cache", "pets", "--image_size=6", f"--data_dir={tmp_path}/data"]
  assert command.main([*args, f"--to={tmp_path}/other", "--workers=0"]) == 0
  cached = datasets.load(config_of(tmp_path, dir=f"{tmp_path}/other", loader="resident"), 0)
  assert cached.test.image_shape == (6, 6, 3)


def test_a_run_learns_and_is_reloaded(tmp_path, tiny_config):
  imported(tmp_path, sizes=4 * SMALL)
  tiny_config.data.update({"name": "pets", "dir": str(tmp_path / "data"), "image_size": 8})
  tiny_config.update({"batch_size": 8, "steps": 2})
  assert schema.mistakes(tiny_config) == []
  loop.run(tiny_config, str(tmp_path / "run"))
  run = convex_jax.load(tmp_path / "run")
  assert run.class_names == ("grey cat", "zebra") and run.certificate["verdict"] == "PROVED"


def no_test(folder):
  (folder / "test").rename(folder / "validate")


def another_class(folder):
  (folder / "test" / "dog").mkdir()
  (folder / "test" / "zebra" / "0.png").rename(folder / "test" / "dog" / "0.png")


def one_class(folder):
  for split in ("train", "test"):
    for path in (folder / split / "zebra").iterdir():
      path.unlink()
    (folder / split / "zebra").rmdir()


def empty(folder):
  for path in (folder / "train" / "zebra").iterdir():
    path.unlink()


BAD = [
  (no_test, "test is not a folder"),
  (another_class, "train and test differ in the classes dog"),
  (one_class, "train has folders of 1 classes; expected two or more"),
  (empty, "zebra is empty"),
  (lambda folder: (folder / "train" / "notes.txt").write_text("x"), "notes.txt is a file"),
  (
    lambda folder: (folder / "train" / "zebra" / "a.txt").write_text("x"),
    "a.txt is not a readable",
  ),
  (lambda folder: (folder / "test" / "zebra" / "b.png").mkdir(), "b.png is not a readable"),
]


@pytest.mark.parametrize("spoil,want", BAD)
def test_folders_that_cannot_be_used_are_refused(tmp_path, capsys, spoil, want):
  write(tmp_path / "images")
  spoil(tmp_path / "images")
  args = ["import", "pets", f"--from={tmp_path}/images", f"--data_dir={tmp_path}/data"]
  assert command.main(args) == 2
  assert want in capsys.readouterr().err
  assert not (tmp_path / "data" / "pets").exists()


@pytest.mark.parametrize("name", ["cifar10", "Pets", "../pets", ""])
def test_names_that_cannot_be_used_are_refused(tmp_path, capsys, name):
  write(tmp_path / "images")
  args = ["import", name, f"--from={tmp_path}/images", f"--data_dir={tmp_path}/data"]
  assert command.main(args) == 2
  assert "cannot name a data set of your own" in capsys.readouterr().err


def test_a_data_set_is_not_overwritten(tmp_path, capsys):
  imported(tmp_path)
  args = ["import", "pets", f"--from={tmp_path}/images", f"--data_dir={tmp_path}/data"]
  assert command.main(args) == 2
  assert "already exists; move it aside" in capsys.readouterr().err


def test_other_data_sets_of_tfds_are_refused_unless_they_are_labelled_images(tmp_path):
  imported(tmp_path)
  about = tmp_path / "data" / "pets" / "1.0.0" / "dataset_info.json"
  text = about.read_text()
  about.write_text(text.replace('"name": "test"', '"name": "validation"'))
  assert prepare.entry_of("pets", str(tmp_path / "data")).test == "validation"
  about.write_text(text.replace('"name": "test"', '"name": "extra"'))
  with pytest.raises(UserError, match=r"the splits .*extra; expected an image"):
    prepare.entry_of("pets", str(tmp_path / "data"))


def test_an_unknown_data_set_is_told_with_where_it_was_looked_for(tmp_path):
  with pytest.raises(UserError, match=r"'pet'; expected one of digits.*pet is not the folder"):
    datasets.load(config_of(tmp_path, name="pet"), 0)
