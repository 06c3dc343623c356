"""Mutants of certified twins: one thing is changed, and the certificate must notice.

A mutant is a network and its weights; `keeps` says whether it stays convex by construction.
`python -m experiments.certificate.run` lists them all.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from configs import base
from convex_jax.models import catalog
from convex_jax.models.constraints import FREE, constraints_of, enforce
from convex_jax.models.layers import BatchNorm
from convex_jax.proof.wide import in_float64
from convex_jax.training import optimizer, step
from tests.support import draws
from tests.support.midpoints import midpoint_gaps

SHAPE = (8, 8, 3)
CLASSES = 5


@dataclasses.dataclass(frozen=True)
class Mutant:
  architecture: str
  kind: str
  where: str
  keeps: bool
  function: Callable[..., jax.Array]  # Of weights, images (B, 8, 8, 3), and the dtype.
  weights: Any


def build(name):
  return catalog.create_model(name, "tiny", "ioc", CLASSES)


def infer(model, weights, x, dtype=jnp.float32):
  numerics = dataclasses.replace(model.parts.numerics, dtype=dtype)
  parts = dataclasses.replace(model.parts, numerics=numerics)
  return step.apply(model.clone(parts=parts), weights, x)


@functools.cache
def shapes(model):
  """Those of a network's variables, in their boxes."""
  return jax.eval_shape(lambda: step.init_variables(model, jax.random.key(0), SHAPE))


def feasible(model, seed=0):
  """(weights, tags): free weights of either sign, tagged ones > 0, averages other than 0 and 1."""
  boxed = shapes(model)
  kinds, rng = constraints_of(boxed["params"]), np.random.default_rng(seed)

  def draw(leaf, kind):
    value = rng.standard_normal(leaf.shape) / np.sqrt(max(1, leaf.size / leaf.shape[-1]))
    return np.float32(value if kind == FREE else np.abs(value) + 1e-3)

  params = jax.tree.map(draw, nn.meta.unbox(boxed["params"]), kinds)
  stats = jax.tree.map(lambda s: np.float32(rng.uniform(0.3, 2, s.shape)), boxed["stats"])
  return {"params": params, "stats": stats}, kinds


