"""A finished run, anywhere: `run = convex_jax.load("runs/x")`.

This needs neither the data, nor the devices it was trained on, nor the config's code: the
workdir's config.json has everything.
"""

import dataclasses
import functools
import hashlib
import operator
import os
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import core, traverse_util
from ml_collections import ConfigDict, FrozenConfigDict

from convex_jax.data.preprocess import inference
from convex_jax.errors import UserError
from convex_jax.models import catalog
from convex_jax.models.variables import apply
from convex_jax.runs.checkpoints import read_weights
from convex_jax.runs.workdir import Workdir

if TYPE_CHECKING:
  from convex_jax.proof import convexified


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
  """A run's config, weights and figures, and its network at inference.

  `params` and `stats` are read-only, since predictions use copies of them on the device: `replace`
  makes a run with others. A run can be pickled, also for processes of a pool; these are to be
  spawned, since JAX does not work in a process that was forked after it had started.
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
  edited: bool = False  # Whether the weights are others than those of its folder.

  def __post_init__(self) -> None:
    for name in ("params", "stats"):
      tree = jax.tree.map(_read_only, core.unfreeze(getattr(self, name)))
      object.__setattr__(self, name, core.FrozenDict(tree))

  def __reduce__(self) -> tuple[Any, ...]:
    # Without what is compiled; the arrays that are unpickled become read-only again.
    return Run, tuple(getattr(self, field.name) for field in dataclasses.fields(self))

  @classmethod
  def described(cls, workdir: str, description: dict[str, Any], step: int, weights: Any) -> "Run":
    """The run of a config.json's content, with the weights {"params", "stats"} of a step."""
    config = FrozenConfigDict(ConfigDict(description["config"]))
    names = ("class_names", "image_shape", "mean", "std")  # More may come with a later version.
    about: dict[str, Any] = {name: tuple(description["data"][name]) for name in names}
    return cls(workdir, config, step, **weights, **about)

  def replace(self, *, params: Any = None, stats: Any = None) -> "Run":
    """The run with other weights, on which all that it computes depends; this one stays as it is.

    It has no certificate; `convex_jax.certify(run.network, x)` proves it, for float images x.

    Raises `UserError` where names or shapes differ from those of this run.
    """
    given = {"params": params, "stats": stats}
    new = {name: _like(name, getattr(self, name), t) for name, t in given.items() if t is not None}
    return dataclasses.replace(self, **new, edited=True)

  @property
  def weights(self) -> dict[str, Any]:
    """{"params", "stats"}, as `apply` takes them."""
    return {"params": self.params, "stats": self.stats}

  @functools.cached_property
  def network(self) -> Callable[[jax.Array], jax.Array]:
    """Images (B, H, W, C), pixel values 0..255, to logits (B, K): what is to be convex."""
    return functools.partial(self.apply, self.weights)  # No closure: it can be pickled.

  def apply(self, weights: Any, image_BxHxWxC: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """`network` with other weights {"params", "stats"}, or computed in another dtype."""
    _refuse_fork()
    if not (isinstance(weights, Mapping) and {"params", "stats"} <= weights.keys()):
      raise UserError(f"weights are a {type(weights).__name__}; expected a dict of params, stats")
    _check_floating(dtype)
    images: Any = image_BxHxWxC
    if not isinstance(images, jax.Array | np.ndarray):
      try:
        images = np.asarray(images)
      except ValueError as error:  # A list of images of several sizes.
        raise UserError(f"images are no array: {error}; expected pixels, 0 to 255") from error
    if images.shape[1:] != self.image_shape:
      shape = ("any", *self.image_shape)
      raise UserError(f"images of shape {images.shape}; expected {shape}")
    if not len(images):
      raise UserError("there are no images; expected at least one")
    if not _is_real(images):
      raise UserError(f"images are {images.dtype}; expected real pixels, 0 to 255")
    model = catalog.build(self.config.model, classes=len(self.class_names), dtype=dtype)
    prepare = inference(self.config.data, self.mean, self.std, dtype)
    return apply(model, dict(weights), prepare(jnp.asarray(images)))

  def convexify(self, dtype: Any = jnp.float32) -> "convexified.Convexified":
    """The network with a common term that makes its logits convex; see `proof.convexified`.

    Its functions are of one image (1, H, W, C), pixel values 0..255, to be mapped over more.
    For float64, call it and its functions within `jax.enable_x64(True)`.

    Raises `UserError` where no such term is known: the message names the operation.
    """
    from convex_jax.proof.convexified import convexify

    _check_floating(dtype)
    if jnp.dtype(dtype).itemsize > 4 and not jax.config.read("jax_enable_x64"):
      raise UserError(f"dtype is {jnp.dtype(dtype)}; expected a call within jax.enable_x64(True)")
    apply = functools.partial(self.apply, dtype=dtype)
    weights = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), self.weights)
    example = jax.ShapeDtypeStruct((1, *self.image_shape), dtype)
    try:
      return convexify(apply, weights, example)
    except ValueError as error:
      raise UserError(f"{self.workdir}: {error}") from error

  @functools.cached_property
  def _jitted(self):
    return jax.jit(self.network)

  def logits(self, images_BxHxWxC: Any, batch_size: int = 256) -> np.ndarray:
    """Logits (B, K) float32 of uint8 images (B, H, W, C), a batch at a time.

    Raises `UserError` (a `ValueError`) when the images are not those of `image_shape`.
    """
    _refuse_fork()
    _check("batch_size", batch_size, _is_integer(batch_size) and batch_size >= 1, "an integer >= 1")
    try:
      images = np.asarray(images_BxHxWxC)
    except ValueError as error:  # A list of images of several sizes.
      raise UserError(f"images are no array: {error}; {self._wanted()}") from error
    if images.shape[1:] != self.image_shape or images.dtype != np.uint8:
      found = f"images are {images.dtype} of shape {images.shape}"
      raise UserError(f"{found}; {self._wanted()}")
    out = np.empty((len(images), len(self.class_names)), np.float32)
    for start in range(0, len(images), batch_size):
      batch = images[start : start + batch_size]
      # One shape for every batch, so that one program is compiled.
      filled = np.zeros((batch_size, *self.image_shape), np.uint8)
      filled[: len(batch)] = batch
      out[start : start + len(batch)] = np.asarray(self._jitted(filled))[: len(batch)]
    return out

  def _wanted(self) -> str:
    return (
      f"expected uint8 of shape (any, {', '.join(map(str, self.image_shape))}), pixels 0 to 255"
    )

  def predict(self, images_BxHxWxC: Any) -> np.ndarray:
    """Class indices (B,) of uint8 images; names are in `class_names`."""
    return self.logits(images_BxHxWxC).argmax(-1)

  def metrics(self, kind: str | None = None) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, all or of one `kind`: "train", "eval", "final"."""
    if kind is not None:
      expected = "'train', 'eval', 'final', or None for all"
      _check_one_of("kind", kind, ("train", "eval", "final"), expected)
    return Workdir(self.workdir).rows(kind)

  @property
  def certificate(self) -> dict[str, Any] | None:
    """The content of certificate.json; None where there is none, or it is of other weights.

    Those of another step are others, and so are raw ones where averaged ones were certified.
    """
    found = Workdir(self.workdir).certificate()
    return found if found and found.get("weights_sha256") == self.digest else None

  @functools.cached_property
  def digest(self) -> str:
    """The SHA-256 of the weights."""
    return digest(self.weights)

  def __repr__(self) -> str:
    count = optax.tree.size(self.params)
    model = self.config.model
    return (
      f"Run({self.workdir!r}: {model.name} {model.size}, twin {model.parts!r}, on"
      f" {self.config.data.name}, {count:,} parameters, step {self.step}"
      f"{', with other weights' if self.edited else ''})"
    )


def digest(weights: Any) -> str:
  """SHA-256 over names, dtypes, shapes and bytes of a tree of arrays."""
  hashed = hashlib.sha256()
  named = {jax.tree_util.keystr(p): a for p, a in jax.tree_util.tree_leaves_with_path(weights)}
  for path, leaf in sorted(named.items()):
    hashed.update(f"{path} {leaf.dtype} {leaf.shape}".encode() + np.asarray(leaf).tobytes())
  return hashed.hexdigest()


def load(workdir: str | os.PathLike[str], step: int | str = "latest", weights: str = "auto") -> Run:
  """The run saved in a workdir.

  Args:
    workdir: its folder.
    step: the checkpoint: a step, "latest" or "best": by accuracy on the validation split or, where
      there is none, on the test split, of which it is then no estimate.
    weights: "ema", "raw", or "auto": averaged weights if the run averaged them.

  Raises:
    UserError: (a `ValueError`) there is no such run or checkpoint, or it is damaged; another
      argument than these.
  """
  _refuse_fork()
  fine = (
    step in ("latest", "best") or step.isdecimal() if isinstance(step, str) else _is_integer(step)
  )
  _check("step", step, fine, "the number of a checkpoint, 'latest' or 'best'")
  if step not in ("latest", "best"):
    step = int(step)
  _check_one_of("weights", weights, ("auto", "ema", "raw"), "'auto', 'ema' or 'raw'")
  folder = Workdir(workdir)
  saved = folder.description()
  chosen, tree = read_weights(folder.checkpoints, step, weights)
  for array in jax.tree.leaves(tree):
    array.flags.writeable = False  # They are nobody else's: no copies are needed.
  return Run.described(folder.path, saved, chosen, tree)


def _check(name: str, value: Any, is_fine: bool, expected: str) -> None:
  if not is_fine:
    raise UserError(f"{name} is {value!r}; expected {expected}")


def _check_one_of(name: str, value: Any, names: Collection[str], expected: str) -> None:
  _check(name, value, isinstance(value, str) and value in names, expected)


def _check_floating(dtype: Any) -> None:
  try:
    is_floating = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
  except TypeError:  # It names no dtype.
    is_floating = False
  _check("dtype", dtype, is_floating, "a dtype of floats, such as 'float32'")


def _is_real(array: Any) -> bool:
  return any(jnp.issubdtype(array.dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_))


def _is_integer(value: Any) -> bool:
  try:
    return not isinstance(value, bool) and operator.index(value) is not None
  except TypeError:
    return False


def _like(name: str, old: Any, new: Any) -> Any:
  """`new`, as arrays of the dtypes of `old`; raises `UserError` unless it has the same arrays."""
  if not isinstance(new, Mapping):
    raise UserError(f"{name} is a {type(new).__name__}; expected a dict of arrays, as run.{name}")
  have: dict[str, Any]
  want: dict[str, Any]
  have, want = (
    {"/".join(map(str, path)): leaf for path, leaf in traverse_util.flatten_dict(tree).items()}
    for tree in (core.unfreeze(new), core.unfreeze(old))  # pyright: ignore
  )
  wrong = [f"{key} is missing" for key in want if key not in have]
  wrong += [f"{key} is unknown" for key in have if key not in want]
  for key in have.keys() & want.keys():
    try:
      array = np.asarray(have[key])
    except ValueError as error:  # A list of lists of several lengths.
      wrong.append(f"{key} is no array: {error}")
      continue
    if array.shape != want[key].shape:
      wrong.append(f"{key} has shape {array.shape}; expected {want[key].shape}")
    elif not _is_real(array):
      wrong.append(f"{key} is {array.dtype}; expected real numbers")
  if wrong:
    raise UserError(f"{name} does not fit this network: {'; '.join(sorted(wrong))}")
  arrays = {key: np.array(value, want[key].dtype) for key, value in have.items()}
  return traverse_util.unflatten_dict(arrays, sep="/")


_computes_in: int | None = None  # The process in which JAX was started from here.


def _refuse_fork() -> None:
  """Raises `UserError` in a process in which JAX would never end."""
  global _computes_in
  _computes_in = _computes_in or os.getpid()
  if _computes_in != os.getpid():
    raise UserError(
      "This process was forked from one in which JAX runs, whose threads it lacks: nothing that it"
      " computes would end. Start it by multiprocessing.get_context('spawn') instead; a run can be"
      " passed to it"
    )


def _read_only(array: Any) -> np.ndarray:
  array = np.asarray(array)
  if array.flags.writeable:
    array = array.copy()
    array.flags.writeable = False
  return array
