"""EfficientNet (Tan and Le 2019, arXiv 1905.11946) and its convex twins.

A 3x3 stem; seven stages of inverted bottlenecks (1x1 expansion, depthwise convolution,
squeeze-excite, 1x1 projection; Sandler et al. 2018); a 1x1 convolution; mean; dropout;
linear head. A BatchNorm follows every convolution outside squeeze-excite.
"""

import functools
import math
from typing import Any, Literal

import flax.linen as nn
import jax

from convex_jax.models.initializers import ELU, NORMED, Moments
from convex_jax.models.layers import silu
from convex_jax.models.parts import Parts, Rate

PAPER_BREAKS = "gate"

STAGES = (  # (kernel, stride, expansion, width, repeats): table 1 of the paper.
  (3, 1, 1, 16, 1),
  (3, 2, 6, 24, 2),
  (5, 2, 6, 40, 2),
  (3, 2, 6, 80, 3),
  (5, 1, 6, 112, 3),
  (5, 2, 6, 192, 4),
  (3, 1, 6, 320, 1),
)

SIZES = {
  "B0": dict(width=1.0, depth=1.0, dropout=0.2),
  "B1": dict(width=1.0, depth=1.1, dropout=0.2),
  "B2": dict(width=1.1, depth=1.2, dropout=0.3),
  "B3": dict(width=1.2, depth=1.4, dropout=0.3),
  "B4": dict(width=1.4, depth=1.8, dropout=0.4),
  "B5": dict(width=1.6, depth=2.2, dropout=0.4),
  "B6": dict(width=1.8, depth=2.6, dropout=0.5),
  "B7": dict(width=2.0, depth=3.1, dropout=0.5),
  "tiny": dict(width=0.1, depth=0.3, dropout=0.2, stem_stride=1, stages=3),  # For tests.
}
IMAGE_SIZE = dict(B0=224, B1=240, B2=260, B3=300, B4=380, B5=456, B6=528, B7=600, tiny=8)