def paths(tree) -> list[str]:
  return ["/".join(k.key for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def changed(weights, path: str, change: Callable[[np.ndarray], Any]):
  """A copy of the weights with one parameter changed."""
  copy = jax.tree.map(np.array, weights)
  *parents, last = path.split("/")
  branch = functools.reduce(lambda d, k: d[k], parents, copy["params"])
  branch[last] = np.asarray(change(branch[last]), np.float32)
  return copy


def one_negative(rng):
  def change(array):
    array.flat[rng.integers(array.size)] = -abs(rng.standard_normal()) - 0.1
    return array

  return change


def some(items, count, rng):
  items = list(items)
  return [items[i] for i in sorted(rng.permutation(len(items))[:count])]


def of_weights(name, rng) -> Iterator[Mutant]:
  model = build(name)
  weights, kinds = feasible(model)
  tagged = [p for p, k in zip(paths(kinds), jax.tree.leaves(kinds), strict=True) if k != FREE]
  scales = [p for p in tagged if p.endswith("scale")]
  function = functools.partial(infer, model)
  for path in some([p for p in tagged if p not in scales], 12, rng):
    yield Mutant(
      name, "one weight negative", path, False, function, changed(weights, path, one_negative(rng))
    )
  for path in some(scales, 6, rng):
    yield Mutant(
      name, "one scale negative", path, False, function, changed(weights, path, one_negative(rng))
    )
  free = [p for p in paths(kinds) if p not in tagged]
  for path in some([p for p in free if p.endswith(("kernel", "scale"))], 3, rng):
    yield Mutant(
      name, "free weights turned", path, True, function, changed(weights, path, np.negative)
    )
  for path in some([p for p in free if p.endswith("bias")], 2, rng):
    yield Mutant(
      name, "bias negative", path, True, function, changed(weights, path, lambda b: -abs(b) - 1)
    )
  for path in some(tagged, 2, rng):
    yield Mutant(name, "weights zero", path, True, function, changed(weights, path, np.zeros_like))


ACTIVATIONS = {  # name: (function, whether it is convex and non-decreasing)
  "GELU": (nn.gelu, False),
  "SiLU": (nn.silu, False),
  "SELU": (nn.selu, False),
  "ELU, alpha 1.5": (functools.partial(nn.elu, alpha=1.5), False),
  "tanh": (nn.tanh, False),
  "absolute value": (jnp.abs, False),
  "ELU, alpha 0.5": (functools.partial(nn.elu, alpha=0.5), True),
  "ReLU": (nn.relu, True),
  "leaky ReLU": (nn.leaky_relu, True),
  "softplus": (nn.softplus, True),
  "CELU": (nn.celu, True),
}


def of_twin(model, **changes):
  twin = dataclasses.replace(model.parts.twin, **changes)
  return model.clone(parts=dataclasses.replace(model.parts, twin=twin))


def of_parts(name) -> Iterator[Mutant]:
  """Another activation, LayerNorm for BatchNorm, the architecture's gates."""
  plain = build(name)
  weights, _ = feasible(plain)
  for label, (activation, keeps) in ACTIVATIONS.items():
    model = of_twin(plain, activation=activation)
    yield Mutant(name, "activation", label, keeps, functools.partial(infer, model), weights)
  for label, fields in {
    "LayerNorm for BatchNorm": {"norm_kind": "layer"},
    "gates kept": {"gates": True},
  }.items():
    model = of_twin(plain, **fields)
    own, _ = feasible(model)
    if paths(own) != paths(weights):  # The architecture has some.
      yield Mutant(name, label, "everywhere", False, functools.partial(infer, model), own)


def min_pooled(y):
  if y.ndim == 4:
    return -nn.max_pool(-y, (2, 2), (1, 1), "SAME")
  return jnp.minimum(y, jnp.roll(y, 1, -1))


REWIRED = {
  "subtraction of two features": lambda y: y - 1.5 * jnp.roll(y, 1, -1),
  "product of two features": lambda y: y * jnp.roll(y, 1, -1),
  "softmax gate": lambda y: y * nn.softmax(y, -1),
  "min-pool": min_pooled,
}


def rewired(model, target, change, weights, x, dtype=jnp.float32):
  """The network with one layer's output changed."""

  def interceptor(call, args, kwargs, context):
    y = call(*args, **kwargs)
    here = context.module.path == target and context.method_name == "__call__"
    return change(y) if here else y

  with nn.intercept_methods(interceptor):
    return infer(model, weights, x, dtype)


def layers_of(model, weights) -> list[tuple[str, ...]]:
  """Paths of the dense, convolution and norm layers, in the order of the computation."""
  found = []

  def interceptor(call, args, kwargs, context):
    y = call(*args, **kwargs)
    if isinstance(context.module, nn.Dense | nn.Conv | BatchNorm):
      found.append(context.module.path)
    return y

  with nn.intercept_methods(interceptor):
    jax.eval_shape(functools.partial(infer, model), weights, jnp.zeros((1, *SHAPE)))
  return list(dict.fromkeys(found))


def of_wiring(name, rng) -> Iterator[Mutant]:
  """Changes in the deeper half of the layers, whose outputs are no longer affine in the image."""
  model = build(name)
  weights, _ = feasible(model)
  layers = [p for p in layers_of(model, weights) if "passthrough" not in "/".join(p)]
  deep = [p for p in layers[len(layers) // 2 :] if p[0] != "head"]
  for label, change in REWIRED.items():
    for target in some(deep, 3, rng):
      function = functools.partial(rewired, model, target, change)
      yield Mutant(name, label, "/".join(target), False, function, weights)


def after_training(model, tx, steps=4):
  """Weights after a few large updates on noise."""
  rng, key = np.random.default_rng(0), draws.key(0)
  fixed = dict(augment=lambda keys, image: image, key=key, label_smoothing=0.0, ema_decay=0.0)
  update = jax.jit(functools.partial(step.train_step, model=model, tx=tx, **fixed))
  state = jax.jit(lambda: step.init_state(model, tx, key, SHAPE, average=False))()
  for i in range(steps):
    batch = {
      "image": rng.standard_normal((4, *SHAPE)).astype(np.float32),
      "label": rng.integers(0, CLASSES, 4),
      "position": np.arange(4) + 4 * i,
    }
    state, _ = update(state, batch)
  return jax.tree.map(np.asarray, state.weights())


def of_training(name, rng, train) -> Iterator[Mutant]:
  """The projection left out, not last, or without one layer's tag; `train` gives the weights."""
  model = build(name)
  _, kinds = feasible(model)
  config = base.get_config().optimizer
  config.learning_rate = 0.3
  free = jax.tree.map(lambda _: FREE, kinds)

  def mutant(kind, where, tx, keeps=False):
    function = functools.partial(infer, model)
    return Mutant(name, kind, where, keeps, function, train(model, tx))

  right = optimizer.make_optimizer(config, 4, kinds)
  yield mutant("trained as it should be", "", right, keeps=True)
  yield mutant("projection left out", "", optimizer.make_optimizer(config, 4, free))
  late = optax.chain(optax.scale_by_adam(), enforce(kinds), optax.scale_by_learning_rate(0.3))
  yield mutant("projection not last", "", late)
  leaves, tree = jax.tree.flatten(kinds)
  names = paths(kinds)  # Kernels: a few steps do not turn a scale that starts at 1.
  tagged = [
    i
    for i, k in enumerate(leaves)
    if k != FREE and names[i].endswith("kernel") and "head" not in names[i]
  ]
  for i in some(tagged, 2, rng):
    forgotten = jax.tree.unflatten(tree, [FREE if j == i else k for j, k in enumerate(leaves)])
    tx = optimizer.make_optimizer(config, 4, forgotten)
    yield mutant("tag forgotten", names[i], tx)


def mutants(name, seed=0, training=True, train=after_training) -> Iterator[Mutant]:
  """All mutants of one architecture, or those whose weights are not trained."""
  rng = np.random.default_rng(seed)
  yield from of_weights(name, rng)
  yield from of_parts(name)
  yield from of_wiring(name, rng)
  if training:
    yield from of_training(name, rng, train)


def worst_gap(mutant: Mutant, pairs=300, seeds=3) -> float:
  """The largest midpoint gap over many pairs of images, in float64: <= 0 where convex."""
  f = jax.jit(functools.partial(mutant.function, in_float64(mutant.weights), dtype=jnp.float64))
  return max(float(midpoint_gaps(f, SHAPE, pairs=pairs, seed=seed).max()) for seed in range(seeds))
