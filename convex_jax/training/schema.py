"""What each key of a config may hold; everything that is wrong with one, reported together."""

import dataclasses
import itertools
import math
import typing
from collections.abc import Callable, Collection, Iterator
from typing import Any

from convex_jax.config_files import flatten
from convex_jax.data import prepare
from convex_jax.data.catalog import DATASETS, SCALINGS, Dataset
from convex_jax.errors import UserError, nearest
from convex_jax.models import catalog
from convex_jax.models.constraints import PENALISED
from convex_jax.models.parts import TWINS, Rate
from convex_jax.training.optimizer import OPTIMIZERS, SCHEDULES, too_few_updates

LARGEST = 2**31 - 1  # Integer, other than a seed.


@dataclasses.dataclass(frozen=True)
class Rule:
  """What a key may hold: its type, a test of the value, and both in words."""

  type: Any  # A type, or a union of them.
  expected: str
  test: Callable[[Any], bool] = lambda value: True
  names: tuple[str, ...] = ()

  def mistake(self, path: str, value: Any) -> str | None:
    """What is wrong with the value of config.`path`, in one line; None if nothing is."""
    right_type = isinstance(value, self.type)
    if isinstance(value, bool) and self.type is not object:  # Python's is an integer as well.
      right_type = bool in (self.type, *typing.get_args(self.type))
    if right_type and self.test(value):
      return None
    expected = self.expected
    if type(value) is int and value > LARGEST:
      expected += " and < 2**31"
    if type(value) is float and not _is_of_float32(value):
      expected += ", in float32"
    return f"config.{path} is {value!r}; expected {expected}{nearest(value, self.names)}"


def integer(low: int) -> Rule:
  """An integer from `low`, within the 32 bits that devices count in."""
  return Rule(int, f"an integer >= {low}", lambda v: low <= v <= LARGEST)


def number(low: float, high: float = math.inf, ends: str = "[]") -> Rule:
  """A number from `low` to `high`; a round bracket leaves out that end."""
  words = f"in {ends[0]}{low:g}, {high:g}{ends[1]}"
  if high == math.inf:
    words = f"{'>=' if ends[0] == '[' else '>'} {low:g}{', or inf' if ends[1] == ']' else ''}"
  left_out = [end for end, bracket in zip((low, high), ends, strict=True) if bracket in "()"]
  what = "a finite number" if math.inf in left_out else "a number"
  return Rule(
    float,
    f"{what} {words}",
    lambda v: low <= v <= high and v not in left_out and _is_of_float32(v),
  )


def _is_of_float32(value: float) -> bool:
  """Whether a number is neither infinite nor 0 in float32, in which devices compute with it."""
  largest, smallest = 3.4028234e38, 1.17549435e-38
  return value in (0, math.inf) or value != value or smallest <= abs(value) <= largest


def one_of(names: Collection[str]) -> Rule:
  """One of these names."""
  return Rule(str, ", ".join(names), lambda v: v in names, tuple(names))


def _are(kind: Any, values: tuple) -> bool:
  return all(isinstance(value, kind) and not isinstance(value, bool) for value in values)


TEXT, SWITCH = Rule(str, "text"), Rule(bool, "true or false")


def field_rule(field: dataclasses.Field) -> Rule:
  """What a field of an architecture may hold, by its type; None takes the size's own."""
  kind: Any = field.type
  if type(None) in typing.get_args(kind):  # X | None.
    kind = typing.get_args(kind)[0]
  if typing.get_origin(kind) is typing.Literal:
    rule = one_of(typing.get_args(kind))
  elif typing.get_origin(kind) is tuple:
    rule = Rule(
      tuple,
      "a tuple of integers >= 1",
      lambda v: v and _are(int, v) and 1 <= min(v) <= max(v) <= LARGEST,
    )
  else:
    rule = {
      bool: SWITCH,
      int: integer(0 if field.default == 0 else 1),
      float: number(0, 100, ends="(]"),
      Rate: number(0, 1, ends="[)"),
    }[kind]
  return Rule(
    rule.type | None, f"{rule.expected}, or None", lambda v: v is None or rule.test(v), rule.names
  )


