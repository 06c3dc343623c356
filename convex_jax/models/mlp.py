"""Multi-layer perceptron with BatchNorm, and its convex twins.

Three hidden layers of 800 units, BatchNorm before each ReLU, a linear head (report,
section 4.1; Sivaprasad et al. 2021, table 1). 3,752,810 parameters for CIFAR-10.
"""

import flax.linen as nn
import jax

from convex_jax.layers import ELU, Parts

SIZES = {
  "800x3": dict(width=800, depth=3),
  "tiny": dict(width=8, depth=2),  # For tests.
}


class Model(nn.Module):
  """Flatten, `depth` times (dense, BatchNorm, activation), linear head.

  In `ioc` the layers after the first also see y = BatchNorm(x W_1 + b_1), which is
  affine in the image at inference, through a matrix of either sign.
  """

  classes: int
  parts: Parts
  width: int
  depth: int

  @nn.compact
  def __call__(self, image_BxHxWxC: jax.Array, train: bool = False) -> jax.Array:
    parts, act = self.parts, self.parts.act(nn.relu)
    x_BxD = image_BxHxWxC.reshape(len(image_BxHxWxC), -1)
    y_BxD = None
    for i in range(self.depth):
      first = i == 0
      h_BxD = parts.dense(
        x_BxD, self.width, free=first, inputs=ELU, before_norm=True, name=f"dense_{i}"
      )
      if parts.passthrough and not first:
        h_BxD += parts.passthrough_dense(y_BxD, self.width, name=f"passthrough_{i}")
      h_BxD = parts.norm(h_BxD, "batch", train=train, name=f"norm_{i}")
      y_BxD = h_BxD if first else y_BxD
      x_BxD = act(h_BxD)
    logits_BxK = parts.head(x_BxD, self.classes, name="head")
    if parts.passthrough:
      logits_BxK += parts.passthrough_dense(y_BxD, self.classes, name="passthrough_head")
    return logits_BxK
