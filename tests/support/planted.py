"""Functions that hide a violation of convexity where sampling does not look, and their kin.

Verifiers are tested on networks with planted counterexamples (Zhou, Xu, Xu et al. 2024,
"SoundnessBench", arXiv 2412.03154). Here each `Case` comes with a pair of points at whose midpoint
the function is too high, by as little as 1e-12, far away, in a narrow region, in one of many
outputs, by one of thousands of weights, or by a number that the program computes otherwise than
real arithmetic or another dtype would. Its `reference` is the same function written in numpy and
evaluated in long doubles, in which `gap` sees the violation; nothing of the certificate takes part.
`tests.support.convex` holds convex functions of the same families.
"""

import dataclasses
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jax.experimental import io_callback
from scipy import linalg, special

from convex_jax.proof import certify

# fmt: off
# One line a case: the tables are read side by side.
WIDE = np.longdouble
RNG = np.random.default_rng(0)


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
  """A function of one array, and what is known of it without the certificate.

  Attributes:
    family: what kind of rule it tries.
    name: unique in its family.
    program: maps the weights and x to arrays.
    a, b: a pair that violates the inequality, for a planted case; x has their shape.
    reference: the program in numpy: maps x of long doubles to a flat or shaped array.
    output: which of the flat outputs violates it.
    kind: what the case is not (planted) or is (convex).
    weights: the program's arguments before x.
    dtype: of x.
    x64: whether the program runs with 64-bit numbers enabled.
    change: what is changed after a first certificate, before the one that counts.
  """

  family: str
  name: str
  program: Callable[..., Any]
  a: np.ndarray
  b: np.ndarray
  reference: Callable[[np.ndarray], Any] | None = None
  output: int = 0
  kind: str = "convex"
  weights: tuple[Any, ...] = ()
  dtype: Any = np.float32
  x64: bool = False
  change: Callable[[], None] | None = None

  def __str__(self) -> str:
    return f"{self.family}: {self.name}"


def proved(case: Case) -> bool:
  """Whether the certificate says PROVED, of the output that a planted case breaks."""
  with jax.enable_x64(case.x64):
    x = jax.ShapeDtypeStruct(np.shape(case.a), case.dtype)

    def judge():
      return certify(case.program, *case.weights, x, kind=case.kind, search_steps=0)

    if case.change is not None:
      judge()
      case.change()
    certificate = judge()
  return bool(certificate) if case.reference is None else bool(certificate.proved[case.output])


def verdict(case: Case) -> str:
  """PROVED or UNKNOWN, or the error that was raised."""
  try:
    return "PROVED" if proved(case) else "UNKNOWN"
  except Exception as error:  # Whatever it is, it is counted.
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def gap(case: Case) -> float:
  """How far the pair violates the inequality, in units of what rounding could make: > 1 if it does.

  In long doubles, by the reference: f(middle) - (f(a) + f(b)) / 2 for "convex".
  """
  a, b = np.asarray(case.a, WIDE), np.asarray(case.b, WIDE)
  with np.errstate(all="ignore"):  # A function that is undefined somewhere is not convex on R^n.
    fa, fb, middle = (_flat(case, x) for x in (a, b, (a + b) / 2))
  excess = middle - (fa + fb) / 2
  excess = {"convex": excess, "concave": -excess, "affine": abs(excess)}[case.kind]
  rounding = 1e3 * np.finfo(WIDE).eps * (abs(fa) + abs(fb) + abs(middle))
  if not np.isfinite([fa, fb]).all() or not np.isfinite(middle):
    return np.inf if np.isnan([fa, fb, middle]).any() or middle == np.inf else -np.inf
  if not rounding:
    return np.inf if excess > 0 else 0.0
  return float(excess / rounding)


def _flat(case: Case, x: np.ndarray) -> np.longdouble:
  assert case.reference is not None
  return np.ravel(np.asarray(case.reference(x), WIDE))[case.output]


def disagreement(case: Case) -> float:
  """How far the program, run as it is, lies from the reference, over the values' size."""
  worst = 0.0
  with jax.enable_x64(case.x64):
    for x in (case.a, case.b):
      weights = jax.tree.map(jnp.asarray, case.weights)
      leaves = jax.tree.leaves(case.program(*weights, jnp.asarray(x, case.dtype)))
      ours = np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in leaves])
      with np.errstate(all="ignore"):
        theirs = float(_flat(case, np.asarray(x, WIDE)))
      if np.isfinite(theirs):
        worst = max(worst, abs(ours[case.output] - theirs) / (1 + abs(theirs)))
  return worst


def both(family, name, f, a, b, **more) -> Case:
  """A case whose program and reference are one text: `f(xp, x)` for xp = jax.numpy and numpy."""
  program, reference = functools.partial(f, jnp), functools.partial(f, np)
  return apart(family, name, program, reference, a, b, **more)


def apart(family, name, program, reference, a, b, **more) -> Case:
  return Case(family, name, program, np.float64(a), np.float64(b), reference, **more)


def at(i: int, t: float = 1.0, n: int = 4) -> np.ndarray:
  """The point with entry t at i, else 0."""
  return t * np.eye(n)[i]


