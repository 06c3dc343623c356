"""Lists every architecture and size: `python -m convex_jax.models`."""

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
from convex_jax.models.layers import make_parts


@functools.cache
def describe(name: str, size: str, parts: str, classes: int, image_size: int) -> tuple[int, int]:
  """(parameters, multiply-accumulates of one image's forward pass); allocates nothing."""
  module = catalog.module_of(name)
  # Depthwise convolutions as such: our form of them has no product to count.
  ingredients = make_parts(
    parts, constraint="clamp", passthrough=True, convolve=jax.lax.conv_general_dilated
  )
  fields = dict(module.SIZES[size])
  if name == "densenet":  # With dropout its transitions pool after their products, as published.
    fields["dropout"] = 0.1
  model = module.Model(classes=classes, parts=ingredients, **fields)
  image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
  variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), image)
  count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))
  return count, macs(jax.make_jaxpr(model.apply)(variables, image).jaxpr)


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
  """A row a size, at the image size and number of classes it was published for."""
  out = Table(
    box=box.SIMPLE,
    padding=(0, 1, 0, 0),
    title="Twins: every ioc is convex in the image, paper if unbroken",
    caption="10^6 weights; 10^9 multiply-accumulates of an image; 1000 classes from 200 px, or 10",
  )
  for column in ("model", "size"):
    out.add_column(column, no_wrap=True)
  for column in ("px", "weights", "MACs", "ioc\nweights", "ioc\nMACs"):
    out.add_column(column, justify="right", no_wrap=True)
  out.add_column("paper\nbroken by", min_width=10)
  for name in catalog.names():
    module = catalog.module_of(name)
    for size in module.SIZES:
      if size == "tiny":
        continue
      px = module.image_size(size)
      classes = 1000 if px >= 200 else 10
      row = [name, size, str(px)]
      for parts in ("base", "ioc"):
        count, work = describe(name, size, parts, classes, px)
        row += [f"{count / 1e6:.2f}", f"{work / 1e9:.3f}"]
      out.add_row(*row, module.PAPER_BREAKS or "-")
  return out


def main(argv: list[str] | None = None) -> int:
  """Prints the table."""
  command_line.parser(
    "models",
    "List every architecture and size, with the weights and the work of each twin.",
    "python -m convex_jax models",
  ).parse_args(argv)
  Console().print(table())
  return 0
