"""Sphinx's settings: `make docs`.

Tables and API pages are made from the code by `generate.py` before each build. Notebooks are
run once and cached in `_build`, on the run of `make train`, which is trained where it is missing;
`DOCS_NOTEBOOKS=off make docs` shows them without results.
"""

import os
import pathlib
import re
import subprocess
import sys

DOCS = pathlib.Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import generate  # noqa: E402
from docstrings import to_rst  # noqa: E402

from convex_jax import __version__  # noqa: E402

project = "convex_jax"
author = "the convex_jax authors"
copyright = "2026, the convex_jax authors"
version = release = __version__

extensions = [
  "myst_nb",
  "sphinx.ext.autodoc",
  "sphinx.ext.mathjax",
  "sphinx.ext.napoleon",
  "sphinx_copybutton",
]
exclude_patterns = ["_build", "_generated", "**.ipynb_checkpoints"]
suppress_warnings = ["config.cache"]

nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!convex_jax\b).*")]  # Other libraries' types.

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = os.environ.get("DOCS_NOTEBOOKS", "cache")
nb_execution_cache_path = str(DOCS / "_build" / "notebooks")
nb_execution_timeout = 600  # Seconds.
nb_execution_raise_on_error = True
nb_merge_streams = True

autodoc_default_options = {"member-order": "bysource"}
autodoc_typehints = "signature"
add_module_names = False
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 80
napoleon_numpy_docstring = False
default_role = "code"

html_theme = "sphinx_book_theme"
html_title = f"convex_jax {version}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_theme_options = {
  "navbar_persistent": [],  # The sidebar has a search field.
  "home_page_in_toc": True,
  "show_navbar_depth": 1,
  "show_toc_level": 2,
  "use_download_button": False,
  "use_fullscreen_button": False,
}
copybutton_prompt_text = r"\$ |>>> "
copybutton_prompt_is_regexp = True


def setup(app):
  """Connects what runs before a build and on each docstring."""
  app.connect("builder-inited", _prepare)
  app.connect("autodoc-process-docstring", _docstring, priority=400)  # Before napoleon, 500.
  app.connect("autodoc-process-signature", _signature)


def _prepare(app):
  """Makes what is generated, and the run that the notebooks look at."""
  generate.write()
  root = DOCS.parent
  if nb_execution_mode != "off" and not (root / "runs/mixer_ioc_digits/certificate.json").exists():
    train = [sys.executable, "-m", "convex_jax.main", "--config=configs/mixer_ioc.py:digits"]
    subprocess.run(train, cwd=root, check=True)


def _docstring(app, what, name, obj, options, lines):
  lines[:] = to_rst(lines)


def _signature(app, what, name, obj, options, signature, returns):
  """Without objects as defaults, which Sphinx cannot parse, and Flax's own two arguments."""
  if signature:
    signature = re.sub(r"= <(?:[^<>]|<[^<>]*>)*>", "= ...", signature)
    signature = re.sub(r"(, )?parent: [^=]*= \.\.\., name: str \| None = None", "", signature)
  return signature, returns
