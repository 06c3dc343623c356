"""MLP-Mixer (Tolstikhin et al. 2021, arXiv 2105.01601) and its convex twins.

Per-patch embedding; blocks of a token-mixing and a channel-mixing MLP, each with a
norm before and a residual sum after; norm; mean over tokens; linear head.
"""

import flax.linen as nn
import jax

from convex_jax.layers import NORMED, Parts


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


def check(fields: dict, image_size: int) -> list[str]:
  """What is wrong with an image of `image_size` px for these fields, one line each."""
  if image_size % fields["patch"]:
    return [
      f"data.image_size is {image_size} px, which patches of model.patch ="
      f" {fields['patch']} px do not tile; allowed: multiples of {fields['patch']}"
    ]
  return []


class Mlp(nn.Module):
  """Dense, activation, dense over the last axis, back to its width.

  `free` leaves the first matrix any sign: right where the input is affine in the
  image. With y, affine in the image, the hidden units also see y V, V of any sign.
  """

  hidden: int
  parts: Parts
  free: bool = False

  @nn.compact
  def __call__(self, x_BxNxD: jax.Array, y_BxNxE: jax.Array | None = None) -> jax.Array:
    parts = self.parts
    h_BxNxF = parts.dense(x_BxNxD, self.hidden, free=self.free, inputs=NORMED, name="dense_0")
    if y_BxNxE is not None:
      h_BxNxF += parts.passthrough_dense(y_BxNxE, self.hidden, name="passthrough")
    h_BxNxF = parts.act(nn.gelu)(h_BxNxF)
    return parts.branch_dense(h_BxNxF, x_BxNxD.shape[-1], name="dense_1")


class Block(nn.Module):
  """Token mixing, then channel mixing (section 2 of the paper, its equation 1).

  `first` says that x is the patch embedding itself, affine in the image. Its norm
  and its first token-mixing matrix are then free, unless a LayerNorm stands between
  them: the report exempts that matrix all the same, so `paper` does too.
  """

  tokens_hidden: int
  channels_hidden: int
  parts: Parts
  first: bool

  @nn.compact
  def __call__(self, x_BxSxD: jax.Array, y_BxDxS: jax.Array | None, train: bool) -> jax.Array:
    parts = self.parts
    h_BxSxD = parts.norm(x_BxSxD, "layer", train=train, free=self.first, name="norm_0")
    mix_tokens = Mlp(self.tokens_hidden, parts, free=self.first, name="token_mixing")
    h_BxDxS = mix_tokens(h_BxSxD.swapaxes(1, 2), None if self.first else y_BxDxS)
    x_BxSxD += h_BxDxS.swapaxes(1, 2)
    h_BxSxD = parts.norm(x_BxSxD, "layer", train=train, name="norm_1")
    return x_BxSxD + Mlp(self.channels_hidden, parts, name="channel_mixing")(h_BxSxD)


class Model(nn.Module):
  """The network. The image's sides must be multiples of `patch` (in px).

  In `ioc` with passthrough, token mixing in every block but the first (whose first
  matrix is free) and the head also see the patch embedding, affine in the image.
  """

  classes: int
  parts: Parts
  patch: int
  depth: int
  channels: int
  tokens_hidden: int
  channels_hidden: int

  @nn.compact
  def __call__(self, image_BxHxWxC: jax.Array, train: bool = False) -> jax.Array:
    parts, side = self.parts, (self.patch, self.patch)
    x_BxHxWxD = parts.conv(
      image_BxHxWxC, self.channels, side, strides=side, padding="VALID", free=True, name="stem"
    )
    x_BxSxD = x_BxHxWxD.reshape(len(x_BxHxWxD), -1, self.channels)
    y_BxDxS = x_BxSxD.swapaxes(1, 2) if parts.passthrough else None
    for i in range(self.depth):
      block = Block(
        self.tokens_hidden, self.channels_hidden, parts, first=i == 0, name=f"block_{i}"
      )
      x_BxSxD = block(x_BxSxD, y_BxDxS, train)
    x_BxSxD = parts.norm(x_BxSxD, "layer", train=train, name="norm")
    zeros = nn.initializers.zeros
    logits_BxK = parts.head(x_BxSxD.mean(axis=1), self.classes, own_init=zeros, name="head")
    if y_BxDxS is not None:
      logits_BxK += parts.passthrough_dense(
        y_BxDxS.mean(axis=2), self.classes, own_init=zeros, name="passthrough_head"
      )
    return logits_BxK
