"""The device's part of a run: state, one update, one evaluation. Pure functions.

Under `jax.jit` over a mesh the batch is one global array, so that a mean runs over
every device and BatchNorm sees the global batch: no collective is written here. Under
`jax.pmap` or `jax.shard_map` give the mapped axis as `axis_name`, and to `parts.Numerics` for
the same update; without the latter BatchNorm sees each device's part of the batch.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import lax

from convex_jax import mesh as meshes
from convex_jax.models import constraints
from convex_jax.models.variables import apply, init_variables
from convex_jax.training.metrics import Evaluation

Batch = dict[str, jax.Array]
SETTLED = 50  # Losses, before one can be a spike.
_DROPOUT, _MIX, _DIRECTION = 2**32 - 1, 2**32 - 2, 2**32 - 3  # No example's position in a run.
Augment = Callable[[jax.Array, jax.Array], jax.Array]
Mix = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


class State(struct.PyTreeNode):
  """All that a run is at one step; `ema` is None unless weights are averaged."""

  step: jax.Array
  params: Any
  stats: Any  # BatchNorm's running averages; an empty dict without BatchNorm.
  opt_state: Any
  ema: Any  # Averages of {"params": ..., "stats": ...}.
  losses: jax.Array  # (3,): number, running mean and variance of the losses.

  def weights(self) -> dict[str, Any]:
    """What evaluation, a checkpoint's reader and a certificate use."""
    return self.ema if self.ema is not None else {"params": self.params, "stats": self.stats}

  def items(self) -> dict[str, Any]:
    """The items of a checkpoint, see `runs.checkpoints`."""
    training = {"step": self.step, "opt_state": self.opt_state, "losses": self.losses}
    items = {"weights": {"params": self.params, "stats": self.stats}, "training": training}
    return items if self.ema is None else {**items, "ema": self.ema}

  @classmethod
  def of(cls, items: dict[str, Any]) -> "State":
    """The state whose `items` these are."""
    return cls(**items["weights"], **items["training"], ema=items.get("ema"))


def init_state(
  model: nn.Module,
  tx: optax.GradientTransformation,
  key: jax.Array,
  image_shape: tuple[int, ...],
  average: bool,
) -> State:
  """The state at step 0 for normalised images of `image_shape` (H, W, C)."""
  weights = nn.meta.unbox(init_variables(model, key, image_shape))
  ema = jax.tree.map(jnp.copy, weights) if average else None
  start, opt_state = jnp.zeros((), jnp.int32), tx.init(weights["params"])
  return State(start, weights["params"], weights["stats"], opt_state, ema, jnp.zeros(3))


def start_from(state: State, weights: dict[str, Any]) -> State:
  """A fresh state with other initial weights {"params", "stats"}; no optimizer here minds."""
  ema = None if state.ema is None else jax.tree.map(jnp.copy, weights)
  return state.replace(**weights, ema=ema)


def targets(label_B: jax.Array, classes: int, smoothing: float) -> jax.Array:
  """(1 - s) y + s / K, y one of K."""
  return optax.smooth_labels(jax.nn.one_hot(label_B, classes), smoothing)


def cross_entropy(logits_BxK: jax.Array, label_B: jax.Array, smoothing: float = 0.0) -> jax.Array:
  """Softmax cross-entropy of each example, in nats; see `targets`."""
  return optax.softmax_cross_entropy(logits_BxK, targets(label_B, logits_BxK.shape[-1], smoothing))


def directions(keys_B: jax.Array, classes: int) -> jax.Array:
  """A random vector (B, classes) an example, uniform on the sphere of radius sqrt(classes).

  The mean of |v^T J|^2 is |J|^2, the sum of squares of a Jacobian J (classes, D).
  """
  v_BxK = jax.vmap(lambda key: jax.random.normal(key, (classes,)))(keys_B)
  return v_BxK * (classes**0.5 / jnp.linalg.norm(v_BxK, axis=-1, keepdims=True))


def _seen(losses: jax.Array, loss: jax.Array) -> jax.Array:
  """The running moments with one loss more: means of all, from the 100th on exponential."""
  number, mean, variance = losses
  share = 1 / jnp.minimum(number + 1, 100)
  away = loss - mean
  return jnp.stack([number + 1, mean + share * away, (1 - share) * (variance + share * away**2)])


def _is_spike(losses: jax.Array, loss: jax.Array, deviations: float) -> jax.Array:
  number, mean, variance = losses
  return (number >= SETTLED) & (loss > mean + deviations * jnp.sqrt(variance))


