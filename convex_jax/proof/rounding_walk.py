"""One pass over a program, for a ball of inputs, by the rules that `rounding_errors` explains."""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convex_jax.proof import constants, enclosures, interpreter, layouts
from convex_jax.proof.arithmetic import (
  BASIC,
  FLOAT64,
  SLOPES,
  Arithmetic,
  enclose,
  gamma,
  own_error,
  slopes_of,
  smallest_normal,
  unit_roundoff,
)
from convex_jax.proof.composed import composed
from convex_jax.proof.enclosures import Ends, size_of
from convex_jax.proof.equations import SAME, Unknown, is_float, is_half_or_more, keeps_precision
from convex_jax.proof.float64 import float64
from convex_jax.proof.in_numpy import rearranged
from convex_jax.proof.merged import NOTHING, kept, merge
from convex_jax.proof.rounded import (
  Chain,
  Condition,
  Rounded,
  as_known,
  as_rounded,
  chain_of,
  has_root,
  hull_of,
  is_fixed,
  is_number,
  joined_chain,
  keeps_affine,
  largest_of,
  mapped,
  product_of,
  roots_of,
  sides_of,
)
from convex_jax.proof.source import Place
from convex_jax.proof.values import Known
from convex_jax.proof.wide import equation


@dataclasses.dataclass(frozen=True, eq=False)
class Ball:
  """All x with |x - centre| <= radius in a norm: "l1", "l2" or "linf"."""

  centre: np.ndarray
  norm: str
  radius: float


class Overflow(Exception):
  """The program may compute infinities, or what is no number."""


_COMPARISONS = {"eq", "ne", "gt", "ge", "lt", "le"}
_EXTREMES = {"max": np.maximum, "min": np.minimum}
_MOVES = {"broadcast_in_dim", "concatenate", "dynamic_slice", "dynamic_update_slice", "gather"}
_MOVES |= {"pad", "reshape", "rev", "slice", "split", "squeeze", "stack", "tile", "transpose"}
_LARGEST = {"reduce_max", "reduce_min", "reduce_window_max", "reduce_window_min"}
_LARGEST |= {"cummax", "cummin"}
_SUMS = {"reduce_sum", "reduce_window_sum", "cumsum"}
_PRODUCTS = {"dot_general", "conv_general_dilated"}
_EXACT_PRODUCTS = ("HIGHEST", "F32_F32_F32")
CHUNK = 64  # Columns of the derivative of an affine value at a time.


def _run(eqn: Any, *arrays: Any) -> Any:
  """The output of an equation for other arrays, in float64."""
  name, params = eqn.primitive.name, eqn.params
  if name == "reduce_sum":
    return np.sum(arrays[0], tuple(params["axes"]))
  found = rearranged(name, params, [np.asarray(a) for a in arrays])
  return found[0] if found is not None else _all(eqn, *arrays)[0]


def _terms(eqn: Any) -> int:
  """How many numbers a sum or an extreme is of, at most."""
  params, shape = eqn.params, eqn.invars[0].aval.shape
  if "axes" in params:
    return math.prod(shape[i] for i in params["axes"])
  return shape[params["axis"]] if "axis" in params else math.prod(params["window_dimensions"])


def _all(eqn: Any, *arrays: Any) -> list[Any]:
  with float64():
    return [np.asarray(out) for out in equation(eqn, [jnp.asarray(a) for a in arrays])]


