"""How far the program that is deployed can be from the function over the reals.

A forward error analysis of the jaxpr, with the stored weights, over a whole ball of inputs. Of
each number it knows an enclosure of its real value over the ball, and a bound on the error of the
value that the program computes. An operation passes on the errors of its operands by the mean value
theorem, and adds its own by the standard model of floating-point arithmetic (Higham 2002, "Accuracy
and Stability of Numerical Algorithms", section 2.2),

    fl(a op b) = (a op b)(1 + d) + e,  |d| <= u,  |e| <= smallest normal number,

with the unit roundoff u of the operation's dtype in the jaxpr; e is what is flushed to 0. A sum of
n products, in any order, with or without fused multiply-add, errs by at most

    gamma_n sum |a_i| |b_i|,  gamma_n = n u / (1 - n u)  (section 3.1).

Assumed of the compiler and the machine:

- they compute the jaxpr's operations, rounding to nearest. They may fuse and contract them,
  sum in any order, divide by way of a reciprocal, keep more precision than a dtype has, and merge
  constants, quotients and exponentials as `merged` says; but products are sums of products (no Strassen or
  Winograd algorithms), and no function is replaced by another one in any other way;
- exp, tanh and the like are right to within `arithmetic.FUNCTIONS`, measured on the CPU with a margin;
- how products of matrices are computed is what an `arithmetic.Arithmetic` says.

What has no rule is refused by name.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from convex_jax.proof import interpreter
from convex_jax.proof.arithmetic import FLOAT64, Arithmetic
from convex_jax.proof.constants import number
from convex_jax.proof.float64 import float64, plain
from convex_jax.proof.rounded import Rounded, as_rounded
from convex_jax.proof.rounding_walk import Ball, Overflow, Walk
from convex_jax.proof.source import Place
from convex_jax.proof.wide import widened


class Program:
  """A program `f(*args)` as a machine computes it, and as a function over the reals.

  Args:
    f: any JAX function, in the dtypes that are deployed.
    *args: its arguments, as for `certify`; argnums: which is the input, a `jax.ShapeDtypeStruct`.
    arithmetic: how it is computed; None where no bound on its error is asked for.

  Raises:
    ValueError: the arguments are unfit, or the function does not return one array.
  """

  def __init__(
    self, f: Callable[..., Any], *args: Any, arithmetic: Arithmetic | None = None, argnums: int = -1
  ):
    self._jaxpr, _ = interpreter.trace(f, *args, argnums=argnums)
    if len(self._jaxpr.out_avals) != 1:
      raise ValueError(f"the function returns {len(self._jaxpr.out_avals)} arrays; expected one")
    self._arithmetic = arithmetic
    self._at = len(jax.tree.leaves(args[: argnums % len(args)]))
    self._given = jax.tree.leaves(args)
    self._spreads: dict[tuple[int, bytes], dict[str, np.ndarray]] = {}

  @property
  def text(self) -> str:
    """Its jaxpr, which tells programs of the same arguments apart."""
    return str(self._jaxpr)

  def exact(self, x: jax.Array) -> jax.Array:
    """The function over the reals, evaluated in float64; to be called under `float64`.

    Its constants are those of the program: a 0.1 that the program holds in bfloat16 is that number.
    """
    given = [*self._given[: self._at], x, *self._given[self._at + 1 :]]
    return widened(self._jaxpr)(*given)[0]

  def error(self, ball: Ball, quickly: bool = False) -> np.ndarray:
    """A bound on |computed - real| of each output, for every x of the program's dtype in a ball.

    Infinite where the program may overflow, or be undefined. `quickly`: without the derivatives of
    affine values, which take minutes where there are millions of them; the bounds are wider.

    Raises:
      ValueError: an operation has no rule.
    """
    out = self._output(ball, quickly)
    return np.full(self._jaxpr.out_avals[0].shape, np.inf) if out is None else _bound(out.error)

  def differences(self, ball: Ball, quickly: bool = False) -> np.ndarray:
    """Bounds (K, K) on the error of each difference of two of the K outputs, as `error`.

    Where the outputs are h W + b over the last axis, an error of h counts by the difference of two
    columns of W; elsewhere the errors of both outputs add up.
    """
    out = self._output(ball, quickly)
    if out is None:
      return np.full((math.prod(self._jaxpr.out_avals[0].shape),) * 2, np.inf)
    error_K = np.ravel(out.error)
    apart_KxK = error_K[:, None] + error_K
    if (end := _linear_end(out)) is not None:
      error_H, weights_HxK = end
      own_K = np.maximum(error_K - error_H @ np.abs(weights_HxK), 0.0)
      columns_KxHxK = np.abs(weights_HxK.T[:, :, None] - weights_HxK)
      apart_KxK = np.minimum(apart_KxK, own_K[:, None] + own_K + error_H @ columns_KxHxK)
    return _bound(apart_KxK)

  def _output(self, ball: Ball, quickly: bool = False) -> Rounded | None:
    """The output over a ball; None where nothing is known of it."""
    if self._arithmetic is None:
      raise ValueError(
        "a bound on rounding errors needs an arithmetic; expected one of ARITHMETICS"
      )
    walk = Walk(self._arithmetic, ball, None if quickly else self._spreads)
    arguments = [
      walk.input(aval.shape) if i == self._at else number(x, aval.dtype)
      for i, (x, aval) in enumerate(zip(self._given, self._jaxpr.in_avals, strict=True))
    ]
    consts = zip(self._jaxpr.consts, self._jaxpr.jaxpr.constvars, strict=True)
    known = [number(value, var.aval.dtype) for value, var in consts]
    with np.errstate(all="ignore"), plain():
      try:
        return as_rounded(walk.run(self._jaxpr.jaxpr, known, arguments, Place())[0])
      except Overflow:
        return None


def in_float64(f: Callable[[jax.Array], jax.Array], ball: Ball) -> float:
  """A bound over a ball on the error of a scalar function evaluated in float64; 0 where none is known.

  It is doubled, for the tangents with which values are compared: not a proof that it covers them.
  """
  with float64():
    example = jax.ShapeDtypeStruct(np.shape(ball.centre), jax.numpy.float64)
    program = Program(f, example, arithmetic=FLOAT64)
  try:
    error = 2 * float(program.error(ball, quickly=True).max(initial=0.0))
  except ValueError:
    return 0.0
  return error if np.isfinite(error) else 0.0


def _bound(error: Any) -> np.ndarray:
  """A bound that float64 has computed from terms >= 0, and what rounding may have cost it."""
  return np.asarray(error) * (1 + 1e-6)


def _linear_end(x: Rounded) -> tuple[np.ndarray, np.ndarray] | None:
  """(error of h, W) where the outputs are h W + b over the last axis, of one h; else None."""
  while x.made_by is not None:
    eqn, operands = x.made_by
    name, varying = eqn.primitive.name, [y for y in operands if isinstance(y, Rounded) and y.varies]
    if len(varying) != 1:
      return None
    if name == "dot_general":
      h, weights = operands
      contracted, batched = eqn.params["dimension_numbers"]
      plain = [tuple(axes) for axes in contracted] == [(len(h.shape) - 1,), (0,)]
      fits = h is varying[0] and plain and batched == ((), ()) and len(weights.shape) == 2
      if not fits or math.prod(h.shape) != len(weights.low):
        return None
      return np.ravel(h.error), (weights.low + weights.high) / 2
    if name not in ("add", "reshape", "broadcast_in_dim", "convert_element_type"):
      return None
    if math.prod(x.shape) != math.prod(varying[0].shape):
      return None
    x = varying[0]
  return None
