"""Runs to rows, tables, pictures and a page: what is written says what was run."""

import base64
import csv
import dataclasses
import json
import math
import pathlib
import re
import shutil
import statistics
from collections.abc import Mapping

import numpy as np
import pytest
from markdown_it import MarkdownIt
from PIL import Image

import convex_jax
from convex_jax import files
from convex_jax.errors import UserError
from convex_jax.proof.radii import NORMS
from convex_jax.runs import radii_command
from convex_jax.runs import workdir as workdirs
from convex_jax.studies import figures, report, results, tables
from convex_jax.studies.results import Point, Result, Results
from tests.support import ROOT

SAVED = ROOT / "tests" / "fixtures" / "run_1_1"


def workdir_of(tmp_path, name, changes=(), evals=(), final=()):
  """A copy of the saved run, its config and its rows changed."""
  folder = tmp_path / name
  shutil.copytree(SAVED, folder)
  content = files.read_json(str(folder / "config.json"))
  for key, value in dict(changes).items():
    *sections, last = key.split(".")
    where = content["config"]
    for section in sections:
      where = where[section]
    where[last] = value
  files.write_json(str(folder / "config.json"), content)
  rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  train, evaluation, last_row = rows
  course = [{**evaluation, **dict(row)} for row in evals] or [evaluation]
  ends = [] if final is None else [{**last_row, **dict(final)}]
  lines = [json.dumps(row) + "\n" for row in [train, *course, *ends]]
  (folder / "metrics.jsonl").write_text("".join(lines))
  return str(folder)


def result(variant="ioc", seed=0, **figures):
  values = {"train_accuracy": 0.5, "test_accuracy": 0.5, "certificate": "PROVED"}
  return Result(
    "net on data", variant, "", seed, f"digest{seed}", "finished", 10, 3.0, 16, **values | figures
  )


def test_a_row_says_what_the_run_says(tmp_path):
  evals = [
    {"step": step, "epoch": step / 10, "train_accuracy": 0.1, "test_accuracy": accuracy}
    for step, accuracy in ((10, 0.2), (20, 0.6), (30, 0.4))
  ]
  final = {"train_accuracy": 0.75, "test_accuracy": 0.5, "gap": 0.25, "test_loss": 1.5}
  workdir = workdir_of(tmp_path, "a", {"seed": 3}, evals, final)
  found = results.of_workdir(workdir, "panel", "variant", "short", (0.9, 0.7))
  run, row = convex_jax.load(str(SAVED)), found.rows[0]
  assert row.key == ("panel", "variant", "short", 3)
  assert (row.train_accuracy, row.test_accuracy, row.gap) == (0.75, 0.5, 0.25)
  assert (row.peak_test_accuracy, row.peak_epoch, row.peak_train_accuracy) == (0.6, 2.0, 0.1)
  assert row.parameters == sum(leaf.size for leaf in map(np.asarray, leaves(run.params)))
  assert row.certificate == "PROVED" and row.source_test_accuracy == 0.7
  images = run.config.batch_size * 20
  rate = run.metrics("train")[0]["images_per_second"]
  assert row.seconds == pytest.approx(images / rate, abs=0.1)
  assert [(p.epoch, p.test_accuracy) for p in found.points] == [(1, 0.2), (2, 0.6), (3, 0.4)]


def test_a_free_network_is_stopped_where_it_fits_as_well_as_ours():
  course = [
    Point("net on data", "base", "", seed, epoch, train, test + 0.1 * seed, 0.0, 0.0)
    for seed in (0, 1)
    for epoch, train, test in ((3, 0.9, 0.4), (1, 0.3, 0.3), (2, 0.5, 0.6))  # In any order.
  ]
  words = tables.stopped_early([result(train_accuracy=0.4), result(seed=1)], course)
  assert words == "57.50 ± 17.68"  # Halfway from 30 to 60 %; at the second's, 70 %.
  assert (
    tables.stopped_early([result(train_accuracy=0.2), result(train_accuracy=0.95)], course) == ""
  )
  assert tables.stopped_early([result(seed=2)], course) == ""
  some = [result(train_accuracy=0.4), result(train_accuracy=0.95), result(train_accuracy=0.4)]
  assert tables.stopped_early(some, course) == "45.00 ± 0.00 (2 of 3 seeds)"
  ours = result(peak_test_accuracy=0.6, peak_epoch=2.0)
  variants = {"base": [result("base")], "ioc": [result(train_accuracy=0.4), ours]}
  cells = cells_of(variants, course)
  heading = "baseline early-stopped at equal train accuracy, test (%)"
  assert [cells[name][heading] for name in variants] == ["", "52.50 ± 10.61"]
  assert [cells[name]["best test accuracy (%)"] for name in variants] == ["", "60.00"]
  assert [cells[name]["its epoch"] for name in variants] == ["", "2"]
  assert [cells[name]["vs. baseline (points)"] for name in variants] == ["", "+0.00"]


