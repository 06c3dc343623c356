"""`python -m convex_jax convexify`: a term that makes a trained network's logits convex."""

import argparse
import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from convex_jax import command_line, files
from convex_jax.data import datasets
from convex_jax.errors import NOT_PROVED
from convex_jax.progress import track
from convex_jax.proof.convexified import Convexified, Layer
from convex_jax.runs import certified
from convex_jax.runs.run import Run, load
from convex_jax.runs.workdir import Workdir

DTYPES = {"float32": jnp.float32, "float64": jnp.float64}
BATCH = 64  # Images that are computed together.
SAMPLE = 16  # Images of which the layers are shown.


@dataclasses.dataclass(frozen=True, eq=False)
class Sizes:
  """What the common term t of a run's logits g does to numbers, on test images.

  Attributes:
    examples: number of images.
    accuracy: of g.
    convex_accuracy: of g + t, evaluated in each dtype.
    agreement: the fraction of images that g + t, evaluated in each dtype, classifies as g does.
    logits: standard deviation of g less its mean over the classes: what a class is told by.
    common: that of t; its mean is in t as well, but cancels in no difference of two inputs.
    largest: the largest |g|, less the mean over the classes.
    magnitude: the largest |g + t|, which decides what is rounded away.
    layers: the growth of t through the network.
  """

  examples: int
  accuracy: float
  convex_accuracy: dict[str, float]
  agreement: dict[str, float]
  logits: float
  common: float
  largest: float
  magnitude: float
  layers: list[Layer]

  @property
  def digits_lost(self) -> float:
    """Decimal digits of the logits that an evaluation of g + t rounds away; infinite beyond a dtype."""
    if not np.isfinite(self.magnitude):
      return float("inf")
    return max(0.0, float(np.log10(self.magnitude / self.largest))) if self.largest else 0.0


def measure(run: Run, images: np.ndarray, labels: np.ndarray) -> Sizes:
  """Evaluates the logits and the common term on images (N, H, W, C) uint8, labels (N,)."""
  accuracy, agreement, numbers, layers = {}, {}, {}, []
  for name, dtype in DTYPES.items():
    with jax.enable_x64(name == "float64"):
      convexified = run.convexify(dtype)
      numbers = _evaluate(convexified, images, dtype, name)
      classes = numbers["convex_logits"].argmax(-1)
      accuracy[name] = float(np.mean(classes == labels))
      agreement[name] = float(np.mean(classes == numbers["logits"].argmax(-1)))
      if name == "float64":
        layers = _layers(convexified, jnp.asarray(images[:SAMPLE], dtype))
  g = numbers["logits"]
  centred = g - g.mean(-1, keepdims=True)
  return Sizes(
    examples=len(images),
    accuracy=float(np.mean(g.argmax(-1) == labels)),
    convex_accuracy=accuracy,
    agreement=agreement,
    logits=float(np.std(centred)),
    common=float(np.std(numbers["common"])),
    largest=float(np.abs(centred).max()),
    magnitude=float(np.abs(numbers["convex_logits"]).max()),
    layers=layers,
  )


def _evaluate(
  convexified: Convexified, images: np.ndarray, dtype: Any, name: str
) -> dict[str, np.ndarray]:
  """Logits (N, K), convex logits (N, K) and common terms (N, 1)."""
  functions = {f: getattr(convexified, f) for f in ("logits", "convex_logits", "common")}

  @jax.jit
  @jax.vmap
  def all_of(image):
    return {f: function(image[None])[0] for f, function in functions.items()}

  starts = range(0, len(images), BATCH)
  out = [
    jax.device_get(all_of(jnp.asarray(images[i : i + BATCH], dtype)))
    for i in track(starts, f"logits in {name}")
  ]
  return {f: np.concatenate([batch[f] for batch in out]) for f in functions}


def _layers(convexified: Convexified, images: jax.Array) -> list[Layer]:
  """The layers' sizes, the mean over images."""
  found = [convexified.layers(image[None]) for image in images]
  return [
    Layer(
      layers[0].place,
      float(np.mean([layer.values for layer in layers])),
      float(np.mean([layer.common for layer in layers])),
    )
    for layers in zip(*found, strict=True)
  ]


def main(argv: list[str] | None = None) -> int:
  """Convexifies a run; returns 0 where g + t is proved, 4 where not, 2 for invalid input."""
  parser = command_line.parser(
    "convexify",
    "Make a trained network's logits g convex by a term t that all classes share, which changes\n"
    "no softmax, and prove that g + t is convex. Prints the accuracy of both, the size of t by\n"
    "layer, and the digits that an evaluation of g + t loses; writes convexified.json into the\n"
    "run's folder; where that is read-only, the table is printed alone.\n"
    "Exit code 0: everything is proved; 4: not proved; 2: invalid input.",
    "python -m convex_jax convexify --workdir=runs/mlp_cifar10",
  )
  command_line.add_run_options(parser)
  parser.add_argument(
    "--examples", type=command_line.integer(1), default=1000, help="test images (default: 1000)"
  )
  parser.add_argument(
    "--data_dir", type=command_line.path, help="folder of the data (default: the run's)"
  )
  return command_line.exit_code(_convexify, parser.parse_args(argv))


def _convexify(args: argparse.Namespace) -> int:
  console = Console()
  run = load(args.workdir, args.step)
  start = time.perf_counter()
  certificate = run.convexify().certificate
  what = "each logit plus a term that all logits share,"
  content = certified.content_of(run, certificate, "image", what, time.perf_counter() - start)
  console.print(content["of"], markup=False, highlight=False)
  console.print(certified.summary(content), markup=False, highlight=False)
  config: Any = ConfigDict(run.config.data.to_dict())
  config.dir = args.data_dir or config.dir
  test = datasets.load_test(config, progress=False).first(args.examples)
  sizes = measure(run, test.images, test.labels)
  console.print(*_tables(sizes), sep="\n")
  console.print(_words(sizes), markup=False, highlight=False)
  content["sizes"] = dataclasses.asdict(sizes)
  files.try_to_write(files.write_json, Workdir(run.workdir).convexified_file, content)
  return 0 if certificate else NOT_PROVED


def _tables(sizes: Sizes) -> list[Table]:
  accuracies = Table("network", "accuracy (%)", "as g (%)", title=f"{sizes.examples:,} test images")
  accuracies.add_row("logits g, as trained", f"{100 * sizes.accuracy:.2f}", "")
  for name, accuracy in sizes.convex_accuracy.items():
    figures = f"{100 * accuracy:.2f}", f"{100 * sizes.agreement[name]:.2f}"
    accuracies.add_row(f"convex logits g + t, evaluated in {name}", *figures)
  growth = Table("after", "values", "common part", title="standard deviations, by layer")
  for layer in sizes.layers:
    growth.add_row(layer.place, f"{layer.values:.3g}", f"{layer.common:.3g}")
  growth.add_row("logits", f"{sizes.logits:.3g}", f"{sizes.common:.3g}")
  return [growth, accuracies]


def _words(sizes: Sizes) -> str:
  lost = sizes.digits_lost
  left = ", ".join(
    f"{name} keeps {max(0.0, float(-np.log10(jnp.finfo(dtype).eps)) - lost):.1f}"
    for name, dtype in DTYPES.items()
  )
  return (
    f"An evaluation of g + t loses {lost:.1f} decimal digits of the logits: {left}. Predict with g,"
    " whose softmax is the same."
  )
