"""A finished run, anywhere: `run = convex_jax.load("runs/x")`.

This needs neither the data, nor the devices it was trained on, nor the config's code: the
workdir's config.json has everything.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict, FrozenConfigDict

from convex_jax.data.preprocess import preparation
from convex_jax.models import catalog
from convex_jax.models.variables import apply
from convex_jax.runs.checkpoints import read_weights
from convex_jax.runs.workdir import Workdir


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
  """A run's config, weights and figures, and its network at inference.

  The arrays of `params` and `stats` are read-only: predictions use copies of them on the
  device. To change weights, call `apply` with others.
  """

  workdir: str
  config: Any  # A FrozenConfigDict.
  step: int
  params: Any
  stats: Any
  class_names: tuple[str, ...]
  image_shape: tuple[int, int, int]  # (H, W, C) of the images it takes, px.
  mean: tuple[float, ...]
  std: tuple[float, ...]

  @classmethod
  def described(cls, workdir: str, description: dict[str, Any], step: int, weights: Any) -> "Run":
    """The run of a config.json's content, with the weights {"params", "stats"} of a step."""
    config = FrozenConfigDict(ConfigDict(description["config"]))
    names = ("class_names", "image_shape", "mean", "std")  # More may come with a later version.
    about: dict[str, Any] = {name: tuple(description["data"][name]) for name in names}
    return cls(workdir, config, step, **jax.tree.map(_read_only, weights), **about)

  @property
  def weights(self) -> dict[str, Any]:
    """{"params", "stats"}, as `apply` takes them."""
    return {"params": self.params, "stats": self.stats}

  @functools.cached_property
  def network(self) -> Callable[[jax.Array], jax.Array]:
    """Images (B, H, W, C), pixel values 0..255, to logits (B, K): what is to be convex."""
    weights = self.weights
    return lambda image_BxHxWxC: self.apply(weights, image_BxHxWxC)

  def apply(self, weights: Any, image_BxHxWxC: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """`network` with other weights {"params", "stats"}, or computed in another dtype."""
    model = catalog.build(self.config.model, classes=len(self.class_names), dtype=dtype)
    prepare = preparation(self.config.data, self.mean, self.std, dtype)
    return apply(model, weights, prepare(image_BxHxWxC))

  @functools.cached_property
  def _jitted(self):
    return jax.jit(self.network)

  def logits(self, images_BxHxWxC: Any, batch_size: int = 256) -> np.ndarray:
    """Logits (B, K) float32 of uint8 images (B, H, W, C), a batch at a time.

    Raises `ValueError` when the images are not those of `image_shape`.
    """
    images = np.asarray(images_BxHxWxC)
    if images.shape[1:] != self.image_shape or images.dtype != np.uint8:
      raise ValueError(
        f"images are {images.dtype} of shape {images.shape}; expected uint8 of shape"
        f" (any, {', '.join(map(str, self.image_shape))}), pixels 0 to 255"
      )
    out = np.empty((len(images), len(self.class_names)), np.float32)
    for start in range(0, len(images), batch_size):
      batch = images[start : start + batch_size]
      # One shape for every batch, so that one program is compiled.
      filled = np.zeros((batch_size, *self.image_shape), np.uint8)
      filled[: len(batch)] = batch
      out[start : start + len(batch)] = np.asarray(self._jitted(filled))[: len(batch)]
    return out

  def predict(self, images_BxHxWxC: Any) -> np.ndarray:
    """Class indices (B,) of uint8 images; names are in `class_names`."""
    return self.logits(images_BxHxWxC).argmax(-1)

  def metrics(self, kind: str | None = None) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, all or of one `kind`: "train", "eval", "final"."""
    return Workdir(self.workdir).rows(kind)

  @property
  def certificate(self) -> dict[str, Any] | None:
    """The content of certificate.json, or None where the run has none."""
    return Workdir(self.workdir).certificate()

  def __repr__(self) -> str:
    count = optax.tree.size(self.params)
    model = self.config.model
    return (
      f"Run({self.workdir!r}: {model.name} {model.size}, twin {model.parts!r}, on"
      f" {self.config.data.name}, {count:,} parameters, step {self.step})"
    )


def load(workdir: str, step: int | str = "latest", weights: str = "auto") -> Run:
  """The run saved in a workdir.

  Args:
    workdir: its folder.
    step: the checkpoint: a step, "latest" or "best" (in accuracy).
    weights: "ema", "raw", or "auto": averaged weights if the run averaged them.

  Raises:
    UserError: (a `ValueError`) there is no such run or checkpoint, or it is damaged.
  """
  folder = Workdir(workdir)
  saved = folder.description()
  chosen, tree = read_weights(folder.checkpoints, step, weights)
  return Run.described(folder.path, saved, chosen, tree)


def _read_only(array: Any) -> np.ndarray:
  array = np.asarray(array).view()
  array.flags.writeable = False
  return array
