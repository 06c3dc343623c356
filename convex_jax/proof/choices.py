"""Choices by a condition on the input, seen through.

Programs guard a function against numbers for which it, or its gradient, is undefined, and choose
twice: where(s > 0, sqrt(where(s > 0, s, 1)), 0). In the outer choice's cases the inner ones are
settled; and if s >= 0, what is left, where(s > 0, sqrt(s), 0), is sqrt(s). Nor is there a choice
in where(x != x, 0, x), which replaces NaN, if x is a number for every input.
"""

from collections.abc import Callable
from typing import Any

from convex_jax.proof.linear import has_no_zero, is_total
from convex_jax.proof.signs import exponent_of, sign
from convex_jax.proof.values import Known, Operation, Value

STEPS = 40  # Operations of a case that are searched.
_BY_ELEMENT = {"add", "sub", "mul", "div", "neg", "max", "min", "abs", "sqrt", "square", "exp"}
_BY_ELEMENT |= {"exp2", "expm1", "log", "log1p", "pow", "integer_pow", "cbrt", "rsqrt", "tanh"}
_BY_ELEMENT |= {"logistic", "cosh", "sinh", "select_n"}
_OF_ONE = {"reshape", "squeeze", "broadcast_in_dim"}


def settled(test: Value, case: int, x: Any, compute: Callable[[Operation, list[Any]], Any]) -> Any:
  """A case of a choice, with all choices in it by the same condition made.

  `compute` computes an operation of other inputs. A condition on each element says something of
  other choices only along operations by element.
  """
  single = test.not_convex.size == 1
  done: dict[int, Any] = {}

  def settle(y):
    op = y.made_by if isinstance(y, Value) else None
    if op is None or op.eqn is None or len(op.eqn.outvars) != 1 or len(done) > STEPS:
      return y
    if op.primitive != op.eqn.primitive.name:  # Renamed, and perhaps of other inputs (`look`).
      return y
    if not single and not (op.primitive in _BY_ELEMENT and op.shape == test.shape):
      return y
    if id(y) not in done:
      done[id(y)] = y
      if op.primitive == "select_n" and len(op.inputs) == 3 and is_test(op.inputs[0]):
        done[id(y)] = settle(op.inputs[1 + min(case, 1)])  # An index of one too many is clamped.
      else:
        inputs = [settle(z) for z in op.inputs]
        if any(a is not b for a, b in zip(inputs, op.inputs, strict=True)):
          done[id(y)] = compute(op, inputs)
    return done[id(y)]

  def is_test(other):
    return other is test or (single and _same_element(other) is _same_element(test))

  return settle(x)


def _same_element(x: Any) -> Any:
  """The value of one element that x consists of."""
  while isinstance(x, Value) and x.made_by is not None and x.made_by.primitive in _OF_ONE:
    if x.made_by.inputs[0].masks[0].size != 1:
      return x
    x = x.made_by.inputs[0]
  return x


def is_same(a: Any, b: Any) -> bool:
  """Whether two values are one finite number, which is no NaN, whatever the input."""
  return a is b and isinstance(a, Value) and a.is_real and is_total(a)


def unguarded(test: Value, *cases: Any) -> Value | None:
  """v where a choice is where(s > 0, v, 0), s is never negative, and v is 0 where s is."""
  op = test.made_by
  if op is None or len(cases) != 2 or op.primitive not in _GUARDS:
    return None
  for (s, zero), case in zip((op.inputs, op.inputs[::-1]), _GUARDS[op.primitive], strict=True):
    if case is None or not isinstance(s, Value) or not _is_zero(zero):
      continue
    value, other = cases[case], cases[1 - case]
    if _is_zero(other) and not sign(s)[0].any() and _vanishes(value, s):
      return value
  return None


# The case that is taken where s > 0, by a comparison of s >= 0 with 0, and of 0 with s.
_GUARDS = {"gt": (1, None), "le": (0, None), "ge": (None, 0), "lt": (None, 1)}
_GUARDS |= {"ne": (1, 1), "eq": (0, 0)}


def _is_zero(x: Any) -> bool:
  return isinstance(x, Known) and x.is_float and not (x.low.any() or x.high.any())


def _vanishes(value: Any, s: Value) -> bool:
  """Whether a value is 0 where s is, element by element."""
  if not isinstance(value, Value) or value.shape != s.shape:
    return False
  while value is not s:
    op = value.made_by if isinstance(value, Value) else None
    if op is None or op.eqn is None or op.shape != s.shape:
      return False
    known = [x for x in op.inputs if isinstance(x, Known)]
    if op.primitive in ("integer_pow", "pow"):
      y = exponent_of(op)
      if isinstance(y, Value) or not (y.low > 0).all():
        return False
    elif op.primitive == "mul" and len(known) == 1:
      if known[0].not_finite.any():
        return False
    elif op.primitive == "div" and isinstance(op.inputs[1], Known):
      if op.inputs[1].not_finite.any() or not has_no_zero(op.inputs[1]):
        return False
    elif op.primitive not in ("sqrt", "abs", "square", "cbrt", "neg"):
      return False
    value = next(x for x in op.inputs if isinstance(x, Value))
  return True
