"""The parts of the site that are made from the code, so that they cannot fall behind it.

`conf.py` calls `write` before each build. Nothing here needs Sphinx: the tests call the same
functions. Tables are Markdown, which pages include from `_generated/`.
"""

import ast
import importlib
import inspect
import io
import pathlib
import pkgutil
import shutil
import sys
import tokenize
from collections.abc import Iterator
from types import ModuleType
from typing import Any

DOCS = pathlib.Path(__file__).parent
ROOT = DOCS.parent
if str(ROOT) not in sys.path:  # For `configs` and `experiments`.
  sys.path.insert(0, str(ROOT))

PACKAGE = "convex_jax"
ROOMS = ("proof", "models", "data", "runs", "training", "studies")
# A primitive's rule in words, for groups of primitives. A test finds what is not named here.
PRIMITIVES = {
  "sums: curvature is kept where all terms agree": "add add_any sub reduce_sum cumsum"
  " reduce_window_sum scatter-add scatter-sub",
  "products with known numbers: curvature is kept or turned by their signs, entry by entry": "mul div dot_general conv_general_dilated neg scatter-mul",
  "products of affine values: convex where they sum up to a positive semidefinite quadratic form": "mul dot_general",
  "by a known matrix, whose inverse has entries of any sign: affine of affine": "triangular_solve",
  "maxima: convex of convex": "max reduce_max reduce_window_max cummax scatter-max",
  "minima: concave of concave": "min reduce_min reduce_window_min cummin scatter-min",
  "convex and increasing": "exp exp2 expm1",
  "convex of affine, and of a convex value >= 0": "abs square integer_pow pow cosh",
  "convex and increasing of a convex value >= 0": "sinh",
  "norms: roots of sums of such powers": "sqrt cbrt pow",
  "convex of convex, as log(exp(a) + exp(b)) is": "logaddexp cumlogsumexp",
  "as part of a log-sum-exp of convex values": "log log1p log2",
  "convex where nothing is cut off above, concave where nothing is cut off below": "clamp",
  "a choice by a known condition; or an activation with kinks, judged by what it computes": "select_n",
  "moves elements: curvature moves with them": "broadcast_in_dim reshape transpose squeeze"
  " expand_dims rev slice dynamic_slice gather scatter dynamic_update_slice concatenate stack tile"
  " pad",
}


def table(heads: list[str], rows: list[list[str]]) -> str:
  """A Markdown table; pipes inside cells are escaped."""
  cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
  return "\n".join("| " + " | ".join(row) + " |" for row in [heads, ["---"] * len(heads), *cells])


def code(value: Any) -> str:
  """A value as a user would type it, in code type."""
  return f"`{value!r}`" if value != "" else '`""`'


# Tables.


def comments(module: ModuleType) -> dict[str, str]:
  """{key: comment} of the lines `config.KEY = VALUE  # comment` of a config file.

  The comment is that of the statement's own lines, after any comment lines right above it.
  """
  source = inspect.getsource(module)
  by_line: dict[int, str] = {}
  alone: set[int] = set()
  for token in tokenize.generate_tokens(io.StringIO(source).readline):
    if token.type == tokenize.COMMENT:
      by_line[token.start[0]] = token.string.lstrip("# ").strip()
      if token.line.strip().startswith("#"):
        alone.add(token.start[0])
  found = {}
  for node in ast.walk(ast.parse(source)):
    if not isinstance(node, ast.Assign):
      continue
    key = ast.unparse(node.targets[0]).removeprefix("config.")
    start = node.lineno
    while start - 1 in alone:
      start -= 1
    words = [by_line[n] for n in range(start, (node.end_lineno or start) + 1) if n in by_line]
    found[key] = " ".join(words) or found.get(key, "")  # Said once, where it is set first.
  return found


def config_keys() -> dict[str, tuple[Any, str, str]]:
  """{key: (default, expected, comment)} of every key of configs/base.py."""
  from configs import base
  from convex_jax.config_files import flatten
  from convex_jax.training.schema import RULES

  said = comments(base)
  order = list(said)
  values = sorted(
    flatten(base.get_config()), key=lambda kv: order.index(kv[0]) if kv[0] in said else len(order)
  )
  return {key: (value, RULES[key].expected, said.get(key, "")) for key, value in values}