def train_step(
  state: State,
  batch: Batch,
  *,
  model: nn.Module,
  tx: optax.GradientTransformation,
  augment: Augment,
  key: jax.Array,
  label_smoothing: float,
  ema_decay: float,
  skip_spikes: float = 0.0,
  mix: Mix | None = None,
  penalty: Callable[[Any], jax.Array] | None = None,
  jacobian_penalty: float = 0.0,
  tagged: Any = None,
  axis_name: str | tuple[str, ...] | None = None,
) -> tuple[State, dict[str, jax.Array]]:
  """One update on a batch {image_BxHxWxC uint8, label_B, position_B}.

  Augmentation is a function of `key` and of an example's position in the run, dropout of
  `key` and the step, `mix` (of images and targets) too: none depends on an interruption nor,
  but for the latter two under a mapped axis, on the number of devices.

  The loss is the cross-entropy, plus `penalty` of the parameters, plus `jacobian_penalty` / 2 times
  the mean of |J|^2. J is the Jacobian of an example's logits in its normalised image, of which a
  step computes |v^T J|^2 for one random v an example (Hoffman, Roberts and Yaida 2019, "Robust
  Learning with Jacobian Regularization", section 2.3), at up to twice its cost. It is J in
  training: where there is a BatchNorm, its statistics depend on the image as well.

  `tagged` is `constraints.constraints_of` the parameters, needed where the state averages them.

  A loss or gradient that is not finite, or, with `skip_spikes` = k above 0, a loss more than k
  standard deviations above its running mean, changes nothing but the step.
  """
  keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, batch["position"])
  image_BxHxWxC = augment(keys_B, batch["image"])
  target_BxK = targets(batch["label"], model.classes, label_smoothing)
  if mix is not None:
    mix_key = jax.random.fold_in(jax.random.fold_in(key, _MIX), state.step)
    image_BxHxWxC, target_BxK = mix(mix_key, image_BxHxWxC, target_BxK)
  dropout_key = jax.random.fold_in(jax.random.fold_in(key, _DROPOUT), state.step)
  if axis_name is not None:  # Each device has its own part of the batch, so its own masks.
    dropout_key = jax.random.fold_in(dropout_key, lax.axis_index(axis_name))

  def forward(params, image_BxHxWxC):
    return model.apply(
      {"params": params, "batch_stats": state.stats},
      image_BxHxWxC,
      train=True,
      mutable=["batch_stats"],
      rngs={"dropout": dropout_key},
    )

  def loss_fn(params):
    network, others = functools.partial(forward, params), 0.0
    if penalty is not None:
      others += penalty(params)
    if jacobian_penalty:
      logits_BxK, backward, mutated = jax.vjp(network, image_BxHxWxC, has_aux=True)
      direction_key = jax.random.fold_in(key, _DIRECTION)
      keys_B = jax.vmap(jax.random.fold_in, (None, 0))(direction_key, batch["position"])
      v_BxK = directions(keys_B, model.classes).astype(logits_BxK.dtype)
      slope_BxHxWxC = backward(v_BxK)[0].astype(jnp.float32)
      others += jacobian_penalty / 2 * jnp.sum(slope_BxHxWxC**2) / len(slope_BxHxWxC)
    else:
      logits_BxK, mutated = network(image_BxHxWxC)
    loss = optax.softmax_cross_entropy(logits_BxK, target_BxK).mean() + others
    return loss, (logits_BxK, mutated.get("batch_stats", {}))

  (loss, (logits_BxK, stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
  accuracy = jnp.mean(logits_BxK.argmax(-1) == batch["label"])
  if axis_name is not None:
    grads, loss, accuracy, stats = lax.pmean((grads, loss, accuracy, stats), axis_name)
  gradient_norm = _norm(grads)
  fine = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
  if skip_spikes:
    fine &= ~_is_spike(state.losses, loss, skip_spikes)

  def update(state, grads, stats):
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
      # Short runs: the average forgets its start, as 1 / t, before `ema_decay` takes over.
      decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
      ema: Any = optax.incremental_update({"params": params, "stats": stats}, ema, 1 - decay)
      ema |= {"params": constraints.averaged(ema["params"], tagged)}
    return State(state.step, params, stats, opt_state, ema, _seen(state.losses, loss))

  # Not `optax.apply_if_finite`: BatchNorm's averages, and those of weights, are to wait as well.
  if meshes.target()[0] == "cpu":
    # `jnp.where` is an eighth slower in a wide MLP, for copies of what may be kept.
    state = lax.cond(fine, update, lambda state, *_: state, state, grads, stats)
  else:  # Into a conditional nothing fuses: gradients would be stored in float32, and read again.
    changed = update(state, grads, stats)
    state = jax.tree.map(functools.partial(jnp.where, fine), changed, state)
  metrics = {"loss": loss, "accuracy": accuracy, "gradient_norm": gradient_norm}
  return state.replace(step=state.step + 1), metrics | {"skipped": ~fine}


def _norm(grads: Any) -> jax.Array:
  """`optax.tree.norm`, on one CPU device in a form that makes an MLP's step 4 to 11 % faster.

  XLA leaves plain sums to YNNPACK, which sums the squares of a large matrix slowly in a step. Sums by
  max(a + b, 0), which is a + b here, it compiles itself.
  """
  # Halved: of the gradients themselves XLA would store the squares, for which Adam asks too.
  halves = optax.tree.scale(0.5, grads)
  if meshes.target() != ("cpu", 1):
    return 2 * optax.tree.norm(halves)

  def sum_of_squares(x):
    if not x.ndim:
      return x * x
    zero = np.zeros((), x.dtype)
    return jnp.sum(lax.reduce(x * x, zero, lambda a, b: jnp.maximum(a + b, 0), (x.ndim - 1,)))

  return 2 * jnp.sqrt(sum(map(sum_of_squares, jax.tree.leaves(halves))))


def eval_step(
  weights: dict[str, Any],
  batch: Batch,
  *,
  model: nn.Module,
  prepare: Callable[[jax.Array], jax.Array],
  evaluation: type[Any] = Evaluation,
) -> Any:
  """Masked sums over a batch {image_BxHxWxC uint8, label_B, mask_B} at inference."""
  logits_BxK = apply(model, weights, prepare(batch["image"]))
  return evaluation.single_from_model_output(
    loss=cross_entropy(logits_BxK, batch["label"]),
    logits=logits_BxK,
    labels=batch["label"],
    mask=batch["mask"],
  )
