"""Proof that a network is convex, or the first operation that breaks it.

    python -m convex_jax.certify --workdir=runs/x

`certify` takes any JAX function of an array, walks its jaxpr (`curvature`) and says for
each output whether it is proved convex. Where it is not, the first operation that breaks
it is named, and a search for two points whose midpoint lies too high may refute it. What
is certified is the function at inference with its stored weights, over the reals: float
rounding is not part of it.
"""

import argparse
import dataclasses
import functools
import hashlib
import os
import sys
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from convex_jax import curvature, files, models, radii_report
from convex_jax.dcp import Operation, Value
from convex_jax.errors import Mistake
from convex_jax.explain import explain
from convex_jax.refute import Counterexample, search
from convex_jax.run import Run, load

FORMAT = 1  # Of certificate.json.
KINDS: dict[str, Callable[[Value], np.ndarray]] = {  # Where a value is not proved to be so.
  "convex": lambda v: v.not_convex,
  "concave": lambda v: v.not_concave,
  "affine": lambda v: v.not_convex | v.not_concave,
}


@dataclasses.dataclass(frozen=True)
class Certificate:
  """What is proved of each output, flat; `reason` where something is not."""

  kind: str
  proved: np.ndarray
  reason: str | None = None
  operation: Operation | None = dataclasses.field(default=None, repr=False)
  counterexample: Counterexample | None = dataclasses.field(default=None, repr=False)

  @property
  def verdicts(self) -> list[str]:
    """PROVED, REFUTED or UNKNOWN, one for each output."""
    words = ["PROVED" if proved else "UNKNOWN" for proved in self.proved]
    if self.counterexample is not None:
      words[self.counterexample.output] = "REFUTED"
    return words

  @property
  def verdict(self) -> str:
    """The worst of them."""
    return max(self.verdicts, key=("PROVED", "UNKNOWN", "REFUTED").index)

  def __bool__(self) -> bool:
    return bool(self.proved.all())


def certify(
  function: Callable[..., Any],
  example: Any,
  weights: Any = None,
  *,
  kind: str = "convex",
  box: tuple[float, float] = (-1.0, 1.0),
  search_function: Callable[..., Any] | None = None,
  search_steps: int = 200,
  seed: int = 0,
) -> Certificate:
  """Whether every output of `function` is convex in its (whole) input.

  Args:
    function: of an array, or of (weights, array) where `weights` are given. Weights may as
      well be closed over; given ones are named in explanations.
    example: an input, or its `jax.ShapeDtypeStruct`: shape and dtype.
    weights: any tree of arrays.
    kind: what to prove: "convex", "concave", "affine".
    box: least and greatest entry of the points among which a counterexample is sought.
    search_function: the same function for that search, where it must be built otherwise to
      compute in float64.
    search_steps: gradient steps of the search; 0: no search.
    seed: of the search.

  Returns:
    A certificate, true where all outputs are proved.

  Raises:
    ValueError: a kind that there is not, an input that is not floating-point, or no output.
  """
  if kind not in KINDS:
    raise ValueError(f"kind is {kind!r}; allowed: {', '.join(KINDS)}")
  if not jnp.issubdtype(example.dtype, jnp.floating):
    raise ValueError(f"the example is {example.dtype}; convexity needs floating-point inputs")
  outputs, _ = curvature.analyse(function, example, weights)
  if not outputs:
    raise ValueError("the function returns nothing")
  missing = [KINDS[kind](v) if isinstance(v, Value) else _is_no_number(v.array) for v in outputs]
  proved = ~np.concatenate([np.ravel(m) for m in missing])
  if proved.all():
    return Certificate(kind, proved)
  worst = next(v for v, m in zip(outputs, missing, strict=True) if m.any())
  operation = curvature.culprit(worst, KINDS[kind]) if isinstance(worst, Value) else None
  counterexample = None
  if search_steps:
    counterexample = search(
      search_function or function, example.shape, weights, ~proved, kind, box, search_steps, seed
    )
  return Certificate(kind, proved, explain(operation, kind), operation, counterexample)


def _is_no_number(known: Any) -> np.ndarray:
  if not isinstance(known, np.ndarray):  # A random key.
    return np.ones(np.shape(known), bool)
  return ~np.isfinite(known)


@dataclasses.dataclass(frozen=True)
class Subject:
  """What of a run is certified: a function of an image, or of the features before its head."""

  input_name: str
  function: Callable[..., Any]
  search_function: Callable[..., Any]
  weights: Any
  example: jax.ShapeDtypeStruct
  box: tuple[float, float]


def subject_of(run: Run) -> Subject:
  """The run's network as a function of its pixels, or its head of its features."""
  weights = {"params": run.params, "stats": run.stats}
  if run.config.model.convex_from == "image":
    example = jax.ShapeDtypeStruct((1, *run.image_shape), jnp.float32)
    exact = functools.partial(run.apply, dtype=jnp.float64)
    return Subject("image", run.apply, exact, weights, example, (0.0, 255.0))
  head = {key: tree["head"] for key, tree in weights.items() if "head" in tree}
  width = head["params"]["dense_0"]["kernel"].shape[0]
  classes = len(run.class_names)

  def apply(weights, features_BxD, dtype=jnp.float32):
    model = models.build_head(run.config.model, classes, dtype=dtype)
    variables = {"params": weights["params"], "batch_stats": weights.get("stats", {})}
    return model.apply(variables, features_BxD)

  example = jax.ShapeDtypeStruct((1, width), jnp.float32)
  exact = functools.partial(apply, dtype=jnp.float64)
  return Subject("features before the head", apply, exact, head, example, (-10.0, 10.0))


