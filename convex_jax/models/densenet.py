"""DenseNet (Huang et al. 2017, arXiv 1608.06993) and its convex twins.

A stem; dense blocks, whose layers append `growth` features to all earlier ones; a 1x1
convolution and average pooling between blocks; norm, activation, pooling; linear head.
No convolution has a bias.
"""

import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from convex_jax.models.fast_forms import gradient_once
from convex_jax.models.initializers import ELU
from convex_jax.models.parts import Parts, Rate

PAPER_BREAKS = ""  # BatchNorm with a scale >= 0 is affine and monotone at inference.


def _imagenet(blocks, growth=32):
  """Table 1 of the paper: 7x7 stem with 2 k features, bottlenecks with 4 k, compression 1/2."""
  return dict(blocks=blocks, growth=growth, stem_width=2 * growth)


def _cifar(layers, growth, bottleneck):
  """Section 4.1 of the paper: 3x3 stem with 16 features, or 2 k in DenseNet-BC; three blocks."""
  return dict(
    blocks=(layers, layers, layers),
    growth=growth,
    stem_width=2 * growth if bottleneck else 16,
    stem="cifar",
    bottleneck=bottleneck,
    compression=0.5 if bottleneck else 1.0,
  )


SIZES = {
  "121": _imagenet((6, 12, 24, 16)),
  "161": _imagenet((6, 12, 36, 24), growth=48),
  "169": _imagenet((6, 12, 32, 32)),
  "201": _imagenet((6, 12, 48, 32)),
  "40-12": _cifar(12, 12, bottleneck=False),
  "100-12": _cifar(32, 12, bottleneck=False),
  "100-24": _cifar(32, 24, bottleneck=False),
  "BC-100-12": _cifar(16, 12, bottleneck=True),
  "BC-250-24": _cifar(41, 24, bottleneck=True),
  "BC-190-40": _cifar(31, 40, bottleneck=True),
  # What the code of Sivaprasad et al. 2021 calls DenseNet: 6 layers in each of 4 blocks.
  "ioc_paper": dict(
    blocks=(6, 6, 6, 6),
    growth=40,
    stem_width=80,
    stem="cifar",
    bottleneck=False,
    transition=40,
    dropout=0.2,
    pool="2x2",
  ),
  "tiny": dict(blocks=(2, 1), growth=4, stem_width=6, stem="cifar"),  # For tests.
}
IMAGE_SIZE = {size: 224 if size.isdigit() else 32 for size in SIZES} | {"tiny": 8}

# Overrides under which the work equals the published figures: with dropout, transitions pool after
# their convolution.
PUBLISHED = dict(dropout=0.1)

he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")  # As in the original code.


def check(fields: dict, image_size: int) -> list[str]:
  """Errors in these fields for images of `image_size` px, one line each."""
  side, width = image_size, fields["stem_width"]
  if fields.get("stem", "imagenet") == "imagenet":
    side = (side + 3) // 4  # Both halvings of the stem round up.
  compression = fields.get("compression", 0.5)
  for layers in fields["blocks"][:-1]:
    width = fields.get("transition") or int((width + layers * fields["growth"]) * compression)
    side //= 2
  side //= 2 if fields.get("pool") == "2x2" else 1
  lines = []
  if not side:
    lines.append(
      f"data.image_size is {image_size} px, too small for the halvings; expected larger images, or"
      " fewer model.blocks"
    )
  if compression > 1 or not width:
    lines.append(
      f"model.compression is {compression:g}, which leaves {width} features; expected a number in"
      " (0, 1] that leaves at least one"
    )
  return lines


