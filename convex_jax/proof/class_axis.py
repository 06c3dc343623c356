"""The end of a network, in which the classes lie along the last axis.

What is the same for all classes may be added to their logits. Where that is known to stay the same up
to the logits, `convexified` need not carry it along as part of each of them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from convex_jax.proof import affine_maps
from convex_jax.proof.values import Known, Operation, Value


def tail(
  output: Value, order: Sequence[Value], inputs_of: Callable[[Value], Sequence[Any]]
) -> set[int]:
  """Ids of the values of which only the logits are made, and whose last axis is that of the classes.

  `order` has each value after its inputs, `inputs_of`.
  """
  users: dict[int, list[Value]] = {}
  for value in order:
    for x in inputs_of(value):
      if isinstance(x, Value):
        users.setdefault(id(x), []).append(value)
  found: set[int] = set()
  for value in reversed(order):
    if value is output or all(id(u) in found and _keeps_classes(u) for u in users[id(value)]):
      found.add(id(value))
  return found


def of_weights(op: Operation) -> int | None:
  """The axis of the weights along which the classes lie, if they are the result's last axis."""
  if op.primitive == "dot_general":
    sums, (batch, _) = op.params["dimension_numbers"]
    at = 0 if isinstance(op.inputs[0], Known) else 1
    free = [i for i in range(len(op.inputs[at].shape)) if i not in sums[at]]
    is_last = at == 1 or len(op.inputs[1].shape) == len(sums[1])
    return free[0] if len(free) == 1 and is_last and not batch else None
  if op.primitive == "conv_general_dilated" and isinstance(op.inputs[1], Known):
    numbers = op.params["dimension_numbers"]
    is_last = numbers.out_spec[1] == len(op.shape) - 1
    plain = op.params["feature_group_count"] == op.params["batch_group_count"] == 1
    return numbers.rhs_spec[0] if is_last and plain else None
  return None


def _keeps_classes(value: Value) -> bool:
  """Whether a value adds up parts of one other, with weights >= 0 that no two classes differ in."""
  op = value.made_by
  if op is None or not affine_maps.is_affine(op):
    return False
  name, inputs, params = op.primitive, op.inputs, op.params
  if name in ("add", "add_any"):
    return all(x.shape == op.shape for x in inputs if isinstance(x, Value))
  if name == "sub":
    return isinstance(inputs[1], Known) and inputs[0].shape == op.shape
  if name in ("mul", "div"):
    known = next(x for x in inputs if isinstance(x, Known)).array
    return bool(known.size and known.flat[0] > 0 and np.all(known == known.flat[0]))
  last = len(inputs[0].shape) - 1
  if name == "reduce_sum":
    return last not in params["axes"]
  if name == "reduce_window_sum":
    return params["window_dimensions"][-1] == 1 and tuple(params["padding"][-1]) == (0, 0)
  if name == "reshape":
    return inputs[0].shape[-1:] == op.shape[-1:]
  if name == "squeeze":
    return last not in params["dimensions"]
  if name == "broadcast_in_dim":
    places = params["broadcast_dimensions"]
    return bool(places) and places[-1] == len(op.shape) - 1 and inputs[0].shape[-1] == op.shape[-1]
  return False
