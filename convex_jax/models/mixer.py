"""MLP-Mixer (Tolstikhin et al. 2021, arXiv 2105.01601) and its convex twins.

Patch embedding; blocks of a token-mixing and a channel-mixing MLP, each with a norm before it
and a residual connection around it; norm; mean over tokens; linear head.
"""

import functools
import math
from typing import Any, Literal

import flax.linen as nn
import jax

from convex_jax.models.initializers import NORMED
from convex_jax.models.layers import cell_means
from convex_jax.models.parts import Parts, Rate

PAPER_BREAKS = "LayerNorm"  # What keeps the `paper` twin from being convex.


def _published(depth, patch, channels):
  """Table 1 of the paper: token MLPs of C / 2 hidden units, channel MLPs of 4 C."""
  hidden = dict(tokens_hidden=channels // 2, channels_hidden=4 * channels)
  return dict(patch=patch, depth=depth, channels=channels, **hidden)


SIZES = {
  # Section 5.2 of the report, for images of 72 px.
  "seed": dict(patch=9, depth=4, channels=128, tokens_hidden=64, channels_hidden=128),
  "S/32": _published(8, 32, 512),
  "S/16": _published(8, 16, 512),
  "B/32": _published(12, 32, 768),
  "B/16": _published(12, 16, 768),
  "L/32": _published(24, 32, 1024),
  "L/16": _published(24, 16, 1024),
  "H/14": _published(32, 14, 1280),
  "tiny": dict(patch=4, depth=2, channels=8, tokens_hidden=6, channels_hidden=10),  # For tests.
}
IMAGE_SIZE = dict.fromkeys(SIZES, 224) | {"seed": 72, "tiny": 8}


def check(fields: dict, image_size: int) -> list[str]:
  """Errors in these fields for images of `image_size` px, one line each."""
  patch, cells = fields["patch"], fields.get("cells", 1)
  if image_size % patch:
    return [
      f"data.image_size is {image_size} px, which patches of model.patch = {patch} px do not tile;"
      f" expected a multiple of {patch}"
    ]
  if image_size // patch % cells:
    return [
      f"model.cells is {cells}, which does not divide the {image_size // patch} patches along a"
      f" side; expected a divisor of {image_size // patch}"
    ]
  return []


class Mlp(nn.Module):
  """Dense, GELU, dense along one axis; returns also the hidden units before and after the GELU.

  `free` leaves the sign of the first matrix open: right where the input is affine in the image.
  y, affine in the image, is scaled and added to the hidden units.
  """

  hidden: int
  gelu: str
  parts: Parts
  axis: int  # 0: tokens, -1: features.
  free: bool = False

  @nn.compact
  def __call__(
    self, x_SxBxD: jax.Array, y: jax.Array | None = None
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    parts, width = self.parts, x_SxBxD.shape[self.axis]
    dense = functools.partial(parts.dense, axis=self.axis, inputs=NORMED, free=self.free)
    h = dense(x_SxBxD, self.hidden, name="dense_0")
    if y is not None:
      h += parts.passthrough_scale(y, axis=self.axis, name="passthrough")
    a = parts.act(functools.partial(nn.gelu, approximate=self.gelu == "tanh"))(h)
    return parts.branch_dense(a, width, axis=self.axis, name="dense_1"), h, a


class Block(nn.Module):
  """Token mixing, then channel mixing (section 2 of the paper, its equation 1).

  `first` means that x is the patch embedding itself, which is affine in the image. Its norm
  and its first token-mixing matrix are then free. With a LayerNorm between them that matrix
  should not be, but the report exempts it, and so does `paper`. The hidden units of the first
  token mixing, before their activation, are returned as y: later blocks get them as passthrough.
  With `parallel` both mixings read x, so that in the first block the first matrices of both act
  on an affine map of the image. The last result holds the hidden units of both mixings.
  """

  tokens_hidden: int
  channels_hidden: int
  gelu: str
  drop_path: Rate
  parts: Parts
  first: bool
  parallel: bool = False

  @nn.compact
  def __call__(
    self, x_SxBxD: jax.Array, train: bool, y_TxBxD: jax.Array | None
  ) -> tuple[jax.Array, jax.Array | None, tuple[jax.Array, jax.Array]]:
    parts, x_before, free = self.parts, x_SxBxD, self.first and self.parallel
    h_SxBxD = parts.norm(x_SxBxD, "layer", train=train, free=self.first, name="norm_0")
    mix_tokens = Mlp(
      self.tokens_hidden, self.gelu, parts, axis=0, free=self.first, name="token_mixing"
    )
    h_SxBxD, hidden_TxBxD, tokens_TxBxD = mix_tokens(h_SxBxD, y_TxBxD)
    x_SxBxD += parts.dropout(h_SxBxD, self.drop_path, train, whole=1)
    read_SxBxD = x_before if self.parallel else x_SxBxD
    h_SxBxD = parts.norm(read_SxBxD, "layer", train=train, free=free, name="norm_1")
    mix_channels = Mlp(
      self.channels_hidden, self.gelu, parts, axis=-1, free=free, name="channel_mixing"
    )
    h_SxBxD, _, channels_SxBxE = mix_channels(h_SxBxD)
    x_SxBxD += parts.dropout(h_SxBxD, self.drop_path, train, whole=1)
    y_TxBxD = hidden_TxBxD if self.first and parts.twin.passthrough else y_TxBxD
    return x_SxBxD, y_TxBxD, (tokens_TxBxD, channels_SxBxE)


class Model(nn.Module):
  """The network; the sides of the image must be multiples of `patch` px.

  In `ioc` with passthrough the hidden units of the first token mixing before their activation,
  which are affine in the image, are scaled and added to those of every later block. Matrices
  instead of the scales, or a map to the logits, learn no faster and cost 3 % of a step.

  Four options are not in the paper and are open to every twin. In `ioc` they widen the layers
  whose weights may have either sign: the first one and, by `shift`, the head.

  - `parallel`: both mixings of the first block read the embedding.
  - `overlap`: the window of a patch extends this many px beyond each of its sides.
  - `cells`: the head sees means over a cells x cells grid of the image.
  - `dense_readout`: the head also sees the normalised hidden units of every mixing.
  """

  classes: int
  parts: Parts
  patch: int
  depth: int
  channels: int
  tokens_hidden: int
  channels_hidden: int
  gelu: Literal["tanh", "erf"] = "tanh"  # tanh in the official code, erf in timm.
  # Stochastic depth of the last block, falling to 0 at the first; branches that are kept are
  # divided by their probability, as in timm but not in the official code.
  drop_path: Rate = 0.0
  parallel: bool = False
  cells: int = 1  # Along each side.
  dense_readout: bool = False
  overlap: int = 0  # px.

  @nn.compact
  def __call__(self, image_BxHxWxC: jax.Array, train: bool = False) -> jax.Array:
    parts, window = self.parts, self.patch + 2 * self.overlap
    stem = functools.partial(parts.conv, stride=self.patch, padding=self.overlap, free=True)
    x_BxHxWxD = stem(image_BxHxWxC, self.channels, window, name="stem")
    # Tokens first: mixing them is then one matrix product, without a transpose.
    x_SxBxD = x_BxHxWxD.reshape(len(x_BxHxWxD), -1, self.channels).swapaxes(0, 1)
    y_TxBxD, hidden = None, []
    for i in range(self.depth):
      fields: Any = dict(first=i == 0, parallel=i == 0 and self.parallel, name=f"block_{i}")
      sizes = (self.tokens_hidden, self.channels_hidden)
      drop_path = self.drop_path * i / max(1, self.depth - 1)
      block = parts.block(Block)(*sizes, self.gelu, drop_path, parts, **fields)
      x_SxBxD, y_TxBxD, (tokens_TxBxD, channels_SxBxE) = block(x_SxBxD, train, y_TxBxD)
      if self.dense_readout:
        tokens_BxTD = tokens_TxBxD.swapaxes(0, 1).reshape(len(image_BxHxWxC), -1)
        hidden += [tokens_BxTD, self._pool(channels_SxBxE)]
    x_BxF = self._pool(parts.norm(x_SxBxD, "layer", train=train, name="norm"))
    if self.dense_readout:
      x_BxF = parts.dense_readout(x_BxF, hidden, train=train, width=self.channels)
    zeros = nn.initializers.zeros
    return parts.head(x_BxF, self.classes, train=train, own_init=zeros, name="head")

  def _pool(self, x_SxBxD: jax.Array) -> jax.Array:
    """Means over cells of the grid of tokens, (B, cells^2 D)."""
    if self.cells == 1:
      return x_SxBxD.mean(axis=0)
    side = math.isqrt(len(x_SxBxD))
    x_BxHxWxD = x_SxBxD.swapaxes(0, 1).reshape(-1, side, side, x_SxBxD.shape[-1])
    return cell_means(x_BxHxWxD, self.cells)
