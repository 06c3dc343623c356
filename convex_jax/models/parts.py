"""The parts that make a twin: one text per architecture, three sets of ingredients.

| twin    | activation | norm                    | weights past the first affine part |
|---------|------------|-------------------------|------------------------------------|
| `base`  | its own    | its own                 | free                               |
| `ioc`   | ELU        | BatchNorm, scale >= 0   | >= 0: convex at inference          |
| `paper` | ELU        | its own, scale >= 0     | >= 0, as in the report             |

Biases are free in every twin, and so is an affine map of the image before the first
activation (`free=True`): the composition stays affine in the image whatever its signs.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from convex_jax.models.constraints import FREE, PENALISED, constrained
from convex_jax.models.fast_forms import conv_general_dilated, resize
from convex_jax.models.initializers import ELU, Moments, log_normal, log_normal_mean
from convex_jax.models.layers import (
  Affine,
  BatchNorm,
  Conv,
  Dense,
  LayerNorm,
  LinearMap,
  Scale,
  elu,
)

Activation = Callable[[jax.Array], jax.Array]
Rate = Annotated[float, "a probability, from 0 to below 1"]  # Of dropout.

LECUN_NORMAL = nn.initializers.lecun_normal()


@dataclasses.dataclass(frozen=True)
class Twin:
  """What distinguishes one twin of an architecture from another."""

  name: str
  constraint: str = FREE  # Of every weight past the first affine part.
  head_constraint: str = FREE  # Of the classifier's weights.
  activation: Activation | None = None  # None: the architecture's own.
  norm_kind: str | None = None  # "batch", "layer", "affine"; None: the architecture's own.
  principled: bool = False  # Log-normal initial weights; LeCun normal where they are free.
  branch_scales: bool = False  # Learnt scales on residual branches.
  passthrough: bool = False  # Free-sign maps to later layers of y, affine in the image.
  gates: bool = True  # Products of features with gates computed from features: never convex.
  widened: bool = False  # The 2021 paper's convex All-CNN: twice the first convolution.


@dataclasses.dataclass(frozen=True)
class HeadSpec:
  """What the classifier is."""

  depth: int = 0  # Hidden layers; 0: linear, as published.
  width: int = 256  # Units of each hidden layer.
  one_logit: bool = False  # With two classes: logits (y, 0), with a single output y.
  twin: Twin | None = None  # Where the head differs from the trunk.


@dataclasses.dataclass(frozen=True)
class Numerics:
  """How the network is computed; none of it changes what the network is."""

  dtype: Any = jnp.float32  # Of the computation; parameters are always float32.
  remat: bool = False  # Recompute blocks in the backward pass: less memory, a third more time.
  convolve: Callable[..., jax.Array] = conv_general_dilated  # `lax`'s, in a faster form.
  axis_name: str | None = None  # BatchNorm's mapped axis; only under `jax.pmap`.


@dataclasses.dataclass(frozen=True)
class Parts:
  """The layers of a twin. Its methods are called inside a model's `nn.compact` method.

  `dense`, `branch_dense` and `conv` take further fields of their layer, and

  - `free`: either sign; right for an affine map of the image only;
  - `inputs`: the statistics of the input, `ELU` activations (default) or `NORMED` features;
  - `before_norm`: whether a BatchNorm follows;
  - `own_init`: the architecture's initial weights.

  The last three matter to the initial values only.
  """

  twin: Twin = Twin("base")
  head_spec: HeadSpec = HeadSpec()
  numerics: Numerics = Numerics()

  def act(self, own: Activation) -> Activation:
    """This twin's activation, or the architecture's `own`."""
    return self.twin.activation or own

  def block(self, cls: type[nn.Module]) -> type[nn.Module]:
    """The block class, wrapped in `nn.remat` if `remat`; `__call__(x, train, ...)`."""
    return nn.remat(cls, static_argnums=(2,)) if self.numerics.remat else cls

  def _affine(
    self,
    layer: type[nn.Module],
    fan_in: int,
    free: bool = False,
    inputs: Moments = ELU,
    before_norm: bool = False,
    own_init: Callable[..., Any] = LECUN_NORMAL,
    **fields,
  ):
    """A dense or convolution layer with a tagged kernel and a bias that matches it."""
    kernel_init, bias_init = own_init, nn.initializers.zeros
    if self.twin.principled and free:  # The log-normal weights after it rely on variance 1.
      kernel_init = LECUN_NORMAL
    elif self.twin.principled:
      kernel_init = log_normal(inputs)
      if not before_norm:  # A norm removes the mean by itself.
        bias = -fan_in * log_normal_mean(fan_in, inputs) * inputs.mean
        bias_init = nn.initializers.constant(bias)
    kernel_init = constrained(kernel_init, FREE if free else self.twin.constraint)
    dtype: Any = self.numerics.dtype
    return layer(dtype=dtype, kernel_init=kernel_init, bias_init=bias_init, **fields)

  def dense(self, x, features: int, *, name: str, **fields):
    """x W + b along `axis` (see `Dense`), with W constrained unless `free`."""
    fan_in = x.shape[fields.get("axis", -1)]
    return self._affine(Dense, fan_in, features=features, name=name, **fields)(x)

  def branch_dense(self, x, features: int, *, name: str, initial_scale: float = 1.0, **fields):
    """The last layer of a branch that is added to others: in `ioc` with a learnt scale >= 0.

    Starting it from 1 learns faster than from 0.1, as measured in a Mixer of 4 blocks.
    """
    if self.twin.branch_scales:
      fields |= dict(initial_scale=initial_scale, scale_constraint=self.twin.constraint)
    return self.dense(x, features, name=name, **fields)

  def conv(self, x, features: int, side: int, *, name: str, stride: int = 1, **fields):
    """Convolution over (H, W), an `nn.Conv`, with its kernel constrained unless `free`."""
    fan_in = side * side * x.shape[-1] // fields.get("feature_group_count", 1)
    fields |= dict(kernel_size=(side, side), strides=(stride, stride))
    fields |= dict(conv_general_dilated=self.numerics.convolve)
    return self._affine(Conv, fan_in, features=features, name=name, **fields)(x)

  def passthrough_dense(self, y, features: int, *, name: str):
    """y V with V of either sign, for y affine in the image; no bias.

    It makes an input-convex network expressive in depth (Amos, Xu and Kolter 2017).
    """
    return LinearMap(features, use_bias=False, dtype=self.numerics.dtype, name=name)(y)

  def passthrough_scale(self, y, *, name: str, axis: int = -1):
    """V y with V diagonal: `passthrough_dense` between layers of one width, at no cost."""
    return Scale(self.numerics.dtype, axis, name=name)(y)

  def passthrough_map(self, y_BxHxWxE, like_BxIxJxD, *, name: str):
    """`passthrough_dense` of a map y, average-pooled to the shape of another map."""
    (h, w), (i, j) = y_BxHxWxE.shape[1:3], like_BxIxJxD.shape[1:3]
    if h % i or w % j:
      y_BxIxJxE = resize(y_BxHxWxE, (i, j))
    else:
      # Not `nn.avg_pool`: a wide window makes its gradient 100 times slower on XLA's CPU backend.
      y_BxIxJxE = y_BxHxWxE.reshape(-1, i, h // i, j, w // j, y_BxHxWxE.shape[-1]).mean((2, 4))
    return self.passthrough_dense(y_BxIxJxE, like_BxIxJxD.shape[-1], name=name)

  def head(self, x, classes: int, *, train: bool, name: str, own_init=LECUN_NORMAL):
    """The classifier on features (B, D): linear, or `Head` where it has hidden layers."""
    if self.head_spec.depth:
      return Head(classes, self, name=name)(x, train)
    return self.linear_head(x, classes, name=name, own_init=own_init)

  def linear_head(self, x, classes: int, *, name: str, own_init=LECUN_NORMAL):
    """Logits (B, classes), in float32 at least; (y, 0) with `one_logit`.

    Both of those are convex, and so is their difference: that of a convex binary classifier.
    """
    one, dtype = self.head_spec.one_logit, self.numerics.dtype
    constraint, is_alone = self.twin.head_constraint, one or classes == 1
    if is_alone and constraint == "shift":  # It moves a class along with others.
      constraint = "clamp"
    if not is_alone and constraint == PENALISED:  # `shift` would make it >= 0 at no cost.
      constraint = FREE
    init = constrained(own_init, constraint)
    y_BxK = LinearMap(1 if one else classes, dtype=dtype, kernel_init=init, name=name)(x)
    y_BxK = y_BxK.astype(jnp.promote_types(dtype, jnp.float32))
    return jnp.pad(y_BxK, ((0, 0), (0, 1))) if one else y_BxK

  def dense_readout(self, x_BxD, hidden_BxF: Sequence[jax.Array], *, train: bool, width: int):
    """Concatenates x and the normalised hidden units as input to the head.

    The result is divided by the root of the number of units in `width`s, so that Adam's first
    steps, equally long for each of many weights, move the logits little.
    """
    hidden_BxG = jnp.concatenate(hidden_BxF, axis=-1)
    hidden_BxG = self.norm(hidden_BxG, "layer", train=train, name="norm_hidden")
    x_BxF = jnp.concatenate([x_BxD, hidden_BxG], axis=-1)
    return x_BxF * math.sqrt(width / x_BxF.shape[-1])

  def dropout(self, x, rate: float, train: bool, whole: int | None = None):
    """Zeroes a fraction `rate` of values and divides the others by 1 - rate; in training only.

    With `whole`, the axis of examples, it drops all values of an example together: stochastic
    depth (Huang et al. 2016).
    """
    axes = () if whole is None else tuple(i for i in range(x.ndim) if i != whole)
    return nn.Dropout(rate, broadcast_dims=axes)(x, deterministic=not train)

  def norm(
    self, x, own: str, *, name: str, train: bool, free=False, epsilon=0.0, momentum: float = 0.9
  ):
    """The twin's normalisation, or the architecture's `own` ("layer", "batch").

    `epsilon` (0: by default) and `momentum` (the fraction of the running averages that a step
    keeps: 1 minus torch's) apply to the architecture's own kind; otherwise LayerNorm has epsilon
    1e-6, BatchNorm 1e-5 and momentum 0.9. `free` leaves the sign of the scale open: right only
    where the norm acts on the affine part of the image.
    """
    numerics, kind = self.numerics, self.twin.norm_kind or own
    scale_init = constrained(nn.initializers.ones, FREE if free else self.twin.constraint)
    fields: Any = dict(dtype=numerics.dtype, scale_init=scale_init, name=name)
    if kind != own:
      epsilon, momentum = 0.0, 0.9
    if kind == "layer":
      return LayerNorm(epsilon or 1e-6, **fields)(x)
    if kind == "affine":
      return Affine(**fields)(x)
    fields |= dict(momentum=momentum, epsilon=epsilon or 1e-5, axis_name=numerics.axis_name)
    return BatchNorm(not train, **fields)(x)


class Head(nn.Module):
  """Hidden layers (dense, BatchNorm, activation) and logits, on features (B, D).

  Where it differs from the trunk before it (`HeadSpec.twin`), the features are its input: its
  first matrix is free and the logits are convex in the features.
  """

  classes: int
  parts: Parts

  @nn.compact
  def __call__(self, x_BxD: jax.Array, train: bool = False) -> jax.Array:
    spec, y_BxD = self.parts.head_spec, None
    parts = dataclasses.replace(self.parts, twin=spec.twin or self.parts.twin)
    for i in range(spec.depth):
      first = i == 0 and spec.twin is not None
      x_BxD = parts.dense(x_BxD, spec.width, free=first, before_norm=True, name=f"dense_{i}")
      if y_BxD is not None:
        x_BxD += parts.passthrough_dense(y_BxD, spec.width, name=f"passthrough_{i}")
      x_BxD = parts.norm(x_BxD, "batch", train=train, name=f"norm_{i}")
      y_BxD = x_BxD if first and parts.twin.passthrough else y_BxD
      x_BxD = parts.act(nn.relu)(x_BxD)
    return parts.linear_head(x_BxD, self.classes, name="logits")


def ioc(constraint: str = "clamp", **changes) -> Twin:
  """The twin that is exactly convex at inference; `changes` to fields of `Twin`."""
  twin = Twin("ioc", constraint, "shift", activation=elu, norm_kind="batch", gates=False)
  learning = dict(principled=True, branch_scales=True, passthrough=True)
  return dataclasses.replace(twin, **(learning | changes))


def paper(constraint: str = "clamp") -> Twin:
  """The report's and the 2021 paper's twin: ELU and weights >= 0, own norm and gates kept."""
  return Twin("paper", constraint, head_constraint=constraint, activation=elu, widened=True)


TWINS = ("base", "ioc", "paper")
NORMS = {"twin": {}, "own": {"norm_kind": None}}
NORMS |= {kind: {"norm_kind": kind} for kind in ("batch", "layer", "affine")}
GATES = ("twin", "static")
CONVEX_FROM = ("image", "head")


def make_parts(
  name: str,
  constraint: str = "clamp",
  *,
  passthrough: bool = True,
  log_normal_init: bool = True,
  branch_scales: bool = True,
  norm: str = "twin",
  gates: str = "twin",
  convex_from: str = "image",
  head_depth: int = 0,
  head_width: int = 256,
  one_logit: bool = False,
  common_penalty: float = 0.0,
  **numerics,
) -> Parts:
  """The `Parts` of a twin: `make_parts("ioc", "clamp")`. Arguments are keys of `config.model`.

  Args:
    name: "base", "ioc" or "paper".
    constraint: of the weights past the first affine part: "clamp", "exponentiate" or "penalised".
    passthrough: free-sign maps of the image's affine part, in `ioc` alone.
    log_normal_init: initial weights that suit a convex network, in `ioc` alone.
    branch_scales: learnt scales >= 0 on residual branches, in `ioc` alone.
    norm: "twin", "own" (the architecture's), or a kind: "batch", "layer", "affine".
    gates: "twin", or "static": learnt weights, or none, in place of gates made of features.
    convex_from: "image", or "head": the twin is the head's, on a trunk as published.
    head_depth: hidden layers of the head.
    head_width: units of each.
    one_logit: whether the network has two classes and a single output.
    common_penalty: if > 0, the weights of `base` that are >= 0 in `ioc` are tagged as penalised.
    **numerics: fields of `Numerics`.

  Raises:
    ValueError: an unknown `name`.
  """
  if name not in TWINS:
    raise ValueError(f"Unknown twin {name!r}; expected one of {', '.join(TWINS)}")
  choices = dict(passthrough=passthrough, principled=log_normal_init, branch_scales=branch_scales)
  twin = {"base": Twin("base"), "ioc": ioc(constraint, **choices), "paper": paper(constraint)}[name]
  twin = dataclasses.replace(twin, **NORMS[norm], gates=twin.gates and gates == "twin")
  if common_penalty and name == "base":
    twin = dataclasses.replace(twin, constraint=PENALISED, head_constraint=PENALISED)
  head_spec = HeadSpec(head_depth, head_width, one_logit)
  if convex_from == "head":
    head_spec, twin = dataclasses.replace(head_spec, twin=twin), Twin("base")
  return Parts(twin, head_spec, Numerics(**numerics))
