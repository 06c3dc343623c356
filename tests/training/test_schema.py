"""A config's mistakes: all at once, one line each, with what is expected."""

import pytest

from configs import base, mixer, mlp
from convex_jax.config_files import flatten
from convex_jax.errors import UserError
from convex_jax.runs import workdir
from convex_jax.training import schema

INF = float("inf")
BAD = {  # path: (value, words that the line must hold)
  "seed": (-1, ">= 0"),
  "epochs": (0, ">= 1"),
  "batch_size": (-4, ">= 1"),
  "dtype": ("bfloat", "Did you mean 'bfloat16'"),
  "label_smoothing": (1.0, "[0, 1)"),
  "ema_decay": (-0.5, "[0, 1)"),
  "data.name": ("cifar", "cifar10"),
  "data.classes": (("cat",), "two or more different names"),
  "data.label_noise": (1.5, "[0, 1]"),
  "data.train_fraction": (0.0, "(0, 1]"),
  "data.loader": ("gpu", "resident"),
  "data.flip": (1, "true or false"),
  "model.name": ("mixr", "Did you mean 'mixer'"),
  "model.parts": ("icc", "base, ioc, paper"),
  "model.constraint": ("clip", "clamp, exponentiate"),
  "optimizer.name": ("adamm", "Did you mean 'adam'"),
  "optimizer.learning_rate": (0.0, "> 0"),
  "optimizer.decay_at": ((0.9, 0.5), "increasing"),
  "optimizer.b1": (1.0, "[0, 1)"),
  "checkpoint.keep": (1, ">= 2"),
  "log.profile_steps": ((3, 1), "the first and the last"),
}
ENDS = {  # path: values beyond what can be computed with
  "seed": (2**32, 2**63, 2**64, 10**30),
  "steps": (2**31, 10**30),
  "epochs": (2**31,),
  "batch_size": (2**63,),
  "checkpoint.keep": (10**20,),
  "log.profile_steps": ((0, 2**63),),
  "data.randaugment": ((2**40, 9.0), (2, INF)),
  "data.crop_area": ((0.1, INF), (float("nan"), 1.0)),
  "optimizer.decay_at": ((0.5, float("nan")),),
  "optimizer.learning_rate": (INF, 1e300, 1e-300),  # In float32 infinite, and 0.
  "optimizer.weight_decay": (INF,),
  "optimizer.clip_norm": (INF,),
  "eval.every_epochs": (INF,),
  "skip_spikes": (INF,),
}


def test_switches_of_an_architecture_may_be_set():
  config = mlp.get_config()
  for value in (True, False, None):
    config.model.dense_readout = value
    assert schema.mistakes(config) == []


def broken(changes):
  config = base.get_config()
  for path, value in changes.items():
    *parents, last = path.split(".")
    target = config
    for parent in parents:
      target = target[parent]
    with target.ignore_type():
      target[last] = value
  return config


@pytest.mark.parametrize("path", BAD)
def test_each_mistake_is_one_line_with_path_value_and_allowed(path):
  value, words = BAD[path]
  lines = schema.mistakes(broken({path: value}))
  assert (
    len(lines) == 1 and lines[0].startswith(f"config.{path} is {value!r}") and words in lines[0]
  )


@pytest.mark.parametrize("path, value", [(p, v) for p, values in ENDS.items() for v in values])
def test_the_ends_of_ranges_are_told(path, value):
  (line,) = schema.mistakes(broken({path: value}))
  assert line.startswith(f"config.{path} is {value!r}; expected")


def test_no_number_is_nan_and_those_that_may_be_infinite_say_so():
  for path, rule in schema.RULES.items():
    if rule.type is float:
      assert rule.mistake(path, float("nan"))
      assert ("or inf" in rule.expected) == (rule.mistake(path, INF) is None), path
      assert rule.mistake(path, -INF)
  assert {p for p, rule in schema.RULES.items() if "or inf" in rule.expected} == {
    "time_limit",
    "checkpoint.patience",
  }


def test_whole_numbers_in_pairs_make_no_other_run():
  config, other = base.get_config(), base.get_config()
  other.data.crop_area = (0.08, 1)
  assert schema.mistakes(other) == []
  assert workdir.digest(config) == workdir.digest(other)


def test_all_mistakes_come_at_once():
  with pytest.raises(UserError) as caught:
    schema.check(broken({path: value for path, (value, _) in BAD.items()}))
  assert len(str(caught.value).splitlines()) == len(BAD)
  assert caught.value.code == 2


def test_wrong_types_unknown_and_missing_keys():
  config = broken({"batch_size": "many"})
  config.epocs = 3
  del config.data["flip"]
  lines = "\n".join(schema.mistakes(config))
  assert "batch_size is 'many'" in lines
  assert "Unknown key config.epocs. Did you mean 'epochs'?" in lines
  assert "data.flip is missing" in lines


def test_a_common_penalty_needs_weights_of_any_sign():
  config = mlp.get_config()
  config.model.update({"parts": "ioc", "common_penalty": 0.1})
  with pytest.raises(UserError, match=r"model\.constraint='penalised'"):
    schema.check(config)
  config.model.constraint = "penalised"
  schema.check(config)


STREAMED = {"data.name": "imagenet2012", "data.loader": "stream"}


@pytest.mark.parametrize(
  "config,changes,words",
  [
    (mixer, {"data.image_size": 70}, "a multiple of 9"),
    (mlp, {"model.parts": "ioc", "model.common_penalty": 0.1}, "expected 0, or config.model.parts"),
    (mixer, {"model.size": "S16"}, "Did you mean 'S/16'"),
    (mixer, {"model.patch": 0}, ">= 1, or None"),
    (mixer, {"model.pach": 3}, "Did you mean 'model.patch'"),
    (mlp, {"optimizer.weight_decay": 0.1}, "Did you mean config.optimizer.name='adamw'"),
    (mlp, {"data.loader": "stream"}, "when the run starts; expected auto"),
    (mlp, {"data.cache_size": 40}, "has no cache; expected 0"),
    (mlp, {"data.name": "imagenet2012"}, "expected stream, or resident"),
    (mlp, {**STREAMED, "data.label_noise": 0.5}, "data.label_noise is 0.5"),
    (mlp, {**STREAMED, "data.cache_size": 20}, "at least config.data.image_size"),
    (mlp, {"data.eval_shifts": (-32, 0)}, "expected integers from -31 to 31"),
    (mlp, {**STREAMED, "data.eval_shifts": (0, 32)}, "moves images of 32 px out of sight"),
    (mlp, {"model.one_logit": True}, "there are 10 classes; expected two"),
    (mlp, {"steps": 9, "optimizer.accumulate": 10}, "make 0 updates (config.optimizer.accumulate"),
    (mlp, {"steps": 5, "optimizer.warmup_steps": 5}, "5 steps make 5 updates; expected more"),
  ],
)
def test_values_that_clash_and_fields_of_an_architecture(config, changes, words):
  config = config.get_config()
  for path, value in changes.items():
    *parents, last = path.split(".")
    target = config[parents[0]] if parents else config
    target[last] = value
  lines = schema.mistakes(config)
  assert len(lines) == 1 and words in lines[0]


def test_the_rules_and_the_base_config_name_the_same_keys():
  assert set(schema.RULES) == {path for path, _ in flatten(base.get_config())}
