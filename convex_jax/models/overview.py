"""Lists every architecture and size: `python -m convex_jax models`."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jax_core
from rich import box
from rich.console import Console
from rich.table import Table

from convex_jax import command_line
from convex_jax.models import catalog
from convex_jax.models.parts import make_parts
from convex_jax.progress import track


@functools.cache
def describe(name: str, size: str, twin: str, classes: int, image_size: int) -> tuple[int, int]:
  """(parameters, multiply-accumulates of one image's forward pass); allocates nothing."""
  module = catalog.module_of(name)
  # XLA's convolutions: our form of a depthwise one has no product to count.
  parts = make_parts(twin, convolve=jax.lax.conv_general_dilated)
  fields = {**module.SIZES[size], **getattr(module, "PUBLISHED", {})}
  model = module.Model(classes=classes, parts=parts, **fields)
  image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
  # Traced once, with the forward pass that finds the shapes.
  traced = jax.make_jaxpr(model.init_with_output, return_shape=True)
  program, (_, variables) = traced(jax.random.key(0), image)
  count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))
  return count, macs(program.jaxpr)


def macs(jaxpr: Any) -> int:
  """Multiply-accumulates of a program's matrix products and convolutions."""
  total = 0
  for equation in jaxpr.eqns:
    out = [math.prod(var.aval.shape) for var in equation.outvars]
    if equation.primitive.name == "dot_general":
      (contracted, _), _ = equation.params["dimension_numbers"]
      total += out[0] * math.prod(equation.invars[0].aval.shape[i] for i in contracted)
    elif equation.primitive.name == "conv_general_dilated":
      kernel, spec = equation.invars[1].aval.shape, equation.params["dimension_numbers"].rhs_spec
      total += out[0] * math.prod(kernel) // kernel[spec[0]]
    total += sum(macs(inner) for inner in jax_core.jaxprs_in_params(equation.params))
  return total


def table() -> Table:
  """One row per size, at the image size and number of classes that it was published for."""
  out = Table(
    box=box.SIMPLE,
    padding=(0, 1, 0, 0),
    title="Architectures and sizes",
    caption="MACs (multiply-accumulates) of one image. 1000 classes from 200 px, otherwise 10."
    " Every ioc is convex in the image; a paper twin is, unless something breaks it.",
  )
  for column in ("\n\nmodel", "\n\nsize"):
    out.add_column(column, no_wrap=True)
  columns = ("\n\npx", "base\nparams\n(10^6)", "base\nMACs\n(10^9)")
  columns += ("ioc\nparams\n(10^6)", "ioc\nMACs\n(10^9)")
  for column in columns:
    out.add_column(column, justify="right", no_wrap=True)
  out.add_column("\npaper twin\nbroken by", min_width=10)
  every = [(name, size) for name in catalog.names() for size in catalog.module_of(name).SIZES]
  every = [(name, size) for name, size in every if size != "tiny"]
  for name, size in track(every, "tracing"):  # Half a minute.
    module = catalog.module_of(name)
    px = module.IMAGE_SIZE[size]
    classes = 1000 if px >= 200 else 10
    row = [name, size, str(px)]
    for twin in ("base", "ioc"):
      count, work = describe(name, size, twin, classes, px)
      row += [f"{count / 1e6:.2f}", f"{work / 1e9:.3f}"]
    out.add_row(*row, module.PAPER_BREAKS or "-")
  return out


def main(argv: list[str] | None = None) -> int:
  """Prints the table; returns the exit code."""
  command_line.parser(
    "models",
    "List every architecture and size, with the parameters and the MACs of its twins.",
    "python -m convex_jax models",
  ).parse_args(argv)
  Console().print(table())
  return 0
