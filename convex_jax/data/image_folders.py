"""Puts images of your own into a data set of TFDS, which runs then read as any other.

The images are FOLDER/train/CLASS/IMAGE and FOLDER/test/CLASS/IMAGE, JPEGs or PNGs. They are copied
unchanged.
"""

import contextlib
import io
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import PIL.Image
import tensorflow_datasets as tfds
from tensorflow_datasets.core import registered

from convex_jax import files
from convex_jax.data.catalog import DATASETS
from convex_jax.data.photos.decode import FORMATS
from convex_jax.errors import UserError
from convex_jax.progress import track

SPLITS = ("train", "test")
DECODED = 2 * 10**9  # Bytes of all images, up to which those of one size are kept decoded.

Found = Mapping[str, Mapping[str, list[pathlib.Path]]]  # Images by split and class.

with registered.skip_registration():

  class Images(tfds.core.GeneratorBasedBuilder):
    """The images that `find` has found."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, name: str, found: Found, shape: tuple[int | None, ...], **folder: Any):
      self.name = name  # pyright: ignore[reportAttributeAccessIssue]
      self._found, self._shape = found, shape
      super().__init__(**folder)

    def _info(self):
      features = {
        "image": tfds.features.Image(shape=self._shape),
        "label": tfds.features.ClassLabel(names=list(self._found["train"])),
      }
      return tfds.core.DatasetInfo(
        builder=self,
        description="Images from a folder.",
        features=tfds.features.FeaturesDict(features),
        supervised_keys=("image", "label"),
      )

    def _split_generators(self, dl_manager):
      return {split: self._generate_examples(split) for split in self._found}

    def _generate_examples(self, split):
      every = [(name, path) for name, paths in self._found[split].items() for path in paths]
      for i, (name, path) in enumerate(track(every, f"copying {split}")):
        yield i, {"image": str(path), "label": name}


def find(folder: str) -> Found:
  """The images of a folder, by split and class, in the order of their names; hidden files are not.

  Raises `UserError` where splits or classes are missing, or files are no images.
  """
  found = {split: _classes(pathlib.Path(folder) / split) for split in SPLITS}
  if len(found["train"]) < 2:
    raise UserError(
      f"{folder}/train has folders of {len(found['train'])} classes; expected two or more"
    )
  if other := sorted(found["train"].keys() ^ found["test"].keys()):
    raise UserError(
      f"{folder}: train and test differ in the classes {', '.join(other)}; expected the same folders"
      " in both"
    )
  return found


def _classes(folder: pathlib.Path) -> dict[str, list[pathlib.Path]]:
  if not folder.is_dir():
    raise UserError(
      f"{folder} is not a folder; expected {folder}/CLASS/IMAGE, one folder for each class"
    )
  found = {}
  for path in sorted(folder.iterdir()):
    if path.name.startswith("."):
      continue
    if not path.is_dir():
      raise UserError(f"{path} is a file; expected the folder of a class. Move it away")
    found[path.name] = sorted(each for each in path.iterdir() if not each.name.startswith("."))
    if not found[path.name]:
      raise UserError(f"{path} is empty; expected images of this class")
  return found


def _shape(found: Found) -> tuple[int | None, ...]:
  """(H, W, C) of images of one size that fit into memory; (None, None, 3) of photographs.

  Raises `UserError` for a file that is not an image.
  """
  paths = [path for classes in found.values() for each in classes.values() for path in each]
  shapes = set()
  for path in track(paths, "looking at the images"):
    try:
      with PIL.Image.open(path, formats=FORMATS) as image:
        bands = 3 if image.mode == "P" else len(image.getbands())
        shapes.add((image.height, image.width, bands))
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
      raise UserError(
        f"{path} is not a readable {' or '.join(FORMATS)} image: {error}. Move it away"
      ) from error
  height, width, channels = next(iter(shapes))
  fits = height * width * channels * len(paths) <= DECODED
  return (
    (height, width, channels)
    if len(shapes) == 1 and channels in (1, 3) and fits
    else (None, None, 3)
  )


def prepare(name: str, folder: str, data_dir: str) -> str:
  """Copies the images of `folder` into the data set `name` below `data_dir`; returns its folder.

  Raises `UserError` for names and images that cannot be used, and where the data set exists.
  """
  if name in DATASETS or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
    raise UserError(
      f"{name!r} cannot name a data set of your own; expected a lower-case letter, then lower-case"
      f" letters, digits and underscores, and not one of {', '.join(DATASETS)}"
    )
  found = find(files.expand(folder))
  builder: Any = Images(
    name, found, _shape(found), data_dir=files.expand(data_dir) or None, file_format="array_record"
  )
  if os.path.exists(builder.data_dir):
    raise UserError(f"{builder.data_dir} already exists; move it aside, or choose another name")
  tfds.disable_progress_bar()  # There is one already.
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      builder.download_and_prepare()
  except OSError as error:
    raise UserError(
      f"{builder.data_dir} could not be written: {error}. Make room, or pass another --data_dir"
    ) from error
  return str(builder.data_dir)