def certify_run(run: Run, kind: str = "convex", search_steps: int = 200) -> Certificate:
  """The certificate of a run's logits at inference."""
  s = subject_of(run)
  return certify(
    s.function,
    s.example,
    s.weights,
    kind=kind,
    box=s.box,
    search_function=s.search_function,
    search_steps=search_steps,
  )


def digest(weights: Any) -> str:
  """SHA-256 over names, dtypes, shapes and bytes of a tree of arrays."""
  hashed = hashlib.sha256()
  for path, leaf in sorted(
    (jax.tree_util.keystr(p), np.asarray(a))
    for p, a in jax.tree_util.tree_leaves_with_path(weights)
  ):
    hashed.update(f"{path} {leaf.dtype} {leaf.shape}".encode())
    hashed.update(np.ascontiguousarray(leaf).tobytes())
  return hashed.hexdigest()


def write(run: Run, certificate: Certificate, seconds: float) -> dict[str, Any]:
  """Writes certificate.json into the run's folder, whole or not at all; returns its content."""
  s = subject_of(run)
  content: dict[str, Any] = {
    "format": FORMAT,
    "verdict": certificate.verdict,
    "kind": certificate.kind,
    "of": f"each logit as a function of the {s.input_name}, at inference, over the reals",
    "logits": dict(zip(run.class_names, certificate.verdicts, strict=True)),
    "reason": certificate.reason,
    "counterexample": None,
    "step": run.step,
    "weights_sha256": digest({"params": run.params, "stats": run.stats}),
    "seconds": round(seconds, 2),
    "versions": {name: metadata.version(name) for name in ("convex_jax", "jax", "flax", "numpy")},
  }
  found = certificate.counterexample
  if found is not None:
    name = "counterexample.npz"
    content["counterexample"] = {
      "file": name,
      "logit": run.class_names[found.output],
      "gap": found.gap,
    }
    with files.whole(os.path.join(run.workdir, name), "wb") as file:
      np.savez(file, a=found.a, b=found.b)
  files.write_json(os.path.join(run.workdir, "certificate.json"), content)
  return content


def summary(content: dict[str, Any]) -> str:
  """A certificate's content in a line or two."""
  total = len(content["logits"])
  proved = sum(verdict == "PROVED" for verdict in content["logits"].values())
  lines = [
    f"{content['verdict']}: {proved} of {total} logits {content['kind']} in the"
    f" {content['of'].split(' of the ')[1].split(',')[0]}"
  ]
  if content["reason"]:
    lines.append(f"first broken by {content['reason']}")
  if content["counterexample"]:
    found = content["counterexample"]
    lines.append(
      f"two inputs refute it: logit {found['logit']} misses by {found['gap']:.3g} midway"
      f" ({found['file']})"
    )
  return "\n".join(lines)


def certify_and_write(run: Run, kind: str = "convex", search_steps: int = 200) -> dict[str, Any]:
  """Certifies a run and writes its certificate.json; returns the content."""
  start = time.perf_counter()
  certificate = certify_run(run, kind, search_steps)
  return write(run, certificate, time.perf_counter() - start)


def _table(content: dict[str, Any]) -> Table:
  table = Table("logit", f"{content['kind']}?")
  for name, verdict in content["logits"].items():
    colour = {"PROVED": "green", "REFUTED": "red"}.get(verdict, "yellow")
    table.add_row(name, f"[{colour}]{verdict}[/]")
  return table


def main(argv: list[str] | None = None) -> int:
  """Certifies a run; returns 0 where all is proved, 1 where not, 2 after a mistake."""
  parser = argparse.ArgumentParser("python -m convex_jax.certify", description=main.__doc__)
  parser.add_argument("--workdir", required=True, help="folder of a run")
  parser.add_argument("--step", default="latest", help="a checkpoint: a number, latest, best")
  parser.add_argument("--kind", default="convex", choices=list(KINDS), help="what to prove")
  parser.add_argument("--search_steps", type=int, default=200, help="of the refuter; 0: none")
  parser.add_argument("--radii", default="", help="certified radii: some of l1,l2,linf")
  parser.add_argument("--examples", type=int, default=200, help="test images of --radii")
  parser.add_argument("--data_dir", default="", help="of the test images; default: the run's")
  args = parser.parse_args(argv)
  step = int(args.step) if args.step.isdigit() else args.step
  console = Console()
  try:
    norms = radii_report.norms_of(args.radii)
    run = load(args.workdir, step)
    content = certify_and_write(run, args.kind, args.search_steps)
    console.print(content["of"], _table(content), sep="\n")
    console.print(summary(content), markup=False, highlight=False)
    if norms:
      measured = radii_report.measure(run, norms, args.examples, args.data_dir)
      console.print(radii_report.write_report(run, measured, norms))
  except Mistake as mistake:
    print(mistake, file=sys.stderr)
    return mistake.code
  return 0 if content["verdict"] == "PROVED" else 1


if __name__ == "__main__":
  sys.exit(main())
