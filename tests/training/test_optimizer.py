"""The chain: against optax's own optimizers, and schedules against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from convex_jax.training import optimizer

PARAMS = {"kernel": jnp.linspace(-1, 1, 12).reshape(3, 4), "bias": jnp.ones(4)}
FREE = {"kernel": "free", "bias": "free"}


def config_of(**changes):
  config = base.get_config().optimizer
  config.update(changes)
  return config


def run(tx, steps=5):
  params, state = PARAMS, tx.init(PARAMS)
  for i in range(steps):
    grads = jax.tree.map(lambda p, i=i: jnp.sin(3 * p + i), params)
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
  return params


@pytest.mark.parametrize(
  "config,oracle",
  [
    (dict(name="adam"), optax.adam(1e-3)),
    (
      dict(name="adamw", weight_decay=0.1),
      optax.adamw(1e-3, weight_decay=0.1, mask=dict(kernel=True, bias=False)),
    ),
    (dict(name="sgd"), optax.sgd(1e-3, momentum=0.9, nesterov=True)),
    (
      dict(name="lion", b2=0.99, weight_decay=0.01),
      optax.lion(1e-3, weight_decay=0.01, mask=dict(kernel=True, bias=False)),
    ),
    (
      dict(name="rmsprop", b2=0.95),
      optax.rmsprop(1e-3, decay=0.95, eps=1e-3, initial_scale=1.0, momentum=0.9),
    ),
    (
      dict(name="adam", clip_norm=0.1),
      optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-3)),
    ),
    (dict(name="sgd", accumulate=2), optax.MultiSteps(optax.sgd(1e-3, 0.9, True), 2)),
  ],
)
def test_the_chain_is_optax_where_nothing_is_constrained(config, oracle):
  got, want = run(optimizer.make_optimizer(config_of(**config), 10, FREE)), run(oracle)
  jax.tree.map(lambda a, b: np.testing.assert_array_max_ulp(a, b, 2), got, want)


def test_biases_and_norms_do_not_decay():
  config = config_of(name="adamw", weight_decay=10.0)
  tx = optimizer.make_optimizer(config, 10, FREE)
  updates, _ = tx.update(jax.tree.map(jnp.zeros_like, PARAMS), tx.init(PARAMS), PARAMS)
  assert not updates["bias"].any()
  np.testing.assert_allclose(updates["kernel"], -1e-2 * PARAMS["kernel"], rtol=1e-6)


def test_schedules_follow_their_formulas():
  steps = np.arange(101)
  constant = optimizer.make_schedule(config_of(learning_rate=0.5), 100)
  assert set(np.asarray([constant(s) for s in steps])) == {0.5}
  cosine = optimizer.make_schedule(
    config_of(learning_rate=0.5, schedule="cosine", warmup_steps=20), 100
  )
  want = np.where(steps < 20, steps / 40, 0.25 * (1 + np.cos(np.pi * (steps - 20) / 80)))
  np.testing.assert_allclose([cosine(s) for s in steps], want, atol=1e-6)
  stepped = optimizer.make_schedule(
    config_of(learning_rate=0.5, schedule="step", warmup_steps=10), 100
  )
  for schedule, want in (
    ("linear", lambda share: 0.5 * (1 - share)),
    ("exponential", lambda share: 0.5 * 0.1**share),
  ):
    falling = optimizer.make_schedule(
      config_of(learning_rate=0.5, schedule=schedule, warmup_steps=20), 100
    )
    got = [falling(s) for s in steps[20:]]
    np.testing.assert_allclose(got, want((steps[20:] - 20) / 80), atol=1e-6)
  for at, want in ((0, 0.0), (10, 0.5), (49, 0.5), (51, 0.05), (74, 0.05), (76, 0.005)):
    assert float(stepped(at)) == pytest.approx(want, rel=1e-5), at


def test_a_schedule_counts_updates_under_accumulation():
  config = config_of(name="sgd", momentum=0.0, schedule="cosine", accumulate=4)
  tx = optimizer.make_optimizer(config, 8, FREE)  # Two updates: rate 1, then 1/2.
  grads, state, moves = {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}, tx.init(PARAMS), []
  for _ in range(8):
    updates, state = tx.update(grads, state, PARAMS)
    moves.append(float(updates["bias"][0]))
  np.testing.assert_allclose(moves, [0, 0, 0, -1e-3, 0, 0, 0, -0.5e-3], rtol=1e-6)
