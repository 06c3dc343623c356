"""Operations of lax with any parameters that are legal, at random: moves, sums, products, extremes.

Code that goes by the usual forms of an operation is wrong of another one without a sign of it, as
of a broadcast that transposes. Each function draws the parameters for an array of a shape and
returns the operation.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Shape = tuple[int, ...]
Operation = Callable[[jax.Array], jax.Array]
LARGEST = 60  # Elements of a result.
REDUCTIONS: tuple[tuple[Any, float], ...] = (
  (lax.add, 0.0),
  (lax.max, -np.inf),
  (lax.min, np.inf),
)


class Case(NamedTuple):
  """Some operations, one after the other, and the shapes at both ends."""

  names: list[str]
  shape: Shape
  result: Shape
  apply: Operation


def case(seed: int, table: Sequence[Any] = ()) -> Case:
  """One to three operations, of those in the table or of all, on an array of one to four axes."""
  rng = np.random.default_rng(seed)
  shape = start = drawn(rng, 1, 4, rng.integers(1, 5))
  names, steps = [], []
  for _ in range(rng.integers(1, 4)):
    name, step = operation(rng, shape, table)
    names.append(name)
    steps.append(step)
    shape = result_of(step, shape)
  return Case(names, start, shape, lambda x: functools.reduce(lambda y, step: step(y), steps, x))


def operation(
  rng: np.random.Generator, shape: Shape, table: Sequence[Any] = ()
) -> tuple[str, Operation]:
  """Any of the table, or of all; its result is neither empty nor large."""
  table = table or OPERATIONS
  while True:
    make = table[rng.integers(len(table))]
    if shape or make in OF_SCALARS:
      step = make(rng, shape)
      result = result_of(step, shape)
      if 0 < math.prod(result) <= LARGEST and len(result) <= 5:
        return make.__name__, step


def result_of(step: Operation, shape: Shape) -> Shape:
  return jax.eval_shape(step, jax.ShapeDtypeStruct(shape, jnp.float32)).shape


def drawn(rng, low: int, high: int, count: int) -> tuple[int, ...]:
  """Integers from `low` to `high` - 1."""
  return tuple(rng.integers(low, high, count).tolist())


def order(rng, count: int) -> tuple[int, ...]:
  return tuple(rng.permutation(count).tolist())


def some(rng, count: int) -> tuple[int, ...]:
  return tuple(np.flatnonzero(rng.random(count) < 0.5).tolist())


def weights(rng, shape: Shape) -> np.ndarray:
  """Small integers, which no sum rounds; all positive, or of both signs."""
  values = [1.0, 2.0, 3.0] if rng.random() < 0.5 else [-2.0, -1.0, 1.0, 2.0]
  return rng.choice(values, shape).astype(np.float32)


def parts(rng, shape: Shape) -> Shape:
  return tuple(int(rng.integers(1, n + 1)) for n in shape)


# Moves.


def reshape(rng, shape):
  n = math.prod(shape)
  sizes = [(a, n // a) for a in range(1, n + 1) if n % a == 0] + [(n,), (1, n, 1)]
  new = sizes[rng.integers(len(sizes))]
  dimensions = order(rng, len(shape)) if rng.random() < 0.5 else None
  return lambda x: lax.reshape(x, new, dimensions)


def transpose(rng, shape):
  axes = order(rng, len(shape))
  return lambda x: lax.transpose(x, axes)


def reverse(rng, shape):
  axes = some(rng, len(shape))
  return lambda x: lax.rev(x, axes)


def squeeze(rng, shape):
  axes = tuple(i for i, n in enumerate(shape) if n == 1)
  return lambda x: lax.squeeze(x, axes)


def broadcast(rng, shape):
  """Also along axes of length 1, and in another order."""
  rank = len(shape) + int(rng.integers(0, 2))
  axes = order(rng, rank)[: len(shape)]
  new = list(drawn(rng, 1, 3, rank))
  for axis, n in zip(axes, shape, strict=True):
    new[axis] = n if n > 1 else int(rng.integers(1, 4))
  return lambda x: lax.broadcast_in_dim(x, new, axes)


def slice_(rng, shape):
  starts = [int(rng.integers(0, n)) for n in shape]
  ends = [int(rng.integers(i + 1, n + 1)) for i, n in zip(starts, shape, strict=True)]
  strides = drawn(rng, 1, 4, len(shape))
  return lambda x: lax.slice(x, starts, ends, strides)


def dynamic_slice(rng, shape):
  """Of a start that may lie outside."""
  sizes, starts = parts(rng, shape), drawn(rng, -3, 5, len(shape))
  return lambda x: lax.dynamic_slice(x, starts, sizes)


def dynamic_update_slice(rng, shape):
  sizes, starts, factors = parts(rng, shape), drawn(rng, -3, 5, len(shape)), weights(rng, shape)
  origin = (0,) * len(shape)

  def update(x):
    return lax.dynamic_update_slice(x, lax.slice(x * factors, origin, sizes), starts)

  return update


def pad(rng, shape):
  """Between elements, too; by less than nothing, which cuts them off."""
  config = []
  for n in shape:
    before, after, between = *drawn(rng, -1, 3, 2), int(rng.integers(0, 3))
    empty = before + after + n + (n - 1) * between <= 0
    config.append((1, 1, between) if empty else (before, after, between))
  padding = float(rng.integers(-1, 2))
  return lambda x: lax.pad(x, jnp.asarray(padding, x.dtype), config)


def concatenate(rng, shape):
  axis, factors = int(rng.integers(len(shape))), weights(rng, shape)
  return lambda x: lax.concatenate([x, x * factors], axis)


def split(rng, shape):
  axis = int(rng.integers(len(shape)))
  first = int(rng.integers(0, shape[axis] + 1))
  which = int(first < shape[axis])
  return lambda x: lax.split(x, (first, shape[axis] - first), axis)[which]


def select(rng, shape):
  """By a mask, by one condition for all, or among three."""
  factors = weights(rng, shape)
  if rng.random() < 0.3:
    which = rng.integers(0, 3, shape if rng.random() < 0.5 else ()).astype(np.int32)
    return lambda x: lax.select_n(which, x, x * factors, -x)
  mask = rng.random(shape if rng.random() < 0.7 else ()) < 0.5
  return lambda x: lax.select_n(mask, x, x * factors)


class _Places(NamedTuple):
  """Where a gather reads and a scatter writes windows of an array."""

  sizes: Shape  # Of a window.
  dropped: Shape  # Axes of length 1 that a window lacks.
  batched: Shape
  mapped: Shape  # Axes that the numbers of an index stand for.
  indices: np.ndarray
  of_batch: Shape  # The axes of the indices that go with those batched.
  axes: Shape  # Of the windows among those of the windows of all indices.
  mode: str

  @property
  def kept(self) -> list[int]:
    return [i for i in range(len(self.sizes)) if i not in (*self.dropped, *self.batched)]

  @property
  def shape(self) -> Shape:
    """Of the windows of all indices."""
    windows, rows = iter(self.sizes[i] for i in self.kept), iter(self.indices.shape[:-1])
    rank = len(self.kept) + self.indices.ndim - 1
    return tuple(next(windows if i in self.axes else rows) for i in range(rank))


def _places(rng, shape: Shape) -> _Places:
  rank, sizes = len(shape), list(parts(rng, shape))
  rows = list(drawn(rng, 1, 4, rng.integers(1, 3)))
  batched, of_batch = (), ()
  if rng.random() < 0.4:
    axis = int(rng.integers(rank))
    batched, of_batch, sizes[axis] = (axis,), (int(rng.integers(len(rows))),), 1
    rows[of_batch[0]] = shape[axis]
  thin = [i for i in range(rank) if sizes[i] == 1 and i not in batched]
  dropped = tuple(i for i in thin if rng.random() < 0.6)
  mapped = tuple(i for i in order(rng, rank) if i not in batched and rng.random() < 0.8)
  if not mapped:  # Of several such updates XLA makes one.
    rows = [n if i in of_batch else 1 for i, n in enumerate(rows)]
  indices = rng.integers(-2, 5, (*rows, len(mapped))).astype(np.int32)
  mode = ["clip", "fill", "promise_in_bounds"][rng.integers(3)]
  if mode == "promise_in_bounds":
    most = [shape[i] - sizes[i] for i in mapped]
    indices = np.clip(indices, 0, np.array(most, np.int32))
  kept = rank - len(dropped) - len(batched)
  axes = tuple(sorted(order(rng, kept + len(rows))[:kept]))
  return _Places(tuple(sizes), dropped, batched, mapped, indices, of_batch, axes, mode)


def gather(rng, shape):
  at = _places(rng, shape)
  numbers = lax.GatherDimensionNumbers(at.axes, at.dropped, at.mapped, at.batched, at.of_batch)
  fill = float(rng.integers(-1, 2)) if at.mode == "fill" else None
  return lambda x: lax.gather(x, at.indices, numbers, at.sizes, mode=at.mode, fill_value=fill)


def scatter(rng, shape):
  """Updates by the elements themselves, or, of products, by numbers."""
  at = _places(rng, shape)
  numbers = lax.ScatterDimensionNumbers(at.axes, at.dropped, at.mapped, at.batched, at.of_batch)
  name = ["add", "sub", "mul", "min", "max", ""][rng.integers(6)]
  update = getattr(lax, f"scatter_{name}" if name else "scatter")
  taken = rng.integers(0, math.prod(shape), at.shape).astype(np.int32)
  factors, signs = weights(rng, at.shape), weights(rng, shape)

  def apply(x):
    old, new = (x, factors) if name == "mul" else (x * signs, jnp.ravel(x)[taken] * factors)
    return update(old, at.indices, jnp.asarray(new, x.dtype), numbers, mode=at.mode)

  return apply


def take(rng, shape):
  """As `vmap` makes gathers of slices."""
  count = int(rng.integers(1, 4))
  starts = rng.integers(-2, 5, (count, len(shape))).astype(np.int32)
  sizes = parts(rng, shape)
  return lambda x: jax.vmap(lambda start: lax.dynamic_slice(x, tuple(start), sizes))(starts)


# Sums, extremes, products.


def scale(rng, shape):
  factors = weights(rng, shape)
  forms: list[Operation] = [
    lambda x: x * factors,
    lambda x: x / factors,
    lambda x: -x,
    lambda x: factors - x,
    lambda x: lax.clamp(jnp.asarray(-1, x.dtype), x, jnp.asarray(np.inf, x.dtype)),
  ]
  return forms[rng.integers(len(forms))]


def cumulative(rng, shape):
  accumulate = [lax.cumsum, lax.cummax, lax.cummin][rng.integers(3)]
  axis, backwards = int(rng.integers(len(shape))), bool(rng.integers(2))
  return lambda x: accumulate(x, axis, reverse=backwards)


def reduction(rng, shape):
  combine, start = REDUCTIONS[rng.integers(3)]
  axes = some(rng, len(shape)) or (0,)
  return lambda x: lax.reduce(x, np.asarray(start, x.dtype), combine, axes)


def window(rng, shape):
  """With any strides, paddings and dilations; each window has an element of the array."""
  combine, start = REDUCTIONS[rng.integers(3)]
  sizes, strides, between, apart = (drawn(rng, 1, 3, len(shape)) for _ in range(4))
  if combine is not lax.add:
    between = apart = (1,) * len(shape)  # JAX has no derivative of any other.
  pads = [
    (int(rng.integers(0, size)), 0) if n > (size - 1) * d else ((size - 1) * d, 0)
    for n, size, d in zip(shape, sizes, apart, strict=True)
  ]

  def apply(x):
    initial = np.asarray(start, x.dtype)
    return lax.reduce_window(x, initial, combine, sizes, strides, pads, between, apart)

  return apply


def product(rng, shape):
  """Of the array and known numbers, on either side, over any axes."""
  axes = order(rng, len(shape))
  batch = int(rng.integers(0, len(shape) + 1)) if rng.random() < 0.5 else 0
  count = int(rng.integers(batch, len(shape) + 1))
  sizes = list(drawn(rng, 1, 4, count + rng.integers(0, 3)))
  places = order(rng, len(sizes))
  for axis, place in zip(axes[:count], places, strict=False):
    sizes[place] = shape[axis]
  factors, own = weights(rng, tuple(sizes)), (axes[batch:count], axes[:batch])
  other = places[batch:count], places[:batch]
  pairs = list(zip(own, other, strict=True))
  if rng.random() < 0.5:
    return lambda x: lax.dot_general(x, factors.astype(x.dtype), pairs)
  turned = [pair[::-1] for pair in pairs]
  return lambda x: lax.dot_general(factors.astype(x.dtype), x, turned)


def convolution(rng, shape):
  """Of the array with a kernel: any layout, strides, paddings, dilations, groups."""
  rank = len(shape)
  if not 2 <= rank <= 4:
    return transpose(rng, shape)
  space = rank - 2
  layouts = lax.ConvDimensionNumbers(*(order(rng, rank) for _ in range(3)))
  batch, channels, *extent = (shape[i] for i in layouts.lhs_spec)
  groups = int(rng.choice([g for g in range(1, channels + 1) if channels % g == 0]))
  batches = 1 if groups > 1 else int(rng.choice([b for b in range(1, batch + 1) if batch % b == 0]))
  sizes, strides, between, apart = (drawn(rng, 1, high, space) for high in (4, 3, 3, 3))
  kernel = [0] * rank
  features = int(rng.integers(1, 3)) * groups * batches
  whole = (features, channels // groups, *sizes)
  for place, n in zip(layouts.rhs_spec, whole, strict=True):
    kernel[place] = n
  pads = []
  for n, size, b, a in zip(extent, sizes, between, apart, strict=True):
    before, after = drawn(rng, -1, 3, 2)
    room = before + after + (n - 1) * b - (size - 1) * a >= 0
    pads.append((before, after) if room else (2 * size, 2 * size))
  factors = weights(rng, tuple(kernel))

  def apply(x):
    options = (strides, pads, between, apart, layouts, groups, batches)
    return lax.conv_general_dilated(x, factors.astype(x.dtype), *options)

  return apply


# Orders, loops, maps.


def sort(rng, shape):
  axis = int(rng.integers(len(shape)))
  return lambda x: lax.sort(x, axis)


def top_k(rng, shape):
  count = int(rng.integers(1, shape[-1] + 1))
  return lambda x: lax.top_k(x, count)[0]


def scan(rng, shape):
  factors, backwards = weights(rng, shape[1:]), bool(rng.integers(2))

  def apply(x):
    start = jnp.zeros(shape[1:], x.dtype)
    return lax.scan(lambda c, row: (c + row, c * factors + row), start, x, reverse=backwards)[1]

  return apply


def mapped(rng, shape):
  """An operation under `vmap`, over any axes."""
  axis = int(rng.integers(len(shape)))
  inner = tuple(n for i, n in enumerate(shape) if i != axis)
  _, step = operation(rng, inner, [f for f in OPERATIONS if f is not mapped])
  return jax.vmap(step, axis, int(rng.integers(len(result_of(step, inner)) + 1)))


LINEAR = [reshape, transpose, reverse, slice_, dynamic_slice, pad, concatenate, split, select]
LINEAR += [squeeze, product, convolution, scan]
OPERATIONS = [*LINEAR, broadcast, dynamic_update_slice, gather, scatter, take, scale, cumulative]
OPERATIONS += [reduction, window, sort, top_k, mapped]


def pulled(rng, shape):
  """The transpose of a linear operation, of which gradients are made."""
  _, step = operation(rng, shape, LINEAR)
  taken = rng.integers(0, math.prod(shape), result_of(step, shape)).astype(np.int32)

  def apply(x):
    _, pull = jax.vjp(step, jnp.zeros(shape, x.dtype))
    return pull(jnp.ravel(x)[taken])[0]

  return apply


OPERATIONS.append(pulled)
OF_SCALARS = {reshape, transpose, squeeze, broadcast, product, scale}