def cells_of(variants, baseline=()):
  """The cells of both tables: {variant: {heading: text}}."""
  cells = {name: {} for name in variants}
  for columns in (tables.RESULTS, tables.DETAILS):
    lines = tables.table(columns, variants, list(baseline)).splitlines()
    heads, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    for name, *row in rows:
      cells[name] |= dict(zip(heads[1:], row, strict=True))
  return cells


def leaves(tree):
  return [x for v in tree.values() for x in (leaves(v) if isinstance(v, Mapping) else [v])]


def test_a_run_that_is_not_finished_is_no_result(tmp_path):
  workdir = workdir_of(tmp_path, "a", final=None)
  with pytest.raises(UserError, match="is not finished"):
    results.of_workdir(workdir, "panel", "variant")
  found = results.of_workdir(workdir, "panel", "variant", outcome="diverged")
  assert found.rows[0].outcome == "diverged" and math.isnan(found.rows[0].test_accuracy)


def test_results_come_back_as_they_were_written(tmp_path):
  found = Results(
    (result(broken_by="mul, in 'a | b'"), result("base", certificate="", zero_share=0.25)),
    (Point("net on data", "ioc", "", 0, 1.0, 0.1, 0.2, 2.3, 2.4),),
  )
  results.write(found, str(tmp_path))
  again = results.read(str(tmp_path))
  assert repr(again) == repr(found)  # nan is not nan.
  assert results.read(str(tmp_path / "nothing")) == Results()


def test_a_damaged_table_is_told(tmp_path):
  results.write(Results((result(),)), str(tmp_path))
  path = tmp_path / "results.csv"
  path.write_text(path.read_text().replace(",10,", ",ten,"))
  with pytest.raises(UserError, match="line 2 is not a valid row"):
    results.read(str(tmp_path))


def test_a_table_older_than_a_column_is_read_and_a_cut_one_is_told(tmp_path):
  results.write(Results((result(peak_epoch=2.0),)), str(tmp_path))
  path = tmp_path / "results.csv"
  with open(path, newline="") as file:
    table = list(csv.reader(file))
  column = table[0].index("peak_epoch")
  older = [row[:column] + row[column + 1 :] for row in table]
  with open(path, "w", newline="") as file:
    csv.writer(file).writerows(older)
  row = results.read(str(tmp_path)).rows[0]
  assert math.isnan(row.peak_epoch) and row.certificate == "PROVED"
  with open(path, "w", newline="") as file:
    csv.writer(file).writerows([older[0], older[1][:10]])
  with pytest.raises(UserError, match="line 2 is not a valid row"):
    results.read(str(tmp_path))
  path.write_bytes(b"panel,variant\n\xff\xff,x\n")
  with pytest.raises(UserError, match="is not a valid row"):
    results.read(str(tmp_path))


def test_a_damaged_certificate_is_told(tmp_path):
  workdir = workdir_of(tmp_path, "a")
  pathlib.Path(workdir, "certificate.json").write_text("{")
  with pytest.raises(UserError, match=r"certificate\.json is damaged"):
    results.of_workdir(workdir, "panel", "variant")


def test_later_results_take_the_place_of_their_own_key_alone():
  old = Results((result(test_accuracy=0.1), result(seed=1)), ())
  new = old + Results((result(test_accuracy=0.2),), ())
  assert [(row.seed, row.test_accuracy) for row in new.rows] == [(1, 0.5), (0, 0.2)]


