"""The parts that make a twin: one text of an architecture, three sets of ingredients.

| parts   | activation | norm                    | weights past the first affine part |
|---------|------------|-------------------------|------------------------------------|
| `base`  | its own    | its own                 | free                               |
| `ioc`   | ELU        | BatchNorm, scale >= 0   | >= 0: convex at inference          |
| `paper` | ELU        | its own                 | >= 0: as the report did            |

Every bias is free, and so is an affine map of the image before the first activation
(`free=True`): the composition stays affine in the image whatever its signs.

Dimension letters in names: B batch, H height, W width, C colour channels, S tokens,
D features, K classes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype

from convex_jax.constraints import FREE, constrained

Activation = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Moments:
  """What a layer's inputs look like: g(z) for z ~ N(0, 1), pairs correlated by 1/2."""

  mean: float  # E g(z)
  square: float  # E g(z)^2
  product: float  # E g(z) g(z')


NORMED = Moments(0.0, 1.0, 0.5)  # g = identity: the output of a norm.
ELU = Moments(0.1605209, 0.6449461, 0.3247809)  # g = ELU with alpha = 1.


def log_normal_mean(fan_in: int, inputs: Moments) -> float:
  """Mean weight that keeps pre-activations at variance 1 and correlation r = 1/2.

  m_w^2 = r / (N (m2 + (N - 1) c - N m1^2)) with fan-in N (Hoedt and Klambauer 2023,
  "Principled Weight Initialisation for Input-Convex Neural Networks", section 3).
  """
  n, m1, m2, c = fan_in, inputs.mean, inputs.square, inputs.product
  return float(np.sqrt(0.5 / (n * (m2 + (n - 1) * c - n * m1**2))))


def log_normal(inputs: Moments) -> Callable[..., jax.Array]:
  """Log-normal weights >= 0 of the mean above and variance (1 - r) / (N m2).

  The last axis is the output, all others are the fan-in (dense and conv kernels).
  """

  def initialize(key, shape, dtype=jnp.float32):
    fan_in = int(np.prod(shape[:-1]))
    mean = log_normal_mean(fan_in, inputs)
    variance = 0.5 / (fan_in * inputs.square)
    log_square = np.log(mean**2 + variance)
    mu, sigma = np.log(mean**2) - log_square / 2, np.sqrt(log_square - np.log(mean**2))
    return jnp.exp(mu + sigma * jax.random.normal(key, shape, dtype))

  return initialize


class ScaledDense(nn.Module):
  """s (x W + b) with a learnt s >= 0 for each feature, 1 at first.

  The scale multiplies W and b, not the (far larger) result: it costs nothing.
  """

  features: int
  constraint: str
  kernel_init: Callable[..., Any]
  bias_init: Callable[..., Any]
  dtype: Any

  @nn.compact
  def __call__(self, x):
    kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
    bias = self.param("bias", self.bias_init, (self.features,))
    ones = constrained(nn.initializers.ones, self.constraint)
    scale = self.param("scale", ones, (self.features,))
    x, kernel, bias = promote_dtype(x, kernel * scale, bias * scale, dtype=self.dtype)
    return x @ kernel + bias


