"""A run's certificate, and what it buys: radii and least logits.

What is certified is the run's network at inference, with its stored weights, as a function of
the image's pixels, 0..255 (or, where only the head is meant to be convex, of the features
before it).
"""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convex_jax import files
from convex_jax import mesh as meshes
from convex_jax.errors import UserError
from convex_jax.models import catalog
from convex_jax.proof.arithmetic import ARITHMETICS
from convex_jax.proof.certificate import Certificate, NotProved, certify, proved
from convex_jax.proof.counterexample import Counterexample
from convex_jax.proof.minimum import Minimum, minimise
from convex_jax.proof.radii import Certifier
from convex_jax.proof.wide import in_float64
from convex_jax.runs.run import Run
from convex_jax.runs.workdir import Workdir

FORMAT = 1  # Of certificate.json.
REALS = "reals"  # In place of an arithmetic.
PIXEL = 255.0  # The range of a pixel, in which radii are given.


def _certify(run: Run, kind: str, search_steps: int) -> tuple[str, Certificate]:
  """(input, certificate): the run's network on its pixels, or its head on its features."""
  _refuse_others(run)
  if run.edited:
    raise UserError(
      f"{run.workdir}: these weights are not those of its checkpoint, and the certificate in that"
      " folder is not theirs; expected a run of `load`. To prove others:"
      " convex_jax.certify(run.network, image.astype('float32'))"
    )
  weights, name = run.weights, "image"
  apply: Callable[..., Any] = run.apply
  shape, box = (1, *run.image_shape), (0.0, PIXEL)
  if run.config.model.convex_from == "head":
    weights = {key: tree["head"] for key, tree in weights.items() if "head" in tree}
    name, box = "features before the head", (-10.0, 10.0)
    shape = (1, weights["params"]["dense_0"]["kernel"].shape[0])

    def apply_head(weights, features_BxD):
      model = catalog.build_head(run.config.model, len(run.class_names), dtype=jnp.float32)
      variables = {"params": weights["params"], "batch_stats": weights.get("stats", {})}
      return model.apply(variables, features_BxD)

    apply = apply_head
  example = jax.ShapeDtypeStruct(shape, jnp.float32)
  return name, certify(apply, weights, example, kind=kind, box=box, search_steps=search_steps)


def _refuse_others(run: Any) -> None:
  if not isinstance(run, Run):
    raise UserError(f"run is {run!r}; expected a run, as convex_jax.load returns it")


def certify_run(
  run: Run, kind: str = "convex", search_steps: int = 200, to_write: bool = True
) -> tuple[dict[str, Any], Counterexample | None]:
  """The content of a run's certificate.json, and the two inputs that refute it, if it is.

  What is only to be printed names no file for these inputs.
  """
  start = time.perf_counter()
  name, certificate = _certify(run, kind, search_steps)
  content = content_of(run, certificate, name, "each logit", time.perf_counter() - start)
  if (found := certificate.counterexample) is not None:
    content["counterexample"] = {"logit": run.class_names[found.output], "gap": found.gap}
    if to_write:
      name = os.path.basename(Workdir(run.workdir).counterexample_file)
      content["counterexample"]["file"] = name
  return content, found


def content_of(
  run: Run, certificate: Certificate, name: str, what: str, seconds: float
) -> dict[str, Any]:
  """What is written of a certificate of `what`, as a function of the input `name`."""
  return {
    "format": FORMAT,
    "verdict": certificate.verdict,
    "kind": certificate.kind,
    "input": name,
    "of": f"{what} as a function of the {name}, at inference, over the reals",
    "logits": dict(zip(run.class_names, certificate.verdicts, strict=True)),
    "reason": certificate.reason,
    "stopped": certificate.stopped,
    "counterexample": None,
    "step": run.step,
    "weights_sha256": run.digest,
    "seconds": round(seconds, 2),
    "versions": {name: metadata.version(name) for name in ("convex_jax", "jax", "flax", "numpy")},
  }


def write(run: Run, content: dict[str, Any], counterexample: Counterexample | None) -> None:
  """Writes certificate.json into the run's folder, and counterexample.npz if there is one.

  Each as a whole or not at all. Raises `Unsaved` where the storage does not take it.
  """
  workdir = Workdir(run.workdir)
  if counterexample is not None:
    with files.atomic_write(workdir.counterexample_file, "wb") as file:
      np.savez(file, a=counterexample.a, b=counterexample.b)
  files.write_json(workdir.certificate_file, content)


def certify_and_write(run: Run) -> dict[str, Any]:
  """`certify_run`, then `write`; returns the content."""
  content, counterexample = certify_run(run)
  write(run, content, counterexample)
  return content


