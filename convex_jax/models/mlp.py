"""Multi-layer perceptron with BatchNorm, and its convex twins.

Three hidden layers of 800 units, each with a BatchNorm before its ReLU, and a linear head (report,
section 4.1; Sivaprasad et al. 2021, table 1). 3,752,810 parameters for CIFAR-10.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from convex_jax.models.initializers import ELU
from convex_jax.models.parts import Parts

PAPER_BREAKS = ""  # BatchNorm is affine at inference.
SIZES = {
  "800x3": dict(width=800, depth=3),
  "tiny": dict(width=8, depth=2, passthrough_rank=4),  # For tests.
}
IMAGE_SIZE = dict.fromkeys(SIZES, 32) | {"tiny": 8}


class Model(nn.Module):
  """Flatten, `depth` times (dense, BatchNorm, activation), linear head.

  In `ioc` the layers after the first also see y = BatchNorm(x W_1 + b_1), which is affine
  in the image at inference, as (y A) V_l, with matrices of either sign and A shared. On CIFAR-10
  after five epochs, rank 64 gains two points for 4 % more work; full matrices gain one more for
  34 %; the same map to the logits costs two points.

  With `dense_readout` the head sees the units of every hidden layer. A linear head of `ioc` with
  two or more logits has weights >= 0 that equal weights of any sign up to a term that all logits
  share (`shift`), so the convex network is then at least
  as expressive as an unconstrained ELU network of one hidden layer: the first, also free.
  """

  classes: int
  parts: Parts
  width: int
  depth: int
  passthrough_rank: int = 64  # Columns of A.
  dense_readout: bool = False

  @nn.compact
  def __call__(self, image_BxHxWxC: jax.Array, train: bool = False) -> jax.Array:
    parts, act = self.parts, self.parts.act(nn.relu)
    x_BxD, z_BxR = image_BxHxWxC.reshape(len(image_BxHxWxC), -1), None
    hidden = []
    for i in range(self.depth):
      first = i == 0
      h_BxD = parts.dense(
        x_BxD, self.width, free=first, inputs=ELU, before_norm=True, name=f"dense_{i}"
      )
      if z_BxR is not None:
        h_BxD += parts.passthrough_dense(z_BxR, self.width, name=f"passthrough_{i}")
      h_BxD = parts.norm(h_BxD, "batch", train=train, name=f"norm_{i}")
      if first and parts.twin.passthrough and self.depth > 1:
        z_BxR = parts.passthrough_dense(h_BxD, self.passthrough_rank, name="passthrough")
      x_BxD = act(h_BxD)
      hidden.append(x_BxD)
    if self.dense_readout:
      x_BxD = jnp.concatenate(hidden, axis=-1)
    return parts.head(x_BxD, self.classes, train=train, name="head")