def scaled(features: int, width: float) -> int:
  """The multiple of 8 nearest to `features` x `width`, and at least 0.9 of it."""
  wanted = features * width
  rounded = max(8, int(wanted + 4) // 8 * 8)
  return rounded if rounded >= 0.9 * wanted else rounded + 8


def kernel_init(side: int, features: int = 1):
  """Normal with variance 2 / fan-out; a depthwise convolution has one output per input."""
  return nn.initializers.normal(math.sqrt(2 / (side * side * features)))


head_init = nn.initializers.variance_scaling(1 / 3, "fan_out", "uniform")  # +-1 / sqrt(classes).


def check(fields: dict, image_size: int) -> list[str]:
  """Errors in these fields, one line each; any `image_size` will do."""
  if fields.get("stages", 1) > len(STAGES):
    return [f"model.stages is {fields['stages']}; expected an integer from 1 to {len(STAGES)}"]
  return []


class ConvNorm(nn.Module):
  """A convolution without bias, then BatchNorm.

  The variant "tf" pads the end first and has epsilon 1e-3 and momentum 0.99; "torch" pads
  evenly and has 1e-5 and 0.9.
  """

  features: int
  side: int
  variant: str
  parts: Parts
  stride: int = 1
  depthwise: bool = False
  free: bool = False
  inputs: Moments = ELU

  @nn.compact
  def __call__(self, x_BxHxWxD: jax.Array, train: bool) -> jax.Array:
    tf = self.variant == "tf"
    x_BxHxWxD = self.parts.conv(
      x_BxHxWxD,
      self.features,
      self.side,
      stride=self.stride,
      padding="SAME" if tf else self.side // 2,
      feature_group_count=self.features if self.depthwise else 1,
      use_bias=False,
      free=self.free,
      inputs=self.inputs,
      own_init=kernel_init(self.side, 1 if self.depthwise else self.features),
      name="conv",
    )
    numbers: Any = dict(epsilon=1e-3, momentum=0.99) if tf else dict(epsilon=1e-5, momentum=0.9)
    return self.parts.norm(x_BxHxWxD, "batch", train=train, name="norm", **numbers)


class SqueezeExcite(nn.Module):
  """x times the sigmoid of an MLP of its mean over positions (Hu et al. 2018)."""

  hidden: int
  parts: Parts

  @nn.compact
  def __call__(self, x_BxHxWxD: jax.Array) -> jax.Array:
    parts, features = self.parts, x_BxHxWxD.shape[-1]
    x_Bx1x1xD, own_init = x_BxHxWxD.mean((1, 2), keepdims=True), kernel_init(1, self.hidden)
    h_Bx1x1xE = parts.dense(x_Bx1x1xD, self.hidden, own_init=own_init, name="reduce")
    h_Bx1x1xE = parts.act(silu)(h_Bx1x1xE)
    h_Bx1x1xD = parts.dense(h_Bx1x1xE, features, own_init=kernel_init(1, features), name="expand")
    return x_BxHxWxD * nn.sigmoid(h_Bx1x1xD)


class Block(nn.Module):
  """Inverted bottleneck, residual where the shapes agree; without squeeze-excite in `ioc`, or where gates are static."""

  features: int
  side: int
  stride: int
  expansion: int
  drop_path: Rate
  variant: str
  parts: Parts

  @nn.compact
  def __call__(self, x_BxHxWxD: jax.Array, train: bool) -> jax.Array:
    parts, act, width = self.parts, self.parts.act(silu), x_BxHxWxD.shape[-1]
    conv = functools.partial(ConvNorm, variant=self.variant, parts=parts)
    expanded, h_BxHxWxE = self.expansion * width, x_BxHxWxD
    if self.expansion > 1:
      h_BxHxWxE = act(conv(expanded, 1, inputs=NORMED, name="expand")(h_BxHxWxE, train))
    depthwise = conv(expanded, self.side, stride=self.stride, depthwise=True, name="depthwise")
    h_BxHxWxE = act(depthwise(h_BxHxWxE, train))
    if parts.twin.gates:
      h_BxHxWxE = SqueezeExcite(max(1, width // 4), parts, name="squeeze_excite")(h_BxHxWxE)
    h_BxHxWxF = conv(self.features, 1, name="project")(h_BxHxWxE, train)
    if self.stride > 1 or self.features != width:
      return h_BxHxWxF
    return x_BxHxWxD + parts.dropout(h_BxHxWxF, self.drop_path, train, whole=0)


class Model(nn.Module):
  """The network, for images of any size; the stem and the stages halve them 5 times.

  In `ioc` with passthrough the normalised stem, which is affine in the image, is average-pooled
  and added to the output of the first block of each later stage.
  """

  classes: int
  parts: Parts
  width: float  # Multiplies the numbers of features ...
  depth: float  # ... and of blocks.
  dropout: Rate  # Before the head.
  stages: int = 7  # Only the first of them: fewer halvings, for small images.
  drop_path: Rate = 0.2  # Stochastic depth after the last block, falling to 0 at the first.
  stem_stride: int = 2  # px.
  # Whose padding and norm: see `ConvNorm`. None is "tf", but for a public file, which needs one.
  variant: Literal["tf", "torch"] | None = None

  @nn.compact
  def __call__(self, image_BxHxWxC: jax.Array, train: bool = False) -> jax.Array:
    parts, act, variant = self.parts, self.parts.act(silu), self.variant or "tf"
    conv = functools.partial(ConvNorm, variant=variant, parts=parts)
    stem = conv(scaled(32, self.width), 3, stride=self.stem_stride, free=True, name="stem")
    y_BxHxWxE = stem(image_BxHxWxC, train)
    x_BxHxWxD, done = act(y_BxHxWxE), 0
    repeats = [math.ceil(self.depth * stage[-1]) for stage in STAGES[: self.stages]]
    for s, (side, stride, expansion, features, _) in enumerate(STAGES[: self.stages]):
      for i in range(repeats[s]):
        shape = (scaled(features, self.width), side, stride if i == 0 else 1, expansion)
        drop_path, name = self.drop_path * done / sum(repeats), f"stage_{s}_block_{i}"
        block = parts.block(Block)(*shape, drop_path, variant, parts, name=name)
        x_BxHxWxD, done = block(x_BxHxWxD, train), done + 1
        if parts.twin.passthrough and s > 0 and i == 0:
          x_BxHxWxD += parts.passthrough_map(y_BxHxWxE, x_BxHxWxD, name=f"passthrough_{s}")
    x_BxHxWxD = act(conv(scaled(1280, self.width), 1, inputs=NORMED, name="top")(x_BxHxWxD, train))
    x_BxD = parts.dropout(x_BxHxWxD.mean((1, 2)), self.dropout, train)
    return parts.head(x_BxD, self.classes, train=train, own_init=head_init, name="head")
