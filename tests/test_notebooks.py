"""The notebooks run from top to bottom; what they need is embedded."""

import os
import pathlib

import pytest

from tests.support import ROOT

NOTEBOOKS = sorted((ROOT / "experiments" / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A checkout of its own: what a notebook trains does not go into the user's."""
  root = tmp_path_factory.mktemp("checkout")
  (root / "configs").symlink_to(ROOT / "configs")
  (root / "notebooks").mkdir()
  return root / "notebooks"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: pathlib.Path, folder, data_dir, monkeypatch):
  nbclient, nbformat = (pytest.importorskip(name) for name in ("nbclient", "nbformat"))

  monkeypatch.setenv("TFDS_DATA_DIR", data_dir)
  monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
  notebook = nbformat.read(path, as_version=4)
  where = {"metadata": {"path": str(folder)}}
  nbclient.NotebookClient(notebook, timeout=600, resources=where).execute()  # Raises on errors.
  outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
  pictures = [out for out in outputs if "image/png" in out.get("data", {})]
  assert outputs and (path.stem == "own_twin" or pictures)
  assert not any(out.get("name") == "stderr" and "Traceback" in out["text"] for out in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs(path):
  nbformat = pytest.importorskip("nbformat")
  notebook = nbformat.read(path, as_version=4)
  assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
  assert os.path.getsize(path) < 20_000
