"""What a run records and shows: rows, their truncation, skipped updates, parameters."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from convex_jax.errors import Diverged
from convex_jax.runs.workdir import Workdir
from convex_jax.training import console, recorder, stopping


def make(tmp_path, start=0, lead=True, every=2):
  config = base.get_config()
  config.log.every_steps = every
  return recorder.Recorder(
    Workdir(str(tmp_path)),
    console.Console(lead),
    config,
    start=start,
    total_steps=10,
    epochs=1.0,
    lead=lead,
  )


def of(loss, **more):
  """What a call of the compiled step measures."""
  loss = np.atleast_1d(np.float32(loss))
  zeros = np.zeros_like(loss)
  return {"loss": loss, "accuracy": zeros, "gradient_norm": zeros, "skipped": zeros > 0} | more


def rows(tmp_path):
  return Workdir(str(tmp_path)).rows()


def test_rows_are_means_since_the_row_before(tmp_path):
  w = make(tmp_path)
  for step, loss in enumerate([4.0, 2.0, 1.0, 3.0, 7.0], 1):
    w.train(step, of(loss), [])
  w.flush()
  w.flush()  # Nothing new: no row.
  w.close()
  assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [(2, 3.0), (4, 2.0), (5, 7.0)]
  assert all(row["images_per_second"] > 0 for row in rows(tmp_path))


def test_stacked_steps_count_each(tmp_path):
  w = make(tmp_path, every=4)
  w.train(4, of([1.0, 2.0, 3.0, 6.0]), [])
  w.close()
  assert rows(tmp_path)[0]["loss"] == 3.0


def test_a_resumed_run_drops_rows_to_come_final_figures_and_a_torn_line(tmp_path):
  kinds = [(2, "train"), (4, "eval"), (4, "final"), (6, "train")]
  old = [dict(step=step, kind=kind, time=1.5) for step, kind in kinds]
  text = "".join(json.dumps(row) + "\n" for row in old) + '{"step": 8, "ki'
  (tmp_path / "metrics.jsonl").write_text(text)
  make(tmp_path, start=4).close()
  assert rows(tmp_path) == old[:2]


def test_rows_leave_out_what_was_skipped_and_say_so(tmp_path, capsys):
  w = make(tmp_path, every=4)
  counter = stopping.SkippedUpdates(limit=9)
  for step, call in (
    (4, of([1.0, np.nan, 3.0, np.inf], skipped=np.array([False, True, False, True]))),
    (8, of([np.nan] * 4, skipped=np.ones(4, bool))),
  ):
    w.train(step, call, counter.count(step, call))
  w.close()
  first, second = rows(tmp_path)
  assert (first["loss"], first["skipped"]) == (2.0, 2)
  assert second["skipped"] == 4 and "loss" not in second
  out = capsys.readouterr().out
  assert "Skipped the update of step 2: loss nan, gradient norm 0 (and 1 more up to step 4)" in out


def test_too_many_skipped_in_a_row_name_the_last():
  counter, bad = stopping.SkippedUpdates(limit=10), np.ones(6, bool)
  counter.count(6, of([np.nan] * 6, skipped=bad))
  counter.count(7, of(1.0))
  counter.count(13, of([np.nan] * 6, skipped=bad))
  with pytest.raises(Diverged, match=r"10 consecutive skipped updates \(last: step 17, loss inf"):
    counter.count(18, of([np.inf] * 5, skipped=bad[:5]))


def test_only_the_first_process_writes(tmp_path):
  w = make(tmp_path, lead=False)
  w.train(2, of(1.0), [])
  w.evaluated("eval", 2, {"test_accuracy": 1.0})
  w.close()
  assert list(tmp_path.iterdir()) == []


def test_the_parameter_table_shows_shape_size_and_constraint():
  params = {"a": {"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(4)}}
  table = console.parameter_table(params, {"a": {"kernel": "clamp", "bias": "free"}})
  line = next(line for line in table.splitlines() if "a/kernel" in line)
  assert "(3, 4)" in line and "12" in line and "clamp" in line
  assert table.endswith("16 parameters, 12 of them constrained")