def test_runs_are_named_by_what_sets_them_apart(tmp_path):
  dirs = [
    workdir_of(tmp_path, "a", {"model.parts": "base"}),
    workdir_of(tmp_path, "b", {"optimizer.learning_rate": 0.5, "seed": 0}),
    workdir_of(tmp_path, "c", {"optimizer.learning_rate": 0.5, "seed": 1, "log.every_steps": 7}),
  ]
  found = results.of_workdirs(dirs)
  assert {row.panel for row in found.rows} == {"mixer tiny on digits"}
  assert [row.variant for row in found.rows][1:] == ["ioc, learning_rate 0.5"] * 2
  assert found.rows[0].variant.startswith("base, learning_rate 0.0")
  with pytest.raises(UserError, match="same config and seed"):
    results.of_workdirs([dirs[0], dirs[0]])


def test_a_digest_is_the_configs_and_outlives_new_keys(tiny_config):
  digest = workdirs.digest(tiny_config)
  changed = tiny_config.copy_and_resolve_references()
  changed.log.every_steps, changed.data.dir = 7, "elsewhere"
  assert workdirs.digest(changed) == digest
  changed.optimizer.learning_rate = 0.123
  assert workdirs.digest(changed) != digest
  older = json.loads(tiny_config.to_json_best_effort())
  for section, key in ((older, "max_skipped"), (older["model"], "norm"), (older["data"], "whiten")):
    del section[key]  # As in a run that is older than these keys.
  assert workdirs.digest(older) == digest
  changed = tiny_config.copy_and_resolve_references()
  changed.data.loader = "resident"  # Where small images lie.
  assert workdirs.digest(changed) == digest


def test_mean_and_spread_are_those_of_the_samples():
  values = [0.71, 0.72, 0.74]
  text = tables.mean_and_spread(values, 100)
  mean, spread = map(float, text.split(" ± "))
  assert mean == pytest.approx(100 * np.mean(values), abs=0.005)
  assert spread == pytest.approx(100 * np.std(values, ddof=1), abs=0.005)
  assert tables.mean_and_spread([math.nan, 0.5]) == "0.50" and tables.mean_and_spread([]) == ""


def test_a_differences_error_is_welchs():
  ours = [result(seed=i, test_accuracy=a) for i, a in enumerate((0.70, 0.72, 0.71))]
  base = [result("base", i, test_accuracy=a) for i, a in enumerate((0.80, 0.86))]
  by, error = map(float, tables.difference(ours, base).split(" ± "))
  a, b = ([100 * row.test_accuracy for row in rows] for rows in (ours, base))
  assert by == pytest.approx(np.mean(a) - np.mean(b), abs=0.005)
  expected = math.sqrt(statistics.variance(a) / 3 + statistics.variance(b) / 2)
  assert error == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize(
  ("certificates", "words"),
  [
    (["PROVED", "PROVED"], "proved"),
    (["PROVED", ""], "proved (1 of 2 runs)"),
    (["PROVED", "REFUTED"], "proved and refuted"),
    (["", ""], "not certified"),
  ],
)
def test_a_table_says_proved_of_what_is_proved_alone(certificates, words):
  rows = [
    result(seed=i, certificate=c, broken_by="LayerNorm" if c == "REFUTED" else "")
    for i, c in enumerate(certificates)
  ]
  assert cells_of({"ioc": rows})["ioc"]["convex"] == words


def test_a_report_names_the_operation_that_breaks_convexity(tmp_path):
  rows = (result("base", certificate=""), result("paper", certificate="REFUTED", broken_by="a sub"))
  report.write_report(Results(rows), str(tmp_path), "title")
  text = (tmp_path / "report.md").read_text()
  assert "`paper`: convexity is first broken by a sub." in text and "`base`: " not in text


@pytest.mark.parametrize(
  ("value", "words"),
  [(40.039, "40"), (1300.02, "1300"), (2.5, "2.5"), (0.0445, "0.0445"), (0.0, "0")],
)
def test_epochs_are_integers_where_a_run_was_one_of_epochs(value, words):
  assert tables.epochs(value) == words


