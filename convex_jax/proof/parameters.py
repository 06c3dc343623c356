"""The parameters of the operations that a second look goes through.

A pattern that forgets a parameter (a `reshape` that also transposes, a sum that runs backwards)
proves what is false. This table names all of them; of an operation with another one, or with
one that must be plain and is not, no pattern makes anything.
"""

from typing import Any

from convex_jax.proof.values import Operation

USED = "used by whoever looks through"
LAYOUT = "says on which devices the numbers are"

_PLAIN = (
  "abs add add_any and cosh div eq erf ge gt is_finite le lt max min ne neg not or select_n sign"
)
_PLAIN += " square sub"
_ACCURATE = "erfc exp exp2 expm1 log log1p log2 logistic sqrt tanh"

PARAMETERS: dict[str, dict[str, Any]] = {  # Of each primitive: USED, LAYOUT or the plain value.
  **{name: {} for name in _PLAIN.split()},
  **{name: {"accuracy": None} for name in _ACCURATE.split()},
  "mul": {"out_dtype": None},
  "integer_pow": {"y": USED},
  "convert_element_type": {"new_dtype": USED, "weak_type": LAYOUT, "sharding": LAYOUT},
  # Moves of elements, done by the primitive itself with all its parameters.
  "broadcast_in_dim": {"shape": USED, "broadcast_dimensions": USED, "sharding": LAYOUT},
  "reshape": {"new_sizes": USED, "dimensions": USED, "sharding": LAYOUT},
  "squeeze": {"dimensions": USED},
  "transpose": {"permutation": USED},
  "slice": {"start_indices": USED, "limit_indices": USED, "strides": USED},
  "rev": {"dimensions": USED},
  # Sums.
  "reduce_sum": {"axes": USED, "out_sharding": LAYOUT},
  "cumsum": {"axis": USED, "reverse": USED},
}


def is_plain(op: Operation) -> bool:
  """Whether every parameter is one that a pattern takes into account."""
  known = PARAMETERS.get(op.primitive)
  if known is None:
    return False
  for name, value in op.params.items():
    plain = known.get(name, ...)
    if plain is not USED and plain is not LAYOUT and value is not plain:
      return False
  return True
