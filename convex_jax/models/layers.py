"""The layers that Flax lacks, or has in a slower form.

Dimension letters in names: B batch, H height, W width, C colour channels, S tokens,
D features, K classes.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from convex_jax.models.constraints import FREE, constrained
from convex_jax.models.fast_forms import along_first, along_last, gradient_once, materialize


@jax.custom_jvp
def elu(x: jax.Array) -> jax.Array:
  """ELU with alpha = 1 (Clevert et al. 2016): x where x > 0, else exp(x) - 1.

  `jax.nn.elu` uses expm1, whose accurate form near 0 doubles the cost; here a float32 value
  just below 0 is off by at most 6e-8.
  """
  return jnp.where(x > 0, x, jnp.exp(jnp.where(x > 0, 0, x)) - 1)


@elu.defjvp
def _elu_jvp(primals, tangents):
  """The slope is min(y, 0) + 1; y is kept anyway, as the next layer's input.

  Without `materialize` XLA keeps the exponential as well, and computes y once more from it: 0.75 GB in a
  DenseNet-BC at batch 64, and 3 to 5 % of the time of a step.
  """
  y = materialize(elu(primals[0]))
  return y, (jnp.minimum(y, 0) + 1) * tangents[0]


@jax.custom_jvp
def silu(x: jax.Array) -> jax.Array:
  """SiLU (Elfwing et al. 2018): x s(x), s the sigmoid."""
  return x * jax.nn.sigmoid(x)


@silu.defjvp
def _silu_jvp(primals, tangents):
  """The slope is s + x s (1 - s), s = (1 + tanh(x / 2)) / 2.

  Of that form XLA does not see that it is the sigmoid of the forward pass, which it would keep: a
  quarter of the memory of an EfficientNet's step, for 3 % of its time. Off by at most 5e-6.
  """
  (x,) = primals
  s = (1 + jnp.tanh(x / 2)) / 2
  return silu(x), (s + x * s * (1 - s)) * tangents[0]


class Layer(nn.Module):
  """A layer that is traced faster: without the initializers of the weights that it is given.

  Flax traces them in every `apply`, to compare shapes, which is nearly half of all tracing.
  """

  @nn.nowrap
  def param(self, name: str, init_fn: Callable[..., Any], *init_args, **init_kwargs) -> Any:
    """`nn.Module.param`; zeros show the shape where no weight can be created."""
    used = init_fn if self.is_mutable_collection("params") else nn.initializers.zeros
    return super().param(name, used, *init_args, **init_kwargs)


class Conv(Layer, nn.Conv):
  """Flax's `Conv`."""


class LinearMap(Layer, nn.Dense):
  """Flax's `Dense`."""


class LayerNorm(Layer, nn.LayerNorm):
  """Flax's `LayerNorm`."""


class BatchNorm(Layer):
  """a x + c for each feature (the last axis), a = scale / sqrt(var + epsilon), c = bias - a mean.

  Batch normalisation (Ioffe and Szegedy 2015, algorithms 1 and 2), with the variables of Flax's
  `BatchNorm`, which computes (x - mean) a + bias. Of that form XLA keeps x - mean for the backward
  pass, next to x: a quarter to a third of the memory of a DenseNet's step.
  """

  use_running_average: bool
  momentum: float
  epsilon: float
  dtype: Any
  scale_init: Callable[..., Any]
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x):
    features, examples = (x.shape[-1],), tuple(range(x.ndim - 1))
    running_mean = self.variable("batch_stats", "mean", jnp.zeros, features, jnp.float32)
    running_var = self.variable("batch_stats", "var", jnp.ones, features, jnp.float32)
    scale = self.param("scale", self.scale_init, features, jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, features, jnp.float32)
    mean, var = running_mean.value, running_var.value
    if not self.use_running_average:
      x = gradient_once(x)  # A sum of three terms, which XLA would compute again for each reader.
      wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
      mean, square = wide.mean(examples), (wide**2).mean(examples)
      if self.axis_name is not None and not self.is_initializing():
        mean, square = jax.lax.pmean((mean, square), self.axis_name)
      var = jnp.maximum(square - mean**2, 0)  # Rounding can make it negative.
      if not self.is_initializing():
        for average, new in ((running_mean, mean), (running_var, var)):
          average.value = self.momentum * average.value + (1 - self.momentum) * new
    a = scale * jax.lax.rsqrt(var + self.epsilon)
    return (x * a + (bias - mean * a)).astype(self.dtype)


class Dense(Layer):
  """x W + b along the last axis, or W^T x + b along the first (`axis` = 0).

  With `initial_scale`, every feature has a learnt scale s, constrained by `scale_constraint`:
  (x W + b) s. It multiplies W and b, not the far larger result, so it costs nothing.
  """

  features: int
  kernel_init: Callable[..., Any]
  bias_init: Callable[..., Any]
  dtype: Any
  axis: int = -1
  use_bias: bool = True
  initial_scale: float | None = None
  scale_constraint: str = FREE

  @nn.compact
  def __call__(self, x):
    kernel = self.param("kernel", self.kernel_init, (x.shape[self.axis], self.features))
    scale = bias = None
    if self.initial_scale is not None:
      initial = constrained(nn.initializers.constant(self.initial_scale), self.scale_constraint)
      scale = self.param("scale", initial, (self.features,))
      kernel = kernel * scale
    if self.use_bias:
      bias = self.param("bias", self.bias_init, (self.features,))
      bias = bias if scale is None else scale * bias
    x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
    y = along_last(x, kernel) if self.axis == -1 else along_first(kernel, x)
    return y if bias is None else y + _along(bias, self.axis, y.ndim)


def _along(v: jax.Array, axis: int, ndim: int) -> jax.Array:
  """A vector that broadcasts along the last (-1) or the first (0) of `ndim` axes."""
  return v if axis == -1 else v.reshape(-1, *[1] * (ndim - 1))


class Scale(Layer):
  """v x with a learnt v of either sign for each feature (along `axis`), initially 1."""

  dtype: Any
  axis: int = -1

  @nn.compact
  def __call__(self, x):
    scale = self.param("scale", nn.initializers.ones, (x.shape[self.axis],))
    x, scale = promote_dtype(x, scale, dtype=self.dtype)
    return _along(scale, self.axis, x.ndim) * x


class Affine(Layer):
  """v x + b for each feature: a norm without statistics (Touvron et al. 2021, ResMLP, 3)."""

  dtype: Any
  scale_init: Callable[..., Any]

  @nn.compact
  def __call__(self, x):
    scale = self.param("scale", self.scale_init, (x.shape[-1],))
    bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
    x, scale, bias = promote_dtype(x, scale, bias, dtype=self.dtype)
    return scale * x + bias


def cell_means(x_BxHxWxD: jax.Array, cells: int) -> jax.Array:
  """Means over an n x m grid of cells of a map, (B, n m D).

  n = gcd(cells, H) and m = gcd(cells, W): `cells` where it divides the side, else fewer.
  """
  batch, height, width, features = x_BxHxWxD.shape
  n, m = math.gcd(cells, height), math.gcd(cells, width)
  means = x_BxHxWxD.reshape(batch, n, height // n, m, width // m, features).mean(axis=(2, 4))
  return means.reshape(batch, -1)
