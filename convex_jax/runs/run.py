"""A finished run, anywhere: `run = convex_jax.load("runs/x")`.

Needs neither the data, nor the devices it was trained on, nor the config's code: what it
needs stands in the workdir's config.json.
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from convex_jax.runs import workdir as describe
from convex_jax import files
from convex_jax.models import catalog
from convex_jax.runs import metrics_file
from convex_jax.data.preprocess import preparation
from convex_jax.runs.checkpoints import read_weights
from convex_jax.errors import UserError
from convex_jax.models.variables import apply


@dataclasses.dataclass(frozen=True)
class Run:
  """A run's config, weights and figures, and its network at inference."""

  workdir: str
  config: Any  # A FrozenConfigDict.
  step: int
  params: Any
  stats: Any
  class_names: tuple[str, ...]
  image_shape: tuple[int, int, int]  # (H, W, C) of the images it takes, px.
  mean: tuple[float, ...]
  std: tuple[float, ...]

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
        f"images are {images.dtype} of shape {images.shape}; allowed: uint8 of shape"
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
    every = metrics_file.read_metrics(os.path.join(self.workdir, "metrics.jsonl"))
    return [row for row in every if kind in (None, row["kind"])]

  @property
  def certificate(self) -> dict[str, Any] | None:
    """The content of certificate.json, or None where the run has none."""
    path = os.path.join(self.workdir, "certificate.json")
    if not os.path.exists(path):
      return None
    try:
      return files.read_json(path, signed=False)
    except files.Damaged as error:
      raise UserError(
        f"{path} is damaged: {error}\n  python -m convex_jax.certify --workdir={self.workdir}"
        " writes it anew"
      ) from error

  def __repr__(self) -> str:
    count = sum(np.size(leaf) for leaf in jax.tree.leaves(self.params))
    model = self.config.model
    return (
      f"Run({self.workdir!r}: {model.name} {model.size}, parts {model.parts!r}, on"
      f" {self.config.data.name}, {count:,} parameters, step {self.step})"
    )


def load(workdir: str, step: int | str = "latest", weights: str = "auto") -> Run:
  """The run in a workdir, at a checkpoint's `step`: a number, "latest" or "best".

  `weights`: "ema", "raw", or "auto", averaged weights where the run averaged them.
  Raises `UserError`, a `ValueError`, when there is no such run or checkpoint.
  """
  workdir = os.path.expanduser(workdir)
  saved = describe.read(workdir)
  chosen, tree = read_weights(os.path.join(workdir, "checkpoints"), step, weights)
  about = saved["data"]
  return Run(
    workdir=workdir,
    config=FrozenConfigDict(ConfigDict(saved["config"])),
    step=chosen,
    params=tree["params"],
    stats=tree["stats"],
    class_names=tuple(about["class_names"]),
    image_shape=tuple(about["image_shape"]),
    mean=tuple(about["mean"]),
    std=tuple(about["std"]),
  )
