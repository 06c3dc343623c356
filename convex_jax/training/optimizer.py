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
  "rmsprop": lambda c: optax.chain(  # As in TensorFlow: EfficientNet's.
    optax.scale_by_rms(c.b2, eps=1e-3, initial_scale=1.0, eps_in_sqrt=True),
    optax.trace(c.momentum),
  ),
}


# From the rate, the config, and the numbers of all steps and of those after the warm-up.
SCHEDULES = {
  "constant": lambda rate, c, total, steps: optax.constant_schedule(rate),
  "linear": lambda rate, c, total, steps: optax.linear_schedule(rate, 0.0, steps),
  "cosine": lambda rate, c, total, steps: optax.cosine_decay_schedule(rate, steps),
  "exponential": lambda rate, c, total, steps: optax.exponential_decay(rate, steps, c.decay_factor),
  "step": lambda rate, c, total, steps: optax.piecewise_constant_schedule(
    rate, {int(share * total) - c.warmup_steps: c.decay_factor for share in c.decay_at}
  ),
}


def make_schedule(config: Any, num_steps: int) -> optax.Schedule:
  """Learning rate by update: linear warm-up from 0, then `config.schedule`.

  constant: the rate; linear, cosine: down to 0 at `num_steps`; exponential: down to
  `decay_factor` times the rate there; step: times `decay_factor` at each share of
  `num_steps` in `decay_at`.
  """
  rate, steps = config.learning_rate, max(num_steps - config.warmup_steps, 1)
  main = SCHEDULES[config.schedule](rate, config, num_steps, steps)
  warmup = optax.linear_schedule(0.0, rate, config.warmup_steps)
  return optax.join_schedules([warmup, main], [config.warmup_steps])


def too_few_updates(config: Any, num_steps: int) -> str | None:
  """What is wrong where a run of so many batches ends before its warm-up does; None if it does not."""
  updates = num_steps // config.accumulate
  if updates > config.warmup_steps:
    return None
  of = f" (config.optimizer.accumulate is {config.accumulate})" if config.accumulate > 1 else ""
  return (
    f"config.optimizer.warmup_steps is {config.warmup_steps}, but {num_steps:,} steps make"
    f" {updates:,} updates{of}; expected more updates than those of the warm-up"
  )


def make_optimizer(config: Any, num_steps: int, constraints: Any) -> optax.GradientTransformation:
  """The whole update rule in order: a reader sees that the projection comes last.

  `num_steps` counts batches; with `config.accumulate` = k the chain runs on the mean
  gradient of every k of them. `constraints` is `constraints.constraints_of(params)`.
  """
  num_updates = num_steps // config.accumulate
  chain = optax.chain(
    optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
    OPTIMIZERS[config.name](config),
    # Matrices and filters decay; biases, norms and scales do not.
    optax.add_decayed_weights(
      config.weight_decay, lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)
    ),
    optax.scale_by_learning_rate(make_schedule(config, num_updates)),
    enforce(constraints),  # A later link could undo it.
  )
  if config.accumulate == 1:
    return chain
  return optax.MultiSteps(chain, config.accumulate).gradient_transformation()
