"""The update rule: schedule, and the chain in order, projection last."""

from typing import Any

import jax
import optax

from convex_jax.models.constraints import enforce

OPTIMIZERS = {
  "adam": lambda c: optax.scale_by_adam(c.b1, c.b2),
  "adamw": lambda c: optax.scale_by_adam(c.b1, c.b2),  # Decay: the chain's next link.
  "sgd": lambda c: optax.trace(c.momentum, nesterov=True),
  "lion": lambda c: optax.scale_by_lion(c.b1, c.b2),
  "rmsprop": lambda c: optax.chain(_scale_by_rms(c.b2), optax.trace(c.momentum)),
}


def _scale_by_rms(decay):
  """As in TensorFlow: epsilon inside the root, averages that start from 1 (EfficientNet's)."""
  return optax.scale_by_rms(decay, eps=1e-3, initial_scale=1.0, eps_in_sqrt=True)


def _constant(rate, config, num_steps):
  return optax.constant_schedule(rate)


def _cosine(rate, config, num_steps):
  return optax.cosine_decay_schedule(rate, max(num_steps - config.warmup_steps, 1))


def _linear(rate, config, num_steps):
  return optax.linear_schedule(rate, 0.0, max(num_steps - config.warmup_steps, 1))


def _exponential(rate, config, num_steps):
  steps = max(num_steps - config.warmup_steps, 1)
  return optax.exponential_decay(rate, steps, config.decay_factor)


def _step(rate, config, num_steps):
  at = [int(share * num_steps) - config.warmup_steps for share in config.decay_at]
  return optax.piecewise_constant_schedule(rate, {step: config.decay_factor for step in at})


SCHEDULES = {
  "constant": _constant,
  "linear": _linear,
  "cosine": _cosine,
  "exponential": _exponential,
  "step": _step,
}


def make_schedule(config: Any, num_steps: int) -> optax.Schedule:
  """Learning rate by update: linear warm-up from 0, then `config.schedule`.

  constant: the rate; linear, cosine: down to 0 at `num_steps`; exponential: down to
  `decay_factor` times the rate there; step: times `decay_factor` at each share of
  `num_steps` in `decay_at`.
  """
  rate = config.learning_rate
  main = SCHEDULES[config.schedule](rate, config, num_steps)
  warmup = optax.linear_schedule(0.0, rate, config.warmup_steps)
  return optax.join_schedules([warmup, main], [config.warmup_steps])


def is_matrix(params: Any) -> Any:
  """Which parameters decay: matrices and filters, not biases, norms or scales."""
  return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def make_optimizer(config: Any, num_steps: int, constraints: Any) -> optax.GradientTransformation:
  """The whole update rule in order: a reader sees that the projection comes last.

  `num_steps` counts batches; with `config.accumulate` = k the chain runs on the mean
  gradient of every k of them. `constraints` is `constraints.constraints_of(params)`.
  """
  num_updates = num_steps // config.accumulate
  clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
  chain = optax.chain(
    clip,
    OPTIMIZERS[config.name](config),
    optax.add_decayed_weights(config.weight_decay, mask=is_matrix),
    optax.scale_by_learning_rate(make_schedule(config, num_updates)),
    enforce(constraints),  # A later link could undo it.
  )
  if config.accumulate == 1:
    return chain
  return optax.MultiSteps(chain, config.accumulate).gradient_transformation()