def pair_at(i: int, n: int = 4, t: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
  return at(i, -t, n), at(i, t, n)


def relu(xp, x):
  return xp.maximum(x, 0)


# Scalar functions with a fault, each in four settings.

E = 1e-6  # The size of most faults.
F = 1e6  # Far away.
W = 1e-4  # The width of a narrow region.

SCALARS: list[tuple[str, Callable[[Any, Any], Any], float, float]] = [
  ("elu, alpha 1 + 1e-6", lambda xp, z: xp.where(z > 0, z, (1 + E) * xp.expm1(xp.where(z > 0, 0, z))), -1e-6, 1e-6),
  ("elu whose right slope is 1 - 1e-6", lambda xp, z: xp.where(z > 0, (1 - E) * z, xp.exp(xp.minimum(z, 0)) - 1), -1e-6, 1e-6),
  ("leaky relu, slope 1 + 1e-6", lambda xp, z: xp.where(z >= 0, z, (1 + E) * z), -1, 1),
  ("leaky relu by maximum, slope -1e-6 - 1", lambda xp, z: xp.minimum(z, (1 - E) * z), -1, 1),
  ("jump of 1e-6 at 0", lambda xp, z: xp.where(z > 0, z + E, 0 * z), -1e-7, 2e-7),
  ("jump of -1e-6 at 0", lambda xp, z: xp.where(z > 0, z - E, 0 * z), -1e-7, 1e-7),
  ("jump of 1e-6 at 1e6", lambda xp, z: xp.where(z > F, z - F + E, 0 * z), F - 1e-7, F + 1e-7),
  ("concave kink at 1e6", lambda xp, z: z - E * relu(xp, z - F), F - 1, F + 1),
  ("concave kink at -1e6", lambda xp, z: abs(z) + E * xp.minimum(z + F, 0), -F - 1, -F + 1),
  ("dent of width 1e-4", lambda xp, z: abs(z) - 2 * relu(xp, W - abs(z)), 0.0, 2 * W),
  ("bump of width 1e-4", lambda xp, z: relu(xp, z) + relu(xp, W - abs(z - 1)), 1 - W, 1 + W),
  ("three relus, one too steep", lambda xp, z: relu(xp, z) - (1 + E) * relu(xp, z - W) + relu(xp, z - 2 * W), 0.0, 2 * W),
  ("a point of its own", lambda xp, z: xp.where(z == 1, E, 0 * z), 1 - W, 1 + W),
  ("a point left out", lambda xp, z: relu(xp, z) + E * xp.where(z != 0, 0 * z, 1), -1e-7, 1e-7),
  ("softplus cut at 20", lambda xp, z: xp.where(z > 20, z, xp.log1p(xp.exp(xp.minimum(z, 20)))), 20 - 1e-9, 20 + 1e-9),
  ("softplus of slope 1 - 1e-6 above 30", lambda xp, z: xp.log1p(xp.exp(-abs(z))) + xp.where(z > 30, (1 - E) * z + 30 * E, relu(xp, z)), 29, 31),
  ("huber, outer slope less by 1e-6", lambda xp, z: xp.where(abs(z) <= 1, z * z / 2, (1 - E) * abs(z) - 0.5 + E), 1 - 1e-6, 1 + 1e-6),
  ("huber with a jump of 1e-6", lambda xp, z: xp.where(abs(z) < 1, z * z / 2, abs(z) - 0.5 + E), 1 - 1e-7, 1 + 1e-7),
  ("huber by minimum, 1e-6 off", lambda xp, z: xp.where(abs(z) < 1, z**2 / 2, abs(z) - 0.5 - E), 1 - 1e-7, 1 + 1e-7),
  ("log-cosh minus 1e-6 z^2", lambda xp, z: xp.logaddexp(z, -z) - E * z**2, 20, 22),
  ("reversed huber, kink too flat", lambda xp, z: xp.where(abs(z) <= 1, abs(z), (z * z + 1) / 2 - 1e-3 * (abs(z) - 1)), 1 - 1e-4, 1 + 1e-4),
  ("epsilon-insensitive with a slope of -1e-6", lambda xp, z: xp.maximum(abs(z) - 0.1, -E * abs(z)), -0.09, 0.09),
  ("squared hinge of the wrong piece", lambda xp, z: xp.where(z < 1, (1 - z) ** 2, E * (1 - z)), 1 - 1e-9, 3),
  ("smooth hinge, one piece shifted", lambda xp, z: xp.where(z <= 0, 0.5 - z, xp.where(z < 1, (1 - z + E) ** 2 / 2, 0 * z)), 1 - 1e-7, 1 + 1e-7),
  ("clip at a bound of 1e6", lambda xp, z: xp.clip(z, -1, F), F - 1, F + 1),
  ("maximum with a bound of minus 1e-6 z", lambda xp, z: xp.maximum(z, 0) + xp.minimum(E * z, 1), F - 1, F + 1),
  ("nested choice, inner jump", lambda xp, z: xp.where(z > 0, xp.where(z > 1, z + E, z), 0 * z), 1 - 1e-7, 1 + 1e-7),
  ("choice by a shifted condition", lambda xp, z: xp.where(z - E > 0, z, 0 * z), 0.0, 3e-6),
  ("choice by another scale", lambda xp, z: xp.where(2 * z > E, z, 0 * z), 0.0, 2e-6),
  ("choice that is turned", lambda xp, z: xp.where(-z > 0, z, 0 * z), -1, 1),
  ("choice, kink between 1 and 1 + 1e-6", lambda xp, z: xp.where(z > 1 + E, z - 1, 0 * z), 1.0, 1 + 3e-6),
  ("choice that says not", lambda xp, z: xp.where(xp.logical_not(z > 0), z, 0 * z), -1, 1),
  ("choice by two comparisons", lambda xp, z: xp.where((z > 0) & (z < F), z, 0 * z), F - 1, F + 1),
  ("sign times z, 1e-6 off", lambda xp, z: xp.sign(z - E) * z, -1e-7, 3e-6),
  ("sum with a step of 1e-6", lambda xp, z: abs(z) + E * xp.sign(z), -1e-7, 2e-7),
  ("square minus a step", lambda xp, z: z * z - E * xp.where(z > 1, 1, 0), 1 - 1e-9, 1 + 1e-9),
  ("exp minus its tangent's double", lambda xp, z: xp.exp(z) - E * z**2 * xp.where(z < 0, 1, 0), -40, -38),
  ("cubic of 1e-6", lambda xp, z: z**2 + E * z**3, -F, -F + 2),
  ("quartic minus square", lambda xp, z: z**4 - E * z**2, -3e-4, 3e-4),
  ("sine of 1e-6", lambda xp, z: z**2 / 2 + 2 * xp.sin(z), 0.7, 2.4),
  ("cosh minus square", lambda xp, z: (xp.exp(z) + xp.exp(-z)) / 2 - (1 + E) * z**2 / 2, -1e-4, 1e-4),
  ("modulo 1e6", lambda xp, z: xp.mod(z, F), F - 1, F + 1),
  ("floor of 1e-6 z", lambda xp, z: z**2 * 0 + xp.floor(E * z), F - 1, F + 1),
  ("round at 1e-6", lambda xp, z: xp.round(z) * E + abs(z), 0.4999, 0.5001),
  ("reciprocal", lambda xp, z: 1 / (z - F), F - 1, F + 2),
  ("square root", lambda xp, z: xp.sqrt(z + F), -F, -F + 2),
  ("logarithm, far away", lambda xp, z: -xp.log(z + F), -F - 2, -F + 1),
  ("entropy", lambda xp, z: z * xp.log(z), -2.0, 1.0),
  ("tanh, where it is flat", lambda xp, z: relu(xp, z) + xp.tanh(z - 10), 10, 12),
  ("a quotient by 1 + z^2", lambda xp, z: z**2 / (1 + E * z**2), 2000, 2002),
  ("arctan", lambda xp, z: z * xp.arctan(z) - xp.where(z > F, E, 0) * z, F - 1, F + 1),
  ("relu of a relu minus 1e-6", lambda xp, z: relu(xp, E - relu(xp, z)), -1e-6, 1e-6),
  ("exp of minus relu", lambda xp, z: xp.exp(-E * relu(xp, z)), -1, 1),
  ("a jump behind a maximum", lambda xp, z: xp.maximum(xp.where(z < 0, z - 1, z + E), z + E / 2), -1e-7, 2e-7),
  ("a jump behind a minimum", lambda xp, z: xp.maximum(z / 2, -2) + xp.minimum(xp.where(z < 0, z, -1.0), 0 * z), -0.3, 0.3),
  ("a jump behind a maximum that takes the other side", lambda xp, z: xp.maximum(xp.where(z < 0, z, 1.0), 0 * z) - 2 * z, -0.1, 0.2),
  ("a jump behind an absolute value", lambda xp, z: abs(xp.where(z < 0, 0 * z, 1.0)) - z, -0.1, 0.2),
  ("a jump behind a clip", lambda xp, z: xp.clip(xp.where(z < 0, z, 1.0), 0, 9) - z, -0.1, 0.2),
  ("a jump behind a square", lambda xp, z: xp.where(z < 0, 0 * z, 1.0) ** 2, -0.1, 0.2),
  ("a jump behind a maximum and a softplus", lambda xp, z: xp.log1p(xp.exp(xp.maximum(xp.where(z < 0, z, 1.0), 0 * z))), -0.1, 0.2),
  ("a power below one", lambda xp, z: 0.999999 ** relu(xp, z), -1, 1),
]

RIVALS = np.float32(RNG.uniform(0.1, 1, (32, 31)))  # Weights of the settings, all positive.
DIRECTION = np.float32([1, 0.5, -0.25, 2])


def _in_network(g):
  """W g(z) for 4 inputs, beside relus that are linear near the pair."""
  kernel = np.float32(np.eye(4) - 1e-3)

  def f(xp, x):
    z = xp.dot(x, DIRECTION)
    return 0.5 * g(xp, z) + relu(xp, x @ kernel * 0 + 1.0).sum()

  return f


def _in_many_outputs(g):
  """The 37th of 1,000 outputs; the others are relus."""

  def f(xp, x):
    z = xp.repeat(x, 250)
    return xp.concatenate([relu(xp, z[:37]), g(xp, z[37:38]), relu(xp, z[38:])])

  return f


def _in_sum(g):
  """One of 992 terms of a sum of columns, each with a positive weight."""

  def f(xp, x):
    h = xp.concatenate([g(xp, x[:1]), relu(xp, x[1:] + 1.0), relu(xp, xp.repeat(x[1:2], 28) + 2)])
    return h @ RIVALS

  return f


def worst_pair(g, low: float, high: float) -> tuple[float, float]:
  """The pair on a grid between two points whose middle is too high by most, for its size."""
  points = np.linspace(low, high, 41)
  a, b = (m.ravel() for m in np.meshgrid(points, points))
  with np.errstate(all="ignore"):
    fa, fb, middle = (g(np, x.astype(WIDE)) for x in (a, b, (a.astype(WIDE) + b) / 2))
    excess = (middle - (fa + fb) / 2) / (abs(fa) + abs(fb) + abs(middle) + np.finfo(WIDE).tiny)
  k = int(np.argmax(np.nan_to_num(excess, nan=np.inf)))  # Undefined is worst of all.
  return a[k], b[k]


def scalars() -> Iterator[Case]:
  unit = np.float64(DIRECTION) / np.dot(DIRECTION, np.float64(DIRECTION))
  for n, (name, g, low, high) in enumerate(SCALARS):
    a, b = worst_pair(g, low, high)
    yield both("kinks and scalar functions", name, g, [a] * 2, [b] * 2)
    settings = [
      both("kinks, in a network", name, _in_network(g), a * unit, b * unit),
      both("kinks, in one of 1,000 outputs", name, _in_many_outputs(g), at(0, a), at(0, b), output=37),
      both("kinks, in a sum", name, _in_sum(g), at(0, a), at(0, b), output=3),
    ]
    turn = n % len(settings)  # Where a setting would move the pair off a single point: the next.
    yield next((c for c in settings[turn:] + settings[:turn] if gap(c) > 1), settings[1])


# Known numbers.


def factor(family, name, make, value, **more) -> Case:
  """x^2 times a known number that the program makes by `make()`, and that is `value` < 0."""
  assert value < 0, (name, value)
  return apart(
    family, name, lambda x: jnp.square(x) * make(), lambda x: WIDE(value) * x * x, [-1.0], [1.0], **more
  )


def sign_of(condition):
  """1 where a known condition holds, else -1."""
  return jnp.where(condition, 1.0, -1.0)


def _wrapped(n: int) -> int:
  """An integer in 32 bits."""
  return (n + 2**31) % 2**32 - 2**31


def integers() -> Iterator[Case]:
  i32, f32 = np.int32, np.float32
  big = np.int64(50000)

  def one(name, make, value, **more):
    return factor("integers that wrap", name, make, value, **more)

  yield apart(
    "integers that wrap", "int32 square of 50,000",
    lambda w, x: jnp.square(x) * jnp.asarray(w * w, f32),
    lambda x: WIDE(50000 * 50000 - 2**32) * x * x, [-1.0], [1.0], weights=(big,),
  )
  yield one("int32 sum", lambda: (jnp.int32(2**31 - 1) + jnp.int32(5)).astype(f32), 4 - 2**31)
  yield one("int8 product", lambda: (jnp.int8(100) * jnp.int8(2)).astype(f32), 200 - 256)
  yield one("uint8 difference", lambda: 100.0 - (jnp.uint8(3) - jnp.uint8(5)).astype(f32), 100 - 254)
  yield one("uint32 negation", lambda: 1.0 - (-jnp.uint32(2)).astype(f32), 1 - (2**32 - 2))
  yield one("absolute value of the least int8", lambda: jnp.abs(jnp.int8(-128)).astype(f32), -128)
  yield one("int16 power", lambda: (jnp.int16(190) ** 2).astype(f32), 36100 - 65536)
  yield one("left shift", lambda: (jnp.int32(3) << 30).astype(f32), -(2**30))
  yield one("sum over an axis", lambda: jnp.full(33, 2**26, i32).sum(dtype=i32).astype(f32), _wrapped(33 * 2**26))
  yield one("cumulative sum", lambda: jnp.cumsum(jnp.full(40, 2**26, i32), dtype=i32)[-1].astype(f32), 40 * 2**26 - 2**32)
  yield one("product over an axis", lambda: jnp.prod(jnp.full(3, 1300, i32), dtype=i32).astype(f32), _wrapped(1300**3))
  yield one("matrix product", lambda: (jnp.full(3, 30000, i32) @ jnp.full(3, 30000, i32)).astype(f32), 27 * 10**8 - 2**32)
  yield one("int32 of 2^40 + 2^31", lambda: jnp.asarray(np.int64(2**40 + 2**31)).astype(f32), -(2.0**31))
  yield one("narrowed to int8", lambda: jnp.int32(200).astype(jnp.int8).astype(f32), -56)
  yield one("narrowed to int16", lambda: jnp.int32(40000).astype(jnp.int16).astype(f32), 40000 - 65536)
  yield one("a counter in a loop", lambda: lax.fori_loop(0, 16, lambda _, c: c * 7, jnp.int32(3)).astype(f32), _wrapped(3 * 7**16))
  yield one("in a nested jit", lambda: jax.jit(lambda v: v * v)(jnp.int32(50000)).astype(f32), 50000**2 - 2**32)
  yield one("a dot of int8", lambda: lax.dot(jnp.full((1, 2), 100, jnp.int8), jnp.full((2, 1), 1, jnp.int8))[0, 0].astype(f32), 200 - 256)
  yield one("bitwise not", lambda: (~jnp.int32(0)).astype(f32), -1)
  yield one("bits of a float", lambda: lax.bitcast_convert_type(jnp.float32(-0.0), i32).astype(f32), -(2.0**31))
  yield one("a wrapped index", lambda: jnp.array([-1.0, 1.0])[(jnp.int8(127) + jnp.int8(2)).astype(i32)], -1.0)
  yield one("a wrapped comparison", lambda: sign_of(jnp.int32(2**31 - 1) + 1 > 0), -1.0)
  yield one("a wrapped matrix", lambda: jnp.sum(jnp.outer(jnp.array([60000, 1], i32), jnp.array([60000, 1], i32)).astype(f32)), float(f32(60000**2 - 2**32) + 120001))


def near_borders() -> Iterator[Case]:
  f32, f16, bf16 = np.float32, np.float16, ml_dtypes.bfloat16
  tenth = f32(0.1)

  def one(name, make, value, **more):
    return factor("near a border", name, make, value, **more)

  def choose(name, test):
    """The sign of a test that the program evaluates; `test(xp, f)` in its own dtype, f."""
    with np.errstate(over="ignore"):
      holds = bool(test(np, f32))
    return one(name, lambda: sign_of(test(jnp, jnp.float32) != holds), -1.0)

  yield one("floor of 0.7 times 10", lambda: 6.5 - jnp.floor(jnp.float32(0.7) * 10), 6.5 - float(np.floor(f32(0.7) * f32(10))))
  yield choose("2 = sqrt(2)^2", lambda xp, f: xp.sqrt(f(2)) * xp.sqrt(f(2)) == 2)
  yield choose("0.1 + 0.2 > 0.3", lambda xp, f: f(0.1) + f(0.2) > f(0.3))
  yield choose("0.1 * 3 == 0.3", lambda xp, f: f(0.1) * f(3) == f(0.3))
  yield choose("1 + 1e-8 > 1", lambda xp, f: f(1) + f(1e-8) > 1)
  yield choose("(1e8 + 1) - 1e8 > 0.5", lambda xp, f: (f(1e8) + f(1)) - f(1e8) > 0.5)
  yield choose("1e-30 squared > 0", lambda xp, f: f(1e-30) * f(1e-30) > 0)
  yield choose("1e30 squared is finite", lambda xp, f: xp.isfinite(f(1e30) * f(1e30)))
  yield choose("0.1 in 32 bits > 0.1", lambda xp, f: xp.asarray(f(0.1)) - 0.1 > 0)
  yield choose("ceil of 1.1 times 10", lambda xp, f: xp.ceil(f(1.1) * f(10)) > 11)
  yield choose("remainder of 1 by 0.1", lambda xp, f: xp.mod(f(1), f(0.1)) > 0.05)
  yield choose("floor division of 1 by 0.1", lambda xp, f: xp.floor_divide(f(1), f(0.1)) > 9.5)
  yield choose("round of 0.15 times 10", lambda xp, f: xp.round(f(0.15) * f(10)) > 1.5)
  yield choose("sign of (0.1 + 0.2) - 0.3", lambda xp, f: xp.sign((f(0.1) + f(0.2)) - f(0.3)) > 0)
  yield choose("sum of ten tenths", lambda xp, f: xp.cumsum(xp.full(10, tenth))[-1] == 1)
  yield choose("argmax near a tie", lambda xp, f: xp.argmax(xp.asarray([1.0, 1.0 + 1e-9], f)) == 0)
  yield choose("order of near ties", lambda xp, f: xp.argsort(xp.asarray([1.0 + 1e-9, 1.0], f))[0] == 0)
  yield choose("place among near ties", lambda xp, f: xp.searchsorted(xp.asarray([1.0, 2.0], f), f(1 + 1e-9)) == 0)
  yield choose("2^24 + 1", lambda xp, f: xp.asarray(2**24 + 1).astype(f) > 2**24)
  yield choose("integer part of 0.29 times 100", lambda xp, f: (f(0.29) * f(100)).astype(np.int32) < 29)
  yield choose("exp and back", lambda xp, f: xp.exp(xp.log(f(3))) == 3)
  yield one("257 in bfloat16", lambda: sign_of(jnp.float32(257).astype(bf16) > 256), -1.0)
  yield one("2049 in float16", lambda: sign_of(jnp.float32(2049).astype(f16) > 2048), -1.0)
  yield one("300 squared in float16", lambda: sign_of(jnp.isfinite(jnp.float16(300) * jnp.float16(300))), -1.0)
  yield one("1 + 1/256 in bfloat16", lambda: sign_of(jnp.bfloat16(1) + jnp.bfloat16(1 / 256) > 1), -1.0)
  yield one("float8 of 17", lambda: (jnp.float32(17).astype(ml_dtypes.float8_e4m3fn).astype(f32) - 16.5), -0.5)
  yield one("float8 of 1.1, in bfloat16", lambda: (jnp.bfloat16(1.1).astype(ml_dtypes.float8_e5m2).astype(f32) - 1.05), 1.0 - 1.05)
  yield one("rounded to 1 bit", lambda: lax.reduce_precision(jnp.float32(1.2), 8, 1) - 1.1, 1 - 1.1)
  yield one("integer of a float just below 3", lambda: jnp.float32(2.9999999).astype(np.int32).astype(f32) - 3.5, -0.5)
  yield one("bfloat16 index", lambda: jnp.array([1.0, -1.0, 1.0])[(jnp.bfloat16(256) + jnp.bfloat16(1)).astype(np.int32) - 255], -1.0)
  yield apart(
    "near a border", "a float64 weight that is 1 in the program",
    lambda w, x: jnp.square(x) * jnp.where(w > 1, 1.0, -1.0),
    lambda x: -x * x, [-1.0], [1.0], weights=(np.float64(1 + 1e-12),),
  )
  yield apart(
    "near a border", "a float64 weight among others, a tie in the program",
    lambda w, x: jnp.square(x) * jnp.array([-1.0, 1.0])[jnp.argmax(w["u"])],
    lambda x: -x * x, [-1.0], [1.0], weights=({"u": np.array([1, 1 + 1e-12])},),
  )
  def count(t):
    steps = 0
    while t(0.1) * t(0) + sum_so_far(t, steps) < 1:
      steps += 1
    return steps

  def sum_so_far(t, n):
    s = t(0)
    for _ in range(n):
      s = t(s + t(0.1))
    return s

  n32 = count(f32)
  yield one("how many tenths make 1", lambda: 0.5 * (n32 - 0.5) - 0.5 * lax.while_loop(lambda c: c[1] < 1, lambda c: (c[0] + 1, c[1] + tenth), (0, jnp.float32(0)))[0].astype(f32), -0.25)
  yield one("machine epsilon", lambda: 1e-8 - lax.while_loop(lambda e: 1 + e > 1, lambda e: e / 2, jnp.float32(1)), 1e-8 - 2.0**-24)


def magnitudes() -> Iterator[Case]:
  """Signs of real numbers that float32 or float64 would round away."""

  def one(name, numbers, combine, value=None, **more):
    """relu(x) times a known combination of numbers, which is below 0."""
    numbers = np.asarray(numbers)
    wide = combine(np, numbers.astype(WIDE)) if value is None else WIDE(value)
    return apart(
      "signs of tiny and of cancelling numbers", name,
      lambda w, x: jnp.maximum(x, 0) * combine(jnp, w), lambda x: np.maximum(x, 0) * wide,
      [-1.0], [1.0], weights=(numbers,), **more,
    )

  product = lambda xp, w: functools.reduce(lambda p, q: p * q, list(w))  # noqa: E731
  yield one("-1e-30 times 1e-30", np.float32([-1e-30, 1e-30]), product)
  yield one("a product of twelve", np.float32([-1e-30, *[1e-30] * 11]), product)
  yield one("a product of twelve, by prod", np.float32([-1e-30, *[1e-30] * 11]), lambda xp, w: xp.prod(w))
  yield one("-1e-200 times 1e-200", np.float64([-1e-200, 1e-200]), product, x64=True, dtype=np.float64)
  yield one("a square under the least double", np.float64([-1e-170]), lambda xp, w: w[0] * abs(w[0]), x64=True, dtype=np.float64)
  yield one("-1e-200 over 1e200", np.float64([-1e-200, 1e200]), lambda xp, w: w[0] / w[1], x64=True, dtype=np.float64)
  yield one("minus exp of -800", np.float32([800]), lambda xp, w: -xp.exp(-w[0]))
  yield one("minus exp of -100", np.float32([100]), lambda xp, w: -xp.exp(-w[0]))
  yield one("minus exp(-1000), by a matrix", np.float32([1000.0]), lambda xp, w: (xp.asarray([[-1.0, 1.0]]) @ xp.stack([xp.exp(-w[0]), 0 * w[0]]))[0])
  yield one("minus a power of 1e-3", np.float32([1e-3]), lambda xp, w: -(w[0] ** 120))
  yield one("sigmoid of -800, turned", np.float32([800]), lambda xp, w: -1 / (1 + xp.exp(w[0])))
  yield one("one minus tanh of 50, turned", np.float32([50]), lambda xp, w: xp.tanh(w[0]) - 1, value=-2 * np.exp(WIDE(-100)))
  yield one("(1e17 + 1) - 1e17", np.float64([2.0**60, 1, -0.5]), lambda xp, w: w[2] * ((w[0] + w[1]) - w[0]), x64=True, dtype=np.float64)
  yield one("a sum of three that cancel", np.float64([2.0**60, -0.5, -(2.0**60)]), lambda xp, w: xp.sum(w), x64=True, dtype=np.float64)
  yield one("a dot product that cancels", np.float64([2.0**30, -0.5, -(2.0**30)]), lambda xp, w: w @ (w * 0 + xp.stack([w[0], w[1] / w[1], w[0]])), value=-0.5, x64=True, dtype=np.float64)
  yield one("a cumulative sum that cancels", np.float64([2.0**60, -0.5, -(2.0**60)]), lambda xp, w: xp.cumsum(w)[-1], x64=True, dtype=np.float64)
  yield one("1/3 of 3 minus 1, minus 1e-18", np.float64([3.0, -1e-18]), lambda xp, w: (1 / w[0]) * w[0] - 1 + w[1], value=-1e-18, x64=True, dtype=np.float64)
  yield one("sqrt(2)^2 - 2 - 1e-17", np.float64([2.0, -1e-17]), lambda xp, w: xp.sqrt(w[0]) ** 2 - w[0] + w[1], value=-1e-17, x64=True, dtype=np.float64)
  yield one("log(exp(30) - ...) that cancels", np.float64([0.1, -1e-18]), lambda xp, w: xp.log(xp.exp(w[0])) - w[0] + w[1], value=-1e-18, x64=True, dtype=np.float64)
  yield one("minus sin of 3 pi", np.float64([1.0]), lambda xp, w: -xp.sin(w[0] * 3.141592653589793 * 3), value=-np.sin(WIDE(3.141592653589793) * 3), x64=True, dtype=np.float64)
  yield one("a mean that rounds up", np.float32([1.0, 1.0 - 2.0**-24]), lambda xp, w: xp.mean(w) - 1, value=-(2.0**-25))
  yield one("variance of nearly equal numbers", np.float64([1e9, 1e9 + 1, 1e9 + 2]), lambda xp, w: xp.mean(w) ** 2 - xp.mean(w * w), value=-2 / WIDE(3), x64=True, dtype=np.float64)
  yield one("half precision, -6e-8 times 0.1", np.float16([-6e-8, 0.1]), lambda xp, w: w[0] * w[1], dtype=np.float16)
  yield one("bfloat16, -1e-38 times 1e-3", np.array([-1e-38, 1e-3], ml_dtypes.bfloat16), lambda xp, w: w[0] * w[1], dtype=ml_dtypes.bfloat16)


def on_the_way() -> Iterator[Case]:
  """Known numbers of which either the real value or what the program gets is below 0."""
  f32, f16 = np.float32, np.float16

  def one(name, weights, make, value):
    assert value < 0, name
    return apart(
      "overflow, underflow and conditioning", name,
      lambda w, x: jnp.square(x) * make(w), lambda x: WIDE(value) * x * x,
      [-1.0], [1.0], weights=(np.asarray(weights, getattr(weights, "dtype", f32)),),
    )

  cancel, tiny = f32([1e8, 1, -1e8, 0]), f32(1e-39)
  same, zeros = f32([1e-30, 1e-30, 1e30, 1e30]), np.zeros(4, int)
  # The program loses them on the way.
  yield one("a product that underflows", same, lambda w: jnp.prod(w) - 0.5, -0.5)
  yield one("a cumulative product that underflows", same, lambda w: jnp.cumprod(w)[-1] - 0.5, -0.5)
  yield one("a product of powers that underflows", f32([1e-30, 1e30]), lambda w: w[0] ** 2 * w[1] ** 2 - 0.5, -0.5)
  yield one("a product by a loop", same, lambda w: lax.fori_loop(0, 4, lambda i, c: c * w[i], f32(1)) - 0.5, -0.5)
  yield one("a product by a scatter", same, lambda w: jnp.ones(1).at[zeros].multiply(w)[0] - 0.5, -0.5)
  yield one("a product that overflows", same[::-1], lambda w: sign_of(jnp.isfinite(jnp.prod(w))), -1.0)
  big = f32([3e38, 3e38, -3e38])
  yield one("a sum that overflows", big, lambda w: sign_of(jnp.isfinite(w.sum())), -1.0)
  yield one("a dot product that overflows", big, lambda w: sign_of(jnp.isfinite(w @ jnp.ones(3))), -1.0)
  yield one("a cumulative sum that overflows", big, lambda w: sign_of(jnp.isfinite(jnp.cumsum(w)[-1])), -1.0)
  yield one("a mean that overflows", big, lambda w: sign_of(jnp.isfinite(w.mean())), -1.0)
  yield one("a window's sum that overflows", big, lambda w: sign_of(jnp.isfinite(lax.reduce_window(w, 0.0, lax.add, (3,), (1,), "VALID")[0])), -1.0)
  yield one("a float16 sum that overflows", f16([6e4, 6e4, -6e4]), lambda w: sign_of(jnp.isfinite(lax.reduce_sum(w, (0,)))), -1.0)
  yield one("a norm that overflows", f32([1e30, 1e30]), lambda w: sign_of(jnp.isfinite(jnp.sqrt(jnp.sum(w**2)))), -1.0)
  yield one("an exp that overflows", f32(100), lambda w: sign_of(jnp.isfinite(jnp.exp(w))), -1.0)
  # Subnormal numbers, which XLA takes for 0.
  for name, test in (
    ("> 0", lambda w: w > 0), ("!= 0", lambda w: w != 0), ("as a bool", lambda w: w.astype(bool)),
    ("+ 0 > 0", lambda w: w + 0.0 > 0), ("times 1 > 0", lambda w: w * 1.0 > 0),
    ("square root > 0", lambda w: jnp.sqrt(w) > 0), ("maximum with 0 > 0", lambda w: jnp.maximum(w, 0) > 0),
    ("negated < 0", lambda w: -w < 0), ("in a sum > 0", lambda w: jnp.sum(jnp.stack([w, w])) > 0),
  ):
    yield one(f"subnormal, {name}", tiny, lambda w, t=test: sign_of(t(w)), -1.0)
  yield one("sign of a subnormal number", tiny, lambda w: jnp.sign(w) - 0.5, -0.5)
  yield one("reciprocal of a subnormal number", f32(5e-39), lambda w: sign_of(jnp.isfinite(1 / w)), -1.0)
  yield one("argmax of subnormal numbers", f32([0, 1e-39]), lambda w: jnp.array([-1.0, 1.0])[jnp.argmax(w)], -1.0)
  yield one("a difference that is subnormal", f32([1.2e-38, 1.19e-38]), lambda w: sign_of(w[0] - w[1] > 0), -1.0)
  # Real numbers that cancel.
  yield one("segment_sum", cancel, lambda w: 0.5 - jax.ops.segment_sum(w, zeros, 1)[0], -0.5)
  yield one("at[].add", cancel, lambda w: 0.5 - jnp.zeros(1).at[zeros].add(w)[0], -0.5)
  yield one("at[].subtract", -cancel, lambda w: 0.5 - jnp.zeros(1).at[zeros].subtract(w)[0], -0.5)
  yield one("a custom reduction", cancel, lambda w: 0.5 - lax.reduce(w, f32(0), lambda p, q: p + q * 1, (0,)), -0.5)
  yield one("a custom window", cancel, lambda w: 0.5 - lax.reduce_window(w, f32(0), lambda p, q: p + q * 1, (4,), (1,), "VALID")[0], -0.5)
  yield one("an associative scan", cancel, lambda w: 0.5 - lax.associative_scan(jnp.add, w)[-1], -0.5)
  yield one("a fast Fourier transform", cancel, lambda w: 0.5 - jnp.fft.fft(w)[0].real, -0.5)
  yield one("complex numbers", f32(1e8), lambda w: 0.5 - ((lax.complex(w, w) + 1) - lax.complex(w, w)).real, -0.5)
  yield one("absolute value of a complex number", f32(1e8), lambda w: 0.5 - jnp.abs((lax.complex(w, w * 0) + 1) - lax.complex(w, w * 0)), -0.5)
  yield one("einsum", cancel, lambda w: 0.5 - jnp.einsum("i,i->", w, jnp.ones(4)), -0.5)
  yield one("a convolution", cancel, lambda w: 0.5 - jnp.convolve(w, jnp.ones(4), "valid")[0], -0.5)
  yield one("a polynomial", f32([1e8, 1, -1e8]), lambda w: 0.5 - jnp.polyval(w, f32(1)), -0.5)
  yield one("a variance", f32([1e8, 1e8, 1e8 + 8]), lambda w: 1.0 - (jnp.mean(w**2) - jnp.mean(w) ** 2), 1 - 64 * 2 / 9)
  yield one("a pooled mean's transpose", cancel, lambda w: 0.5 - jax.grad(lambda v: (v * w).sum())(jnp.ones(4)).sum(), -0.5)
  # Ill-conditioned problems: the program's own value has the other sign.
  grid = np.arange(9)
  hilbert = f32(1 / (grid[:, None] + grid + 1.0))
  inverse = linalg.invhilbert(9)
  computed = np.linalg.inv(hilbert)
  wrong = list(zip(*np.nonzero(np.sign(computed) != np.sign(inverse)), strict=True))[:3]
  for i, j in wrong:
    s = -np.sign(inverse[i, j])
    yield one(f"entry {i}, {j} of a Hilbert matrix's inverse", hilbert, lambda w, i=i, j=j, s=s: s * jnp.linalg.inv(w)[i, j], -abs(inverse[i, j]))
  flat = f32([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
  ones = np.ones((3, 3), f32)
  yield one("least singular value", flat, lambda w: jnp.linalg.svd(w, compute_uv=False)[2] - 1e-9, -1e-9)
  yield one("last diagonal entry of QR", flat, lambda w: jnp.abs(jnp.linalg.qr(w)[1][2, 2]) - 1e-9, -1e-9)
  yield one("least eigenvalue, turned", ones, lambda w: -1e-9 - jnp.linalg.eigvalsh(w)[0], -1e-9)
  yield one("least eigenvalue", ones, lambda w: jnp.linalg.eigvalsh(w)[0] - 1e-9, -1e-9)
  yield one("determinant", f32([[1e8, 1e8 - 8], [1e8 + 8, 1e8]]), lambda w: 1 - jnp.linalg.det(w), 1 - 64.0)
  yield one("determinant of a singular matrix", flat, lambda w: jnp.abs(jnp.linalg.det(w)) - 1e-9, -1e-9)
  yield one("last entry of a Cholesky factor", f32([[1, 1], [1, 1]]), lambda w: jnp.linalg.cholesky(w)[1, 1] - 1e-5, -1e-5)
  yield one("a triangular solve that cancels", f32([[1, 0, 0], [1e8, 1, 0], [1, 1e-8, 1]]), lambda w: 0.25 - jax.scipy.linalg.solve_triangular(w, f32([1, 1e8 + 8, 2.33]), lower=True)[2], 0.25 - (float(f32(2.33)) - 1 - float(f32(1e-8)) * (float(f32(1e8 + 8)) - 1e8)))
  root = f32(1.4616318)  # Just below the root of digamma.
  below = float(special.digamma(np.float64(root)))
  yield one("digamma beside its root", root, lambda w: np.sign(-below) * lax.digamma(w), -abs(below))


def draws() -> Iterator[Case]:
  """Random numbers, which are others with 64 bits."""
  random = jax.random
  key = random.key(7)
  table: list[tuple[str, Callable[[], Any]]] = [
    ("gamma", lambda: random.gamma(key, 2.0)),
    ("normal", lambda: random.normal(key)),
    ("uniform", lambda: random.uniform(key)),
    ("exponential", lambda: random.exponential(key)),
    ("beta", lambda: random.beta(key, 2.0, 3.0)),
    ("truncated normal", lambda: random.truncated_normal(key, -1.0, 1.0)),
    ("gumbel", lambda: random.gumbel(key)),
    ("laplace", lambda: random.laplace(key)),
    ("student", lambda: random.t(key, 3.0)),
    ("dirichlet", lambda: random.dirichlet(key, jnp.ones(3))[0]),
    ("categorical", lambda: random.categorical(random.key(5), jnp.zeros(50)) / 50.0),
    ("randint", lambda: random.randint(key, (), 0, 1000) / 1000.0),
    ("normal, by an old key", lambda: random.normal(random.PRNGKey(3))),
    ("split and folded", lambda: random.normal(random.fold_in(random.split(key)[1], 5), (3,))[2]),
    ("normal in a jit", lambda: jax.jit(random.normal)(key)),
    ("normal in a scan", lambda: lax.scan(lambda c, k: (c + random.normal(k), None), 0.0, random.split(key, 3))[0]),
    ("orthogonal", lambda: random.orthogonal(key, 3)[0, 0]),
    ("dropout mask", lambda: random.bernoulli(random.key(1), 0.5, (64,)).astype(np.float32).mean()),
    ("random bits", lambda: random.bits(key).astype(np.float32) / 2.0**32),
    ("permutation", lambda: random.permutation(random.key(2), 50)[0] / 50.0),
    ("choice", lambda: random.choice(random.key(4), jnp.arange(64.0)) / 64),
  ]
  for name, draw in table:
    here = float(draw())
    with jax.enable_x64(True):
      there = float(draw())
    sign = -1.0 if there < here else 1.0
    border = here + sign * max(abs(there - here) / 2, 1e-3)
    value = sign * (np.float32(here) - np.float32(border))
    yield factor("random draws", name, lambda d=draw, s=sign, c=border: s * (d() - c), float(value))


def _callback():
  """An impure number: 1 at first, -1 from the fifth call on."""
  calls = []

  def give():
    calls.append(0)
    return np.float32(1 if len(calls) < 5 else -1)

  return give


def effects() -> Iterator[Case]:
  shape, calls = jax.ShapeDtypeStruct((), np.float32), [_callback() for _ in range(4)]
  yield factor("effects", "io_callback", lambda: io_callback(calls[0], shape), -1.0)
  yield factor("effects", "ordered io_callback", lambda: io_callback(calls[1], shape, ordered=True), -1.0)
  yield factor("effects", "io_callback in a jit", lambda: jax.jit(lambda: io_callback(calls[2], shape))(), -1.0)
  yield factor("effects", "io_callback in a scan", lambda: lax.scan(lambda s, _: (s * io_callback(calls[3], shape), None), jnp.float32(1), None, length=1)[0], -1.0)
  yield factor("effects", "numbers of the machine", lambda: lax.rng_uniform(jnp.float32(-1), jnp.float32(1), ()), -0.5)
  store = np.ones(3, np.float32)
  reads = factor("effects", "a callback that reads what changes", lambda: io_callback(lambda: store[0], shape), -1.0)
  yield dataclasses.replace(reads, change=lambda: store.__setitem__(0, -1.0))


# Verdicts of an older function.

GLOBAL = {"last": np.ones(4, np.float32)}


class _Layer:
  def __init__(self):
    self.last = jnp.ones(4)

  def __call__(self, x):
    return self.last @ jax.nn.softplus(x)


def changes() -> Iterator[Case]:
  family = "changed since"

  def reference(x):
    return -np.log1p(np.exp(x)).sum()

  def one(name, program, change, **more):
    a, b = np.full(4, -1.0), np.ones(4)
    return apart(family, name, program, reference, a, b, change=change, **more)

  minus = -jnp.ones(4)
  w = {"last": jnp.ones(4)}
  yield one("an entry of a dict", lambda x: w["last"] @ jax.nn.softplus(x), lambda: w.update(last=minus))
  v = np.ones(4, np.float32)
  yield one("an array in place", lambda x: v @ jax.nn.softplus(x), lambda: v.__imul__(-1))
  layer = _Layer()
  yield one("an attribute", layer, lambda: setattr(layer, "last", minus))
  other = _Layer()
  yield one("an attribute, by a method", other.__call__, lambda: setattr(other, "last", minus))
  inner = {"last": jnp.ones(4)}
  jitted = jax.jit(lambda x: inner["last"] @ jax.nn.softplus(x))
  yield one("in a nested jit", lambda x: jitted(x), lambda: (inner.update(last=minus), jitted.clear_cache()))
  box = [1.0]
  yield one("an entry of a list", lambda x: box[0] * jax.nn.softplus(x).sum(), lambda: box.__setitem__(0, -1.0))
  yield one("a global", lambda x: GLOBAL["last"] @ jax.nn.softplus(x), lambda: GLOBAL.update(last=np.float32(minus)))
  state = types.SimpleNamespace(sign=1.0)
  yield one("in a checkpoint", jax.checkpoint(lambda x: state.sign * jax.nn.softplus(x).sum()), lambda: setattr(state, "sign", -1.0))
  sign = types.SimpleNamespace(sign=1.0)
  scan = lambda x: lax.scan(lambda c, r: (c + sign.sign * jax.nn.softplus(r), None), 0.0, x)[0]  # noqa: E731
  yield one("in a scan", scan, lambda: setattr(sign, "sign", -1.0))
  held = {"w": np.ones(4, np.float32)}
  part = functools.partial(lambda h, x: h["w"] @ jax.nn.softplus(x), held)
  yield one("in a partial", part, lambda: held["w"].__imul__(-1))
  deep = {"w": 1.0}
  net = jax.custom_jvp(lambda x: deep["w"] * jax.nn.softplus(x).sum())
  net.defjvp(lambda p, t: (net(*p), jnp.dot(jax.nn.sigmoid(p[0]), t[0])))
  yield one("in a custom_jvp", net, lambda: deep.update(w=-1.0))
  kept = {"w": np.ones(4, np.float32)}
  cached = {"w": 1.0}
  called = jax.jit(lambda x: cached["w"] * jax.nn.softplus(x).sum())
  yield one("in a nested jit that keeps its cache", lambda x: called(x), lambda: cached.update(w=-1.0))
  body = {"w": 1.0}

  def step(c, r):
    return c + body["w"] * jax.nn.softplus(r), None

  yield one("in a loop's body that is the same object", lambda x: lax.scan(step, 0.0, x)[0], lambda: body.update(w=-1.0))
  branch = {"w": 1.0}

  def taken(x):
    return branch["w"] * jax.nn.softplus(x).sum()

  yield one("in a branch of cond", lambda x: lax.cond(True, taken, jnp.sum, x), lambda: branch.update(w=-1.0))
  yield one("a weight that is an argument", lambda u, x: u["w"] @ jax.nn.softplus(x), lambda: kept["w"].__imul__(-1), weights=(kept,))


# Moves of elements: a sign that is right for one element falls on another.

_IDX = np.int32([3, 1, 7, 7, 0, -1, 4, 2])
_ORDER = np.int32([5, 2, 7, 0, 4, 1, 6, 3])
MASK = np.array([1, 0, 1, 1, 0, 1, 0, 1], bool)
MOVES: list[tuple[str, Callable, Callable]] = [
  ("rev", lambda v: lax.rev(v, (0,)), lambda v: v[::-1]),
  ("roll", lambda v: jnp.roll(v, 3), lambda v: np.roll(v, 3)),
  ("transpose", lambda v: v.reshape(2, 4).T, lambda v: v.reshape(2, 4).T),
  ("transpose of three axes", lambda v: v.reshape(2, 2, 2).transpose(1, 2, 0), lambda v: v.reshape(2, 2, 2).transpose(1, 2, 0)),
  ("reshape in another order", lambda v: v.reshape((4, 2), order="F"), lambda v: v.reshape((4, 2), order="F")),
  ("reshape with dimensions", lambda v: lax.reshape(v.reshape(2, 4), (4, 2), dimensions=(1, 0)), lambda v: v.reshape(2, 4).T.reshape(4, 2)),
  ("negative padding", lambda v: lax.pad(v, jnp.zeros((), v.dtype), [(-2, 3, 0)]), lambda v: np.concatenate([v[2:], [0, 0, 0]])),
  ("interior padding", lambda v: lax.pad(v, jnp.zeros((), v.dtype), [(1, 0, 1)]), lambda v: np.stack([0 * v, v], 1).ravel()),
  ("slice with strides", lambda v: lax.slice(v, (1,), (8,), (3,)), lambda v: v[1:8:3]),
  ("negative strides", lambda v: v[6:0:-2], lambda v: v[6:0:-2]),
  ("dynamic slice that is clamped", lambda v: lax.dynamic_slice(v, (jnp.int32(6),), (4,)), lambda v: v[4:8]),
  ("dynamic slice from below", lambda v: lax.dynamic_slice(v, (jnp.int32(-3),), (4,)), lambda v: v[0:4] if _clamps() else v[4:8]),
  ("dynamic index that is negative", lambda v: lax.dynamic_index_in_dim(v, jnp.int32(-2), keepdims=True), lambda v: v[6:7]),
  ("dynamic update that is clamped", lambda v: lax.dynamic_update_slice(v, v[:3] * 0, (jnp.int32(7),)), lambda v: np.concatenate([v[:5], 0 * v[:3]])),
  ("take", lambda v: jnp.take(v, _IDX, mode="wrap"), lambda v: v[_IDX]),
  ("take, clipped", lambda v: jnp.take(v, np.array([9, -4, 5]), mode="clip"), lambda v: v[[7, 0, 5]]),
  ("take, wrapped", lambda v: jnp.take(v, np.array([9, -4, 17]), mode="wrap"), lambda v: v[[1, 4, 1]]),
  ("indices that are negative", lambda v: v[np.array([-1, -8, 2])], lambda v: v[[-1, -8, 2]]),
  ("indices out of bounds", lambda v: v[jnp.array([12, 3])], lambda v: v[[7, 3]]),
  ("filled with a number", lambda v: v.at[np.array([12, 3, 5])].get(mode="fill", fill_value=2.0), lambda v: np.array([2, v[3], v[5]])),
  ("two-dimensional indices", lambda v: v.reshape(2, 4)[np.array([1, 0, 1]), np.array([3, 3, 0])], lambda v: v[[7, 3, 4]]),
  ("rows by indices", lambda v: v.reshape(4, 2)[np.array([3, 1, 1])], lambda v: v.reshape(4, 2)[[3, 1, 1]]),
  ("columns by indices", lambda v: v.reshape(2, 4)[:, np.array([3, 1, 1])], lambda v: v.reshape(2, 4)[:, [3, 1, 1]]),
  ("take along an axis", lambda v: jnp.take_along_axis(v.reshape(2, 4), np.array([[3, 0], [1, 1]]), 1), lambda v: v[[3, 0, 5, 5]]),
  ("a permutation and back", lambda v: v[_ORDER][_ORDER], lambda v: v[_ORDER][_ORDER]),
  ("choice by a mask", lambda v: jnp.where(MASK, v, v[::-1]), lambda v: np.where(MASK, v, v[::-1])),
  ("choice among three", lambda v: lax.select_n(np.array([0, 1, 2, 0, 1, 2, 0, 1]), v, v[::-1], jnp.roll(v, 1)), lambda v: np.choose([0, 1, 2, 0, 1, 2, 0, 1], [v, v[::-1], np.roll(v, 1)])),
  ("set", lambda v: v.at[np.array([1, 6])].set(v[np.array([6, 0])]), lambda v: v[[0, 6, 2, 3, 4, 5, 0, 7]]),
  ("set by a mask", lambda v: v.at[2:5].set(v[5:8]), lambda v: v[[0, 1, 5, 6, 7, 5, 6, 7]]),
  ("repeat", lambda v: jnp.repeat(v, np.array([0, 2, 1, 0, 3, 1, 0, 1]), total_repeat_length=8), lambda v: np.repeat(v, [0, 2, 1, 0, 3, 1, 0, 1])),
  ("tile", lambda v: jnp.tile(v[2:6], 2), lambda v: np.tile(v[2:6], 2)),
  ("split", lambda v: jnp.concatenate(jnp.split(v, [3, 5])[::-1]), lambda v: np.concatenate(np.split(v, [3, 5])[::-1])),
  ("unequal split, middle", lambda v: lax.split(v, (1, 5, 2))[1], lambda v: v[1:6]),
  ("concatenation", lambda v: jnp.concatenate([v[6:], v[:1], jnp.zeros(2)]), lambda v: np.concatenate([v[6:], v[:1], [0, 0]])),
  ("stack", lambda v: jnp.stack([v[:4], v[4:]], 1), lambda v: np.stack([v[:4], v[4:]], 1)),
  ("move an axis", lambda v: jnp.moveaxis(v.reshape(2, 2, 2), 0, 2), lambda v: np.moveaxis(v.reshape(2, 2, 2), 0, 2)),
  ("rot90", lambda v: jnp.rot90(v.reshape(2, 4)), lambda v: np.rot90(v.reshape(2, 4))),
  ("diagonal", lambda v: jnp.diagonal(v.reshape(2, 4), 1), lambda v: np.diagonal(v.reshape(2, 4), 1)),
  ("diagonal by einsum", lambda v: jnp.einsum("ii->i", v[4:].reshape(2, 2)), lambda v: v[[4, 7]]),
  ("diagonal matrix", lambda v: jnp.diag(v[3:7], 1), lambda v: np.diag(v[3:7], 1)),
  ("lower triangle", lambda v: jnp.tril(v.reshape(2, 4), 1), lambda v: np.tril(v.reshape(2, 4), 1)),
  ("broadcast of an axis", lambda v: jnp.broadcast_to(v.reshape(2, 1, 4), (2, 3, 4)), lambda v: np.broadcast_to(v.reshape(2, 1, 4), (2, 3, 4))),
  ("broadcast in dim", lambda v: lax.broadcast_in_dim(v.reshape(2, 4), (4, 3, 2), (2, 0)), lambda v: np.broadcast_to(v.reshape(2, 4).T[:, None, :], (4, 3, 2))),
  ("vmap over the second axis", lambda v: jax.vmap(lambda c: c[::-1], 1, 0)(v.reshape(4, 2)), lambda v: v.reshape(4, 2).T[:, ::-1]),
  ("a scan's rows", lambda v: lax.scan(lambda c, r: (r, c), v[:2], v.reshape(4, 2))[1], lambda v: np.concatenate([v[:2], v[:6]])),
  ("a scan from the back", lambda v: lax.scan(lambda c, r: (r, c), v[:2], v.reshape(4, 2), reverse=True)[1], lambda v: np.concatenate([v[2:], v[:2]])),
  ("a map", lambda v: lax.map(lambda r: r[::-1], v.reshape(4, 2)), lambda v: v.reshape(4, 2)[:, ::-1]),
  ("permutation matrix", lambda v: np.eye(8, dtype=np.float32)[_ORDER] @ v, lambda v: v[_ORDER]),
  ("nearest resize", lambda v: jax.image.resize(v.reshape(2, 4), (4, 4), "nearest"), lambda v: np.repeat(v.reshape(2, 4), 2, 0)),
]


@functools.cache
def _clamps() -> bool:
  """What `lax.dynamic_slice` makes of a negative start: an index from the end."""
  return int(lax.dynamic_slice(jnp.arange(8), (jnp.int32(-3),), (4,))[0]) == 0


def _features(xp, x):
  """[x, relu(x)]: eight numbers, of which only the first four may have any sign."""
  return xp.concatenate([x, xp.maximum(x, 0)])


@functools.cache
def signs_of_moves() -> list[tuple[str, Callable, Callable, np.ndarray, np.ndarray]]:
  """(name, program, reference, signs, labels): signs that keep all moved features convex."""
  rows = []
  for name, program, reference in MOVES:
    labels = np.ravel(reference(np.arange(1, 9)))  # 0 where nothing of v is.
    rows.append((name, program, reference, np.where(labels > 4, 1.0, -1.0), labels))
  return rows


def moves() -> Iterator[Case]:
  for n, (name, program, reference, signs, labels) in enumerate(signs_of_moves()):
    places = np.flatnonzero((labels > 4) & (labels == labels.astype(int)))
    if not places.size:
      raise ValueError(name)
    k = int(places[n % places.size])
    wrong = signs.copy()
    wrong[k] = -E
    wrong = np.float32(wrong)
    i = int(labels[k]) - 5
    yield apart(
      "moves", name,
      lambda x, p=program, s=wrong: p(_features(jnp, x)).ravel() * s,
      lambda x, r=reference, s=wrong: np.ravel(r(_features(np, x))) * s.astype(WIDE),
      *pair_at(i), output=k,
    )


# Scatters, sums over segments, reductions, windows.


def sums() -> Iterator[Case]:
  family, two = "scatters and reductions", (np.full(4, -1.0), np.ones(4))
  index = np.array([2, 0, 2, 1])

  def one(name, program, reference, a=two[0], b=two[1], **more):
    return apart(family, name, program, reference, a, b, **more)

  def segments(x, w):
    out = np.zeros(3, WIDE)
    np.add.at(out, index, np.maximum(x, 0) * w)
    return out

  signs = np.float32([1, 1, -2, 1])
  yield one("segment_sum of one wrong sign", lambda x: jax.ops.segment_sum(jax.nn.relu(x) * signs, index, 3), lambda x: segments(x, signs), output=2)
  yield one("at[].add of one wrong sign", lambda x: jnp.zeros(3).at[index].add(jax.nn.relu(x) * signs), lambda x: segments(x, signs), output=2)
  yield one("at[].subtract", lambda x: jnp.zeros(3).at[index].subtract(jax.nn.relu(x)), lambda x: -segments(x, 1), output=2)
  yield one("at[].add onto a concave value", lambda x: (-2 * jax.nn.relu(x)).at[index].add(jax.nn.relu(x)), lambda x: -2 * np.maximum(x, 0) + np.array([1, 1, 2, 0]) * np.maximum(x[0], 0), output=1)
  yield one("at[].multiply by a negative number", lambda x: jax.nn.relu(x).at[index].multiply(np.float32([1, 1, -E, 1])), lambda x: np.maximum(x, 0) * np.array([1, 1, -E, 1]), output=2)
  yield one("at[].multiply twice, signs that cancel but one", lambda x: jax.nn.relu(x).at[np.array([0, 0, 0])].multiply(np.float32([-1, -1, -1])), lambda x: np.maximum(x, 0) * np.array([-1, 1, 1, 1]))
  yield one("at[].min", lambda x: jax.nn.relu(x).at[np.array([1, 2])].min(x[:2] + 0.5), lambda x: np.array([max(x[0], 0), min(max(x[1], 0), x[0] + 0.5), min(max(x[2], 0), x[1] + 0.5), max(x[3], 0)]), a=[1.5, 3, 0, 0], b=[3.5, 3, 0, 0], output=1)
  yield one("at[].max of a concave value", lambda x: x.at[np.array([1, 2])].max(-jax.nn.relu(x[:2])), lambda x: np.array([x[0], max(x[1], -max(x[0], 0)), 0, 0]), a=[-1, -3, 0, 0], b=[1, -3, 0, 0], output=1)
  yield one("at[].power", lambda x: jax.nn.relu(x).at[1].power(0.5), lambda x: np.sqrt(np.maximum(x, 0)), a=np.zeros(4), output=1)
  yield one("at[].apply", lambda x: x.at[1].apply(jnp.sin), lambda x: np.sin(x), a=np.zeros(4), b=np.full(4, 3.0), output=1)
  yield one("at[].add at a place of the input's", lambda x: jnp.zeros(3).at[jnp.argmax(x[:2])].add(1.0), lambda x: (np.arange(3) == np.argmax(x[:2])) * 1.0, a=[0.0, 1.0, 0, 0], b=[1.0, 0, 0, 0])
  yield one("a scatter out of bounds, wrapped", lambda x: jnp.zeros(3).at[np.array([-1, 0])].add(-jax.nn.relu(x[:2])), lambda x: np.array([-max(x[1], 0), 0, -max(x[0], 0)]), output=2)
  yield one("a scatter that overwrites the affine part", lambda x: (-x).at[np.array([1])].set(-jax.nn.relu(x[:1])), lambda x: np.array([-x[0], -max(x[0], 0), 0, 0]), output=1)
  yield one("segment_max of a concave value", lambda x: jax.ops.segment_max(-jax.nn.relu(x), index, 3), lambda x: np.array([-max(x[1], 0), -max(x[3], 0), max(-max(x[0], 0), -max(x[2], 0))]), output=1)
  yield one("segment_min", lambda x: jax.ops.segment_min(jax.nn.relu(x), index, 3), lambda x: np.minimum(np.maximum(x[0], 0), np.maximum(x[2], 0)) + np.zeros(3), a=[0, 0, 1, 0], b=[1, 0, 0, 0], output=2)
  yield one("segment_prod", lambda x: jax.ops.segment_prod(x, index, 3), lambda x: x[0] * x[2] + np.zeros(3), a=[1, 0, -1, 0], b=[-1, 0, 1, 0], output=2)
  yield one("a bincount with weights", lambda x: jnp.bincount(index, -jax.nn.relu(x), length=3), lambda x: segments(x, -1), output=2)
  yield one("minimum", lambda x: jnp.min(x), lambda x: x.min(), a=[1, -1, 5, 5], b=[-1, 1, 5, 5])
  yield one("minimum over a wrong axis", lambda x: x.reshape(2, 2).min(0), lambda x: x.reshape(2, 2).min(0), a=at(0), b=at(2))
  yield one("median", lambda x: jnp.median(x[:3]), lambda x: np.sort(x[:3])[1], a=[2, 0, 0, 0], b=[0, 2, 0, 0])
  yield one("second largest", lambda x: lax.top_k(x, 2)[0], lambda x: np.sort(x)[::-1][:2], a=at(0), b=at(1), output=1)
  yield one("sorted, all but the last", lambda x: jnp.sort(x), lambda x: np.sort(x), a=at(0), b=at(1), output=2)
  yield one("quantile", lambda x: jnp.quantile(x, 0.4), lambda x: np.quantile(x.astype(float), 0.4), a=at(0), b=at(1))
  yield one("product", lambda x: jnp.prod(x), lambda x: np.prod(x), a=[1, -1, 1, 1], b=[-1, 1, 1, 1])
  yield one("cumulative product", lambda x: jnp.cumprod(x), lambda x: np.cumprod(x), a=[1, -1, 0, 0], b=[-1, 1, 0, 0], output=1)
  yield one("cumulative minimum", lambda x: lax.cummin(x), lambda x: np.minimum.accumulate(x), a=at(0), b=at(1), output=1)
  yield one("cumulative sum from the wrong end", lambda x: lax.cumsum(jnp.concatenate([x[:3], -jax.nn.relu(x[3:])]), reverse=True), lambda x: np.cumsum(np.append(x[:3], -max(x[3], 0))[::-1])[::-1])
  yield one("cumulative maximum of a concave value", lambda x: lax.cummax(-jax.nn.relu(x)), lambda x: np.maximum.accumulate(-np.maximum(x, 0)), output=3)
  yield one("variance of relus", lambda x: jnp.var(jax.nn.relu(x)), lambda x: np.var(np.maximum(x, 0)), a=[-0.5, 1, 1, 1], b=[0.5, 1, 1, 1])
  yield one("mean minus maximum", lambda x: x.mean() - x.max(), lambda x: x.mean() - x.max(), a=at(0), b=at(1))
  yield one("maximum with a concave initial value", lambda x: jnp.max(-jax.nn.relu(x), initial=-3.0), lambda x: max(-np.maximum(x, 0).min(), -3))
  yield one("maximum where, one of them concave", lambda x: jnp.max(jnp.concatenate([x[:3], -jax.nn.relu(x[3:])]), where=np.array([0, 0, 0, 1], bool), initial=-9.0), lambda x: -np.maximum(x[3], 0))
  yield one("sum where, one of them negative", lambda x: jnp.sum(jax.nn.relu(x) * signs, where=np.array([0, 0, 1, 0], bool)), lambda x: -2 * np.maximum(x[2], 0))
  yield one("argmax as a number", lambda x: jnp.argmax(x[:2]).astype(np.float32), lambda x: float(np.argmax(x[:2])), a=[0, -1, 0, 0], b=[0, 1.5, 0, 0])
  yield one("softmax", lambda x: jax.nn.softmax(x), lambda x: np.exp(x) / np.exp(x).sum(), a=[1, 0, 0, 0], b=[9, 0, 0, 0])
  yield one("standardised", lambda x: jax.nn.standardize(x), lambda x: (x - x.mean()) / np.sqrt(x.var() + 1e-5), a=at(0, 0.0), b=at(0, 9.0))
  yield one("the largest minus the second", lambda x: x.max() - jnp.sort(x)[-2], lambda x: np.sort(x)[-1] - np.sort(x)[-2], a=[2, 2, 0, 0], b=[2, 0, 2, 0])
  one_d = dict(padding="VALID")
  yield one("windows of minima", lambda x: lax.reduce_window(x, jnp.inf, lax.min, (2,), (1,), "VALID"), lambda x: np.minimum(x[1:], x[:-1]), a=at(0), b=at(1))
  yield one("windows of concave maxima", lambda x: lax.reduce_window(-jax.nn.relu(x), -jnp.inf, lax.max, (2,), (2,), "SAME"), lambda x: np.maximum(-np.maximum(x[::2], 0), -np.maximum(x[1::2], 0)))
  yield one("windows with dilation", lambda x: lax.reduce_window(jnp.stack([x[0], -jax.nn.relu(x[1]), x[2], x[3]]), 0.0, lax.add, (2,), (1,), "VALID", window_dilation=(2,)), lambda x: np.array([x[0] + x[2], -max(x[1], 0) + x[3]]), output=1)
  yield one("windows with base dilation", lambda x: lax.reduce_window(jnp.stack([x[0], -jax.nn.relu(x[1]), x[2], x[3]]), 0.0, lax.add, (2,), (2,), ((1, 0),), base_dilation=(2,)), lambda x: np.array([x[0], -max(x[1], 0), x[2], x[3]]), output=1)
  yield one("windows of products", lambda x: lax.reduce_window(x, 1.0, lax.mul, (2,), (2,), "VALID"), lambda x: x[::2] * x[1::2], a=[1, -1, 0, 0], b=[-1, 1, 0, 0])
  yield one("pooled mean, one sign wrong", lambda x: lax.reduce_window(jax.nn.relu(x) * signs, 0.0, lax.add, (2,), (2,), **one_d) / 2, lambda x: (np.maximum(x, 0) * signs).reshape(2, 2).mean(1), output=1)
  yield one("a reduction by the smaller of the relus", lambda x: lax.reduce(x, jnp.float32(jnp.inf), lambda p, q: jnp.minimum(p, q), (0,)), lambda x: x.min(), a=[1, -1, 5, 5], b=[-1, 1, 5, 5])
  yield one("an associative scan of minima", lambda x: lax.associative_scan(jnp.minimum, x), lambda x: np.minimum.accumulate(x), a=at(0), b=at(1), output=1)
  yield one("interpolation in a table", lambda x: jnp.interp(x, np.array([-2.0, -1, 0, 1, 2]), np.array([4.0, 1, 0, 1, 1.9])), lambda x: np.interp(x.astype(float), [-2.0, -1, 0, 1, 2], [4.0, 1, 0, 1, 1.9]), a=np.full(4, 0.5), b=np.full(4, 1.5))


# Convolutions: one entry of the kernel is -1e-6.


def convolve(x, kernel, *, stride=1, pad=(0, 0), spread=1, dilation=1, groups=1):
  """`lax.conv_general_dilated` of (channels, length) and (out, in / groups, width), in numpy."""
  channels, length = x.shape
  thin = np.zeros((channels, (length - 1) * spread + 1), x.dtype)
  thin[:, ::spread] = x
  padded = np.zeros((channels, thin.shape[1] + sum(pad)), x.dtype)
  low = max(0, -pad[0])
  kept = thin[:, low : thin.shape[1] - max(0, -pad[1])]
  padded[:, max(0, pad[0]) : max(0, pad[0]) + kept.shape[1]] = kept
  out, depth, width = kernel.shape
  count = (padded.shape[1] - (width - 1) * dilation - 1) // stride + 1
  y = np.zeros((out, count), x.dtype)
  for o in range(out):
    first = (o // (out // groups)) * depth
    for p in range(count):
      for i in range(depth):
        for w in range(width):
          y[o, p] += kernel[o, i, w].astype(x.dtype) * padded[first + i, p * stride + w * dilation]
  return y


CONVOLUTIONS: list[tuple[str, dict[str, Any]]] = [
  ("plain", {}),
  ("strided", {"stride": 2}),
  ("padded", {"pad": (2, 1)}),
  ("negative padding", {"pad": (-1, 2)}),
  ("kernel dilated", {"dilation": 2, "pad": (2, 2)}),
  ("input dilated", {"spread": 2, "pad": (1, 1)}),
  ("all of it", {"stride": 2, "pad": (3, -1), "spread": 3, "dilation": 2}),
  ("groups", {"groups": 2}),
  ("depthwise", {"groups": 4}),
]


def convolved(options, kernel, x, layout="NCH"):
  """The same convolution by jax; the layout names the axes of x (N, C, H)."""
  o = {"stride": 1, "pad": (0, 0), "spread": 1, "dilation": 1, "groups": 1} | options
  specs = {"NCH": ("NCH", "OIH", "NCH"), "NHC": ("NHC", "HIO", "NHC"), "HCN": ("HCN", "OHI", "CNH")}
  axes = specs[layout]

  def arrange(array, names, spec):
    return jnp.transpose(array, [names.index(c) for c in spec])

  y = lax.conv_general_dilated(
    arrange(x[None], "NCH", axes[0]), arrange(kernel.astype(x.dtype), "OIH", axes[1]), (o["stride"],), [o["pad"]],
    (o["spread"],), (o["dilation"],), axes, o["groups"],
  )
  return jnp.transpose(y, [axes[2].index(c) for c in "NCH"])[0]


def kernels(options) -> np.ndarray:
  rng = np.random.default_rng(3)
  return np.float32(rng.uniform(0.1, 1, (4, 4 // options.get("groups", 1), 3)))


def convolutions() -> Iterator[Case]:
  for n, (name, options) in enumerate(CONVOLUTIONS):
    kernel = kernels(options)
    where = (n % 4, n % kernel.shape[1], n % 3)
    kernel[where] = -E
    first = where[0] // (4 // options.get("groups", 1)) * kernel.shape[1] + where[1]

    def reference(x, k=kernel, o=options):
      return convolve(np.maximum(x, 0), k, **o)

    one = np.zeros((4, 6))
    hit, found = 0, None
    for place in range(6):  # The first place of the input that the entry sees alone.
      one[:] = 0
      one[first, place] = 1
      low = np.ravel(reference(one.astype(WIDE)))
      if (low < 0).any():
        found, hit = one.copy(), int(np.flatnonzero(low < 0)[0])
        break
    assert found is not None, name
    for layout in ("NCH", "NHC", "HCN") if name in ("plain", "groups", "all of it") else ("NCH",):
      yield apart(
        "convolutions", f"{name}, {layout}",
        lambda x, k=kernel, o=options, la=layout: convolved(o, k, jax.nn.relu(x), la),
        reference, -found, found, output=hit,
      )


# Networks with one weight of thousands below zero.

ACTIVATIONS = {
  "relu": (jax.nn.relu, lambda z: np.maximum(z, 0)),
  "elu": (jax.nn.elu, lambda z: np.where(z > 0, z, np.expm1(np.minimum(z, 0)))),
  "softplus": (jax.nn.softplus, lambda z: np.logaddexp(z, 0)),
  "celu": (jax.nn.celu, lambda z: np.where(z > 0, z, np.expm1(np.minimum(z, 0)))),
  "leaky relu": (jax.nn.leaky_relu, lambda z: np.where(z > 0, z, 0.01 * z)),
}
WIDTH, INPUTS = 48, 4


def layers(seed: int) -> list[dict[str, np.ndarray]]:
  """An input-convex network: positive weights but for those that see the input."""
  rng = np.random.default_rng(seed)
  out = []
  for i in range(3):
    part = {"x": rng.standard_normal((INPUTS, WIDTH)), "b": rng.standard_normal(WIDTH)}
    if i:
      part["h"] = rng.uniform(0.1, 1, (WIDTH, WIDTH)) / WIDTH
    out.append({k: np.float32(v) for k, v in part.items()})
  return out


def forward(xp, act, parts, x):
  h = None
  for part in parts:
    z = x @ part["x"] + part["b"]
    h = act(z if h is None else z + h @ part["h"])
  return h


def planted_network(seed: int, act: str, size: float):
  """(weights, a, b, output): unit j of the second layer enters output k by -size.

  The other weights of output k are tiny, so that along the way between a and b the planted one
  decides: unit j bends there.
  """
  parts = layers(seed)
  rng = np.random.default_rng(seed + 99)
  j, k = rng.integers(WIDTH, size=2)
  last = {"x": np.zeros((INPUTS, WIDTH), np.float32), "b": np.full(WIDTH, 9, np.float32), "h": parts[2]["h"].copy()}
  last["h"][:, k] = 0
  last["h"][rng.permutation(WIDTH)[: WIDTH // 2], k] = np.float32(size * 1e-7)
  last["h"][j, k] = -np.float32(size)
  parts = [parts[0], parts[1], last]
  reference = ACTIVATIONS[act][1]
  best = (0.0, None, None)
  for step in (0.01, 0.1, 1.0, 10.0):
    for _ in range(60):
      a = rng.standard_normal(INPUTS) * 2
      b = a + rng.standard_normal(INPUTS) * step
      fa, fb, fm = (forward(np, reference, parts, x.astype(WIDE))[k] for x in (a, b, (a + b) / 2))
      excess = float((fm - (fa + fb) / 2) / max(abs(fm), WIDE(1e-9)))
      if excess > best[0]:
        best = (excess, a, b)
    if best[0] > 1e-14:
      break
  assert best[0] > 0, (seed, act)
  return parts, best[1], best[2], int(k)


def networks() -> Iterator[Case]:
  family = "networks with one wrong weight"
  for n, (act, size) in enumerate((a, s) for s in (1.0, E, 1e-12) for a in ACTIVATIONS):
    parts, a, b, k = planted_network(n, act, size)
    ours, theirs = ACTIVATIONS[act]
    yield apart(
      family, f"{act}, -{size:g} of {WIDTH**2} weights",
      lambda w, x, f=ours: forward(jnp, f, w, x), lambda x, w=parts, f=theirs: forward(np, f, w, x),
      a, b, output=k, weights=(parts,),
    )
  parts, a, b, k = planted_network(50, "relu", E)
  theirs = ACTIVATIONS["relu"][1]
  more = {"output": k, "weights": (parts,)}

  def reference(x):
    return forward(np, theirs, parts, x)

  def one(name, program, **extra):
    return apart(family, name, program, reference, a, b, **{**more, **extra})

  act = jax.nn.relu
  yield one("rematerialised", jax.checkpoint(lambda w, x: forward(jnp, act, w, x)))
  yield one("in nested jits", lambda w, x: jax.jit(lambda v: jax.jit(lambda u: forward(jnp, act, w, u))(v))(x))
  yield one("one example of a batch by vmap", lambda w, x: jax.vmap(lambda v: forward(jnp, act, w, v))(jnp.stack([x]))[0])
  yield one("a known mask that leaves the weight", lambda w, x: forward(jnp, act, [*w[:2], {**w[2], "h": w[2]["h"] * (np.arange(WIDTH) >= 0)}], x))
  yield one("weights by a bfloat16 copy", lambda w, x: forward(jnp, act, [*w[:2], {**w[2], "h": jnp.where(w[2]["h"] < 0, w[2]["h"], w[2]["h"].astype(jnp.bfloat16).astype(np.float32))}], x))
  yield one("weights that are clipped too low", lambda w, x: forward(jnp, act, [*w[:2], {**w[2], "h": jnp.clip(w[2]["h"], -E * 1.01)}], x))
  yield one("double precision", lambda w, x: forward(jnp, act, w, x), x64=True, dtype=np.float64)
  yield one("einsum", lambda w, x: jnp.einsum("i,io->o", act(x @ w[1]["x"] + w[1]["b"] + jnp.einsum("i,io->o", act(x @ w[0]["x"] + w[0]["b"]), w[1]["h"])), w[2]["h"]) + w[2]["b"])
  stack = np.stack([np.eye(INPUTS, dtype=np.float32) / 2] * 30)
  stack[17, 1, 2] = -0.5

  def loop(x):
    c = x
    for w in stack:
      c = np.maximum(c @ w + x, 0)
    return c

  a, b, more = np.float64([0, -1, 5, 0]), np.float64([0, 1, 5, 0]), {"output": 2}
  name = "the 17th of 30 steps of a"
  yield apart(family, f"{name} scan", lambda x: lax.scan(lambda c, w: (jax.nn.relu(c @ w + x), None), x, stack)[0], loop, a, b, **more)
  yield apart(family, f"{name} fori_loop", lambda x: lax.fori_loop(0, 30, lambda i, c: jax.nn.relu(c @ jnp.asarray(stack)[i] + x), x), loop, a, b, **more)


# Log-sum-exp.


def lse(x, axis=None, keepdims=False):
  top = np.max(x, axis, keepdims=True)
  out = np.log(np.exp(x - top).sum(axis, keepdims=True)) + top
  return out if keepdims else np.squeeze(out, axis) if axis is not None else out.ravel()[0]


def shifted(u, shift_in, shift_out, add, axis=1):
  """log(sum(exp(u - shift_in(u)))) + shift_out(u), written for xp."""

  def f(xp, x):
    v = u(xp, x)
    total = xp.log(xp.exp(v - shift_in(xp, v)).sum(axis))
    return add(xp, total, shift_out(xp, v))

  return f


def log_sum_exps() -> Iterator[Case]:
  family = "log-sum-exp"
  table = lambda xp, x: x.reshape(2, 2)  # noqa: E731
  plus = lambda xp, t, c: t + c  # noqa: E731
  rng = np.random.default_rng(1)

  def one(name, f, **more):
    """The pair is the worst of random ones: what is wrong here is wrong nearly everywhere."""
    reference = functools.partial(f, np)
    best = (0.0, None, None, 0)
    with np.errstate(all="ignore"):
      for scale in (1.0, 5.0, 30.0):
        for _ in range(150):
          a, b = rng.standard_normal((2, 4)) * scale
          fa, fb, fm = (np.ravel(reference(x.astype(WIDE))) for x in (a, b, (a + b) / 2))
          excess = (fm - (fa + fb) / 2) / (abs(fa) + abs(fb) + abs(fm) + WIDE(1e-30))
          k = int(np.argmax(np.nan_to_num(excess, nan=0.0)))
          if excess[k] > best[0]:
            best = (excess[k], a, b, k)
        if best[0] > 1e-9:
          break
    assert best[1] is not None, name
    return both(family, name, f, best[1], best[2], output=best[3], **more)

  top = lambda xp, v: v.max(1, keepdims=True)  # noqa: E731
  yield one("shift of the other axis", shifted(table, top, lambda xp, v: v.max(0), plus))
  yield one("shift of the rows reversed", shifted(table, top, lambda xp, v: v.max(1)[::-1], plus))
  yield one("shift by the least instead of the largest", shifted(table, top, lambda xp, v: v.min(1), plus))
  yield both(family, "shift scaled by 0.99", shifted(table, top, lambda xp, v: v.max(1) * 0.99, plus), at(0, -1e-3), at(0, 1e-3))
  yield one("shift subtracted twice, added once", shifted(table, lambda xp, v: 2 * v.max(1, keepdims=True), lambda xp, v: v.max(1), plus))
  yield one("shift subtracted again", shifted(table, top, lambda xp, v: v.max(1), lambda xp, t, c: t - c))
  yield one("shift added twice by a concave value", shifted(table, lambda xp, v: v.min(1, keepdims=True), lambda xp, v: v.min(1), lambda xp, t, c: t + c + c))
  yield one("shift of the first row for both", shifted(table, lambda xp, v: v.min(1, keepdims=True), lambda xp, v: xp.broadcast_to(v.min(1)[:1], (2,)), plus))
  yield one("shift turned through a reshape", shifted(table, lambda xp, v: v.min(1)[:, None], lambda xp, v: v.min(1).reshape(2, 1).T.ravel()[::-1], plus))
  yield one("shift of the columns in a square", shifted(table, lambda xp, v: v.min(0)[:, None], lambda xp, v: v.min(0)[None, ::-1][0], plus))
  yield one("shift broadcast along the other axis", shifted(table, lambda xp, v: v.min(1)[None, :], lambda xp, v: v.min(1), plus))
  yield one("shift where a mask is", shifted(table, lambda xp, v: xp.where(np.array([[True], [False]]), v.min(1, keepdims=True), 0), lambda xp, v: v.min(1), plus))
  yield one("shift by a cast that is stepped", shifted(table, lambda xp, v: 0 * v[:, :1], lambda xp, v: xp.round(v[:, 0]), plus))
  yield one("shift of an exp2", lambda xp, x: xp.log(xp.exp2(table(xp, x) - table(xp, x).min(1, keepdims=True)).sum(1)) + table(xp, x).min(1))
  yield one("log2 of a sum of exp", lambda xp, x: xp.log2(xp.exp(table(xp, x) - table(xp, x).max(1, keepdims=True)).sum(1)) + table(xp, x).min(1))
  yield one("log1p of a sum of shifted exps", lambda xp, x: xp.log1p(xp.exp(table(xp, x) - table(xp, x).min(1, keepdims=True)).sum(1)) + table(xp, x).min(1))
  yield one("a mean over both axes, shifted by rows", lambda xp, x: xp.log(xp.exp(table(xp, x) - table(xp, x).min(1, keepdims=True)).mean()) + table(xp, x).min(1))
  yield one("missing elements", lambda xp, x: xp.log(xp.exp(table(xp, x) - table(xp, x).min(1, keepdims=True))[:, :1].sum(1) - 0.0 * x[:2]) + 2 * table(xp, x).min(1))
  yield one("one more term without the shift", lambda xp, x: xp.log(xp.exp(x[:2] - x.min()).sum() + xp.exp(x[2])) + x.min())
  yield one("a term of weight -1e-6", lambda xp, x: xp.log(xp.exp(x) @ np.float32([1, 1, 1, -E])))
  yield one("a difference of exps", lambda xp, x: xp.log(xp.exp(abs(x[0]) + 1) - xp.exp(x[0])))
  yield one("concave exponents", lambda xp, x: xp.log(xp.exp(-(x**2)).sum()))
  yield one("one concave exponent of four", lambda xp, x: xp.log(xp.exp(xp.concatenate([x[:3], -(x[3:] ** 2)])).sum()))
  yield one("concave exponents, masked wrongly", lambda xp, x: xp.log(xp.where(np.array([1, 0, 1, 1], bool), xp.exp(-abs(x)), 0).sum()))
  yield one("masked exponents of wrong sign", lambda xp, x: xp.log(xp.where(np.array([1, 0, 1, 0], bool), xp.exp(x), xp.exp(-abs(x))).sum()))
  yield one("log of a sum of squares", lambda xp, x: xp.log((x * x).sum() + 1))
  yield one("log of 1 + exp, of a concave value", lambda xp, x: xp.log(1 + xp.exp(-abs(x))))
  yield both(family, "log1p(exp(-|x|)) + 0.999999 relu(x)", lambda xp, x: xp.log1p(xp.exp(-abs(x))) + (1 - E) * relu(xp, x), [-1e-6], [1e-6])
  yield both(family, "relu(x) + log1p(exp(-1.000001 |x|))", lambda xp, x: relu(xp, x) + xp.log1p(xp.exp(-1.000001 * abs(x))), [-1e-6], [1e-6])
  yield one("maximum plus log1p(exp(-difference))", lambda xp, x: xp.maximum(x[0], x[1]) + xp.log1p(xp.exp(-abs(x[0] - x[2]))))
  yield one("logaddexp of a concave value", lambda xp, x: xp.logaddexp(x, -(x**2)))
  yield one("logaddexp, turned", lambda xp, x: -xp.logaddexp(x, -x))
  yield one("logaddexp2 of a concave value", lambda xp, x: xp.logaddexp2(-abs(x), 0 * x))
  yield one("logaddexp minus 1.000001 max", lambda xp, x: xp.logaddexp(x[0], x[1]) - (1 + E) * xp.maximum(x[0], x[1]))
  yield one("log_softmax", lambda xp, x: x - (jax.nn.logsumexp(x) if xp is jnp else lse(x)))
  yield one("cross-entropy of a label of weight 1.000001", lambda xp, x: (1 - E) * (jax.nn.logsumexp(x) if xp is jnp else lse(x)) - (jax.nn.logsumexp(x[1:]) if xp is jnp else lse(x[1:])))
  yield one("difference of log-sum-exps", lambda xp, x: (jax.nn.logsumexp(x) - jax.nn.logsumexp(2 * x) if xp is jnp else lse(x) - lse(2 * x)))
  yield one("logsumexp, b with -1e-6", lambda xp, x: jax.nn.logsumexp(x, b=np.float32([1, 1, -E, 1])) if xp is jnp else np.log(np.exp(x) @ np.array([1, 1, -np.float32(E), 1], WIDE)))
  yield one("logsumexp of a concave value", lambda xp, x: jax.nn.logsumexp(-abs(x)) if xp is jnp else lse(-abs(x)))
  yield one("logsumexp where, of a concave value", lambda xp, x: jax.nn.logsumexp(jnp.concatenate([x[:3], -abs(x[3:])]), where=np.array([1, 0, 0, 1], bool)) if xp is jnp else lse(np.array([x[0], -abs(x[3])])))
  yield one("logsumexp over an axis with a concave value", lambda xp, x: jax.nn.logsumexp(jnp.stack([x, -abs(x)]), 0) if xp is jnp else lse(np.stack([x, -abs(x)]), 0))
  yield one("log cumulative sum of exps of concave values", lambda xp, x: lax.cumlogsumexp(-abs(x)) if xp is jnp else np.log(np.cumsum(np.exp(-abs(x)))))
  yield one("log of a mean of tanh", lambda xp, x: xp.log(2 + xp.tanh(x).mean()))
  yield one("entropy of a softmax", lambda xp, x: (jax.nn.softmax(x) * jax.nn.log_softmax(x)).sum() if xp is jnp else (np.exp(x - lse(x)) * (x - lse(x))).sum())
  yield both(family, "log-sum-exp by an undefined shift", lambda xp, x: xp.log(xp.exp(x[1:] - xp.log(x[0])).sum()) + xp.log(x[0]), -np.ones(4), np.ones(4))

  def permuted(xp, v):
    m = v.min(1, keepdims=True) + 0 * v
    return lax.reshape(m, (2, 2), dimensions=(1, 0)) if xp is jnp else m.T

  yield one("shift through a reshape with dimensions", shifted(table, lambda xp, v: permuted(xp, v)[:, :1], lambda xp, v: v.min(1), plus))
  yield one("field: shift through a reshape with dimensions", lambda xp, x: xp.log(xp.exp(table(xp, x) - permuted(xp, table(xp, x))).sum(1)) + table(xp, x).min(1))


# Quadratic forms.


def nearly_psd(n: int, least: float, seed: int = 0) -> np.ndarray:
  rng = np.random.default_rng(seed)
  q = np.linalg.qr(rng.standard_normal((n, n)))[0]
  spectrum = np.append(rng.uniform(0.5, 2, n - 1), least)
  return q @ np.diag(spectrum) @ q.T


def worst_direction(matrix) -> np.ndarray:
  """The eigenvector of the least eigenvalue of the symmetric part."""
  m = np.asarray(matrix, np.float64)
  return np.linalg.eigh((m + m.T) / 2)[1][:, 0]


def quadratic_forms() -> Iterator[Case]:
  family = "quadratic forms"

  def one(name, f, matrix, center=0.0, reach=1.0, **more):
    """`f(xp, A, x)`, along the direction in which A curves down."""
    v = reach * worst_direction(matrix)
    a, b = center - v, center + v
    more = {"dtype": np.float32} | more
    return apart(
      family, name, lambda x: f(jnp, matrix, x), lambda x: f(np, np.asarray(matrix, WIDE), x), a, b, **more
    )

  single, double = np.float32, {"dtype": np.float64, "x64": True}
  form = lambda xp, a, x: x @ a @ x  # noqa: E731
  for n in (2, 5, 16, 64):
    yield one(f"x A x, {n} inputs, eigenvalue -1e-6", form, nearly_psd(n, -2e-6).astype(single))
  yield one("x A x, eigenvalue -1e-6, 1e6 away", form, nearly_psd(4, -2e-6).astype(single), center=F, reach=1e3)
  yield one("x A x, eigenvalue -1e-12", form, nearly_psd(5, -1e-12), **double)
  yield one("x A x, eigenvalue -1e-14", form, nearly_psd(3, -1e-14), **double)
  yield one("[[1, 1 + 1e-7], [1 + 1e-7, 1]]", form, single([[1, 1 + 1.2e-7], [1 + 1.2e-7, 1]]))
  yield one("[[1, 1], [1, 1 - 2^-52]]", form, np.array([[1, 1], [1, 1 - 2.0**-52]]), **double)
  yield one("[[1e-30, 1e-15 + ...]]", form, np.array([[1e-30, 1.0000001e-15], [1.0000001e-15, 1]]), **double)
  yield one("not symmetric", form, single([[1, 3], [0, 1]]))
  yield one("triangular, with a positive diagonal", form, single(np.triu(np.full((4, 4), 2.2)) - 1.2 * np.eye(4)))
  yield one("einsum", lambda xp, a, x: xp.einsum("i,ij,j->", x, a, x), nearly_psd(4, -2e-6).astype(single))
  yield one("sum of x (A x)", lambda xp, a, x: (x * (a @ x)).sum(), nearly_psd(4, -2e-6).astype(single))
  yield one("vdot", lambda xp, a, x: xp.vdot(x, a @ x), nearly_psd(4, -2e-6).astype(single))
  yield one("sum of A times the outer product", lambda xp, a, x: (a * xp.outer(x, x)).sum(), nearly_psd(4, -2e-6).astype(single))
  yield one("a column and a row", lambda xp, a, x: (x[None] @ a @ x[:, None])[0, 0], nearly_psd(4, -2e-6).astype(single))
  yield one("in nested jits", lambda xp, a, x: (jax.jit(lambda v: jax.jit(jnp.matmul)(v, a) @ v)(x) if xp is jnp else x @ a @ x), nearly_psd(4, -2e-6).astype(single))
  yield one("batched by vmap", lambda xp, a, x: (jax.vmap(lambda m: x @ m @ x)(jnp.stack([a, a])) if xp is jnp else np.array([x @ a @ x] * 2)), nearly_psd(4, -2e-6).astype(single))
  yield one("of an affine value", lambda xp, a, x: (2 * x + 1) @ a @ (2 * x + 1), nearly_psd(4, -2e-6).astype(single))
  yield one("of different affine values", lambda xp, a, x: (x + 1) @ a @ (x[::-1] + 1), -np.eye(4, dtype=single)[::-1])
  yield one("turned", lambda xp, a, x: -(x @ -a @ x), np.diag(single([1, 1, 1, -E])))
  yield one("a diagonal with -1e-6", lambda xp, a, x: (x * x) @ xp.diagonal(a), np.diag(single([1, 1, 1, -E])))
  yield one("one of 64 squares", lambda xp, a, x: (xp.diagonal(a) * x**2).sum(), np.diag(single([1] * 37 + [-E] + [1] * 26)))
  yield one("product of two entries", lambda xp, a, x: x[0] * x[1] + 0.499 * (x**2).sum(), single([[0.499, 0.5], [0.5, 0.499]]))
  yield one("x times its reverse", lambda xp, a, x: x @ x[::-1], np.eye(4)[::-1].copy())
  w = np.random.default_rng(2).standard_normal((4, 3)).astype(single)
  c = w.copy()
  c[1, 2] += 1e-3
  c[0] = -c[0] * 1e-3
  yield one("|W x|^2 with one entry changed", lambda xp, a, x: (x @ w.astype(x.dtype)) @ (x @ c.astype(x.dtype)), w.astype(float) @ c.T.astype(float))
  yield one("|W x|^2 - 1e-6 |x|^2", lambda xp, a, x: ((x @ w.astype(x.dtype)) ** 2).sum() - E * (x @ x), w.astype(float) @ w.T.astype(float) - E * np.eye(4))
  yield one("W W^T - 1e-6 I made in the program", lambda xp, a, x: x @ (w.astype(x.dtype) @ w.T.astype(x.dtype) - E * xp.eye(4)) @ x, w.astype(float) @ w.T.astype(float) - E * np.eye(4))
  yield one("x relu(x)", lambda xp, a, x: x @ relu(xp, -x), np.diag([-1.0, 1, 1, 1]))
  yield one("a square of relus minus a square", lambda xp, a, x: (relu(xp, x) ** 2).sum() - E * x[0] ** 2, np.diag([-1.0, 1, 1, 1]), center=-5.0)
  yield one("a block of a batch", lambda xp, a, x: xp.stack([x @ x, x @ a @ x]), nearly_psd(4, -2e-6).astype(single), output=1)
  yield one("integers that wrap in the matrix", lambda xp, a, x: x @ ((jnp.diag(jnp.array([100, 1, 1, 1], jnp.int8) * jnp.int8(2))).astype(single) if xp is jnp else np.diag([-56.0, 2, 2, 2])) @ x, np.diag([-56.0, 2, 2, 2]))
  yield one("a NaN in the matrix", lambda xp, a, x: x @ (a * np.float32(np.nan)) @ x, np.eye(4, dtype=single))
  yield one("(x - 1e6)^2 minus 1.000001 x^2", lambda xp, a, x: (x - F) @ (x - F) - (1 + E) * (x @ x), np.diag([-1.0, 1, 1, 1]), reach=1e3)


# Norms and powers.


def norms() -> Iterator[Case]:
  family = "norms and powers"

  def one(name, f, a, b, **more):
    return both(family, name, f, a, b, **more)

  ones = np.ones(4)
  norm = lambda xp, v: xp.sqrt((v * v).sum())  # noqa: E731
  yield one("norm of relu(x) - 1", lambda xp, x: norm(xp, relu(xp, x) - 1), -ones, ones)
  yield one("norm of relu(x) - 1e-6", lambda xp, x: norm(xp, relu(xp, x) - E), -ones * E, ones * E)
  yield one("norm of a concave value", lambda xp, x: norm(xp, 1 - relu(xp, x)), -ones, ones)
  yield one("jnp.linalg.norm of a convex value", lambda xp, x: xp.linalg.norm(x**2 - 1) if xp is jnp else norm(xp, x**2 - 1), -ones, ones)
  yield one("norm squared, less 1e-6, rooted", lambda xp, x: xp.sqrt(relu(xp, (x * x).sum() - E)), at(0, 1e-3), at(0, 3e-3))
  yield one("root of 1 + relu", lambda xp, x: xp.sqrt(1 + relu(xp, x)), ones, 9 * ones)
  yield one("root of a sum of absolute values", lambda xp, x: xp.sqrt(abs(x).sum()), np.zeros(4), ones)
  yield one("root of a sum of squares of one axis", lambda xp, x: xp.sqrt(xp.sqrt((x.reshape(2, 2) ** 2).sum(1))), np.zeros(4), ones)
  yield one("root of x^2 - 1e-6 x y", lambda xp, x: xp.sqrt(x[0] ** 2 - 2.1 * x[0] * x[1] + x[1] ** 2), [1, 0, 0, 0], [0, 1, 0, 0])
  yield one("root of a square of a convex value", lambda xp, x: xp.sqrt((x**2 - 1) ** 2), -ones, ones)
  yield one("norm of order 1/2", lambda xp, x: (xp.sqrt(abs(x)).sum()) ** 2, [1, 0, 0, 0], [0, 1, 0, 0])
  yield one("norm to the power 0.99", lambda xp, x: norm(xp, x) ** 0.99, np.zeros(4), ones)
  yield one("a unit vector", lambda xp, x: x / (norm(xp, x) + 1e-3), np.zeros(4), ones)
  yield one("norm minus 1.000001 of one entry", lambda xp, x: norm(xp, x) - (1 + E) * abs(x[0]), -at(0), at(0))
  yield one("x^2 / y", lambda xp, x: x[0] ** 2 / x[1], [1, -1, 0, 0], [1, -3, 0, 0])
  yield one("reciprocal of a norm", lambda xp, x: 1 / (1 + norm(xp, x)), -at(0), at(0))
  yield one("rsqrt", lambda xp, x: (lax.rsqrt(x + 1.5) if xp is jnp else 1 / xp.sqrt(x + 1.5)), -2 * ones, ones)
  yield one("safe norm with a step at 0", lambda xp, x: xp.where((x * x).sum() == 0, E, norm(xp, x)), -E * ones * 0.1, E * ones * 0.1)
  yield one("largest less the mean of absolute values", lambda xp, x: abs(x).max() - abs(x).sum() / 2, [1, -1, 0, 0], [1, 1, 0, 0])
  yield one("root of a sum of exps minus 1", lambda xp, x: xp.sqrt(xp.exp(x).sum() - 1), -9 * ones, -1.0 * ones)
  for power in (3, 5, -1, -2, -3):
    name = f"integer power {power}"
    yield one(name, lambda xp, x, p=power: (x + 0.5) ** p if p > 0 or xp is jnp else 1 / (x + 0.5) ** -p, *((-1.5 * ones, 1.5 * ones) if power == -2 else (-2.5 * ones, -0.7 * ones)))
  for power in (0.5, 0.999, 1.5, -0.5, 1 / 3):
    yield one(f"power {power:.3g} of the input", lambda xp, x, p=power: xp.power(x, p), -ones, ones)
  for power in (0.5, 0.999999, -1.0):
    yield one(f"power {power:g} of 1 + relu", lambda xp, x, p=power: xp.power(1 + relu(xp, x), p), *((-ones, ones) if power < 0 else (ones, 99 * ones)))
  yield one("square of relu(x) - 1e-6", lambda xp, x: xp.square(relu(xp, x) - E), -E * ones, E * ones)
  yield one("(relu(x) - 1)^2", lambda xp, x: (relu(xp, x) - 1) ** 2, -ones, ones)
  yield one("power 1.5 of relu(x) - 1e-6, taken absolute", lambda xp, x: abs(relu(xp, x) - E) ** 1.5, -E * ones, E * ones)
  yield one("fourth power of x^2 - 1", lambda xp, x: (x**2 - 1) ** 4, -ones, ones)
  yield one("powers by an array, one of them 3", lambda xp, x: xp.power(x, np.float32([2, 2, 3, 2])), -2 * ones, -0.5 * ones, output=2)
  yield one("powers by an array of integers, one of them 3", lambda xp, x: xp.power(x, np.array([2, 2, 3, 2])), -2 * ones, -0.5 * ones, output=2)
  yield one("0.5 to the power relu", lambda xp, x: xp.power(0.5, relu(xp, x)), -ones, ones)
  yield one("2 to a concave power", lambda xp, x: xp.exp2(-relu(xp, x)), -ones, ones)
  yield one("a base below 0", lambda xp, x: xp.power(-2.0, x), 0.5 * ones, 1.5 * ones)
  yield one("x times |x|", lambda xp, x: x * abs(x), -2 * ones, 0 * ones)
  yield one("x times x^2", lambda xp, x: x * x * x, -2 * ones, 0 * ones)
  yield one("product of a relu and a falling relu", lambda xp, x: relu(xp, x + 1) * relu(xp, 1 - x), -ones, ones)
  yield one("polynomial with a cubic of 1e-6", lambda xp, x: xp.polyval(np.float32([E, 1, 0, 0]), x), -F / 2 * ones, (2 - F / 2) * ones)
  yield one("sinh", lambda xp, x: xp.sinh(x), -2 * ones, 0 * ones)
  yield one("cosh of a convex value", lambda xp, x: xp.cosh(x**2 - 1), -ones, ones)
  yield one("hypot of a convex value", lambda xp, x: xp.hypot(x**2 - 1, 0 * x), -ones, ones)

  def bent(xp, z):
    """Of a convex square, though its size is not convex."""
    return xp.where(z < 0, 2 - xp.exp(-xp.minimum(z, 0)), 1 + z)

  inside = (-0.6 * ones, -0.02 * ones)
  yield one("root of a square that is convex", lambda xp, x: xp.sqrt(bent(xp, x) ** 2), *inside)
  yield one("root of a product that is convex", lambda xp, x: xp.sqrt(bent(xp, x) * bent(xp, x)), *inside)
  yield one("power 1/2 of a square that is convex", lambda xp, x: (bent(xp, x) ** 2) ** 0.5, *inside)
  yield one("fourth root of a fourth power that is convex", lambda xp, x: (bent(xp, x) ** 4) ** 0.25, *inside)
  yield one("root of a sum of squares that are convex", lambda xp, x: xp.sqrt((bent(xp, x) ** 2).sum() + E), *inside)
  yield one("hypot of a value of convex square", lambda xp, x: xp.hypot(bent(xp, x), 0 * x), *inside)
  yield one("a value of convex square, absolute", lambda xp, x: abs(bent(xp, x)), *inside)
  yield one("root of softplus to the power 1.4", lambda xp, x: xp.sqrt(xp.log1p(xp.exp(x)) ** 1.4), ones, 9 * ones)
  yield one("root of x^2 exp(x)", lambda xp, x: xp.sqrt(x**2 * xp.exp(x)), -3.5 * ones, -1.5 * ones)
  yield one("cube root of a square", lambda xp, x: xp.cbrt(x**2), 0 * ones, ones)
  yield one("cube root of exp less 5", lambda xp, x: xp.cbrt(xp.exp(x) - 5), ones * 1.7, 4 * ones)
  yield one("root of a minimum of squares", lambda xp, x: xp.sqrt(xp.minimum(x**2, 1)), 0.5 * ones, 1.5 * ones)
  yield one("square of a clip at -1e-6", lambda xp, x: xp.maximum(x, -E) ** 2, -2 * E * ones, 0 * ones)
  yield one("cube of a minimum with 0", lambda xp, x: xp.minimum(x, 0) ** 3, -2 * ones, 0 * ones)
  yield one("x times x through a move", lambda xp, x: x * x[np.int32([1, 0, 2, 3])], [1, -1, 0, 0], [-1, 1, 0, 0])
  yield one("x times x through a transposed square", lambda xp, x: x.reshape(2, 2) * x.reshape(2, 2).T, [0, 1, -1, 0], [0, -1, 1, 0], output=1)
  yield one("x times its cast to an integer", lambda xp, x: x * x.astype(np.int32), 0.9 * ones, 1.2 * ones)
  yield one("powers by an array, one of them 0.4", lambda xp, x: xp.power(x * x, np.float32([0.5, 0.4, 1, 2])), 0 * ones, ones, output=1)
  yield one("harmonic mean", lambda xp, x: 2 / (1 / x[0] + 1 / x[1]), [1, 2, 0, 0], [2, 1, 0, 0])
  yield one("geometric mean", lambda xp, x: xp.sqrt(relu(xp, x[0]) * relu(xp, x[1])), [1, 0, 0, 0], [0, 1, 0, 0])
  yield one("exp of a log, times 1 - x^2", lambda xp, x: xp.exp(xp.log(1 + x**2) * -1), -ones, ones)
  yield one("log(cosh) of a convex value", lambda xp, x: xp.log(xp.cosh(x**2 - 1)), -ones, ones)


# Named activations and their spellings.


def activations() -> Iterator[Case]:
  nn = jax.nn
  sigmoid = lambda z: 1 / (1 + np.exp(-z))  # noqa: E731

  def one(name, program, reference, a, b, **more):
    return apart("named activations", name, program, reference, [a] * 2, [b] * 2, **more)

  expm1 = lambda z: np.expm1(np.minimum(z, 0))  # noqa: E731
  yield one("gelu", nn.gelu, lambda z: z / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))), -5, -2)
  yield one("silu", nn.silu, lambda z: z * sigmoid(z), -9, -3)
  yield one("mish", nn.mish, lambda z: z * np.tanh(np.logaddexp(z, 0)), -9, -3)
  yield one("sigmoid", nn.sigmoid, sigmoid, 0, 9)
  yield one("tanh", nn.tanh, np.tanh, 0, 9)
  yield one("log_sigmoid", nn.log_sigmoid, lambda z: -np.logaddexp(-z, 0), -9, 9)
  yield one("selu", nn.selu, lambda z: 1.0507009873554805 * np.where(z > 0, z, 1.6732632423543772 * expm1(z)), -1e-3, 1e-3)
  yield one("elu, alpha 1.000001", lambda z: nn.elu(z, 1 + E), lambda z: np.where(z > 0, z, np.float32(1 + E) * expm1(z)), -4e-7, 4e-7)
  yield one("elu, alpha -0.5", lambda z: nn.elu(z, -0.5), lambda z: np.where(z > 0, z, -0.5 * expm1(z)), -9, -1)
  yield one("celu, alpha -1", lambda z: nn.celu(z, -1.0), lambda z: np.where(z > 0, z, -np.expm1(-np.minimum(z, 0))), -3, -1)
  yield one("leaky relu, slope 1.000001", lambda z: nn.leaky_relu(z, 1 + E), lambda z: np.where(z > 0, z, (1 + E) * z), -1, 1)
  yield one("relu6", nn.relu6, lambda z: np.clip(z, 0, 6), 5, 7)
  yield one("hard tanh", nn.hard_tanh, lambda z: np.clip(z, -1, 1), 0, 2)
  yield one("hard sigmoid", nn.hard_sigmoid, lambda z: np.clip(z + 3, 0, 6) / 6, 2, 4)
  yield one("hard silu", nn.hard_silu, lambda z: z * np.clip(z + 3, 0, 6) / 6, -4, -2)
  yield one("soft sign", nn.soft_sign, lambda z: z / (1 + abs(z)), 0, 9)
  yield one("sparse sigmoid", nn.sparse_sigmoid, lambda z: np.clip((z + 1) / 2, 0, 1), 0, 2)
  yield one("sparse plus, turned", lambda z: -nn.sparse_plus(z), lambda z: -np.where(z >= 1, z, np.where(z <= -1, 0, (z + 1) ** 2 / 4)), -1, 1)
  yield one("squareplus, b = -1", lambda z: nn.squareplus(z, -1.0), lambda z: (z + np.sqrt(z * z - 1)) / 2, 1.5, 3)
  yield one("softplus, turned", lambda z: -nn.softplus(z), lambda z: -np.logaddexp(z, 0), -9, 9)
  yield one("softplus of a softplus, turned inside", lambda z: nn.softplus(1 - nn.softplus(z)), lambda z: np.logaddexp(1 - np.logaddexp(z, 0), 0), -3, 3)
  yield one("relu of minus elu", lambda z: nn.relu(-nn.elu(z)), lambda z: np.maximum(-np.where(z > 0, z, expm1(z)), 0), -9, -1)
  yield apart("named activations", "glu", nn.glu, lambda z: z[:1] * sigmoid(z[1:]), [1, 0], [1, 9])
  yield apart("named activations", "a maximum without its leading unit", lambda x: x.max() - nn.relu(x[0]), lambda x: x.max() - max(x[0], 0), [-1, -1], [1, -1])
  yield one("erf", lax.erf, lambda z: special.erf(z.astype(float)), 0, 2)
  yield one("logarithm of gamma, across a pole", lax.lgamma, lambda z: special.gammaln(z.astype(float)), -0.5, 0.5)


# Steps: casts and roundings of the input.


def steps() -> Iterator[Case]:
  f32 = np.float32

  def one(name, program, reference, a, b, kind="convex", **more):
    return apart("casts and roundings", f"{name} ({kind})", program, reference, [a] * 2, [b] * 2, kind=kind, **more)

  def through(dtype):
    return lambda z: z.astype(f32).astype(dtype).astype(f32)

  low = {  # (a, b) whose middle is rounded up while a and b are exact.
    "float8_e4m3fn": (1.0, 1.125 + 2.0**-6),
    "float8_e5m2": (1.0, 1.25 + 2.0**-6),
    "float8_e4m3b11fnuz": (1.0, 1.125 + 2.0**-6),
    "float8_e5m2fnuz": (1.0, 1.25 + 2.0**-6),
    "float8_e3m4": (1.0, 1.0625 + 2.0**-7),
    "float4_e2m1fn": (1.0, 1.5 + 2.0**-4),
  }
  for name, (a, b) in low.items():
    dtype = getattr(ml_dtypes, name)
    for kind in ("convex", "affine") if "e5m2" in name or "float4" in name else ("convex",):
      yield one(f"{name}", lambda z, d=dtype: z.astype(d).astype(f32), through(dtype), a, b, kind)
  dtype = ml_dtypes.float8_e5m2
  yield one("float8_e5m2 of bfloat16", lambda z: z.astype(dtype).astype(jnp.bfloat16), through(dtype), 1.0, 1.25 + 2.0**-6, dtype=jnp.bfloat16)
  yield one("relu, then float8", lambda z: jax.nn.relu(z).astype(ml_dtypes.float8_e4m3fn).astype(f32), lambda z: through(ml_dtypes.float8_e4m3fn)(np.maximum(z, 0)), 1.0, 1.125 + 2.0**-6)

  def reduced(z, bits):
    m, e = np.frexp(z)
    return np.ldexp(np.rint(np.ldexp(m, bits + 1)), e - bits - 1)

  for exponent, mantissa in ((5, 1), (8, 3), (8, 7), (5, 10), (8, 0)):
    width = 2.0**-mantissa
    yield one(f"reduce_precision({exponent}, {mantissa})", lambda z, e=exponent, m=mantissa: lax.reduce_precision(z, e, m), lambda z, m=mantissa: reduced(z, m), 1.0, 1 + width * 1.2)
  yield one("reduce_precision(5, 1)", lambda z: lax.reduce_precision(z, 5, 1), lambda z: reduced(z, 1), 1.0, 1.6, "affine")
  yield one("reduce_precision in a nested jit", lambda z: jax.jit(lambda v: lax.reduce_precision(v, 8, 2))(z) ** 2, lambda z: reduced(z, 2) ** 2, 1.0, 1.26)
  yield one("int32", lambda z: z.astype(np.int32).astype(f32), np.trunc, 0.9, 1.2)
  yield one("int32, affine", lambda z: z.astype(np.int32).astype(f32), np.trunc, 0.9, 1.2, "affine")
  yield one("bool", lambda z: z.astype(bool).astype(f32), lambda z: (z != 0) * 1.0, 0, 1)
  yield one("round", jnp.round, np.round, 0.4, 0.7)
  yield one("floor", jnp.floor, np.floor, 0.9, 1.2)
  yield one("ceil", jnp.ceil, np.ceil, 0.0, 0.2)
  yield one("trunc", jnp.trunc, np.trunc, 0.9, 1.2)
  yield one("sign", jnp.sign, np.sign, -0.1, 1)
  yield one("heaviside", lambda z: jnp.heaviside(z, 0.5), lambda z: np.heaviside(z.astype(float), 0.5), -0.1, 1)
  yield one("straight-through floor", lambda z: z + lax.stop_gradient(jnp.floor(z) - z), np.floor, 0.9, 1.2)
  yield one("quantised to 1e-6", lambda z: jnp.round(z / E) * E, lambda z: np.round(z / E) * E, 0.4e-6, 0.7e-6)
  yield one("int8 quantisation", lambda z: jnp.clip(jnp.round(z * 16), -128, 127).astype(np.int8).astype(f32) / 16, lambda z: np.round(z * 16) / 16, 0.025, 0.045)
  yield one("bits", lambda z: lax.bitcast_convert_type(z, np.int32).astype(f32) * 2.0**-23, lambda z: np.floor(np.log2(z)) + 127 + z / 2.0 ** np.floor(np.log2(z)) - 1, 1.0, 4.0)


# Control flow.


def control() -> Iterator[Case]:
  def one(name, program, reference, a, b, **more):
    return apart("control flow and custom rules", name, program, reference, a, b, **more)

  two = ([-1.0, -1.0], [1.0, 1.0])
  yield one("cond on the input, with a jump of 1e-6", lambda x: lax.cond(x[0] > 0, lambda v: v + E, lambda v: 0 * v, x), lambda x: x + E if x[0] > 0 else 0 * x, [-1e-8] * 2, [3e-8] * 2)
  yield one("cond, slope 1e-6 too steep on the left", lambda x: lax.cond(x[0] > 0, lambda v: v, lambda v: (1 + E) * v, x), lambda x: x if x[0] > 0 else (1 + E) * x, *two)
  yield one("cond on another entry", lambda x: lax.cond(x[1] > 0, lambda v: v, lambda v: 0 * v, x), lambda x: x if x[1] > 0 else 0 * x, [1.0, -1.0], [1.0, 1.0 + 1e-3])
  yield one("cond turned", lambda x: lax.cond(x[0] > 0, lambda v: 0 * v, lambda v: v, x), lambda x: 0 * x if x[0] > 0 else x, *two)
  yield one("cond on a sum, at 1e6", lambda x: lax.cond(x.sum() > F, lambda v: v.sum() - E, lambda v: v.sum(), x), lambda x: x.sum() - E * (x.sum() > F), [F / 2, F / 2 - 1e-7], [F / 2, F / 2 + 1e-7])
  yield one("switch on a known index that is clipped", lambda x: lax.switch(np.int32(7), [jnp.exp, jnp.abs, lambda v: -jnp.abs(v)], x), lambda x: -abs(x), *two)
  yield one("switch on a negative index", lambda x: lax.switch(np.int32(-1), [lambda v: -jnp.abs(v), jnp.abs, jnp.exp], x), lambda x: -abs(x), *two)
  yield one("cond on a number that is known near a border", lambda x: lax.cond(jnp.float32(0.1) * 3 > 0.3, lambda v: -jnp.abs(v), jnp.abs, x) if bool(np.float32(0.1) * np.float32(3) > np.float32(0.3)) else lax.cond(jnp.float32(0.1) * 3 > 0.3, jnp.abs, lambda v: -jnp.abs(v), x), lambda x: -abs(x), *two)
  yield one("select on a known mask that wraps", lambda x: jnp.where(jnp.int8(127) + jnp.int8(1) > 0, jnp.abs(x), -jnp.abs(x)), lambda x: -abs(x), *two)
  yield one("switch on the input", lambda x: lax.switch(jnp.argmax(x), [lambda v: v.sum(), lambda v: v.sum() + E], x), lambda x: x.sum() + E * np.argmax(x), [1, 1 - 1e-7], [1, 1 + 2e-7])
  yield one("while that counts by the input", lambda x: lax.while_loop(lambda c: c < x[0], lambda c: c + 1.0, jnp.zeros((), x.dtype)), lambda x: max(np.ceil(x[0]), 0), [0.0, 0], [0.2, 0])
  yield one("while with a convex body and a wrong end", lambda x: lax.while_loop(lambda c: c.sum() < 4, lambda c: 2 * c + 1, jax.nn.relu(x)), _doubled, [1.4, 1.4], [2.4, 2.4])
  yield one("fori_loop with a concave step", lambda x: lax.fori_loop(0, 5, lambda i, c: jnp.where(i == 3, jnp.minimum(c, 1), jax.nn.relu(c)), x), lambda x: np.minimum(np.maximum(x, 0), 1), [0.0] * 2, [2.0] * 2)
  yield one("scan with a wrong sign at one step", lambda x: lax.scan(lambda c, s: (c + s * jax.nn.relu(c), None), x, np.float32([1, 1, -3, 1]))[0], _signs, *two)
  yield one("scan, from the back", lambda x: lax.scan(lambda c, s: (jax.nn.relu(c) * s, None), x, np.float32([-1, 1]), reverse=True)[0], lambda x: -np.maximum(x, 0), *two)
  yield one("scan whose carries are swapped", lambda x: lax.scan(lambda c, _: ((c[1], c[0]), None), (jax.nn.relu(x), -jax.nn.relu(x)), None, length=3)[0][0], lambda x: -np.maximum(x, 0), *two)
  yield one("scan whose outputs are swapped", lambda x: lax.scan(lambda c, r: (c, (-jax.nn.relu(r), jax.nn.relu(r))), 0.0, x)[1][0], lambda x: -np.maximum(x, 0), *two)
  yield one("map of a concave function", lambda x: lax.map(lambda r: -jnp.abs(r), x), lambda x: -abs(x), *two)

  def custom(body, *rules):
    f = jax.custom_jvp(body)
    f.defjvp(rules[0] if rules else lambda p, t: (f(*p), t[0]))
    return f

  yield one("custom_jvp whose derivative is another's", custom(jnp.sin), np.sin, [0.0] * 2, [3.0] * 2)
  yield one("custom_jvp that is named relu", _named("relu", custom(lambda v: jnp.minimum(v, 0))), lambda x: np.minimum(x, 0), *two)
  yield one("jit that is named logsumexp", jax.jit(_named("logsumexp", lambda v: -jnp.abs(v).sum())), lambda x: -abs(x).sum(), *two)
  yield one("jit that is named softplus", jax.jit(_named("softplus", lambda v: -jnp.abs(v))), lambda x: -abs(x), *two)

  logaddexp = jax.custom_jvp(lambda a, b: jnp.minimum(a, b))
  logaddexp.defjvp(lambda p, t: (logaddexp(*p), t[0]))
  yield one("custom_jvp in place of logaddexp", lambda x: logaddexp(x, -x), lambda x: np.minimum(x, -x), *two)
  nearly = jax.custom_jvp(lambda a, b: jnp.where(jnp.isnan(a - b), a + b, jnp.maximum(a, b) - jnp.log1p(jnp.exp(-jnp.abs(a - b)))))
  nearly.defjvp(lambda p, t: (nearly(*p), t[0]))
  yield one("logaddexp with its correction turned", lambda x: nearly(x, -x), lambda x: abs(x) - np.log1p(np.exp(-2 * abs(x))), [0.0] * 2, [1.0] * 2)
  backward = jax.custom_vjp(lambda v: jnp.sin(v))
  backward.defvjp(lambda v: (jnp.exp(v), None), lambda r, g: (g,))
  yield one("custom_vjp whose forward pass is another's", backward, np.sin, [0.0] * 2, [3.0] * 2)
  yield one("a gradient of a convex function", jax.grad(lambda v: jnp.exp(-(v**2)).sum()), lambda x: -2 * x * np.exp(-x * x), [0.0] * 2, [-1.4] * 2)
  yield one("a jvp's tangent", lambda x: jax.jvp(jax.nn.softplus, (x,), (jnp.ones_like(x),))[1], lambda x: 1 / (1 + np.exp(-x)), [0.0] * 2, [9.0] * 2)
  yield one("a linear solve by the input", lambda x: jnp.linalg.solve(jnp.eye(2) * (2 + x[0]), jnp.ones(2)), lambda x: np.ones(2) / (2 + x[0]), [-3.0, 0], [-5.0, 0])
  yield one("a determinant", lambda x: jnp.linalg.det(jnp.stack([x, x[::-1]])), lambda x: x[0] ** 2 - x[1] ** 2, [0.0, -1], [0.0, 1])
  yield one("least eigenvalue", lambda x: jnp.linalg.eigvalsh(jnp.stack([jnp.stack([x[0], x[1]]), jnp.stack([x[1], -x[0]])]))[0], lambda x: -np.sqrt((x * x).sum()), *two)
  yield one("a pure callback of the input", lambda x: jax.pure_callback(lambda v: -np.abs(v), jax.ShapeDtypeStruct((2,), np.float32), x), lambda x: -abs(x), *two)
  yield one("pieces, the last shifted up", lambda x: jnp.piecewise(x, [x < 0, x >= 1], [0.0, lambda v: 2 * v - 1 + E, lambda v: v]), lambda x: np.where(x < 0, 0, np.where(x >= 1, 2 * x - 1 + E, x)), [1 - 1e-8] * 2, [1 + 3e-8] * 2)
  yield one("jnp.select with a default below", lambda x: jnp.select([x > 1, x > 0], [x, 0 * x + 1], -1.0), lambda x: np.where(x > 1, x, np.where(x > 0, 1, -1)), [-1e-3] * 2, [1.0] * 2)


def _doubled(x):
  c = np.maximum(x, 0)
  while c.sum() < 4:
    c = 2 * c + 1
  return c


def _signs(x):
  for s in (1, 1, -3, 1):
    x = x + s * np.maximum(x, 0)
  return x


def _named(name, f):
  g = lambda *a: f(*a)  # noqa: E731
  g.__name__ = g.__qualname__ = name
  return g


FAMILIES = (scalars, integers, near_borders, magnitudes, on_the_way, draws, effects, changes, moves, sums, convolutions, networks, log_sum_exps, quadratic_forms, norms, activations, steps, control)


QUICK = tuple(f for f in FAMILIES if f is not draws)  # To draw takes compilations.

# Whose references are real numbers, or the program's, of which the other loses the sign.
ROUNDED = {
  "effects",
  "overflow, underflow and conditioning",
  "signs of tiny and of cancelling numbers",
}


def cases(families=FAMILIES) -> Iterator[Case]:
  """All planted cases; a new list each time, for some change or count."""
  for family in families:
    yield from family()