RULES = {
  # `jax.random.key` forgets higher bits.
  "seed": Rule(int, "an integer >= 0 and < 2**32", lambda v: 0 <= v < 2**32),
  "epochs": integer(1),
  "steps": integer(0),
  "batch_size": integer(1),
  "steps_per_call": integer(1),
  "dtype": one_of(("float32", "bfloat16")),
  "fsdp": integer(1),
  "batch_norm": one_of(("global", "device")),
  "max_skipped": integer(1),
  "skip_spikes": number(0, ends="[)"),
  "time_limit": number(0),
  "init_from": TEXT,
  "init_optimizer": SWITCH,
  "label_smoothing": number(0, 1, ends="[)"),
  "jacobian_penalty": number(0, ends="[)"),
  "ema_decay": number(0, 1, ends="[)"),
  "mixup": number(0, 100),
  "cutmix": number(0, 100),
  # See `mistakes`: one of your own is looked for in `data.dir`.
  "data.name": Rule(str, f"{', '.join(DATASETS)}, or one of your own", bool, tuple(DATASETS)),
  "data.classes": Rule(
    tuple,
    "(), or two or more different names such as ('cat', 'dog')",
    lambda v: _are(str, v) and len(v) != 1 and len(set(v)) == len(v),
  ),
  "data.dir": TEXT,
  "data.image_size": integer(1),
  "data.normalise": one_of(("auto", "own", *SCALINGS)),
  "data.flip": SWITCH,
  "data.crop_padding": integer(0),
  "data.jitter": number(0, 1),
  "data.randaugment": Rule(
    tuple,
    "(operations, magnitude): an integer >= 0 and a number in [0, 10]",
    lambda v: (
      len(v) == 2
      and _are(int, v[:1])
      and _are(int | float, v)
      and 0 <= v[0] <= LARGEST
      and 0 <= v[1] <= 10
    ),
  ),
  "data.repeats": integer(1),
  "data.whiten": SWITCH,
  "data.erasing": number(0, 1),
  "data.label_noise": number(0, 1),
  "data.train_fraction": number(0, 1, ends="(]"),
  "data.validation_fraction": number(0, 1, ends="[)"),
  "data.loader": one_of(("auto", "resident", "host", "stream")),
  "data.cache_size": integer(0),
  "data.crop_area": Rule(
    tuple,
    "two increasing numbers in (0, 1]",
    lambda v: len(v) == 2 and _are(int | float, v) and 0 < v[0] <= v[1] <= 1,
  ),
  "data.eval_share": number(0, 1, ends="(]"),
  "data.eval_shifts": Rule(
    tuple,
    "one or more different integers such as (-2, 0, 2)",
    lambda v: v and _are(int, v) and len(set(v)) == len(v) and all(abs(n) <= LARGEST for n in v),
  ),
  "data.eval_flip": SWITCH,
  "data.workers": integer(-1),
  "data.max_unreadable": number(0, 1),
  "model.name": one_of(catalog.names()),
  "model.size": TEXT,  # Depends on the name: see `_clashes`.
  "model.parts": one_of(TWINS),
  **{f"model.{key}": one_of(names) for key, names in catalog.CHOICES.items()},
  "model.passthrough": SWITCH,
  "model.log_normal_init": SWITCH,
  "model.branch_scales": SWITCH,
  "model.head_depth": integer(0),
  "model.head_width": integer(1),
  "model.one_logit": SWITCH,
  "model.common_penalty": number(0, ends="[)"),
  "model.remat": SWITCH,
  "optimizer.name": one_of(OPTIMIZERS),
  "optimizer.learning_rate": number(0, ends="()"),
  "optimizer.schedule": one_of(SCHEDULES),
  "optimizer.warmup_steps": integer(0),
  "optimizer.decay_at": Rule(
    tuple,
    "increasing numbers in (0, 1)",
    lambda v: _are(int | float, v) and all(a < b for a, b in itertools.pairwise((0, *v, 1))),
  ),
  "optimizer.decay_factor": number(0, 1, ends="(]"),
  "optimizer.weight_decay": number(0, ends="[)"),
  "optimizer.clip_norm": number(0, ends="[)"),
  "optimizer.b1": number(0, 1, ends="[)"),
  "optimizer.b2": number(0, 1, ends="[)"),
  "optimizer.momentum": number(0, 1, ends="[)"),
  "optimizer.accumulate": integer(1),
  "eval.every_epochs": number(0, ends="()"),
  "eval.train_examples": integer(0),
  "checkpoint.every_steps": integer(0),
  "checkpoint.keep": integer(2),
  "checkpoint.must_save": SWITCH,
  "checkpoint.patience": number(0, ends="(]"),
  "log.every_steps": integer(1),
  "log.profile_steps": Rule(
    tuple,
    "(0, 0), or the first and the last step",
    lambda v: len(v) == 2 and _are(int, v) and 0 <= v[0] <= v[1] <= LARGEST,
  ),
}


def rules_of(config: Any) -> dict[str, Rule]:
  """`RULES`, with the fields of the architecture that `model.name` chooses."""
  values = dict(flatten(config))
  if values.get("model.name") not in catalog.names():
    unknown = Rule(object, "anything")
    return {path: unknown for path in values if path.startswith("model.")} | RULES
  fields = catalog.fields(values["model.name"])
  return RULES | {f"model.{name}": field_rule(field) for name, field in fields.items()}


