"""All-CNN (Springenberg et al. 2015, arXiv 1412.6806) and its convex twins.

Convolutions only: strided ones instead of pooling, then a 1x1 convolution to a map of class
scores and the mean over positions. A ReLU follows every convolution, including the last.
"""

import functools
from typing import Any, Literal

import flax.linen as nn
import jax

from convex_jax.models.initializers import ELU, NORMED
from convex_jax.models.parts import Parts, Rate

PAPER_BREAKS = ""  # Neither norm nor gate.

SIZES = {  # Sides of the kernels before each halving (table 1 of the paper).
  "a": dict(kernels=(5,)),
  "b": dict(kernels=(5, 1)),
  "c": dict(kernels=(3, 3)),
  # What the code of Sivaprasad et al. 2021 calls All-Conv.
  "ioc_paper": dict(kernels=(3, 3), form="ioc_paper"),
  "tiny": dict(kernels=(5, 1), width=6, padding="same"),  # For tests.
}
IMAGE_SIZE = dict.fromkeys(SIZES, 32) | {"tiny": 8}

he_normal = nn.initializers.he_normal()


def check(fields: dict, image_size: int) -> list[str]:
  """Errors in these fields for images of `image_size` px, one line each."""
  published = fields.get("form", "published") == "published"
  if published and fields.get("padding", "valid") == "valid" and image_size < 9:
    return [
      f"data.image_size is {image_size} px, too small for an unpadded 3x3 convolution after two"
      " halvings; expected an integer >= 9, or model.padding='same'"
    ]
  return []


class Model(nn.Module):
  """The network; `width` features, 2 `width` after the first halving.

  The form "published" has dropout of 0.2 on the image and of 0.5 after each strided
  convolution, and no norm. The form "ioc_paper" has a BatchNorm after the activations of
  convolutions 2, 4, 6 and 8, no dropout on the image, and a class map of stride 2; its `paper`
  twin has twice as many features in the first convolution.

  In `ioc` with passthrough the first convolution's output, which is affine in the image, is
  average-pooled and added to the input of the activation after each halving.
  """

  classes: int
  parts: Parts
  kernels: tuple[int, ...]  # Sides (px) of the convolutions before each strided one.
  width: int = 96
  dropout: Rate = 0.5
  padding: Literal["valid", "same"] = "valid"  # Of the last 3x3 convolution.
  form: Literal["published", "ioc_paper"] = "published"

  @nn.compact
  def __call__(self, image_BxHxWxC: jax.Array, train: bool = False) -> jax.Array:
    parts, act, published = self.parts, self.parts.act(nn.relu), self.form == "published"
    same = self.padding == "same" or not published
    halves = [[(k, 1) for k in self.kernels] + [(3, 2)] for _ in range(2)]
    plan = [(w, *step) for w, half in zip((1, 2), halves, strict=True) for step in half]
    plan += [(2, 3, 1), (2, 1, 1)]
    x_BxHxWxD, y_BxHxWxE = image_BxHxWxC, None
    if published:
      x_BxHxWxD = parts.dropout(x_BxHxWxD, 0.4 * self.dropout, train)
    normed = halved = False
    conv = functools.partial(parts.conv, own_init=he_normal)
    for i, (widths, side, stride) in enumerate(plan):
      widths *= 2 if parts.twin.widened and i == 0 and not published else 1
      padding = side // 2 if same or i != len(plan) - 2 else 0
      fields: Any = dict(inputs=NORMED if normed else ELU, padding=padding, free=i == 0)
      x_BxHxWxD = conv(
        x_BxHxWxD, self.width * widths, side, stride=stride, name=f"conv_{i}", **fields
      )
      if i == 0:
        y_BxHxWxE = x_BxHxWxD
      elif halved and parts.twin.passthrough:
        x_BxHxWxD += parts.passthrough_map(y_BxHxWxE, x_BxHxWxD, name=f"passthrough_{i}")
      x_BxHxWxD, halved, normed = act(x_BxHxWxD), stride == 2, not published and i % 2 == 1
      if normed:
        x_BxHxWxD = parts.norm(x_BxHxWxD, "batch", train=train, name=f"norm_{i}")
      if halved:
        x_BxHxWxD = parts.dropout(x_BxHxWxD, self.dropout, train)
    # A class map behind a ReLU is never negative; a single logit has to be of either sign.
    if parts.head_spec.depth or parts.head_spec.one_logit:
      return parts.head(x_BxHxWxD.mean((1, 2)), self.classes, train=train, name="head")
    stride, inputs = 1 if published else 2, NORMED if normed else ELU
    x_BxHxWxK = conv(x_BxHxWxD, self.classes, 1, stride=stride, inputs=inputs, name="head")
    return act(x_BxHxWxK).mean((1, 2))
