"""CycleMLP (Chen et al. 2021, arXiv 2107.10224) and its convex twins.

Patch embedding; four stages of blocks on maps whose side halves from stage to stage; norm; mean
over positions; linear head. A block mixes by three dense layers, two of which read each
channel at a position one step away along an axis, and then by a channel MLP.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from convex_jax.models.initializers import NORMED
from convex_jax.models.layers import cell_means
from convex_jax.models.parts import Parts, Rate

PAPER_BREAKS = "LayerNorm, gate"


def _published(depths, widths=(64, 128, 320, 512), ratios=(4, 4, 4, 4)):
  """Table 1 of the paper and its code."""
  return dict(depths=depths, widths=widths, ratios=ratios)


SIZES = {
  "B1": _published((2, 2, 4, 2)),
  "B2": _published((2, 3, 10, 3)),
  "B3": _published((3, 4, 18, 3), ratios=(8, 8, 4, 4)),
  "B4": _published((3, 8, 27, 3), ratios=(8, 8, 4, 4)),
  "B5": _published((3, 4, 24, 3), widths=(96, 192, 384, 768)),
  "tiny": dict(depths=(1, 1), widths=(8, 12), ratios=(2, 2), stem_stride=2),  # For tests.
}
IMAGE_SIZE = dict.fromkeys(SIZES, 224) | {"tiny": 8}

gelu = functools.partial(nn.gelu, approximate=False)
normal = nn.initializers.normal(0.02)
# Of the plain convolutions: uniform in +-1 / sqrt(fan-in), torch's default.
uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def check(fields: dict, image_size: int) -> list[str]:
  """Errors in these fields for images of `image_size` px, one line each."""
  if image_size < 3:
    return [
      f"data.image_size is {image_size} px, too small for a 7x7 stem; expected an integer >= 3"
    ]
  lengths = {key: len(fields[key]) for key in ("depths", "widths", "ratios")}
  if len(set(lengths.values())) > 1:
    counts = ", ".join(f"model.{key} has {n}" for key, n in lengths.items())
    return [f"{counts} stages; expected the same number in each"]
  cells, sides = fields.get("cells", 1), [(image_size - 3) // fields.get("stem_stride", 4) + 1]
  for _ in fields["depths"][1:]:
    sides.append((sides[-1] + 1) // 2)
  seen = sides if fields.get("dense_readout") else sides[-1:]  # By the head.
  if cells > 1 and all(math.gcd(cells, side) == 1 for side in seen):
    return [
      f"model.cells is {cells}, which has no common factor with the side of a map that the head"
      f" sees ({', '.join(map(str, seen))}); expected 1, or an integer that has one"
    ]
  return []


def cycle(x_BxHxWxD: jax.Array, axis: int) -> jax.Array:
  """Reads channel c at a position shifted by (c + 1) mod 3 - 1 along `axis`; 0 outside.

  CycleFC with cycle length 3 and step 1 (section 3.2 of the paper) is this followed by a dense
  layer. Three slices and a `where`, which compile to one loop.
  """
  size, channel = x_BxHxWxD.shape[axis], jnp.arange(x_BxHxWxD.shape[-1]) % 3
  padding = [(1, 1) if i == axis else (0, 0) for i in range(4)]
  padded = jnp.pad(x_BxHxWxD, padding)
  after = jax.lax.slice_in_dim(padded, 2, size + 2, axis=axis)
  before = jax.lax.slice_in_dim(padded, 0, size, axis=axis)
  return jnp.where(channel == 0, x_BxHxWxD, jnp.where(channel == 1, after, before))


class Gate(nn.Module):
  """Weights of 3 branches, each (B, 1, 1, D): softmax of an MLP of their sum, position-averaged."""

  parts: Parts
  first: bool

  @nn.compact
  def __call__(self, total_BxHxWxD: jax.Array) -> list[jax.Array]:
    parts, features = self.parts, total_BxHxWxD.shape[-1]
    x_Bx1x1xD = total_BxHxWxD.mean((1, 2), keepdims=True)
    h_Bx1x1xE = parts.dense(
      x_Bx1x1xD, features // 4, free=self.first, own_init=normal, name="dense_0"
    )
    h_Bx1x1xE = parts.act(gelu)(h_Bx1x1xE)
    g_Bx1x1x3D = parts.dense(h_Bx1x1xE, 3 * features, own_init=normal, name="dense_1")
    # Not `nn.softmax`: sums of three maps instead of a reduction make a step 7 % faster.
    g_Bx1x1xD = [g_Bx1x1x3D[..., i::3] for i in range(3)]
    most_Bx1x1xD = jax.lax.stop_gradient(functools.reduce(jnp.maximum, g_Bx1x1xD))
    e_Bx1x1xD = [jnp.exp(g - most_Bx1x1xD) for g in g_Bx1x1xD]
    return [e / functools.reduce(jnp.add, e_Bx1x1xD) for e in e_Bx1x1xD]


class Mix(nn.Module):
  """A dense layer on the weighted sum of three branches: along the width, the height, neither.

  The published weights come from a `Gate`. Without gates (`ioc`, or static ones) they are learnt numbers >= 0,
  so that the whole is affine: where x is affine in the image (`first`) every sign is free.
  In a gated first block the report's code exempts the branches and the first matrix of the gate.
  """

  parts: Parts
  first: bool

  @nn.compact
  def __call__(self, x_BxHxWxD: jax.Array) -> jax.Array:
    parts, features, affine = self.parts, x_BxHxWxD.shape[-1], not self.parts.twin.gates

    def dense(x, name, **fields):
      return parts.dense(x, features, inputs=NORMED, own_init=normal, name=name, **fields)

    def branch(x, name, **fields):
      if self.first or parts.twin.gates:
        return dense(x, name, free=self.first, **fields)
      return parts.branch_dense(
        x, features, inputs=NORMED, initial_scale=1 / 3, name=name, **fields
      )

    branches = [
      branch(cycle(x_BxHxWxD, 2), "along_width"),
      branch(cycle(x_BxHxWxD, 1), "along_height"),
      branch(x_BxHxWxD, "along_channels", use_bias=False),
    ]
    if affine:
      mixed_BxHxWxD = functools.reduce(jnp.add, branches)
    else:
      gates_Bx1x1xD = Gate(parts, self.first, name="gate")(functools.reduce(jnp.add, branches))
      mixed_BxHxWxD = sum(g * b for g, b in zip(gates_Bx1x1xD, branches, strict=True))
    if self.first and affine:
      return dense(mixed_BxHxWxD, "proj", free=True)
    return parts.branch_dense(mixed_BxHxWxD, features, inputs=NORMED, own_init=normal, name="proj")


class Block(nn.Module):
  """Mixing, then a channel MLP, each with a norm before it and a residual connection around it.

  `first` means that x is the patch embedding itself, which is affine in the image. The layers
  after it are free as long as they are affine: in `ioc` up to the first ELU. y, affine in the
  image, is scaled and added to the input of the channel MLP, whose hidden units are returned last.
  """

  ratio: int
  drop_path: Rate
  parts: Parts
  first: bool

  @nn.compact
  def __call__(
    self, x_BxHxWxD: jax.Array, train: bool, y_BxHxWxD: jax.Array | None = None
  ) -> tuple[jax.Array, jax.Array]:
    parts, features, affine = self.parts, x_BxHxWxD.shape[-1], not self.parts.twin.gates
    norm = functools.partial(parts.norm, own="layer", epsilon=1e-5, train=train)
    h_BxHxWxD = norm(x_BxHxWxD, free=self.first, name="norm_0")
    h_BxHxWxD = Mix(parts, self.first, name="mix")(h_BxHxWxD)
    x_BxHxWxD += parts.dropout(h_BxHxWxD, self.drop_path, train, whole=0)
    free = self.first and affine
    h_BxHxWxD = norm(x_BxHxWxD, free=free, name="norm_1")
    if y_BxHxWxD is not None and not self.first:
      h_BxHxWxD += parts.passthrough_scale(y_BxHxWxD, name="passthrough")
    h_BxHxWxF = parts.dense(
      h_BxHxWxD, self.ratio * features, free=free, inputs=NORMED, own_init=normal, name="dense_0"
    )
    h_BxHxWxF = parts.act(gelu)(h_BxHxWxF)
    h_BxHxWxD = parts.branch_dense(h_BxHxWxF, features, own_init=normal, name="dense_1")
    return x_BxHxWxD + parts.dropout(h_BxHxWxD, self.drop_path, train, whole=0), h_BxHxWxF


class Model(nn.Module):
  """The network, for images of any size; 224 px give maps of 56, 28, 14 and 7.

  In `ioc` with passthrough the patch embedding, which is affine in the image, is average-pooled
  to the map of each stage, mapped and normalised; scaled, it is added to the input of every
  channel MLP.

  Two options are not in the paper and are open to every twin, as in the Mixer: the head sees means
  over a `cells` x `cells` grid of the map, or the closest that the map's side allows, and with
  `dense_readout` also those of the normalised hidden units of every channel MLP.
  """

  classes: int
  parts: Parts
  depths: tuple[int, ...]  # Blocks per stage.
  widths: tuple[int, ...]  # Features per stage.
  ratios: tuple[int, ...]  # Hidden units of a channel MLP / features, per stage.
  stem_stride: int = 4  # px.
  drop_path: Rate = 0.1  # Stochastic depth of the last block, falling to 0 at the first.
  cells: int = 1  # Along each side.
  dense_readout: bool = False

  @nn.compact
  def __call__(self, image_BxHxWxC: jax.Array, train: bool = False) -> jax.Array:
    parts, done = self.parts, 0
    x_BxHxWxD, y_BxHxWxE, hidden = image_BxHxWxC, image_BxHxWxC, []
    for stage, (depth, width, ratio) in enumerate(
      zip(self.depths, self.widths, self.ratios, strict=True)
    ):
      conv = functools.partial(parts.conv, features=width, own_init=uniform)
      if stage == 0:
        y_BxHxWxE = conv(
          image_BxHxWxC, side=7, stride=self.stem_stride, padding=2, free=True, name="stem"
        )
        x_BxHxWxD = y_BxHxWxE
      else:
        x_BxHxWxD = conv(
          x_BxHxWxD, side=3, stride=2, padding=1, inputs=NORMED, name=f"down_{stage}"
        )
      z_BxHxWxD = None
      if parts.twin.passthrough and (stage or depth > 1):  # The first block has no use for it.
        z_BxHxWxD = parts.passthrough_map(y_BxHxWxE, x_BxHxWxD, name=f"passthrough_{stage}")
        z_BxHxWxD = parts.norm(
          z_BxHxWxD, "batch", train=train, free=True, name=f"passthrough_{stage}_norm"
        )
      for i in range(depth):
        drop_path = self.drop_path * done / max(1, sum(self.depths) - 1)
        block = parts.block(Block)(
          ratio, drop_path, parts, first=done == 0, name=f"stage_{stage}_block_{i}"
        )
        x_BxHxWxD, hidden_BxHxWxF = block(x_BxHxWxD, train, z_BxHxWxD)
        done += 1
        if self.dense_readout:
          hidden.append(cell_means(hidden_BxHxWxF, self.cells))
    x_BxHxWxD = parts.norm(x_BxHxWxD, "layer", epsilon=1e-5, train=train, name="norm")
    x_BxF = cell_means(x_BxHxWxD, self.cells)
    if self.dense_readout:
      x_BxF = parts.dense_readout(x_BxF, hidden, train=train, width=self.widths[-1])
    return parts.head(x_BxF, self.classes, train=train, own_init=normal, name="head")
