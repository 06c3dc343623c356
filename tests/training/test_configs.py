"""Every config loads, is right, builds; a twin differs in its parts alone."""

import functools
import importlib
import pathlib

import jax
import pytest

from configs import binary
from convex_jax.config_files import flatten
from convex_jax.data.catalog import DATASETS
from convex_jax.models import catalog
from convex_jax.training import schema, step

CONFIGS = sorted(p.stem for p in pathlib.Path("configs").glob("*.py") if p.stem != "base")
TASKS = [  # The binary ones have their own few data sets.
  (name, dataset)
  for name in CONFIGS
  for dataset in (binary.CLASSES if name.startswith("binary") else DATASETS)
]
TASKS += [(name, f"imagenet2012,{s}") for name in ("mixer", "mixer_ioc") for s in ("S/16", "B/16")]


def get(name, *dataset):
  return importlib.import_module(f"configs.{name}").get_config(*dataset)


@functools.cache
def parameters(model, shape):
  """Their shapes; many data sets share a network and a size of image."""
  return jax.eval_shape(lambda: step.init_variables(model, jax.random.key(0), shape))["params"]


@pytest.mark.parametrize("name,dataset", TASKS)
def test_every_config_is_right_and_builds(name, dataset):
  config = get(name, dataset)
  config.lock()
  schema.check(config)
  dataset = dataset.partition(",")[0]
  assert config.data.name == dataset
  entry = DATASETS[dataset]
  shape = (config.data.image_size, config.data.image_size, entry.image_shape[-1])
  assert catalog.build(config.model, len(config.data.classes) or entry.classes)
  assert parameters(catalog.build(config.model, 10), shape)


@pytest.mark.parametrize("twin,dataset", [t for t in TASKS if t[0].endswith("_ioc")])
def test_a_twin_differs_in_parts_alone(twin, dataset):
  ours, sibling = (dict(flatten(get(name, dataset))) for name in (twin, twin[:-4]))
  differences = {key for key in ours.keys() | sibling.keys() if ours.get(key) != sibling.get(key)}
  assert differences == {"model.parts"}
  assert (ours["model.parts"], sibling["model.parts"]) == ("ioc", "base")


def test_the_default_is_the_reports_recipe():
  config = get("mixer_ioc")
  assert (config.data.name, config.data.image_size, config.epochs) == ("cifar10", 72, 100)
  assert (config.optimizer.name, config.optimizer.learning_rate) == ("adam", 1e-3)
  assert config.optimizer.schedule == "constant"


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_a_document(name):
  doc = importlib.import_module(f"configs.{name}").__doc__
  assert f"python -m convex_jax.main --config=configs/{name}.py" in doc