def test_the_command_writes_a_page_with_its_pictures_inside(tmp_path, capsys):
  evals = [{"step": s, "epoch": s / 10, "test_accuracy": s / 100} for s in (10, 20, 30)]
  dirs = [
    workdir_of(tmp_path, f"{parts}{seed}", {"model.parts": parts, "seed": seed}, evals)
    for parts in ("base", "ioc")
    for seed in (0, 1)
  ]
  out = tmp_path / "out"
  assert report.main([*dirs, f"--out={out}"]) == 0
  page, text = (out / "report.html").read_text(), (out / "report.md").read_text()
  assert str(out / "report.html") in capsys.readouterr().out
  picture = out / "mixer_tiny_on_digits.png"
  assert Image.open(picture).size[0] > 600 and picture.stat().st_size < 300_000
  assert page.count("data:image/png;base64,") == 1 and 'src="mixer' not in page
  assert not re.search(r'(src|href)="(?!data:)', page)  # Nothing is fetched.
  assert "<script" not in page and page.count("<table") == 2
  headings = [t.content for t in MarkdownIt("commonmark").enable("table").parse(text)[:2]]
  assert headings[1] == "Comparison of runs"
  with open(out / "results.csv") as file:
    rows = list(csv.DictReader(file))
  assert [(row["variant"], row["seed"]) for row in rows] == [
    ("base", "0"), ("base", "1"), ("ioc", "0"), ("ioc", "1"),
  ]  # fmt: skip
  assert report.main([str(out), f"--out={tmp_path / 'again'}"]) == 0
  assert (tmp_path / "again" / "report.md").read_text() == text


def test_each_panel_has_a_picture_of_its_own(tmp_path):
  """Also where names differ only in punctuation, or are not of ASCII letters."""
  panels = ("C", "C++", "C 2", "Größe", "c")
  rows = [dataclasses.replace(result(test_accuracy=i / 9), panel=p) for i, p in enumerate(panels)]
  page = pathlib.Path(report.write_report(Results(tuple(rows)), str(tmp_path), "Names")).read_text()
  pictures = re.findall(r"!\[.*?\]\((.*?)\)", (tmp_path / "report.md").read_text())
  assert len({*pictures}) == len(panels)
  found = re.findall(r"base64,([^\"]+)", page)
  assert [base64.b64decode(each) for each in found] == [
    (tmp_path / picture).read_bytes() for picture in pictures
  ]


def test_a_run_whose_config_lacks_a_key_of_another_is_compared(tmp_path):
  """As the size of an architecture may stay out of a config of one's own."""
  dirs = [workdir_of(tmp_path, name) for name in "ab"]
  path = str(tmp_path / "a" / "config.json")
  content = files.read_json(path)
  del content["config"]["model"]["tokens_hidden"]
  files.write_json(path, content)
  path = str(tmp_path / "b" / "config.json")
  content = files.read_json(path)
  content["config"]["model"]["tokens_hidden"] = 24
  files.write_json(path, content)
  variants = [row.variant for row in results.of_workdirs(dirs).rows]
  assert variants == ["ioc, tokens_hidden None", "ioc, tokens_hidden 24"]


def test_a_curve_is_the_mean_of_its_seeds_within_their_range():
  accuracies = {0: (0.1, 0.2, 0.3), 1: (0.3, 0.6, 0.9), 2: (0.2, 0.1)}
  points = [
    Point("p", "v", "", seed, epoch, 0.0, accuracy, 0.0, 0.0)
    for seed, values in accuracies.items()
    for epoch, accuracy in enumerate(values, 1)
  ]
  x, low, mean, high = figures.band(points, "test_accuracy", 100)
  assert x == [1, 2]  # Those that every seed has.
  np.testing.assert_allclose([low, mean, high], [[10, 10], [20, 30], [30, 60]])


def test_curves_of_old_and_new_runs_are_of_the_same_epochs(tmp_path):
  """Numbers lose digits on their way through a table: a run must not differ before it."""
  evals = [{"step": s, "epoch": s / 3, "test_accuracy": s / 7} for s in range(1, 7)]
  workdirs = [workdir_of(tmp_path, f"{seed}", {"seed": seed}, evals) for seed in (0, 1)]
  old, new = (results.of_workdir(workdir, "p", "v") for workdir in workdirs)
  results.write(old, str(tmp_path))
  both = results.read(str(tmp_path)) + new
  assert len(figures.band(list(both.points), "test_accuracy", 1)[0]) == 6


