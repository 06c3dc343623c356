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
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from convex_jax.models.constraints import FREE, constrained
from convex_jax.models.fast_forms import along_first, along_last, conv_general_dilated
from convex_jax.models.initializers import ELU, Moments, log_normal, log_normal_mean

Activation = Callable[[jax.Array], jax.Array]


@jax.custom_jvp
def elu(x: jax.Array) -> jax.Array:
  """ELU of alpha 1 (Clevert et al. 2016): x where x > 0, else exp(x) - 1.

  `jax.nn.elu` takes expm1, whose form near 0 costs as much again; here a float32 close
  below 0 is off by at most 6e-8.
  """
  return jnp.where(x > 0, x, jnp.exp(jnp.where(x > 0, 0, x)) - 1)


@elu.defjvp
def _elu_jvp(primals, tangents):
  """The slope is min(y, 0) + 1: y is kept in any case, as the next layer's input."""
  y = elu(primals[0])
  return y, (jnp.minimum(y, 0) + 1) * tangents[0]


class Dense(nn.Module):
  """x W + b along the last axis, or W^T x + b along the first (`axis` = 0).

  With `initial_scale` s (x W + b), a learnt s >= 0 for each feature. The scale multiplies
  W and b, not the (far larger) result: it costs nothing.
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
    if self.axis == -1:
      y = along_last(x, kernel)
      return y if bias is None else y + bias
    y = along_first(kernel, x)
    return y if bias is None else y + _upright(bias, y.ndim)


def _upright(v: jax.Array, ndim: int) -> jax.Array:
  """A vector along the first of `ndim` axes."""
  return v.reshape(-1, *[1] * (ndim - 1))


class Scale(nn.Module):
  """v x, a learnt v of either sign for each feature (along `axis`), 1 at first."""

  dtype: Any
  axis: int = -1

  @nn.compact
  def __call__(self, x):
    scale = self.param("scale", nn.initializers.ones, (x.shape[self.axis],))
    x, scale = promote_dtype(x, scale, dtype=self.dtype)
    return (scale if self.axis == -1 else _upright(scale, x.ndim)) * x


class Affine(nn.Module):
  """v x + b for each feature: a norm without statistics (Touvron et al. 2021, ResMLP, 3)."""

  dtype: Any
  scale_init: Callable[..., Any]

  @nn.compact
  def __call__(self, x):
    scale = self.param("scale", self.scale_init, (x.shape[-1],))
    bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
    x, scale, bias = promote_dtype(x, scale, bias, dtype=self.dtype)
    return scale * x + bias


@dataclasses.dataclass(frozen=True)
class Parts:
  """A set of ingredients. Its methods act inside a model's `nn.compact` call."""

  name: str
  constraint: str = FREE  # Of every weight past the first affine part.
  head_constraint: str = FREE  # Of the classifier's weights.
  activation: Activation | None = None  # None: the architecture's own.
  norm_kind: str | None = None  # "batch", "layer", "affine"; None: the architecture's own.
  principled: bool = False  # Log-normal initialisation; LeCun's of what is free.
  branch_scales: bool = False  # Learnt scales on residual branches.
  passthrough: bool = False  # Free-sign maps of y, affine in the image, to later layers.
  gates: bool = True  # Products of features and gates made of features: never convex.
  widened: bool = False  # The 2021 paper's convex All-CNN: twice the first convolution.
  classifier: "Parts | None" = None  # Of the head, where it is of another kind.
  head_depth: int = 0  # Hidden layers of the head; 0: linear, as published.
  head_width: int = 256  # Units of each.
  one_logit: bool = False  # Of two classes: logits (y, 0), with a single output y.
  remat: bool = False  # Recompute a block in the backward pass: less memory, a third more time.
  convolve: Callable[..., jax.Array] = conv_general_dilated  # `lax`'s, in a faster form.
  dtype: Any = jnp.float32  # Of the computation; parameters are float32 always.
  axis_name: str | None = None  # BatchNorm's mapped axis; only under `jax.pmap`.

  def act(self, own: Activation) -> Activation:
    """This twin's activation, or the architecture's `own`."""
    return self.activation or own

  def block(self, cls: type[nn.Module]) -> type[nn.Module]:
    """A block's class, rematerialised where asked; its call takes x, train, and what it likes."""
    return nn.remat(cls, static_argnums=(2,)) if self.remat else cls

  def _affine(self, layer, fan_in, free, inputs, before_norm, own_init, **fields):
    """Fields of a dense or conv layer: dtype, tagged kernel, matching bias."""
    kernel_init, bias_init = own_init, nn.initializers.zeros
    if self.principled and free:  # The log-normal weights after it count on a variance of 1.
      kernel_init = nn.initializers.lecun_normal()
    elif self.principled:
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
    **fields,
  ):
    """X W + b along `axis` (see `Dense`); W >= 0 where the twin asks, unless `free`.

    `inputs` says what x is (`ELU` activations or `NORMED` features) and
    `before_norm` whether a BatchNorm follows: both matter to the initial values only.
    """
    layer = self._affine(
      Dense,
      x.shape[fields.get("axis", -1)],
      free,
      inputs,
      before_norm,
      own_init,
      features=features,
      name=name,
      **fields,
    )
    return layer(x)

  def branch_dense(
    self,
    x,
    features: int,
    *,
    name: str,
    inputs: Moments = ELU,
    own_init=nn.initializers.lecun_normal(),  # noqa: B008
    initial_scale: float = 1.0,
    **fields,
  ):
    """The last layer of a branch that is added to others: in `ioc` with a learnt scale >= 0.

    What to start it from was measured in a Mixer of 4 blocks: 1 learns faster than 0.1.
    """
    if not self.branch_scales:
      return self.dense(x, features, inputs=inputs, own_init=own_init, name=name, **fields)
    layer = self._affine(
      Dense,
      x.shape[fields.get("axis", -1)],
      False,
      inputs,
      False,
      own_init,
      features=features,
      scale_constraint=self.constraint,
      initial_scale=initial_scale,
      name=name,
      **fields,
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
      kernel[0] * kernel[1] * x.shape[-1] // fields.get("feature_group_count", 1),
      free,
      inputs,
      before_norm,
      own_init,
      features=features,
      kernel_size=kernel,
      conv_general_dilated=self.convolve,
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

  def passthrough_scale(self, y, *, name: str, axis: int = -1):
    """V y with V diagonal: as `passthrough_dense` between layers of one width, for nothing."""
    return Scale(self.dtype, axis, name=name)(y)

  def passthrough_map(self, y_BxHxWxE, like_BxIxJxD, *, name: str):
    """`passthrough_dense` of a map y, average-pooled to the shape of another map."""
    (h, w), (i, j) = y_BxHxWxE.shape[1:3], like_BxIxJxD.shape[1:3]
    if h % i or w % j:
      shape = (len(y_BxHxWxE), i, j, y_BxHxWxE.shape[-1])
      y_BxIxJxE = jax.image.resize(y_BxHxWxE, shape, "linear", antialias=True)
    else:
      # Not `nn.avg_pool`: a wide window's gradient takes XLA's CPU backend 100 times as long.
      y_BxIxJxE = y_BxHxWxE.reshape(-1, i, h // i, j, w // j, y_BxHxWxE.shape[-1]).mean((2, 4))
    return self.passthrough_dense(y_BxIxJxE, like_BxIxJxD.shape[-1], name=name)

  def head(
    self,
    x,
    classes: int,
    *,
    train: bool,
    name: str,
    own_init=nn.initializers.lecun_normal(),  # noqa: B008
  ):
    """The classifier on features (B, D): linear, or `Head` where the head is deeper."""
    if self.head_depth:
      return Head(classes, self, name=name)(x, train)
    return self.linear_head(x, classes, name=name, own_init=own_init)

  def linear_head(self, x, classes: int, *, name: str, own_init=nn.initializers.lecun_normal()):  # noqa: B008
    """Logits, float32 at least; with `one_logit` (y, 0).

    Both are convex then, and so is their difference: that of a convex binary classifier.
    """
    outputs, constraint = (1 if self.one_logit else classes), self.head_constraint
    if outputs == 1 and constraint == "shift":  # Needs another class to be moved along.
      constraint = "clamp"
    init = constrained(own_init, constraint)
    layer = nn.Dense(outputs, dtype=self.dtype, kernel_init=init, name=name)
    y_BxK = layer(x).astype(jnp.promote_types(self.dtype, jnp.float32))
    return jnp.pad(y_BxK, ((0, 0), (0, 1))) if self.one_logit else y_BxK

  def dense_readout(self, x_BxD, hidden_BxF: Sequence[jax.Array], *, train: bool, width: int):
    """What a head sees that sees hidden units besides x: both, the units behind a norm.

    Divided by the root of their number in `width`s, so that Adam's first steps, of one length
    for each of many weights, move the logits little.
    """
    hidden_BxG = jnp.concatenate(hidden_BxF, axis=-1)
    hidden_BxG = self.norm(hidden_BxG, "layer", train=train, name="norm_hidden")
    x_BxF = jnp.concatenate([x_BxD, hidden_BxG], axis=-1)
    return x_BxF * math.sqrt(width / x_BxF.shape[-1])

  def dropout(self, x, rate: float, train: bool, whole: int | None = None):
    """Zeroes a share `rate` of values, divides the others by 1 - rate; in training only.

    Given the axis of examples, `whole`, all of an example's values at once: stochastic depth
    (Huang et al. 2016).
    """
    axes = () if whole is None else tuple(i for i in range(x.ndim) if i != whole)
    return nn.Dropout(rate, broadcast_dims=axes)(x, deterministic=not train)

  def norm(
    self,
    x,
    own: str,
    *,
    name: str,
    train: bool,
    free: bool = False,
    epsilon: float | None = None,
    momentum: float = 0.9,
  ):
    """The twin's normalisation, or the architecture's `own` ("layer", "batch").

    `epsilon` and `momentum` (the share of running averages that a step keeps; 1 minus
    torch's) are of the own kind; otherwise LayerNorm has 1e-6, BatchNorm 1e-5 and 0.9.
    `free` leaves the scale's sign open: right only where the norm acts on the affine part
    of the image.
    """
    scale_init = constrained(nn.initializers.ones, FREE if free else self.constraint)
    kind = self.norm_kind or own
    if kind != own:
      epsilon, momentum = None, 0.9
    if kind == "layer":
      layer = nn.LayerNorm(epsilon or 1e-6, dtype=self.dtype, scale_init=scale_init, name=name)
      return layer(x)
    if kind == "affine":
      return Affine(self.dtype, scale_init, name=name)(x)
    layer = nn.BatchNorm(
      use_running_average=not train,
      momentum=momentum,
      epsilon=epsilon or 1e-5,
      dtype=self.dtype,
      scale_init=scale_init,
      axis_name=self.axis_name,
      name=name,
    )
    return layer(x)


def cell_means(x_BxHxWxD: jax.Array, cells: int) -> jax.Array:
  """Means over n x m parts of a map, (B, n m D), where n = gcd(cells, H), m = gcd(cells, W).

  That is `cells` where they share out a side evenly, else fewer.
  """
  batch, height, width, features = x_BxHxWxD.shape
  n, m = math.gcd(cells, height), math.gcd(cells, width)
  means = x_BxHxWxD.reshape(batch, n, height // n, m, width // m, features).mean(axis=(2, 4))
  return means.reshape(batch, -1)


class Head(nn.Module):
  """Hidden layers (dense, BatchNorm, activation) and logits, on features (B, D).

  Where the trunk before it is of another kind (`Parts.classifier`), the features are its
  input: its first matrix is free and the logits are convex in the features.
  """

  classes: int
  trunk: Parts

  @nn.compact
  def __call__(self, x_BxD: jax.Array, train: bool = False) -> jax.Array:
    parts, y_BxD = self.trunk.classifier or self.trunk, None
    for i in range(self.trunk.head_depth):
      first = i == 0 and self.trunk.classifier is not None
      x_BxD = parts.dense(
        x_BxD, self.trunk.head_width, free=first, before_norm=True, name=f"dense_{i}"
      )
      if y_BxD is not None:
        x_BxD += parts.passthrough_dense(y_BxD, self.trunk.head_width, name=f"passthrough_{i}")
      x_BxD = parts.norm(x_BxD, "batch", train=train, name=f"norm_{i}")
      y_BxD = x_BxD if first and parts.passthrough else y_BxD
      x_BxD = parts.act(nn.relu)(x_BxD)
    return parts.linear_head(x_BxD, self.classes, name="logits")


def base(**fields) -> Parts:
  """The published architecture."""
  return Parts("base", **fields)


def ioc(constraint: str, **fields) -> Parts:
  """Exactly convex at inference."""
  of_ioc = {"norm_kind": "batch", "principled": True, "branch_scales": True, "passthrough": True}
  return Parts(
    "ioc",
    constraint=constraint,
    head_constraint="shift",
    activation=elu,
    gates=False,
    **of_ioc | fields,
  )


def paper(constraint: str, **fields) -> Parts:
  """What the report and the 2021 paper did: ELU and weights >= 0, own norm and gates kept."""
  return Parts(
    "paper",
    constraint=constraint,
    head_constraint=constraint,
    activation=elu,
    widened=True,
    **fields,
  )


PARTS = ("base", "ioc", "paper")
NORMS = {"twin": {}, "own": {"norm_kind": None}} | {
  kind: {"norm_kind": kind} for kind in ("batch", "layer", "affine")
}
CONVEX_FROM = ("image", "head")


def make_parts(
  name: str,
  constraint: str,
  passthrough: bool = True,
  log_normal_init: bool = True,
  branch_scales: bool = True,
  norm: str = "twin",
  convex_from: str = "image",
  **fields,
) -> Parts:
  """The `Parts` called `name`; `fields` are those of `Parts` from `head_depth` on.

  `passthrough`, `log_normal_init` and `branch_scales` are of `ioc` alone. `norm`: the twin's
  ("twin"), the architecture's ("own"), or a kind. With `convex_from` "head" the parts make
  the head alone, on a trunk as published.
  """
  if name not in PARTS:
    raise ValueError(f"model.parts is {name!r}; allowed: {', '.join(PARTS)}")
  if name == "base":
    parts = base(**NORMS[norm], **fields)
  elif name == "paper":
    parts = paper(constraint, **NORMS[norm], **fields)
  else:
    choice = {"passthrough": passthrough, "branch_scales": branch_scales}
    parts = ioc(constraint, principled=log_normal_init, **choice, **NORMS[norm], **fields)
  return parts if convex_from == "image" else base(classifier=parts, **fields)
