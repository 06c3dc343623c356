"""What the importer needs to know of an architecture: `Names`, and helpers to write them."""

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

Rule = tuple[str, Callable[[re.Match], str]]  # A pattern of public module names; our name.
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Names:
  """How public files of one architecture name its modules, and what else is special in them.

  Attributes:
    rules: the first that matches a public module's name gives ours.
    fields: (model, path, keys) -> the fields of `model` that a file with these keys implies;
      raises `UserError` for a network that no fields describe.
    reorder: (key, kernel, image_shape) -> the kernel of a dense layer of a torch file, (inputs,
      outputs), with its inputs in our order.
    pixels: keys -> how the file's network saw its pixels, as `config.data.normalise` says it:
      "half", "imagenet", or "own" for files of a user's own training.
    untold: (model, keys) -> what a file of this architecture cannot tell, a line each.
    image_size: (model, channels, {our leaf: shape}) -> the side in px of the images of a network
      with these shapes, None where they do not depend on it.
    constants: a pattern of keys that hold no weights, and (key, array) -> whether the array is
      the one that our layers compute.
  """

  rules: Sequence[Rule]
  fields: Callable[[Any, str, Collection[str]], Mapping[str, Any]] = lambda *_: {}
  reorder: Callable[[str, np.ndarray, Sequence[int]], np.ndarray] = lambda _, kernel, __: kernel
  pixels: Callable[[Collection[str]], str] = lambda _: "own"
  untold: Callable[[Any, Collection[str]], Sequence[str]] = lambda *_: ()
  image_size: Callable[[Any, int, Mapping[str, Shape]], int | None] = lambda *_: None
  constants: tuple[str, Callable[[str, np.ndarray], bool]] = ("", lambda *_: False)


def fixed(**names: str) -> list[Rule]:
  """Rules for modules without numbers, each as ours="theirs"."""
  return [(re.escape(theirs), lambda _, ours=ours: ours) for ours, theirs in names.items()]


def minus_one(number: str) -> int:
  """An index from 0 of one from 1."""
  return int(number) - 1