class Walk(interpreter.Walk):
  """One pass over a program, for a ball."""

  def __init__(
    self, arithmetic: Arithmetic, ball: Ball, spreads: dict[tuple[int, bytes], Any] | None
  ):
    super().__init__()
    self._arithmetic, self._ball, self._spreads = arithmetic, ball, spreads
    self._input: Any = None
    self._decided = hashlib.sha256()

  def input(self, shape: tuple[int, ...]) -> Rounded:
    """The program's input: any number in the ball.

    One below float32's smallest normal number may be flushed to 0; in float64 the input is exact.
    """
    x, r = self._ball.centre.reshape(shape).astype(np.float64), self._ball.radius
    tiny = smallest_normal(jnp.float32) if self._arithmetic is not FLOAT64 else 0.0
    self._input = Rounded(x - r, x + r, np.full(shape, tiny), is_affine=True)
    return self._input

  def _equation(self, eqn, inputs, place: Place) -> list[Any]:
    self._order += 1
    name = eqn.primitive.name
    called, other = layouts.called(eqn, inputs), composed(eqn, inputs)
    if called is not None:
      return self._inner(*called, place)
    if other is not None:
      return self._compute(other, eqn.invars, inputs, place)
    if name in SAME or keeps_precision(eqn):
      return list(inputs)
    try:
      if name == "scan":
        return self._loop(eqn, inputs, place)
      if name == "while" and (outputs := self._while(eqn, inputs, place)) is not None:
        self._decide(np.asarray(self._order))  # How often it ran.
        return outputs
      if name == "cond" and isinstance(inputs[0], Known) and inputs[0].is_exact:
        self._decide(inputs[0].low)
        return self._cond(eqn, *inputs, place=place)
      if is_float(eqn.outvars[0].aval.dtype) and any(map(is_number, inputs)):
        outputs = self._floats(name, eqn, inputs)
        if outputs is not None:
          if any(x.is_affine for x in outputs):
            self._decide(*(as_known(x).low for x in inputs if not is_number(x)))
          return outputs
      return self._folded(eqn, inputs)
    except Unknown as reason:
      raise ValueError(
        f"{name} has no bound on its rounding error ({reason}), in {place}; expected arithmetic,"
        " exp, log, tanh, logistic, erf, roots, maxima, sums, products, choices by comparison"
      ) from reason

  def _decide(self, *choices: Any) -> None:
    """Remembers what may differ from ball to ball: which affine function later values are."""
    for choice in choices:
      self._decided.update(np.asarray(choice).tobytes())

  def _folded(self, eqn, inputs) -> list[Any]:
    """The outputs that `constants` knows, for the real and the computed operands at once."""
    operands = [x.known if isinstance(x, Rounded | Condition) else x for x in inputs]
    if any(is_float(v.aval.dtype) for v in eqn.outvars) and not all(map(is_fixed, inputs)):
      raise Unknown("of what depends on the input")
    outputs = constants.fold(eqn, operands)
    if eqn.primitive.name in _COMPARISONS and all(map(is_number, inputs)):
      return [Condition(outputs[0], (eqn, list(map(as_rounded, inputs))))]
    return outputs

  def _loop(self, eqn, inputs, place: Place) -> list[Any]:
    body, length, reverse, fixed, carried = layouts.scan_of(eqn)
    if not 0 < length <= interpreter.LOOP_LIMIT:
      raise Unknown("too long")
    carry, rows = inputs[fixed : fixed + carried], []
    for i in range(length):
      at = length - 1 - i if reverse else i
      row = [mapped(lambda a, at=at: a[at], [x]) for x in inputs[fixed + carried :]]
      outputs = self._inner(body, [*inputs[:fixed], *carry, *row], place)
      carry = outputs[:carried]
      rows.append(outputs[carried:])
    if reverse:
      rows.reverse()
    return [*carry, *(mapped(lambda *a: np.stack(a), c) for c in zip(*rows, strict=True))]

  def _floats(self, name: str, eqn, inputs) -> list[Any] | None:
    dtype = eqn.outvars[0].aval.dtype
    if not all(is_float(v.aval.dtype) for v in eqn.outvars):
      return None
    if name == "select_n":
      return [self._checked(self._chosen(eqn, *inputs), dtype)]
    if name in _MOVES:
      return self._moved(eqn, inputs)
    if not all(map(is_number, inputs)):
      return None
    operands = [as_rounded(x) for x in inputs]
    if name == "convert_element_type":
      return [self._checked(self._converted(eqn, operands[0]), dtype)]
    if name in _LARGEST:
      x = operands[0]
      error = _run(eqn, x.error) if "max" in name else -_run(eqn, -x.error)
      ends = _run(eqn, x.low), _run(eqn, x.high)
      error = np.maximum(error, 0.0)  # Of no number at all.
      return [
        self._made(eqn, operands, ends, error, merged=x.merged if _terms(eqn) == 1 else NOTHING)
      ]
    if name in _SUMS:
      return [self._checked(self._summed(eqn, operands[0]), dtype)]
    if name in _PRODUCTS:
      return [self._checked(self._product(name, eqn, *operands), dtype)]
    if name in _EXTREMES:
      return [self._extreme(name, eqn, *operands)]
    if name == "clamp":
      low, x, high = operands
      bounded = self._extreme("min", eqn, self._extreme("max", eqn, x, low), high)
      return [dataclasses.replace(bounded, made_by=(eqn, operands))]
    if (name == "integer_pow" and eqn.params["y"] >= 1) or name in SLOPES or name in BASIC:
      return [self._checked(self._elementwise(name, eqn, operands), dtype)]
    return None

  def _made(self, eqn, operands, ends: Ends, error, affine=False, **more) -> Rounded:
    varies = any(x.varies for x in operands if isinstance(x, Rounded))
    affine = affine and varies
    return Rounded(
      *ends, np.asarray(error), varies, affine, (eqn, tuple(operands)) if varies else None, **more
    )

  def _checked(self, x: Rounded, dtype) -> Rounded:
    """The number; of an infinite error where its dtype may not hold it, or it is undefined."""
    size = size_of(x.ends) + x.error
    lost = ~(size <= float(jnp.finfo(dtype).max))
    if not lost.any():
      return x
    low, high = np.where(lost, -np.inf, x.low), np.where(lost, np.inf, x.high)
    return dataclasses.replace(
      x,
      low=low,
      high=high,
      error=np.where(lost, np.inf, x.error),
      chains=tuple(Chain(c.root, (-np.inf, np.inf), np.inf) for c in x.chains),
      around=None,
      is_affine=False,
    )

  # Moves, casts, sums, products.

  def _moved(self, eqn, inputs) -> list[Rounded]:
    count = len(inputs)
    if eqn.primitive.name in ("gather", "dynamic_slice"):
      count = 1
    if eqn.primitive.name == "dynamic_update_slice":
      count = 2
    keys = inputs[count:]
    if not all(isinstance(k, Known) and k.is_exact for k in keys):
      raise Unknown("by an index that depends on the input")
    operands, indices = [as_rounded(x) for x in inputs[:count]], [k.low for k in keys]

    def move(arrays: Sequence[Any]) -> list[Any]:
      return _all(eqn, *arrays) if len(eqn.outvars) > 1 else [_run(eqn, *arrays, *indices)]

    parts = [move([getattr(x, part) for x in operands]) for part in ("low", "high", "error")]
    shifts: Any = [None] * len(eqn.outvars)
    if count == 1 and operands[0].shift is not None:
      shifts = move([operands[0].shift])
    affine = all(x.is_affine or not x.varies for x in operands) and len(eqn.outvars) == 1
    merged = kept(operands)
    return [
      self._made(eqn, [*operands, *keys], (low, high), error, affine, shift=shift, merged=merged)
      for low, high, error, shift in zip(*parts, shifts, strict=True)
    ]

  def _converted(self, eqn, x: Rounded) -> Rounded:
    source, target = eqn.invars[0].aval.dtype, np.dtype(eqn.params["new_dtype"])
    if not is_half_or_more(target):
      raise Unknown("to less than half precision, a step function")
    if jnp.promote_types(source, target) == target:
      return x
    error = x.error + unit_roundoff(target) * (size_of(x.ends) + x.error) + smallest_normal(target)
    if not x.varies and x.known.is_exact:
      shift = np.asarray(x.low).astype(target).astype(np.float64) - x.low
      return self._made(eqn, [x], x.ends, np.abs(shift) + smallest_normal(target), shift=shift)
    return self._made(eqn, [x], x.ends, error, affine=x.is_affine, merged=x.merged)

  def _summed(self, eqn, x: Rounded) -> Rounded:
    n, dtype = _terms(eqn), eqn.outvars[0].aval.dtype
    size = _run(eqn, size_of(x.ends) + x.error)
    error = (
      _run(eqn, x.error)
      + gamma(max(0, n - 1), unit_roundoff(dtype)) * size
      + n * smallest_normal(dtype)
    )
    self._check_size(size, dtype)
    ends = tuple(_run(eqn, end) for end in x.ends)
    slack = 1e-12 * size
    ends = self._within_ball(eqn, [x], (ends[0] - slack, ends[1] + slack), x.is_affine)
    return self._made(eqn, [x], ends, error, x.is_affine, merged=x.merged if n == 1 else NOTHING)

  def _product(self, name: str, eqn, a: Rounded, b: Rounded) -> Rounded:
    if name == "dot_general":
      (axes, _), _ = eqn.params["dimension_numbers"]
      n = math.prod(a.shape[i] for i in axes)
    else:
      n = math.prod(b.shape) // max(1, b.shape[eqn.params["dimension_numbers"].rhs_spec[0]])
    source, target = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
    wide = jnp.promote_types(jnp.promote_types(source, target), self._arithmetic.accumulator)
    factors = self._factors(eqn)
    middles = [(x.low + x.high) / 2 for x in (a, b)]
    radii = [np.maximum(x.high - m, m - x.low) for x, m in zip((a, b), middles, strict=True)]
    sizes = [size_of(x.ends) for x in (a, b)]
    middle = _run(eqn, *middles)
    radius = _run(eqn, radii[0], sizes[1])
    if radii[1].any():
      radius = radius + _run(eqn, np.abs(middles[0]), radii[1])
    # The error of the factors, as far as their signs are not known; then that of the sum.
    errors, known = [x.error for x in (a, b)], 0.0
    for i, (x, other) in enumerate(((a, b), (b, a))):
      if x.shift is not None:
        j = 1 - i
        pairs = [(x.shift, middles[j]), (np.abs(x.shift), radii[j] + other.error)]
        at, about = (_run(eqn, *(p if i == 0 else p[::-1])) for p in pairs)
        known, errors[i] = known + np.abs(at) + about, x.error - np.abs(x.shift)
    computed = [s + x.error for s, x in zip(sizes, (a, b), strict=True)]
    if factors:
      errors = [e + factors * c for e, c in zip(errors, computed, strict=True)]
      computed = [(1 + factors) * c for c in computed]
    error = known + _run(eqn, errors[0], computed[1])
    if errors[1].any():
      error = error + _run(eqn, sizes[0], errors[1])
    size = _run(eqn, *computed)
    self._check_size(size, target)
    error = error + gamma(n, unit_roundoff(wide)) * size + 2 * n * smallest_normal(wide)
    slack = 1e-12 * size
    affine = (a.is_affine and not b.varies) or (b.is_affine and not a.varies)
    ends = self._within_ball(
      eqn, [a, b], (middle - radius - slack, middle + radius + slack), affine
    )
    merged = NOTHING
    if n == 1 or math.prod(a.shape) == math.prod(b.shape) == n * math.prod(np.shape(ends[0])):
      merged, own = merge("mul", eqn, [a, b], ends, target)
      merged, error = merged if n == 1 else NOTHING, error + n * own
    if wide != target:
      error = error + unit_roundoff(target) * (size_of(ends) + error) + smallest_normal(target)
    return self._made(eqn, [a, b], ends, error, affine, merged=merged)

  def _factors(self, eqn) -> float:
    """The relative error with which a product's factors are read."""
    precision = eqn.params.get("precision")
    each = precision if isinstance(precision, tuple) else (precision,)
    names = {getattr(p, "name", str(p)) for p in each}
    if names <= set(_EXACT_PRODUCTS) or all(v.aval.dtype != jnp.float32 for v in eqn.invars):
      return 0.0
    if not names <= {"None", "DEFAULT", "HIGH", *_EXACT_PRODUCTS}:
      raise Unknown(f"of precision {', '.join(sorted(names))}")
    if not (names <= {"None", *_EXACT_PRODUCTS} or self._arithmetic.factors):
      # On GPUs and TPUs the setting jax_default_matmul_precision=highest does not change it.
      raise Unknown(f"of precision {', '.join(sorted(names))}, not highest, as the program asks")
    return self._arithmetic.factors

  def _check_size(self, size, dtype) -> None:
    if not (size <= float(jnp.finfo(dtype).max)).all():
      raise Overflow  # Or NaN, of infinite factors.

  def _within_ball(self, eqn, operands, ends: Ends, affine: bool) -> Ends:
    """The ends, no further apart than an affine function of the input is over the ball.

    Operand by operand, an l1 ball would count as the box around it.
    """
    if not affine or self._spreads is None:
      return ends
    key = self._order, self._decided.digest()
    if key not in self._spreads:
      self._spreads[key] = self._spread(eqn, operands)
    middle, half = (ends[0] + ends[1]) / 2, (ends[1] - ends[0]) / 2
    spread = self._spreads[key][self._ball.norm]
    radius = self._ball.radius * spread * (1 + 1e-9) + 1e-10 * half
    radius = np.minimum(radius + 1e-12 * np.abs(middle), half)
    return np.maximum(ends[0], middle - radius), np.minimum(ends[1], middle + radius)

  def _spread(self, eqn, operands) -> dict[str, np.ndarray]:
    """How far an affine value can move over the unit ball of each norm: the dual norm of its derivative."""
    value = self._made(eqn, operands, (0.0, 0.0), 0.0, affine=True)

    def of_input(x):
      return _affine(value, self._input, x, {})

    shape = self._input.shape
    with float64():
      origin = jnp.zeros(shape)

      def column(d):
        return jax.jvp(of_input, (origin,), (d.reshape(shape),))[1]

      @jax.jit
      def further(most, squares, total, rows):
        """The norms of the columns before, and of these."""
        part = jnp.abs(jax.vmap(column)(rows))
        return jnp.maximum(most, part.max(0)), squares + (part**2).sum(0), total + part.sum(0)

      size, norms = math.prod(shape), [jnp.zeros(eqn.outvars[0].aval.shape)] * 3
      for start in range(0, size, CHUNK):
        rows = np.zeros((CHUNK, size))
        rows[np.arange(min(CHUNK, size - start)), np.arange(start, min(start + CHUNK, size))] = 1
        norms = further(*norms, rows)
    most, squares, total = map(np.asarray, norms)
    lost = size * 1e-150  # Squares below 1e-308 may count as 0.
    return {"l1": most, "l2": np.sqrt(squares) + lost, "linf": total}

  # Elementwise operations.

  def _elementwise(self, name: str, eqn, operands: Sequence[Rounded]) -> Rounded:
    dtype = eqn.outvars[0].aval.dtype
    wide = [x.wide for x in operands]
    ends, around = (enclose(name, eqn, e) for e in ([x.ends for x in operands], wide))
    slopes = slopes_of(name, eqn, wide, around)
    steep = [size_of(s) for s in slopes]
    passed = sum(product_of(s, x.error) for s, x in zip(steep, operands, strict=True))
    merged, error = merge(name, eqn, operands, around, dtype)
    own = own_error(name, eqn, operands, around, dtype) + error
    chains = []
    for root in roots_of(operands):
      parts = [chain_of(x, root) for x in operands]
      terms = [_times(s, c.slope) for s, c in zip(slopes, parts, strict=True)]
      slack = 1e-12 * sum(map(size_of, terms))
      slope = sum(t[0] for t in terms) - slack, sum(t[1] for t in terms) + slack
      error = own + sum(product_of(s, c.error) for s, c in zip(steep, parts, strict=True))
      chains.append(Chain(root, slope, error))
    affine = name in (*BASIC, "neg") and keeps_affine(name, operands)
    around = around[0] - own, around[1] + own
    best = self._best(eqn, operands, ends, around, passed + own, chains, affine)
    return dataclasses.replace(best, merged=merged)

  def _best(self, eqn, operands, ends, around, error, chains, affine=False) -> Rounded:
    error = functools.reduce(np.minimum, [c.total for c in chains], error)
    error = np.broadcast_to(error, np.shape(ends[0]))
    numbers = [x for x in operands if isinstance(x, Rounded)]
    return self._made(
      eqn, operands, ends, error, affine, chains=tuple(chains), around=around, merged=kept(numbers)
    )

  def _extreme(self, name: str, eqn, a: Rounded, b: Rounded) -> Rounded:
    """The greater or the lesser: no further off than the further of both, and their slopes' hull."""
    f = _EXTREMES[name]
    ends, around = ((f(x[0], y[0]), f(x[1], y[1])) for x, y in ((a.ends, b.ends), (a.wide, b.wide)))
    possible = [x[1] >= y[0] for x, y in ((a.wide, b.wide), (b.wide, a.wide))]
    if name == "min":
      possible.reverse()
    error = largest_of(possible, [a.error, b.error])
    chains = []
    for root in roots_of([a, b]):
      parts = [chain_of(x, root) for x in (a, b)]
      slope = hull_of(possible, [c.slope for c in parts])
      chains.append(Chain(root, slope, largest_of(possible, [c.error for c in parts])))
    return self._best(eqn, [a, b], ends, around, error, chains)

  def _chosen(self, eqn, which, *cases) -> Rounded:
    """One of several numbers.

    Where the computed choice may differ from the real one, by rounding, the error is how far the
    cases are apart. Of a choice by comparing a root z with a number c, as in an ELU, each case
    counts on its side of c only: from z to its computed value, the result changes by the slopes
    of the cases and by how far they are apart at c.
    """
    known, cases = as_known(which), [as_rounded(x) for x in cases]
    shape = eqn.outvars[0].aval.shape
    index = [np.broadcast_to(np.asarray(i, int), shape) for i in (known.low, known.high)]
    possible = [(index[0] <= i) & (i <= index[1]) for i in range(len(cases))]
    for case, p in zip(cases, possible, strict=True):
      if p.all() and np.array_equal(index[0], index[1]):
        return case
    unsure = index[0] != index[1]
    if isinstance(which, Condition):
      unsure = unsure & ~which.agrees
    chains, operands = [], [which, *cases]
    sides = sides_of(which) if unsure.any() else None
    if sides is not None:
      root, below, at, above = sides
      halves = [self._again(x, root, y) for x, y in zip(cases, (below, above), strict=True)]
      there = hull_of(possible, [self._again(x, root, at).ends for x in cases])
      jump = np.where(unsure, there[1] - there[0], 0.0)
      if all(has_root(x, y) for x, y in zip(halves, (below, above), strict=True)):
        chains.append(joined_chain(root, possible, halves, (below, above), jump))
      cases = halves
    elif not unsure.any():
      for root in roots_of(cases):
        chains.append(joined_chain(root, possible, cases, [root] * len(cases), 0.0))
    ends, around = (hull_of(possible, [getattr(x, e) for x in cases]) for e in ("ends", "wide"))
    error = largest_of(possible, [x.error for x in cases])
    error = error + np.where(unsure, around[1] - around[0], 0.0)
    return self._best(eqn, operands, ends, around, error, chains)

  def _again(self, x: Any, root: Rounded, other: Rounded) -> Any:
    """A number with another one in the place of its root."""
    if x is root:
      return other
    if isinstance(x, Known) or x.made_by is None:
      return x
    eqn, operands = x.made_by
    if isinstance(x, Condition):
      return self._folded(eqn, [self._again(y, root, other) for y in operands])[0]
    if not has_root(x, root):
      return x
    operands = [self._again(y, root, other) for y in operands]
    (again,) = self._floats(eqn.primitive.name, eqn, operands) or [x]
    return again


def _affine(x: Any, root: Rounded, at: Any, done: dict[int, Any]) -> Any:
  """An affine value as a JAX function of the input."""
  if x is root:
    return at
  if not isinstance(x, Rounded):
    return jnp.asarray(x.low)
  if x.made_by is None:
    return jnp.asarray((x.low + x.high) / 2)
  if id(x) not in done:
    eqn, operands = x.made_by
    arrays = [_affine(y, root, at, done) for y in operands]
    done[id(x)] = (
      arrays[0] if eqn.primitive.name == "convert_element_type" else equation(eqn, arrays)[0]
    )
  return done[id(x)]


def _times(a: Ends, b: Ends) -> Ends:
  """a b, where infinity times 0 is 0."""
  low, high = enclosures.multiply(a, b)
  return np.nan_to_num(low, nan=0.0, posinf=np.inf, neginf=-np.inf), np.nan_to_num(
    high, nan=0.0, posinf=np.inf, neginf=-np.inf
  )
