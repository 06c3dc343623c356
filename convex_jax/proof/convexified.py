"""Any network's logits, made convex without a change to its softmax.

Softmax, cross-entropy and argmax do not see a number that is added to all logits. So it is enough
to find a function t(x) for which g_k(x) + t(x) is convex for every class k. Each value on the way
to the logits is carried as

    z = u + a - b,    u affine, a and b convex,

all three computed by the network's own operations: a linear map W = W+ - W- takes (u, a, b) to
(W u, W+ a + W- b, W+ b + W- a), a maximum of two values takes them to the maximum of
u_1 + a_1 + b_2 and u_2 + a_2 + b_1, less b_1 + b_2, and a scalar function phi = phi_1 - phi_2
(`splitting`), with slopes in [-alpha, beta], to

    phi_1(z) + alpha a + beta b    and    phi_2(z) + alpha a + beta b.

With the logits g = u + a - b, t is the sum of b over the classes. If they end in a matrix W, that
is done before it: t = (-min_k W_k) a + (max_k W_k) b makes all weights non-negative, at the least
cost. Every ReLU network is such a difference (Zhang, Naitzat and Lim 2018, "Tropical Geometry of
Deep Neural Networks", theorem 5.4); what all classes share makes each of them convex.

For two or more classes, then, convexity of the logits is no restriction. The price is the size of t, which
grows with depth: predict with the logits, and keep t apart.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convex_jax.proof import affine_maps, class_axis, differences, interpreter
from convex_jax.proof.certificate import Certificate, certify
from convex_jax.proof.differences import Parts
from convex_jax.proof.exponents import exponents
from convex_jax.proof.parameters import is_plain
from convex_jax.proof.pieces import COMPARISONS, ELEMENTWISE, LOGIC, signature
from convex_jax.proof.splitting import NoSplitError, Split, split
from convex_jax.proof.values import Known, Operation, Value

_WEIGHTED = {"mul", "div", "dot_general", "conv_general_dilated"}
_EXTREMES = {"reduce_max": 1, "reduce_min": -1}
_WINDOWS = {"reduce_window_max": 1, "reduce_window_min": -1}
_SCALAR = ELEMENTWISE | set(COMPARISONS) | set(LOGIC) | {"logaddexp"}


@dataclasses.dataclass(frozen=True)
class Layer:
  """How large the numbers are after one operation that is not affine.

  Attributes:
    place: the operation, and where it is in the source.
    values: the standard deviation of its values z = u + a - b.
    common: that of b, of which t is made; infinite or NaN if beyond the dtype.
  """

  place: str
  values: float
  common: float


@dataclasses.dataclass(frozen=True, eq=False)
class Convexified:
  """A network, and the term that makes its logits convex: see `convexify`.

  The functions are of the input alone, of one shape; they may be jitted, mapped and differentiated.

  Attributes:
    logits: the network itself, g(x).
    example: shape and dtype of the input.
  """

  logits: Callable[[jax.Array], jax.Array]
  example: jax.ShapeDtypeStruct
  _program: Callable[..., tuple[jax.Array, jax.Array]]

  def common(self, x: jax.Array) -> jax.Array:
    """t(x), with a last axis of length 1; infinite or NaN where it is beyond the dtype."""
    return self._program(x)[1]

  def convex_logits(self, x: jax.Array) -> jax.Array:
    """g(x) + t(x), as a sum, in which no large numbers cancel; likewise infinite or NaN."""
    return self._program(x)[0]

  def layers(self, x: jax.Array) -> list[Layer]:
    """The growth of t through the network, at some inputs."""
    layers: list[Layer] = []
    self._program(x, layers)
    return layers

  @functools.cached_property
  def certificate(self) -> Certificate:
    """That of `convex_logits`."""
    return certify(self.convex_logits, self.example, search_steps=0)


def convexify(f: Callable[..., jax.Array], *args: Any, argnums: int = -1) -> Convexified:
  """Makes the logits `f(*args)` convex in one of its arguments without changing their softmax.

  Args:
    f: any JAX function that returns one array, with the K >= 2 logits on its last axis, made of
      affine maps, maxima and scalar functions of bounded slope; or, of any operations, one whose
      logits are proved convex as they are, to which nothing is added.
    *args: its arguments, as for `certify`. Of the input, only shape and dtype matter; floats
      of less than 32 bits are computed in float32.
    argnums: which argument is the input, as in `jax.grad`; by default the last.

  Returns:
    The logits g, the term t, their sum g + t and its certificate.

  Raises:
    ValueError: an operation has no such form, for example a product of two values that both depend
      on the input; the message says where it is. Or as `certify`.
  """
  at = interpreter.input_position(args, argnums)
  outputs, _ = interpreter.analyse(f, *args, argnums=argnums)
  if len(outputs) != 1:
    raise ValueError(f"the function returns {len(outputs)} arrays; expected one, of logits")
  (output,) = outputs
  if not output.shape or output.shape[-1] < 2:
    raise ValueError(
      f"the function returns an array of shape {output.shape}; expected two or more logits on its"
      " last axis (of one logit z, the two logits are 0 and z)"
    )
  if not isinstance(output, Value):
    raise ValueError("the logits do not depend on the input")
  example = jax.ShapeDtypeStruct(args[at].shape, args[at].dtype)

  def logits(x):
    return f(*args[:at], x, *args[at + 1 :])

  dtype = jnp.promote_types(example.dtype, jnp.float32)

  def unchanged(x, layers=None):
    y = jnp.asarray(logits(x), dtype)
    return y, jnp.zeros((*y.shape[:-1], 1), dtype)

  try:
    return Convexified(logits, example, _Program(output, dtype))
  except ValueError:
    if (
      output.not_convex.any()
    ):  # Else it is proved by a rule that differences of convex parts lack.
      raise
    return Convexified(logits, example, unchanged)


_Read = Callable[[Any], Parts]


@dataclasses.dataclass(frozen=True, eq=False)
class _Step:
  """How the parts of a value are made of those of earlier ones."""

  inputs: Sequence[Any]
  make: Callable[[_Read], Parts]


class _Program:
  """Computes the convex logits and the common term from an input."""

  def __init__(self, output: Value, dtype: Any):
    self._output, self._dtype = output, dtype
    self._steps: dict[int, _Step] = {}
    self._splits: dict[Any, Split] = {}
    self._order = affine_maps.in_order([output], self._inputs_of)
    self._tail = class_axis.tail(
      output, self._order, lambda value: self._steps[id(value)].inputs if value.made_by else ()
    )

  def __call__(
    self, x: jax.Array, layers: list[Layer] | None = None
  ) -> tuple[jax.Array, jax.Array]:
    wanted = next(value.shape for value in self._order if value.made_by is None)
    if jnp.shape(x) != wanted:
      raise ValueError(
        f"the input has the shape {jnp.shape(x)}; expected {wanted}. Of more inputs: jax.vmap, or"
        " jax.lax.map"
      )
    done: dict[int, Parts] = {}

    def read(node):
      if isinstance(node, Value):
        return done[id(node)]
      return self._read_known(node)

    for value in self._order:
      if value.made_by is None:
        done[id(value)] = Parts(jnp.asarray(x, self._dtype))
        continue
      parts = self._steps[id(value)].make(read)
      if parts.above is None and parts.below is None:
        parts = Parts(jnp.zeros(value.shape, self._dtype))
      done[id(value)] = parts
      if layers is not None and not affine_maps.is_affine(value.made_by):
        other = 0.0 if parts.below is None else float(jnp.std(parts.below))
        op = value.made_by
        layers.append(Layer(f"{op.primitive} in {op.place}", float(jnp.std(parts.value)), other))
    parts = done[id(self._output)]
    return self._ended(parts)

  def _ended(self, parts: Parts) -> tuple[jax.Array, jax.Array]:
    """(convex logits, common term)."""
    shape, above = self._output.shape, parts.above
    above = jnp.zeros(shape, self._dtype) if above is None else jnp.broadcast_to(above, shape)
    common = jnp.zeros((*shape[:-1], 1), self._dtype)
    if parts.common is not None:
      common = jnp.broadcast_to(parts.common, shape)[..., :1]
    if parts.other is None:
      return above, common
    other = jnp.broadcast_to(parts.other, shape)
    others = 1 - jnp.eye(shape[-1], dtype=self._dtype)
    return above + other @ others, common + other.sum(-1, keepdims=True)

  def _read_known(self, k: Any) -> Parts:
    if isinstance(k, Known):
      return Parts(None if k.is_float and not np.any(k.array) else self._number(k))
    return Parts(jnp.asarray(k))

  def _number(self, k: Known) -> jax.Array:
    return jnp.asarray(k.array, self._dtype) if k.is_float else jnp.asarray(k.low)

  def _inputs_of(self, value: Value) -> Sequence[Any]:
    if value.made_by is None:
      return ()
    self._steps[id(value)] = step = self._step(value, value.made_by)
    return step.inputs

  def _step(self, value: Value, op: Operation) -> _Step:
    name, inputs = op.primitive, op.inputs
    if affine_maps.is_affine(op):
      return _Step(inputs, lambda read: self._linear(value, op, read))
    values = [x for x in inputs if isinstance(x, Value)]
    bounds = [np.asarray(x.array) for x in inputs if isinstance(x, Known)]
    if name in ("max", "min") and len(values) == 1:
      sign = 1 if name == "max" else -1
      return _Step(inputs, lambda read: differences.bounded(read(values[0]), bounds[0], sign))
    if name == "clamp" and values == [inputs[1]]:
      low, high = bounds
      return _Step(
        inputs,
        lambda read: differences.bounded(differences.bounded(read(values[0]), low, 1), high, -1),
      )
    if (found := exponents(op)) is not None:
      u, axes = found
      fold = functools.partial(
        differences.folded, axes=axes, pair=functools.partial(differences.extreme, soft=True)
      )
      return _Step([u], lambda read: fold(read(u)).map(lambda a: a.reshape(op.shape)))
    if name == "logaddexp":
      return _Step(
        inputs, lambda read: differences.extreme(read(inputs[0]), read(inputs[1]), soft=True)
      )
    reason = ""
    for root in _roots(value):
      try:
        found = self._split(value, root)
      except NoSplitError as error:
        reason = reason or str(error)
        continue
      return _Step([root], lambda read, z=root, found=found: differences.scalar(read(z), found))
    if name in ("max", "min"):
      sign = 1 if name == "max" else -1
      return _Step(
        inputs, lambda read: differences.extreme(read(inputs[0]), read(inputs[1]), sign=sign)
      )
    if name in _EXTREMES:
      pair = functools.partial(differences.extreme, sign=_EXTREMES[name])
      return _Step(
        inputs,
        lambda read: differences.folded(read(inputs[0]), op.params["axes"], pair).map(
          lambda a: a.reshape(op.shape)
        ),
      )
    if name in _WINDOWS and set(op.params["base_dilation"]) == {1}:
      return _Step(inputs, lambda read: differences.pooled(read(inputs[0]), op, _WINDOWS[name]))
    raise ValueError(_refusal(op, reason))

  def _split(self, value: Value, root: Value) -> Split:
    key = signature(value, root)
    found = self._splits.get(key)
    if found is None:
      found = split(lambda z: self._between(value, root, z), value, root)
      if key is not None:
        self._splits[key] = found
    return found

  def _between(self, value: Value, root: Value, z: jax.Array) -> jax.Array:
    """`value` as a function of `root`, at z."""
    done = {id(root): z}

    def inputs_of(node):
      return () if node is root else node.made_by.inputs

    for node in affine_maps.in_order([value], inputs_of):
      if node is root:
        continue
      op = node.made_by
      assert op is not None
      arrays = [done[id(x)] if isinstance(x, Value) else self._known(x, z) for x in op.inputs]
      done[id(node)] = jnp.logaddexp(*arrays) if op.primitive == "logaddexp" else op.bind(*arrays)
    return done[id(value)]

  def _known(self, x: Known, like: jax.Array) -> jax.Array:
    return jnp.asarray(x.array, like.dtype) if x.is_float else jnp.asarray(x.low)

  # Affine operations.

  def _linear(self, value: Value, op: Operation, read: _Read) -> Parts:
    known = [x for x in op.inputs if isinstance(x, Known)]
    if op.primitive in _WEIGHTED and len(known) == 1:
      parts = read(next(x for x in op.inputs if isinstance(x, Value)))
      if op.primitive == "div":
        return differences.divided(parts, np.asarray(known[0].array), op.shape, self._dtype)
      weights = np.asarray(known[0].array)
      if id(value) in self._tail and (axis := class_axis.of_weights(op)) is not None:
        return self._head(op, parts, weights, axis)
      return self._weighted(op, parts, weights)
    if op.primitive in ("max", "min", "clamp"):  # With bounds that do not bind.
      return read(next(x for x in op.inputs if isinstance(x, Value)))
    signs = {"sub": (1, -1), "neg": (-1,)}.get(op.primitive, (1,) * len(op.inputs))
    parts = [read(x) for x in op.inputs]
    turned = [-p if sign < 0 else p for p, sign in zip(parts, signs, strict=True)]
    apply = functools.partial(self._apply, "add" if op.primitive == "sub" else op.primitive, op)
    affine = apply([p.affine for p in turned])
    convex, other, common = (
      apply(
        [
          getattr(p, kind) if isinstance(x, Value) else None
          for p, x in zip(turned, op.inputs, strict=True)
        ]
      )
      for kind in ("convex", "other", "common")
    )
    return Parts(affine, convex, other, common)

  def _apply(self, name: str, op: Operation, arrays: list[Any]) -> Any:
    """An operation without weights on one kind of part, in which what is absent is 0."""
    floats = [isinstance(x, Value) or (isinstance(x, Known) and x.is_float) for x in op.inputs]
    if all(a is None for a, is_float in zip(arrays, floats, strict=True) if is_float):
      return None
    if name in ("add", "add_any"):
      return jnp.broadcast_to(differences.total(*arrays), op.shape)
    if name == "neg":
      return arrays[0]
    whole = []
    for a, x, is_float in zip(arrays, op.inputs, floats, strict=True):
      if isinstance(x, Known) and not is_float:
        whole.append(jnp.asarray(x.low))
      else:
        whole.append(jnp.zeros(x.shape, self._dtype) if a is None else a)
    return affine_maps.apply(op, whole, self._dtype)

  def _times(self, op: Operation, x: Any, weights: np.ndarray) -> Any:
    """A bilinear operation of an array, None for 0, with other weights."""
    if x is None:
      return None
    numbers = jnp.asarray(weights, self._dtype)
    pair = [x, numbers] if isinstance(op.inputs[0], Value) else [numbers, x]
    return affine_maps.apply(op, pair, self._dtype)

  def _weighted(self, op: Operation, parts: Parts, weights: np.ndarray) -> Parts:
    plus, minus = np.maximum(weights, 0), np.maximum(-weights, 0)
    times = functools.partial(self._times, op)
    has_minus, has_plus = minus.any(), plus.any()
    convex = differences.total(
      times(parts.convex, plus) if has_plus else None,
      times(parts.other, minus) if has_minus else None,
    )
    other = differences.total(
      times(parts.other, plus) if has_plus else None,
      times(parts.convex, minus) if has_minus else None,
    )
    common = times(parts.common, weights)  # By one number: `class_axis.tail`.
    return Parts(times(parts.affine, weights), convex, other, common)

  def _head(self, op: Operation, parts: Parts, weights: np.ndarray, axis: int) -> Parts:
    """Weights less their minimum over the classes, and the same for their negatives."""
    least, most = weights.min(axis, keepdims=True), weights.max(axis, keepdims=True)
    times = functools.partial(self._times, op)
    convex = differences.total(
      times(parts.convex, weights - least), times(parts.other, most - weights)
    )
    common = differences.total(times(parts.convex, -least), times(parts.other, most))
    if common is not None:
      common = jnp.broadcast_to(common, op.shape)
    return Parts(times(parts.affine, weights), convex, common=common)


# Operations that are not affine.


def _roots(value: Value) -> Iterator[Value]:
  """Earlier values of which a value is a scalar function, the nearest first."""
  frontier = {id(value): value}
  while frontier:
    node = max(frontier.values(), key=_order)
    if node is not value and len(frontier) == 1 and node.is_real:
      yield node
    op = node.made_by
    if (
      op is None or op.primitive not in _SCALAR or not (is_plain(op) or op.primitive == "logaddexp")
    ):
      return
    del frontier[id(node)]
    inputs = [x for x in op.inputs if isinstance(x, Value)]
    if any(x.shape != value.shape for x in inputs):
      return
    frontier |= {id(x): x for x in inputs}


def _order(value: Value) -> int:
  return value.made_by.order if value.made_by else -1


def _refusal(op: Operation, reason: str) -> str:
  """What is wrong with an operation, and what to use instead."""
  name, values = op.primitive, [x for x in op.inputs if isinstance(x, Value)]
  what = ""
  if name == "div" and isinstance(op.inputs[1], Value):
    what = "div: a quotient by a value that depends on the input"
  elif len(values) == 2 and name in ("mul", "dot_general", "conv_general_dilated"):
    what = f"{name}: a product of two values that both depend on the input"
  elif name in ("rsqrt", "sqrt"):
    what = f"{name} of a value that depends on the input"
  if what:
    return (
      f"{what}, in {op.place}; use BatchNorm in place of LayerNorm, static gates or none in place of"
      " gates made of the input, and GELU or ELU in place of an activation that is such a product"
    )
  what = f"{name} is not affine, a maximum, or a scalar function of bounded slope"
  what += f" ({reason})" if reason else ""
  return f"{what}, in {op.place}; nothing is known to make its logits convex"