@dataclasses.dataclass(frozen=True)
class Parts:
  """A set of ingredients. Its methods act inside a model's `nn.compact` call."""

  name: str
  constraint: str = FREE  # Of every weight past the first affine part.
  head_constraint: str = FREE  # Of the classifier's weights.
  activation: Activation | None = None  # None: the architecture's own.
  norm_kind: str | None = None  # "batch", "layer"; None: the architecture's own.
  principled: bool = False  # Log-normal initialisation, residual branch scales.
  passthrough: bool = False  # Free-sign maps of y, affine in the image, to later layers.
  dtype: Any = jnp.float32  # Of the computation; parameters are float32 always.
  axis_name: str | None = None  # BatchNorm's mapped axis; only under `jax.pmap`.

  def act(self, own: Activation) -> Activation:
    """This twin's activation, or the architecture's `own`."""
    return self.activation or own

  def _affine(self, layer, fan_in, free, inputs, before_norm, own_init, **fields):
    """Fields of a dense or conv layer: dtype, tagged kernel, matching bias."""
    kernel_init, bias_init = own_init, nn.initializers.zeros
    if self.principled and not free:
      kernel_init = log_normal(inputs)
      if not before_norm:  # A norm takes the mean away by itself.
        bias = -fan_in * log_normal_mean(fan_in, inputs) * inputs.mean
        bias_init = nn.initializers.constant(bias)
    kernel_init = constrained(kernel_init, FREE if free else self.constraint)
    return layer(dtype=self.dtype, kernel_init=kernel_init, bias_init=bias_init, **fields)

  def dense(
    self,
    x,
    features: int,
    *,
    name: str,
    free: bool = False,
    inputs: Moments = ELU,
    before_norm: bool = False,
    own_init=nn.initializers.lecun_normal(),  # noqa: B008
  ):
    """X W + b over the last axis; W >= 0 where the twin asks, unless `free`.

    `inputs` says what x is (`ELU` activations or `NORMED` features) and
    `before_norm` whether a BatchNorm follows: both matter to the initial values only.
    """
    layer = self._affine(
      nn.Dense, x.shape[-1], free, inputs, before_norm, own_init, features=features, name=name
    )
    return layer(x)

  def branch_dense(self, x, features: int, *, name: str):
    """The last layer of a residual branch: in `ioc` with a learnt scale >= 0.

    What to start it from was measured at 4 blocks: 1 learns faster than 0.1.
    """
    if not self.principled:
      return self.dense(x, features, name=name)
    layer = self._affine(
      ScaledDense,
      x.shape[-1],
      False,
      ELU,
      False,
      None,
      features=features,
      constraint=self.constraint,
      name=name,
    )
    return layer(x)

  def conv(
    self,
    x,
    features: int,
    kernel: tuple[int, int],
    *,
    name: str,
    free: bool = False,
    inputs: Moments = ELU,
    before_norm: bool = False,
    own_init=nn.initializers.lecun_normal(),  # noqa: B008
    **fields,
  ):
    """Convolution over (H, W) with `nn.Conv`'s further `fields`; as `dense` otherwise."""
    layer = self._affine(
      nn.Conv,
      kernel[0] * kernel[1] * x.shape[-1],
      free,
      inputs,
      before_norm,
      own_init,
      features=features,
      kernel_size=kernel,
      name=name,
      **fields,
    )
    return layer(x)

  def passthrough_dense(self, y, features: int, *, name: str, own_init=None):
    """Y V with V of either sign, for y affine in the image; no bias.

    What makes an input-convex network expressive in depth (Amos, Xu and Kolter 2017).
    """
    init = own_init or nn.initializers.lecun_normal()
    return nn.Dense(features, use_bias=False, dtype=self.dtype, kernel_init=init, name=name)(y)

  def head(self, x, classes: int, *, name: str, own_init=nn.initializers.lecun_normal()):  # noqa: B008
    """The classifier; logits are float32 at least. `shift` needs two classes; one logit is clamped."""
    constraint = self.head_constraint
    if classes == 1 and constraint == "shift":
      constraint = "clamp"
    init = constrained(own_init, constraint)
    layer = nn.Dense(classes, dtype=self.dtype, kernel_init=init, name=name)
    return layer(x).astype(jnp.promote_types(self.dtype, jnp.float32))

  def norm(self, x, own: str, *, name: str, train: bool, free: bool = False, epsilon=1e-6):
    """The twin's normalisation, or the architecture's `own` ("layer", "batch").

    LayerNorm's `epsilon` is the architecture's; BatchNorm has 1e-5, and running
    averages that keep 0.9 a step (torch's momentum 0.1). `free` leaves the scale's
    sign open: right only where the norm acts on the affine part of the image.
    """
    scale_init = constrained(nn.initializers.ones, FREE if free else self.constraint)
    if (self.norm_kind or own) == "layer":
      layer = nn.LayerNorm(epsilon, dtype=self.dtype, scale_init=scale_init, name=name)
      return layer(x)
    layer = nn.BatchNorm(
      use_running_average=not train,
      momentum=0.9,
      epsilon=1e-5,
      dtype=self.dtype,
      scale_init=scale_init,
      axis_name=self.axis_name,
      name=name,
    )
    return layer(x)


def base(**fields) -> Parts:
  """The published architecture."""
  return Parts("base", **fields)


def ioc(constraint: str, passthrough: bool, **fields) -> Parts:
  """Exactly convex at inference: see `design` in the README and `certify`."""
  return Parts(
    "ioc",
    constraint=constraint,
    head_constraint="shift",
    activation=nn.elu,
    norm_kind="batch",
    principled=True,
    passthrough=passthrough,
    **fields,
  )


def paper(constraint: str, **fields) -> Parts:
  """What the report and the 2021 paper did: ELU and weights >= 0, own norm kept."""
  return Parts(
    "paper", constraint=constraint, head_constraint=constraint, activation=nn.elu, **fields
  )


PARTS = ("base", "ioc", "paper")


def make_parts(name: str, constraint: str, passthrough: bool, **fields) -> Parts:
  """The `Parts` called `name`; `fields` are `dtype` and `axis_name`."""
  if name == "base":
    return base(**fields)
  if name == "ioc":
    return ioc(constraint, passthrough, **fields)
  if name == "paper":
    return paper(constraint, **fields)
  raise ValueError(f"model.parts is {name!r}; allowed: {', '.join(PARTS)}")
