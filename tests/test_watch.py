"""What a run tells: rows, their truncation, the parameter table."""

import json

import jax.numpy as jnp
import pytest

from configs import base
from convex_jax import watch
from convex_jax.errors import Diverged


def make(tmp_path, start=0, active=True, every=2):
  config = base.get_config()
  config.log.every_steps = every
  return watch.Watch(str(tmp_path), start, 10, 1.0, config, active)


def rows(tmp_path):
  return watch.read_metrics(str(tmp_path / "metrics.jsonl"))


def test_rows_are_means_since_the_row_before(tmp_path):
  w = make(tmp_path)
  for step, loss in enumerate([4.0, 2.0, 1.0, 3.0, 7.0], 1):
    w.train(step, {"loss": jnp.asarray(loss), "accuracy": jnp.asarray(0.5)})
  w.flush()
  w.flush()  # Nothing new: no row.
  w.close()
  assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [(2, 3.0), (4, 2.0), (5, 7.0)]
  assert all(row["images_per_second"] > 0 for row in rows(tmp_path))


def test_stacked_steps_count_each(tmp_path):
  w = make(tmp_path, every=4)
  w.train(4, {"loss": jnp.asarray([1.0, 2.0, 3.0, 6.0]), "accuracy": jnp.zeros(4)})
  w.close()
  assert rows(tmp_path)[0]["loss"] == 3.0


def test_a_resumed_run_drops_rows_to_come_final_figures_and_a_torn_line(tmp_path):
  old = [dict(step=2, kind="train"), dict(step=4, kind="eval"), dict(step=4, kind="final")]
  old += [dict(step=6, kind="train")]
  text = "".join(json.dumps(row) + "\n" for row in old) + '{"step": 8, "ki'
  (tmp_path / "metrics.jsonl").write_text(text)
  make(tmp_path, start=4).close()
  assert rows(tmp_path) == old[:2]


def test_a_loss_that_is_no_number_names_its_step(tmp_path):
  w = make(tmp_path)
  with pytest.raises(Diverged, match="loss of step 7 is inf"):
    w.train(8, {"loss": jnp.asarray([1.0, 1.0, jnp.inf, jnp.nan])})
  w.close()


def test_only_the_first_process_writes(tmp_path):
  w = make(tmp_path, active=False)
  w.train(2, {"loss": jnp.asarray(1.0)})
  w.evaluated("eval", 2, {"test_accuracy": 1.0})
  w.say("nothing")
  w.close()
  assert list(tmp_path.iterdir()) == []


def test_the_parameter_table_shows_shape_size_and_constraint():
  params = {"a": {"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(4)}}
  table = watch.parameter_table(params, {"a": {"kernel": "clamp", "bias": "free"}})
  line = next(line for line in table.splitlines() if "a/kernel" in line)
  assert "(3, 4)" in line and "12" in line and "clamp" in line
  assert table.endswith("16 parameters, 12 of them constrained")