def test_schedules_are_not_compared_with_each_other():
  long, short = result("base", test_accuracy=0.9), result("base", test_accuracy=0.5)
  rows = [dataclasses.replace(long, schedule="full"), dataclasses.replace(short, schedule="short")]
  assert list(tables.panels_of(Results(tuple(rows)))) == [
    "net on data (full)", "net on data (short)",
  ]  # fmt: skip


def test_a_sweeps_results_are_not_overwritten(tmp_path, capsys):
  kept = dataclasses.replace(result(), schedule="full")
  results.write(Results((kept,)), str(tmp_path))
  before = (tmp_path / "results.csv").read_bytes()
  workdir = workdir_of(tmp_path, "a")
  assert report.main([workdir, f"--out={tmp_path}"]) == 2
  assert "pass another --out" in capsys.readouterr().err
  assert (tmp_path / "results.csv").read_bytes() == before


def test_two_results_of_one_name_and_two_configs_are_told(tmp_path, capsys):
  for name, digest in (("a", "1"), ("b", "2")):
    (tmp_path / name).mkdir()
    results.write(Results((dataclasses.replace(result(), digest=digest),)), str(tmp_path / name))
  dirs = [str(tmp_path / name) for name in ("a", "b")]
  assert report.main([*dirs, f"--out={tmp_path / 'out'}"]) == 2
  assert "of another config" in capsys.readouterr().err


def test_a_diverged_run_is_counted_and_drawn_by_nobody(tmp_path):
  nan = math.nan
  lost = dataclasses.replace(
    result(seed=1, train_accuracy=nan, test_accuracy=nan, certificate=""), outcome="diverged"
  )
  rows = (result(), lost)
  points = tuple(
    Point(*row.key, epoch, 0.5, 0.5, 1.0, 1.0) for row, n in zip(rows, (5, 1)) for epoch in range(n)
  )
  report.write_report(Results(rows, points), str(tmp_path), "title")
  line = (tmp_path / "report.md").read_text().split("| ioc |")[1]
  assert "50.00" in line and cells_of({"ioc": list(rows)})["ioc"]["runs"] == "2 (1 diverged)"


def test_text_of_a_result_is_no_markup(tmp_path):
  bad = result("<script>alert(1)</script>")
  report.write_report(Results((bad,)), str(tmp_path), "a <b>title</b>")
  page = (tmp_path / "report.html").read_text()
  assert "<script" not in page and "<b>" not in page


def test_many_variants_are_drawn_as_ends(tmp_path):
  rows = tuple(result(f"variant {i}", test_accuracy=i / 10) for i in range(6))
  points = tuple(Point(*row.key, 1.0, 0.5, 0.5, 1.0, 1.0) for row in rows)
  report.write_report(Results(rows, points), str(tmp_path), "title")
  assert "Final accuracy of each run" in (tmp_path / "report.md").read_text()
  tall = Image.open(tmp_path / "net_on_data.png").size[1]
  report.write_report(Results(rows[:5], points[:5]), str(tmp_path), "title")
  assert tall > Image.open(tmp_path / "net_on_data.png").size[1]  # A line a variant.


@pytest.mark.parametrize("path", ["nothing", "empty"])
def test_what_is_no_run_is_told(tmp_path, capsys, path):
  (tmp_path / "empty").mkdir()
  assert report.main([str(tmp_path / path), f"--out={tmp_path / 'out'}"]) == 2
  assert "holds no run" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_radii_are_of_all_norms_unless_some_are_named(monkeypatch, capsys):
  asked = []
  monkeypatch.setattr(radii_command, "load", lambda *_: None)
  monkeypatch.setattr(radii_command, "measure", lambda run, norms, *_: asked.append(norms))
  monkeypatch.setattr(radii_command, "table_of", lambda *_: "")
  monkeypatch.setattr(radii_command, "write", lambda *_: None)
  assert radii_command.main(["--workdir=x"]) == 0 and asked == [tuple(NORMS)]
  assert radii_command.main(["--workdir=x", "--norms="]) == 2  # A variable that is not set, maybe.
  assert "--norms=''; expected some of" in capsys.readouterr().err and len(asked) == 1
