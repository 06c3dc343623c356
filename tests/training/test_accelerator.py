"""What only an accelerator can show: `pytest -m accelerator`, skipped where JAX has none.

`CONVEX_JAX_TEST_DEVICE=cpu` puts a CPU in its place, to check the tests themselves.
"""

import importlib
import os

import jax
import numpy as np
import pytest

import convex_jax
from convex_jax import mesh
from convex_jax.models import catalog
from convex_jax.training import loop, program
from tests.support import of

pytestmark = pytest.mark.accelerator
CALLS = [range(i, i + 1) for i in range(3)]


@pytest.fixture(scope="module")
def device():
  """The accelerator; what it compiles is optimised, unlike in other tests."""
  stand_in = os.environ.get("CONVEX_JAX_TEST_DEVICE") == "cpu"
  if jax.default_backend() == "cpu" and not stand_in:
    pytest.skip("JAX has no accelerator here")
  jax.config.update("jax_disable_most_optimizations", stand_in)
  yield jax.devices()[-1]
  jax.config.update("jax_disable_most_optimizations", True)  # As tests/conftest.py has it.


def small(name, parts, data_dir, **changes):
  """A config of a network of a few weights on digits, without dropout."""
  config = importlib.import_module(f"configs.{name}").get_config("digits")
  own = {key: None for key, value in config.model.items() if key in catalog.fields(name)}
  fixed = {key: 0.0 for key in ("dropout", "drop_path") if key in own}
  config.model.update(own | fixed | {"size": "tiny", "parts": parts})
  config.data.dir = data_dir
  return of(config, batch_size=16, steps=6, optimizer__warmup_steps=0, **changes)


def trained(config, examples, device):
  """The program, the state after some steps, and the losses."""
  with jax.default_device(device):
    job = program.Program(config, examples, mesh.make_mesh([device]))
    state, losses = job.init(), []
    for steps in CALLS:
      state, metrics = job.train_call(state, job.batches(steps))
      losses += np.atleast_1d(metrics["loss"]).tolist()
  return job, state, losses


@pytest.mark.parametrize("parts", ["base", "ioc"])
@pytest.mark.parametrize("name", catalog.names())
def test_steps_equal_those_of_a_cpu(device, few_digits, data_dir, name, parts):
  config = small(name, parts, data_dir, optimizer__name="sgd", optimizer__learning_rate=1e-2)
  with jax.default_matmul_precision("highest"):
    _, want, losses = trained(config, few_digits, jax.devices("cpu")[0])
    _, got, other = trained(config, few_digits, device)
  np.testing.assert_allclose(other, losses, rtol=1e-3)
  pairs = zip(jax.tree.leaves(got.params), jax.tree.leaves(want.params), strict=True)
  for a, b in pairs:
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("name", ["mixer", "mlp"])
def test_a_run_trained_in_bfloat16_is_proved(device, tmp_path, data_dir, name):
  config = small(name, "ioc", data_dir, dtype="bfloat16", data__train_fraction=0.2)
  with jax.default_device(device):
    loop.run(config, str(tmp_path))
  run = convex_jax.load(str(tmp_path))
  assert run.certificate["verdict"] == "PROVED"


def test_steps_compile_once_and_their_memory_does_not_grow(device, few_digits, data_dir):
  config = small("mixer", "ioc", data_dir)
  job, state, _ = trained(config, few_digits, device)

  def in_use():
    stats = device.memory_stats()
    return stats["bytes_in_use"] if stats else sum(a.nbytes for a in jax.live_arrays())

  used = []
  with jax.default_device(device):  # It is a part of what a program is found by.
    for steps in [*CALLS, *CALLS]:
      state, metrics = job.train_call(state, job.batches(steps))
      jax.block_until_ready(metrics)
      used.append(in_use())
  assert job._train_call._cache_size() == 1
  assert max(used[2:]) <= max(used[:2])  # The state is donated; no step leaves anything behind.