def config_tables() -> str:
  """A table for each section of the config."""
  keys = config_keys()
  sections = ["", *dict.fromkeys(key.split(".")[0] for key in keys if "." in key)]
  out = []
  for section in sections:
    rows = [
      [f"`{key}`", code(value), expected, comment]
      for key, (value, expected, comment) in keys.items()
      if key.rpartition(".")[0] == section
    ]
    title = f"`{section}`" if section else "The run"
    out += [f"## {title}", "", table(["key", "default", "expected", "meaning"], rows), ""]
  return "\n".join(out)


def architecture_keys() -> str:
  """A table of the further keys of `model` that each architecture has."""
  from convex_jax.models import catalog
  from convex_jax.training.schema import field_rule

  out = []
  for name in catalog.names():
    said = comments(importlib.import_module(f"configs.{name}"))
    rows = [
      [f"`model.{key}`", field_rule(field).expected, said.get(f"model.{key}", "")]
      for key, field in catalog.fields(name).items()
    ]
    out += [f"### `{name}`", "", table(["key", "expected", "meaning"], rows), ""]
  return "\n".join(out)


def data_sets() -> str:
  """A table of the data sets."""
  from convex_jax.data.catalog import DATASETS

  rows = []
  for name, entry in DATASETS.items():
    shape = " x ".join(map(str, entry.image_shape[:2]))
    size = "any" if entry.synthetic else "natural" if entry.is_natural else shape
    counts = [f"{n:,}" for n in (entry.train_examples, entry.test_examples)]
    rows.append([f"`{name}`", f"{entry.classes:,}", size, str(entry.image_shape[2]), *counts])
  return table(["name", "classes", "size (px)", "channels", "training", "test"], rows)


def exit_codes() -> str:
  """A table of how a command can end."""
  from convex_jax import errors

  def below(cls: type) -> Iterator[type]:
    for sub in cls.__subclasses__():
      yield sub
      yield from below(sub)

  rows = [["0", "", "Done."]]
  rows.append([str(errors.NOT_PROVED), "", "The network could not be proved convex."])
  for cls in below(errors.Ended):
    if cls.__module__ == errors.__name__:
      meaning = " ".join(inspect.getdoc(cls).split())
      rows.append([str(cls.code), f"`{cls.__name__}`", meaning])
  rows.sort(key=lambda row: (int(row[0]), row[1]))
  return table(["exit code", "exception", "meaning"], rows)


def commands() -> str:
  """A table of `python -m convex_jax COMMAND`."""
  from convex_jax.__main__ import COMMANDS

  rows = [[f"`python -m convex_jax {name}`", what] for name, (_, what) in COMMANDS.items()]
  return table(["command", "what it does"], rows)


def primitives() -> str:
  """A table of every primitive that the proof has a rule for."""
  from convex_jax.proof.rules import RULES

  groups = {
    what: [name for name in names.split() if name in RULES] for what, names in PRIMITIVES.items()
  }
  rows = [[what, " ".join(f"`{n}`" for n in names)] for what, names in groups.items() if names]
  return table(["rule", "primitives"], rows)


def sizes() -> str:
  """A table of architectures: their sizes, and what keeps the `paper` twin from being convex."""
  from convex_jax.models import catalog

  rows = []
  for name in catalog.names():
    module = catalog.module_of(name)
    named = [size for size in module.SIZES if size != "tiny"]
    pixels = sorted({module.IMAGE_SIZE[size] for size in named})
    between = str(pixels[0]) if len(pixels) == 1 else f"{pixels[0]} to {pixels[-1]}"
    listed = " ".join(f"`{size}`" for size in named)
    rows.append([f"`{name}`", listed, between, module.PAPER_BREAKS or "nothing"])
  return table(["`model.name`", "`model.size`", "image (px)", "`paper` is not convex for"], rows)


def experiment_table(name: str) -> str:
  """A table that `experiments.readme` makes of measured results; links from the site's root."""
  make = getattr(importlib.import_module("experiments.readme"), name)
  if inspect.signature(make).parameters:
    return make("/experiments")
  return make().replace("](experiments/", "](/experiments/")