def summary(content: dict[str, Any]) -> str:
  """What a certificate says, in one to four lines."""
  total = len(content["logits"])
  proved = sum(verdict == "PROVED" for verdict in content["logits"].values())
  what = f"{proved} of {total} logits are {content['kind']} in the {content['input']}"
  lines = [f"{content['verdict']}: {what}"]
  if content["reason"]:
    lines.append(f"first broken by {content['reason']}")
  if found := content["counterexample"]:
    where = f" ({found['file']})" if "file" in found else ""
    lines.append(
      f"refuted by two inputs: at their midpoint logit {found['logit']} violates the inequality by"
      f" {found['gap']:.3g}{where}"
    )
  if stopped := content.get("stopped"):
    lines.append(f"the search for a counterexample stopped: {stopped}")
  return "\n".join(lines)


def certifier(run: Run, arithmetic: str = REALS, convexified: bool = False) -> Certifier:
  """Certified radii of a run's images, for pixels in 0..1.

  Args:
    run: whose logits are proved convex in the image, but for `convexified`.
    arithmetic: "reals", the network as a function; or one of `arithmetic.ARITHMETICS`, the
      program that computes it in that arithmetic, whose rounding is taken off.
    convexified: radii of any network that `Run.convexify` takes, by the proof of its convex logits.

  Raises:
    UserError: the logits are not proved convex in the image, or have no convex form, or no bound on
      the rounding error of an operation is known; another arithmetic than these.
  """
  _refuse_others(run)
  if arithmetic != REALS and arithmetic not in ARITHMETICS:
    raise UserError(f"arithmetic is {arithmetic!r}; expected {REALS}, {', '.join(ARITHMETICS)}")
  if convexified:
    run.convexify()  # What has no convex form is refused here, whatever the arithmetic.
  weights, shape = run.weights, run.image_shape
  options: dict[str, Any] = {"scale": PIXEL, "convexified": convexified}
  with _only_proved(run, convexified):
    if arithmetic == REALS:
      return Certifier(run.apply, weights, shape, **options)
    deployed = ARITHMETICS[arithmetic]
    apply = functools.partial(run.apply, dtype=deployed.dtype)
    # Convolutions have another form on the CPU than elsewhere, which rounds differently.
    here, there = (meshes.traced_for(platform, apply) for platform in ("cpu", "gpu"))
    try:
      return Certifier(here, weights, shape, arithmetic=deployed, others=[there], **options)
    except NotProved:
      raise
    except ValueError as error:
      raise UserError(
        f"{run.workdir}: in {arithmetic}, {error}; or {REALS} as arithmetic"
      ) from error


def minimise_logit(
  run: Run, k: int, box: tuple[Any, Any] = (0.0, PIXEL), steps: int = 1000
) -> Minimum:
  """The image in a box (pixels 0..255) of the least logit k, with proof: see `minimise`.

  Raises `UserError` where the run's logits are not proved convex in the image.
  """
  _refuse_others(run)
  if isinstance(steps, bool) or not (isinstance(steps, int | np.integer) and steps >= 1):
    raise UserError(f"steps is {steps!r}; expected an integer >= 1")
  try:
    low, high = (np.broadcast_to(np.asarray(b, np.float64), run.image_shape) for b in box)
  except (TypeError, ValueError) as error:
    raise UserError(f"box is {box!r}; expected (least, greatest) pixels: {error}") from error
  if not ((low <= high) & np.isfinite(high - low)).all():
    raise UserError("box is empty or not finite; expected finite pixels, least <= greatest")
  count = len(run.class_names)
  if isinstance(k, bool) or not (isinstance(k, int | np.integer) and 0 <= k < count):
    raise UserError(f"k is {k!r}; expected a logit, an integer from 0 to {count - 1}")
  with _only_proved(run):
    proved(run.apply, run.weights, jax.ShapeDtypeStruct((1, *run.image_shape), jnp.float32))
  network = functools.partial(_exact(run), in_float64(run.weights))
  return minimise(lambda x: network(x[None])[0, k], low, high, steps=steps)


def _exact(run: Run) -> Callable[..., jax.Array]:
  """`run.apply` in float64."""
  return functools.partial(run.apply, dtype=jnp.float64)


@contextlib.contextmanager
def _only_proved(run: Run, convexified: bool = False) -> Iterator[None]:
  if run.config.model.convex_from != "image" and not convexified:
    raise UserError(
      f"{run.workdir}: radii need logits that are convex in the image; here only the head is convex"
    )
  try:
    yield
  except NotProved as error:
    raise UserError(
      f"{run.workdir}: radii and minima hold for proved networks only, and this one is not proved"
      f" ({error}); train its twin with --config.model.parts=ioc,"
      " or ask for the radii of its convexified logits (--convexified)"
    ) from error
