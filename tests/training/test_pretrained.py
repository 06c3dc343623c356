"""Public weights for a run: how pixels are scaled, and `python -m convex_jax evaluate`."""

import os

import numpy as np
import pytest

from convex_jax import __main__
from convex_jax.data.catalog import IMAGENET
from convex_jax.errors import UserError
from convex_jax.models import catalog
from convex_jax.models.variables import apply
from convex_jax.runs.workdir import Workdir
from convex_jax.training import evaluation, loop, pretrained, schema
from tests.models.test_public import ALIKE, as_timm, official
from tests.support import of

HALF = ((0.5,), (0.5,))


@pytest.fixture
def config(tiny_config, tmp_path):
  """Of a run that starts from random weights under the official Mixer's names."""
  np.savez(tmp_path / "public.npz", **official())
  config = of(tiny_config, model__parts="base", init_from=str(tmp_path / "public.npz"), steps=1)
  config.model.update(ALIKE)
  return config


@pytest.mark.parametrize(
  "normalise,want",
  [("auto", HALF), ("half", HALF), ("unit", ((0.0,), (1.0,))), ("own", None)],
)
def test_pixels_are_scaled_as_the_file_or_the_config_has_it(normalise, want, config, few_digits):
  config.data.normalise = normalise
  public, examples = pretrained.start(config, few_digits)
  mean, std = want or few_digits.train.statistics()
  assert examples.statistics == (mean, std)
  words = pretrained.words(config, public, examples)
  assert f"mean {mean[0]:.4g} and deviation {std[0]:.4g}" in words
  assert ("networks with these names" in words) == (normalise == "auto")


def test_grey_images_are_not_scaled_as_colours_are(config, few_digits):
  config.data.normalise = "imagenet"
  assert any("has no colours" in line for line in schema.mistakes(config))
  with pytest.raises(UserError, match=r"the images have 1; set --config.data.normalise"):
    few_digits.scaled("imagenet")
  colours = few_digits.train.__class__(
    few_digits.train.images.repeat(3, -1), few_digits.train.labels
  )
  few = few_digits.__class__(colours, None, colours, few_digits.class_names)
  assert few.scaled("imagenet").statistics == IMAGENET


def test_a_run_without_a_file_may_choose_and_one_that_is_resumed_may_not(
  config, few_digits, tmp_path
):
  folder = Workdir(str(tmp_path / "run"))
  own = few_digits.train.statistics()
  for normalise, want in (("auto", own), ("own", own), ("half", HALF)):
    chosen = of(config, init_from="", data__normalise=normalise)
    public, examples = loop._scaled(chosen, folder, few_digits)
    assert public is None and examples.statistics == want
  # A run that was started before files had a scaling goes on with what it began with.
  os.makedirs(os.path.join(folder.checkpoints, "3"))
  folder.describe(config, few_digits, 1)
  public, examples = loop._scaled(config, folder, few_digits)
  assert public is None and examples.statistics == own


def test_a_file_is_evaluated_as_its_network_has_it(config, few_digits):
  """Against ranks and losses of all logits, in numpy."""
  public, examples = pretrained.start(config, few_digits)
  got = evaluation.evaluate(config, public, examples)
  test = few_digits.test
  images = (test.images / np.float32(255) - 0.5) / np.float32(0.5)
  logits = np.asarray(apply(catalog.build(config.model, 10), public.weights, images))
  ranks = (logits > logits[np.arange(50), test.labels][:, None]).sum(1)
  assert got["accuracy"] == pytest.approx(np.mean(ranks < 1))
  assert got["top5_accuracy"] == pytest.approx(np.mean(ranks < 5))
  assert 0 < got["accuracy"] < got["top5_accuracy"] < 1
  loss = np.log(np.exp(logits).sum(1)) - logits[np.arange(50), test.labels]
  assert got["loss"] == pytest.approx(loss.mean(), rel=1e-4)


def command(config, *more):
  sizes = [f"--config.model.{key}={value}" for key, value in {"size": "tiny", **ALIKE}.items()]
  data, file = f"--config.data.dir={config.data.dir}", f"--config.init_from={config.init_from}"
  return __main__.main(["evaluate", "--config=configs/mixer.py:digits", data, file, *sizes, *more])


def test_the_command_prints_the_accuracies_and_what_was_assumed(config, capsys):
  assert command(config) == 0
  out = capsys.readouterr().out
  for words in ("top-1", "top-5", "360", "mean 0.5 and deviation 0.5", "30 arrays imported"):
    assert words in out


def test_what_cannot_be_evaluated_is_refused(config, capsys, tmp_path):
  headless = {key: array for key, array in official().items() if "head/" not in key}
  np.savez(tmp_path / "headless.npz", **headless)
  for more, words in (
    ((f"--config.init_from={tmp_path / 'headless.npz'}",), "params/head/kernel"),
    (("--config.init_from=",), "expected a file of public weights"),
    (("--config.init_from=/nowhere.npz",), "/nowhere.npz does not exist"),
    (("--config.data.normalise=hlaf",), "Did you mean 'half'"),
    (("--config.model.parts=ioc",), "lacks weights of this network"),
  ):
    assert command(config, *more) == 2
    assert words in capsys.readouterr().err
  assert __main__.main(["evaluate"]) == 2


def test_the_scaling_of_timms_file_is_that_of_the_official_one(config, few_digits, tmp_path):
  np.savez(tmp_path / "timm.npz", **as_timm(official()))
  config = of(config, init_from=str(tmp_path / "timm.npz"), model__gelu="erf")
  public, examples = pretrained.start(config, few_digits)
  assert public.pixels == "half" and examples.statistics == HALF
