"""MLP-Mixer (Tolstikhin et al. 2021, arXiv 2105.01601) and its convex twins.

Per-patch embedding; blocks of a token-mixing and a channel-mixing MLP, each with a
norm before and a residual sum after; norm; mean over tokens; linear head.
"""

import functools
import math
from typing import Literal

import flax.linen as nn
import jax

from convex_jax.models.initializers import NORMED
from convex_jax.models.layers import Parts, cell_means

PAPER_BREAKS = "LayerNorm"  # What keeps the `paper` twin from being convex.


def _published(depth, patch, channels):
  """Table 1 of the paper: token MLP C / 2, channel MLP 4 C."""
  return dict(
    patch=patch,
    depth=depth,
    channels=channels,
    tokens_hidden=channels // 2,
    channels_hidden=4 * channels,
  )


SIZES = {
  # The report's, section 5.2: for images of 72 px.
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


def image_size(size: str) -> int:
  """Side of the images that a size was published for, px."""
  return {"seed": 72, "tiny": 8}.get(size, 224)


def check(fields: dict, image_size: int) -> list[str]:
  """What is wrong with an image of `image_size` px for these fields, one line each."""
  patch, cells = fields["patch"], fields.get("cells", 1)
  if image_size % patch:
    return [
      f"data.image_size is {image_size} px, which patches of model.patch ="
      f" {patch} px do not tile; allowed: multiples of {patch}"
    ]
  if image_size // patch % cells:
    return [
      f"model.cells is {cells}, which {image_size // patch} patches a side do not share out"
      f" evenly; allowed: divisors of {image_size // patch}"
    ]
  return []


class Mlp(nn.Module):
  """Dense, GELU, dense along an axis, back to its width; the hidden units before and after GELU.

  `free` leaves the first matrix any sign: right where the input is affine in the image.
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

  `first` says that x is the patch embedding itself, affine in the image. Its norm
  and its first token-mixing matrix are then free, unless a LayerNorm stands between
  them: the report exempts that matrix all the same, so `paper` does too. The hidden
  units of that token mixing, returned as y, are what later blocks get as passthrough.
  `parallel` lets both mixings read x, so that in the first block both first matrices act
  on what is affine in the image. Returned last: the hidden units of either.
  """

  tokens_hidden: int
  channels_hidden: int
  gelu: str
  drop_path: float
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
    y_TxBxD = hidden_TxBxD if self.first and parts.passthrough else y_TxBxD
    return x_SxBxD, y_TxBxD, (tokens_TxBxD, channels_SxBxE)


class Model(nn.Module):
  """The network. The image's sides must be multiples of `patch` (in px).

  In `ioc` with passthrough the first token mixing's hidden units before their activation,
  affine in the image, are scaled and added to those of every later block. Matrices in
  place of the scales, or a map to the logits, learn no faster and cost 3 % of a step.

  Four choices that are not the paper's, open to every twin. In `ioc` they widen what has
  weights of either sign: the first layer and, by `shift`, the head.

  - `parallel`: the first block's mixings both read the embedding.
  - `overlap`: a patch's window reaches so many px over each of its sides.
  - `cells`: the head sees means over cells x cells parts of the image.
  - `dense_readout`: it sees the hidden units of every mixing as well, behind a norm.
  """

  classes: int
  parts: Parts
  patch: int
  depth: int
  channels: int
  tokens_hidden: int
  channels_hidden: int
  gelu: Literal["tanh", "erf"] = "tanh"  # The official form is tanh, timm's erf.
  # Stochastic depth of the last block, falling to 0 at the first; what is kept is divided by
  # its share, as timm does and the official code does not.
  drop_path: float = 0.0
  parallel: bool = False
  cells: int = 1  # A side.
  dense_readout: bool = False
  overlap: int = 0  # px.

  @nn.compact
  def __call__(self, image_BxHxWxC: jax.Array, train: bool = False) -> jax.Array:
    parts, window = self.parts, self.patch + 2 * self.overlap
    x_BxHxWxD = parts.conv(
      image_BxHxWxC,
      self.channels,
      (window, window),
      strides=(self.patch, self.patch),
      padding=self.overlap,
      free=True,
      name="stem",
    )
    # Tokens first: to mix them is then one product with all the rest, without a transpose.
    x_SxBxD = x_BxHxWxD.reshape(len(x_BxHxWxD), -1, self.channels).swapaxes(0, 1)
    y_TxBxD, hidden = None, []
    for i in range(self.depth):
      block = parts.block(Block)(
        self.tokens_hidden,
        self.channels_hidden,
        self.gelu,
        self.drop_path * i / max(1, self.depth - 1),
        parts,
        first=i == 0,
        parallel=i == 0 and self.parallel,
        name=f"block_{i}",
      )
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
    """Means over cells of the grid of tokens: (B, cells^2 D)."""
    if self.cells == 1:
      return x_SxBxD.mean(axis=0)
    side = math.isqrt(len(x_SxBxD))
    x_BxHxWxD = x_SxBxD.swapaxes(0, 1).reshape(-1, side, side, x_SxBxD.shape[-1])
    return cell_means(x_BxHxWxD, self.cells)