def _clashes_of_data(data: Any, entry: Dataset) -> Iterator[str]:
  natural = entry.is_natural
  if natural and data.loader == "auto":
    yield (
      f"config.data.loader is 'auto', but the images of {data.name!r} vary in size; expected"
      " stream, or resident or host (which need `data cache`)"
    )
  if not natural and data.loader == "stream":
    yield (
      f"config.data.loader is 'stream', but {data.name!r} is decoded when the run starts; expected"
      " auto, resident or host"
    )
  if data.loader == "stream":
    for key in ("classes", "label_noise"):
      if data[key]:
        yield (
          f"config.data.{key} is {data[key]!r}, which config.data.loader='stream' does not support"
        )
  side = data.cache_size or min(entry.image_shape[:2]) or data.image_size
  if any(abs(shift) >= side for shift in data.eval_shifts):
    yield (
      f"config.data.eval_shifts is {tuple(data.eval_shifts)}, which moves images of {side} px out of"
      f" sight; expected integers from {1 - side} to {side - 1}"
    )
  if data.normalise == "imagenet" and entry.image_shape[-1] != 3:
    yield (
      f"config.data.normalise is 'imagenet', but {data.name!r} has no colours; expected auto, own,"
      " half or unit"
    )
  if data.cache_size and not natural and not entry.synthetic:
    yield f"config.data.cache_size is {data.cache_size}, but {data.name!r} has no cache; expected 0"
  elif data.cache_size and data.cache_size < data.image_size:
    yield (
      f"config.data.cache_size is {data.cache_size}; expected 0, or at least config.data.image_size"
      f" ({data.image_size} px)"
    )


def _clashes(config: Any) -> Iterator[str]:
  """Values that are valid alone and invalid together."""
  module = catalog.module_of(config.model.name)
  if config.model.size not in module.SIZES:
    yield one_of(module.SIZES).mistake("model.size", config.model.size) or ""
  elif hasattr(module, "check"):
    lines = module.check(catalog.fields_of(config.model), config.data.image_size)
    yield from (f"config.{line}" for line in lines)
  if config.model.convex_from == "head" and not config.model.head_depth:
    yield (
      "config.model.head_depth is 0, but config.model.convex_from is 'head': a linear head is convex"
      " in its features whatever its weights; expected an integer >= 1"
    )
  is_free = config.model.parts == "base" or config.model.constraint == PENALISED
  if config.model.common_penalty and not is_free:
    yield (
      f"config.model.common_penalty is {config.model.common_penalty:g}, but the weights of"
      f" {config.model.parts!r} are not negative as it is; expected 0, or config.model.parts='base',"
      f" or config.model.constraint={PENALISED!r}"
    )
  if config.init_optimizer and not config.init_from:
    yield (
      "config.init_optimizer is True, but config.init_from is ''; expected the folder of a run in"
      " config.init_from"
    )
  if config.batch_norm == "device" and config.fsdp > 1:
    yield (
      f"config.fsdp is {config.fsdp}, but config.batch_norm is 'device'; expected 1, or"
      " config.batch_norm='global'"
    )
  entry = prepare.entry_of(config.data.name, config.data.dir)
  yield from _clashes_of_data(config.data, entry)
  classes = len(config.data.classes) or entry.classes
  if config.model.one_logit and classes != 2:
    yield (
      f"config.model.one_logit is True, but there are {classes} classes; expected two, for example"
      " config.data.classes=('cat', 'dog')"
    )
  if config.optimizer.name == "adam" and config.optimizer.weight_decay:
    yield (
      f"config.optimizer.weight_decay is {config.optimizer.weight_decay:g}, but 'adam' has no weight"
      " decay; expected 0. Did you mean config.optimizer.name='adamw'?"
    )
  if config.steps and (few := too_few_updates(config.optimizer, config.steps)):
    yield few


def mistakes(config: Any) -> list[str]:
  """Everything that is wrong with a config, one line each: path, value, what is expected."""
  values = dict(flatten(config))
  rules = rules_of(config)
  unknown, missing = sorted(values.keys() - rules.keys()), [p for p in RULES if p not in values]
  lines = [f"Unknown key config.{path}{nearest(path, rules)}" for path in unknown]
  lines += [f"config.{path} is missing; configs/base.py has it" for path in missing]
  lines += filter(None, (rules[p].mistake(p, v) for p, v in values.items() if p in rules))
  name, folder = values.get("data.name"), values.get("data.dir")
  if name and isinstance(name, str) and isinstance(folder, str):
    try:
      prepare.entry_of(name, folder)
    except UserError as error:
      lines.append(str(error))
  return lines or list(_clashes(config))


def check(config: Any) -> None:
  """Raises `UserError` with every line of `mistakes`, if there are any."""
  if lines := mistakes(config):
    raise UserError("\n".join(lines))
