"""Why a function is not proved convex, in a sentence."""

from collections.abc import Sequence

from convex_jax.dcp import RULES, Known, Operation, Value


def explain(operation: Operation | None, kind: str) -> str:
  """One sentence on the first operation that breaks the curvature."""
  if operation is None:
    return "an output that is no finite real number"
  what = _what(operation, kind)
  return f"{what}, in {operation.place}"


def _what(op: Operation, kind: str) -> str:
  name, known = op.primitive, [x for x in op.inputs if isinstance(x, Known)]
  values = [x for x in op.inputs if isinstance(x, Value)]
  if op.note:
    return f"an activation that is neither convex nor concave: {op.note}"
  if name in ("dot_general", "conv_general_dilated", "mul", "div") and len(values) == 2:
    verb = "quotient" if name == "div" else "product"
    return f"{name}: a {verb} of two values that both depend on the input"
  if name in ("dot_general", "conv_general_dilated", "mul", "div") and known:
    return f"{name}: {_wrong_signs(known[0])}, and multiply what is not affine"
  if name == "div":
    return "div: a quotient by a value that depends on the input"
  if name in ("sub", "add"):
    return f"{name}: the {'difference' if name == 'sub' else 'sum'} of {_curved(values, name)}"
  if name == "neg":
    return "neg: the negative of " + _shape_of(values[0])
  if name not in RULES:
    return f"{name} of a value that depends on the input, for which there is no rule"
  return f"{name} of {' and '.join(map(_shape_of, values))}, which is not {kind}"


def _shape_of(value: Value) -> str:
  if value.is_affine:
    return "an affine value"
  if not value.not_convex.any():
    return "a convex value"
  return "a concave value" if not value.not_concave.any() else "a value of mixed curvature"


def _curved(values: Sequence[Value], name: str) -> str:
  words = [_shape_of(v) for v in values]
  if name == "sub" and len(words) == 2 and words[0] == words[1]:
    return f"two {words[0].split()[1]} values"
  return f" {'minus' if name == 'sub' else 'and'} ".join(words)


def _wrong_signs(known: Known) -> str:
  """How many entries of which weights are negative."""
  for name, array in known.origins.items():
    if (array < 0).any():
      return f"{(array < 0).sum():,} of {array.size:,} entries of {name} are negative"
  count = f"{(known.array < 0).sum():,} of {known.array.size:,} entries"
  made = " and ".join(known.origins)
  return f"{count} of a constant{f' made of {made}' if made else ''} are negative"