TABLES = {
  "config_keys": config_tables,
  "architecture_keys": architecture_keys,
  "data_sets": data_sets,
  "exit_codes": exit_codes,
  "commands": commands,
  "primitives": primitives,
  "sizes": sizes,
  "claims": lambda: experiment_table("claims"),
  "speed": lambda: experiment_table("speed"),
  "faults": lambda: experiment_table("faults"),
}


# Pages.


def modules() -> list[str]:
  """Every public module of the package, by its dotted name."""
  package = importlib.import_module(PACKAGE)
  names = [m.name for m in pkgutil.walk_packages(package.__path__, f"{PACKAGE}.")]
  return [name for name in names if not any(part.startswith("_") for part in name.split("."))]


def api_pages() -> dict[str, str]:
  """{file name: text}: a page for each module, a page for each package that lists its modules."""
  names = modules()
  pages = {}
  for name in names:
    short = name.removeprefix(f"{PACKAGE}.")
    inner = [other for other in names if other.rpartition(".")[0] == name]
    pages[f"{name}.md"] = (
      f"# {short}\n\n```{{eval-rst}}\n.. automodule:: {name}\n   :members:\n```\n" + _toc(inner)
    )
  face = importlib.import_module(PACKAGE)
  things = {n: getattr(face, n) for n in face.__all__ if not n.startswith("_")}
  rooms = [f"{PACKAGE}.{room}" for room in ROOMS if f"{PACKAGE}.{room}" in names]
  ground = [name for name in names if name.count(".") == 1 and name not in rooms]
  pages["index.md"] = "\n".join(
    [
      "# API reference\n",
      "These names can be imported from `convex_jax` itself:\n",
      *(
        f"- {{py:obj}}`{n} <{thing.__module__}.{thing.__qualname__}>`: {_summary(thing)}"
        for n, thing in things.items()
      ),
      "\nEverything else is imported from its module. A package imports only those listed before",
      "it, and `proof` needs JAX, NumPy and SciPy alone.\n",
      *(f"- [{n.partition('.')[2]}]({n}.md): {_first_line(n)}" for n in rooms),
      "\nModules outside of these packages:\n",
      *(f"- [{n.partition('.')[2]}]({n}.md): {_first_line(n)}" for n in ground),
      _toc([*rooms, *ground]).replace(":maxdepth: 1", ":hidden:"),
    ]
  )
  return pages


def _first_line(name: str) -> str:
  return _summary(importlib.import_module(name))


def _summary(thing: Any) -> str:
  return (inspect.getdoc(thing) or "").partition("\n\n")[0].replace("\n", " ")


def _toc(names: list[str]) -> str:
  return "\n```{toctree}\n:maxdepth: 1\n\n" + "\n".join(names) + "\n```\n" if names else ""


def _replace(path: pathlib.Path, text: str) -> None:
  """Writes a file only where its text changed, so that Sphinx rebuilds what changed."""
  if not path.exists() or path.read_text() != text:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def copy_experiments() -> None:
  """Experiments and notebooks, as pages."""
  source = ROOT / "experiments"
  for path in sorted(source.glob("*/*")):
    target = DOCS / path.relative_to(ROOT)
    if path.suffix == ".ipynb":
      target = DOCS / "notebooks" / path.name
    elif path.name == "report.md":
      _replace(target, "---\norphan: true\n---\n" + path.read_text())
      continue
    elif path.suffix not in (".png", ".csv") and path.name != "README.md":
      continue
    if not target.exists() or target.read_bytes() != path.read_bytes():
      target.parent.mkdir(parents=True, exist_ok=True)
      shutil.copyfile(path, target)


def write() -> None:
  """Writes every generated table and page."""
  for name, make in TABLES.items():
    _replace(DOCS / "_generated" / f"{name}.md", make() + "\n")
  pages = api_pages()
  for old in (DOCS / "api").glob("*.md"):
    if old.name not in pages:
      old.unlink()
  for name, text in pages.items():
    _replace(DOCS / "api" / name, text)
  copy_experiments()
