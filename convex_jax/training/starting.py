"""What a run begins with, by `config.init_from`: a file of public weights, or another run."""

import dataclasses
from typing import Any

import jax
import numpy as np
import optax
from flax import traverse_util

from convex_jax import config_files, files
from convex_jax import mesh as meshes
from convex_jax.errors import UserError
from convex_jax.models.constraints import FREE, PROJECTIONS
from convex_jax.models.public.importer import Public
from convex_jax.runs import checkpoints
from convex_jax.runs.workdir import Workdir, essential
from convex_jax.training import pretrained, step
from convex_jax.training.program import Program


@dataclasses.dataclass(frozen=True, eq=False)
class Start:
  """Weights {"params", "stats"} of numpy arrays, and what else a run's state takes over."""

  words: str  # Where they come from.
  weights: dict[str, Any]
  more: dict[str, Any] = dataclasses.field(default_factory=dict)  # Fields of `step.State`.

  def state(self, fresh: step.State) -> step.State:
    """The state at step 0, laid out as `fresh` is."""
    weights = {"params": fresh.params, "stats": fresh.stats}
    state = step.start_from(fresh, meshes.put_like(weights, self.weights))
    like = {name: getattr(fresh, name) for name in self.more}
    return state.replace(**meshes.put_like(like, self.more))


def start_of(config: Any, program: Program, public: Public | None = None) -> Start:
  """What `config.init_from` names: a run, or the file of which these are the public weights.

  Raises `UserError` where it does not fit the network.
  """
  path = files.expand(config.init_from)
  if files.is_folder(path):
    return _of_run(config, program, Workdir(path))
  if public is None:
    public, _ = pretrained.start(config, program.examples)
  return Start(pretrained.words(config, public, program.examples), public.weights)


def _of_run(config: Any, program: Program, source: Workdir) -> Start:
  about, fresh = source.description(), jax.eval_shape(program.init)
  whole = config.init_optimizer
  which = "raw" if whole else "auto"
  at, weights = checkpoints.read_weights(source.checkpoints, "latest", which)
  wanted = {"params": fresh.params, "stats": fresh.stats}
  _check_shapes(source.path, about, config, weights, wanted)
  kinds, flat = _flat(program.constraints), _flat(weights["params"])
  # The source may be a twin without constraints.
  params = {k: np.asarray(PROJECTIONS[kinds.get(k, FREE)](leaf)) for k, leaf in flat.items()}
  weights = {**weights, "params": traverse_util.unflatten_dict(params, sep="/")}
  if not whole:
    return Start(f"Weights from {source.path}: step {at}", weights)
  like = {"opt_state": fresh.opt_state, "losses": fresh.losses, "step": fresh.step}
  try:
    more = checkpoints.read_training(source.checkpoints, at, like)
  except UserError as error:
    changed = _differences(about, config, "optimizer.")
    raise UserError(f"config.init_optimizer is True, but {error}{changed}") from error
  del more["step"]
  more["opt_state"] = jax.tree.map(_restarted, more["opt_state"], is_leaf=_is_schedule)
  if fresh.ema is not None and checkpoints.has_averages(source.checkpoints, at):
    _, more["ema"] = checkpoints.read_weights(source.checkpoints, at, "ema")
  words = f"step {at}, with its optimizer state; the learning rate starts anew"
  return Start(f"Weights from {source.path}: {words}", weights, more)


def _check_shapes(path: str, about: Any, config: Any, found: Any, wanted: Any) -> None:
  """Raises `UserError` unless two trees have arrays of the same names and shapes."""
  have, want = ({k: np.shape(v) for k, v in _flat(tree).items()} for tree in (found, wanted))
  if different := [k for k in sorted({*have, *want}) if have.get(k) != want.get(k)]:
    name = different[0]
    words = f"{name} is {have.get(name, 'absent')} there, {want.get(name, 'absent')} now"
    raise UserError(
      f"config.init_from={path} is a run of another network: {words}"
      f"{_differences(about, config, 'model.', 'data.')}"
    )


def _differences(about: dict[str, Any], config: Any, *sections: str) -> str:
  """The keys of these sections in which a run's config and this one differ, a line each."""
  there, now, defaults = essential(about["config"]), essential(config), config_files.defaults()

  def value(of, key):
    return of[key] if key in of else defaults.get(key)  # Left out of `essential`.

  keys = [
    k for k in sorted({*there, *now}) if k.startswith(sections) and there.get(k) != now.get(k)
  ]
  return "".join(f"\n  config.{k}: {value(there, k)!r} there, {value(now, k)!r} now" for k in keys)


def _flat(tree: Any) -> dict[str, Any]:
  return traverse_util.flatten_dict(tree, sep="/")


def _is_schedule(node: Any) -> bool:
  return isinstance(node, optax.ScaleByScheduleState)


def _restarted(node: Any) -> Any:
  return node._replace(count=np.zeros_like(node.count)) if _is_schedule(node) else node
