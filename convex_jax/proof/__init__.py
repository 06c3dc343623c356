"""Is this function convex? A proof, or the first operation that breaks it.

`certify` takes any JAX function, reads its computation graph (the jaxpr), and returns a verdict
on each output:

- PROVED: convex (or concave, or affine) in the input on all of R^n, as a function over the reals,
  with the weights given. The proof follows the rules of disciplined convex programming element by
  element, and recognises activations and log-sum-exp by what they compute.
- REFUTED: two points were found whose midpoint lies on the wrong side, rounding accounted for.
- UNKNOWN: neither. Where no rule applies, nothing is guessed.

Unless all is proved, the certificate names the first operation that breaks it, its weights and its
line in the source code.

    def network(weights, x):
      z = jax.nn.softplus(x @ weights["first"])
      z = jax.nn.softplus(z @ weights["second"] + x @ weights["passthrough"])
      return z @ weights["last"]

    print(certify(network, weights, x))  # PROVED, if second >= 0 and last >= 0.

Every other network of affine maps, maxima and scalar activations has convex logits too, once a term
that all of them share is added (`convexify`), which no softmax sees.

Convexity then pays: `radii` certifies how far an input may move before its class can change,
`minimum` bounds a convex function's least value over a box, and `export_cvxpy` puts it into a convex
program (this one needs cvxpy). The package needs jax, numpy and scipy, and nothing else of
convex_jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from convex_jax.proof.certificate import Certificate, NotProved, certify
  from convex_jax.proof.convexified import Convexified, convexify
  from convex_jax.proof.export import export_cvxpy

__all__ = ["Certificate", "Convexified", "NotProved", "certify", "convexify", "export_cvxpy"]
_WHERE = {  # Imported on first use: a run proves at its end, and CVXPY is an extra.
  "Certificate": "certificate",
  "Convexified": "convexified",
  "NotProved": "certificate",
  "certify": "certificate",
  "convexify": "convexified",
  "export_cvxpy": "export",
}


def __getattr__(name: str) -> Any:
  if name not in _WHERE:
    raise AttributeError(f"{__name__} has no attribute {name!r}; it has {', '.join(__all__)}")
  try:
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
  except ModuleNotFoundError as error:
    if error.name != "cvxpy":
      raise
    message = "export_cvxpy needs cvxpy: pip install 'convex_jax[cvxpy]'"
    raise ModuleNotFoundError(message, name="cvxpy") from error


def __dir__() -> list[str]:
  return sorted([*globals(), *__all__])
