"""A config of a file and overrides, or everything that is wrong with them."""

import os
from typing import Any

from convex_jax import config_files
from convex_jax.errors import UserError, nearest
from convex_jax.training import schema


def load_config(file: str, overrides: list[str]) -> Any:
  """The config of a file and its overrides ["--config.KEY=VALUE", ...].

  Raises `UserError` for what cannot be loaded, with everything else that is wrong as well.
  """
  try:
    return config_files.load([f"--config={file}", *overrides])
  except Exception as error:  # Whatever a config's code, or a value that does not fit, raises.
    raise UserError("\n".join(_explain(file, overrides) or [str(error)])) from error


def _explain(file: str, overrides: list[str]) -> list[str]:
  """Tries each override alone; then checks the config that the good ones make."""
  path = config_files.find(file).partition(":")[0]
  if not os.path.isfile(path):
    names = sorted(f"configs/{n}" for n in os.listdir(config_files.bundled()) if n.endswith(".py"))
    return [f"--config={file} cannot be read: {path} is no file; bundled: {', '.join(names)}"]
  try:
    rules = schema.rules_of(config_files.load([f"--config={file}"]))
  except Exception as error:
    return [f"--config={file} cannot be read: {' '.join(str(error.__cause__ or error).split())}"]
  good, lines = [], []
  for override in overrides:
    path = override.partition(".")[2].partition("=")[0]
    try:
      config_files.load([f"--config={file}", override])
      good.append(override)
    except LookupError:
      lines.append(f"Unknown key config.{path}{nearest(path, rules)}")
    except Exception as error:
      why = f"expected {rules[path].expected}" if path in rules else str(error)
      lines.append(f"{override.lstrip('-')}: {why}")
  config = config_files.load([f"--config={file}", *good])
  return lines + schema.mistakes(config)