class Layer(nn.Module):
  """Norm, activation, 3x3 to k features; with a bottleneck, first norm, activation, 1x1 to 4 k."""

  growth: int
  bottleneck: bool
  dropout: Rate
  parts: Parts

  @nn.compact
  def __call__(self, x_BxHxWxD: jax.Array, train: bool) -> jax.Array:
    parts, act = self.parts, self.parts.act(nn.relu)
    conv = functools.partial(parts.conv, use_bias=False, inputs=ELU, own_init=he_normal)
    norm = functools.partial(parts.norm, own="batch", train=train)
    h_BxHxWxF = act(norm(x_BxHxWxD, name="norm_0"))
    if self.bottleneck:
      h_BxHxWxF = conv(h_BxHxWxF, 4 * self.growth, 1, name="conv_0")
      h_BxHxWxF = parts.dropout(h_BxHxWxF, self.dropout, train)
      h_BxHxWxF = act(norm(h_BxHxWxF, name="norm_1"))
    h_BxHxWxF = conv(h_BxHxWxF, self.growth, 3, padding=1, name="conv_1")
    return parts.dropout(h_BxHxWxF, self.dropout, train)


class Model(nn.Module):
  """The network.

  In `ioc` with passthrough the output of the stem, which is affine in the image, is
  average-pooled and added to the features that enter each later block.
  """

  classes: int
  parts: Parts
  blocks: tuple[int, ...]  # Layers per block.
  growth: int  # k, the features that a layer adds.
  stem_width: int  # Features.
  stem: Literal["imagenet", "cifar"] = "imagenet"  # 7x7, stride 2, norm, max-pool; or 3x3.
  bottleneck: bool = True
  compression: float = 0.5  # Fraction of the features that a transition keeps.
  transition: int = 0  # Features after a transition; 0: `compression` decides.
  dropout: Rate = 0.0  # After every convolution except the stem.
  pool: Literal["global", "2x2"] = "global"  # Before the head.

  @nn.compact
  def __call__(self, image_BxHxWxC: jax.Array, train: bool = False) -> jax.Array:
    parts, act = self.parts, self.parts.act(nn.relu)
    conv = functools.partial(parts.conv, use_bias=False, inputs=ELU, own_init=he_normal)
    norm = functools.partial(parts.norm, own="batch", train=train)
    if self.stem == "cifar":
      x_BxHxWxD = conv(image_BxHxWxC, self.stem_width, 3, padding=1, free=True, name="stem")
      y_BxHxWxE = x_BxHxWxD
    else:
      x_BxHxWxD = conv(
        image_BxHxWxC, self.stem_width, 7, stride=2, padding=3, free=True, name="stem"
      )
      y_BxHxWxE = norm(x_BxHxWxD, name="stem_norm")
      padding: Any = ((1, 1), (1, 1))
      x_BxHxWxD = nn.max_pool(act(y_BxHxWxE), (3, 3), strides=(2, 2), padding=padding)
    for b, layers in enumerate(self.blocks):
      if b > 0:
        width = self.transition or int(x_BxHxWxD.shape[-1] * self.compression)
        x_BxHxWxD = act(norm(x_BxHxWxD, name=f"transition_{b}_norm"))
        pool = functools.partial(nn.avg_pool, window_shape=(2, 2), strides=(2, 2))
        if not self.dropout:  # A 1x1 convolution commutes with pooling: a quarter of the work.
          x_BxHxWxD = pool(x_BxHxWxD)
        x_BxHxWxD = conv(x_BxHxWxD, width, 1, name=f"transition_{b}")
        if self.dropout:
          x_BxHxWxD = pool(parts.dropout(x_BxHxWxD, self.dropout, train))
        if parts.twin.passthrough:
          x_BxHxWxD += parts.passthrough_map(y_BxHxWxE, x_BxHxWxD, name=f"passthrough_{b}")
      for i in range(layers):
        layer = parts.block(Layer)(
          self.growth, self.bottleneck, self.dropout, parts, name=f"block_{b}_layer_{i}"
        )
        x_BxHxWxD = gradient_once(x_BxHxWxD)  # Its gradient sums over all later layers.
        x_BxHxWxD = jnp.concatenate([x_BxHxWxD, layer(x_BxHxWxD, train)], axis=-1)
    x_BxHxWxD = act(norm(x_BxHxWxD, name="norm"))
    if self.pool == "2x2":
      x_BxD = nn.avg_pool(x_BxHxWxD, (2, 2), strides=(2, 2)).reshape(len(x_BxHxWxD), -1)
    else:
      x_BxD = x_BxHxWxD.mean((1, 2))
    return parts.head(x_BxD, self.classes, train=train, name="head")
