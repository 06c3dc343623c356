"""Config files: found, loaded, flattened; and the defaults, which are `configs/base.py`'s.

The configs that come with the package are a folder next to it in a clone and inside it in a
wheel. They import each other as `configs.NAME`, and so may a user's own.
"""

import ast
import functools
import importlib.machinery
import os
import re
import runpy
import sys
import types
from collections.abc import Iterator
from typing import Any

from convex_jax import files

_PACKAGE = os.path.dirname(os.path.abspath(__file__))
_OVERRIDE = re.compile(r"--?(?P<no>no)?config\.(?P<key>[^=\s]+)(=(?P<value>.*))?", re.DOTALL)


def bundled() -> str:
  """The folder of the configs that come with the package."""
  inside = os.path.join(_PACKAGE, "configs")
  return inside if os.path.isdir(inside) else os.path.join(os.path.dirname(_PACKAGE), "configs")


def make_importable(file: str) -> None:
  """Lets `from configs import base`, in a config file, find the configs that are meant.

  Those next to the file, where its folder is called configs; of a link also those next to what
  it points to; then the working directory's, then the bundled.
  """
  beside = [os.path.dirname(os.path.abspath(file)), os.path.dirname(os.path.realpath(file))]
  folders = [folder for folder in beside if os.path.basename(folder) == "configs"]
  folders += [os.path.join(os.getcwd(), "configs"), bundled()]
  configs: Any = sys.modules.setdefault("configs", types.ModuleType("configs"))
  # Of a package of that name that was imported by other means.
  others = vars(configs).setdefault("_path_before", list(getattr(configs, "__path__", [])))
  configs.__path__ = list(dict.fromkeys([*folders, *others]))
  for name in [name for name in sys.modules if name.startswith("configs.")]:
    spec = importlib.machinery.PathFinder.find_spec(name, configs.__path__)
    if spec is None or spec.origin != getattr(sys.modules[name], "__file__", None):
      # Of the file that was loaded before this one: another of that name is meant now.
      del sys.modules[name]
      vars(configs).pop(name.partition(".")[2], None)


def find(path: str) -> str:
  """`path`, or for configs/NAME.py that does not exist, the bundled config of that name."""
  file, colon, argument = files.expand(path).partition(":")
  folder, name = os.path.split(os.path.normpath(file))
  inside = os.path.join(bundled(), name)
  if folder == "configs" and not os.path.exists(file) and os.path.exists(inside):
    file = inside
  return file + colon + argument


def split(arguments: list[str]) -> tuple[list[str], list[str]]:
  """(overrides of config keys, in the form --config.KEY=VALUE; all other arguments).

  Also takes `--config.KEY VALUE`, and for a switch `--config.KEY` and `--noconfig.KEY`.
  """
  overrides, others, left = [], [], list(arguments)
  while left:
    argument = left.pop(0)
    match = _OVERRIDE.fullmatch(argument)
    if match is None:
      others.append(argument)
    elif match["no"]:
      overrides.append(f"--config.{match['key']}=false")
    elif match["value"] is None and left and not left[0].startswith("--"):
      overrides.append(f"--config.{match['key']}={left.pop(0)}")
    else:
      overrides.append(f"--{argument.lstrip('-')}")
  return overrides, others


def load(arguments: list[str]) -> Any:
  """The config that the arguments ["--config=FILE", "--config.KEY=VALUE", ...] make.

  Where a key is given twice the last value counts; those of a tuple may be given one by one.

  Raises whatever the file's code does; `LookupError` for an unknown key; `ValueError` or
  `TypeError` for a value that does not fit.
  """
  overrides, (file,) = split(arguments)
  path, _, argument = find(file.partition("=")[2]).partition(":")
  make_importable(path)
  module = runpy.run_path(path)
  if "get_config" not in module:
    raise ValueError("it does not define get_config()")
  config = module["get_config"](*filter(None, [argument]))
  texts: dict[str, list[str | None]] = {}
  for override in overrides:
    key, equals, text = override.partition(".")[2].partition("=")
    texts.setdefault(key, []).append(text if equals else None)
  # Of the extra `train`; what comes before, `--help` included, works without it.
  from ml_collections.config_flags import config_path

  for key, given in texts.items():
    try:
      kind, default = config_path.get_type(key, config), config_path.get_value(key, config)
    except (LookupError, AttributeError, TypeError) as error:
      raise LookupError(key) from error
    if hasattr(default, "items"):
      raise ValueError(f"a section; set its keys, such as config.{key}.{next(iter(default))}")
    config_path.set_value(key, config, _value(given, kind, default))
  config.lock()
  return config


def _value(texts: list[str | None], kind: Any, default: Any) -> Any:
  """What a key is set to by texts of which the last counts; all of them, for a tuple."""
  # Of the extra `train`.
  from absl import flags

  text = texts[-1]
  if text is None:
    if kind is bool:
      return True
    raise ValueError("a value is missing")
  if text.lower() == "none":
    return "" if default == "" else None
  if kind is str:
    return text
  if kind is bool:
    return flags.BooleanParser().parse(text)
  if kind is float:
    return float(text)
  if kind is int:
    return _integer(text)
  if kind is tuple:
    values = _tuple(text)
    if len(texts) > 1 and len(values) == 1:
      values = [value for text in texts for value in _tuple(text or "")]
    return tuple(_like(value, default, i) for i, value in enumerate(values))
  return ast.literal_eval(text)


def _tuple(text: str) -> tuple[Any, ...]:
  """Also of names without quotes."""
  # Of the extra `train`.
  from ml_collections.config_flags import tuple_parser

  values = tuple_parser.TupleParser().parse(text)
  if values == (text,):
    return tuple(filter(None, (name.strip() for name in text.strip("()[]").split(","))))
  return values


def _integer(text: str) -> int:
  """Also of 1e3, as of 1_000."""
  try:
    return int(text, 0)
  except ValueError:
    if not float(text).is_integer():
      raise
    return int(float(text))


def _like(value: Any, default: Any, i: int) -> Any:
  """An element of a tuple, a whole number and a name in the form in which the default has them."""
  if default == ():
    return str(value)
  kinds = [type(element) for element in default or (0,)]
  if type(value) is int and set(kinds) == {float}:
    return float(value)
  if type(value) is float and value.is_integer() and kinds[min(i, len(kinds) - 1)] is int:
    return int(value)
  return value


@functools.cache
def defaults() -> dict[str, Any]:
  """Every key that all configs share, by path ("data.name"), and its default."""
  return dict(flatten(runpy.run_path(os.path.join(bundled(), "base.py"))["get_config"]()))


def flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
  """The (path, value) pairs of a nested config."""
  for key, value in config.items():
    if hasattr(value, "items"):
      yield from flatten(value, f"{prefix}{key}.")
    else:
      yield prefix + key, value
