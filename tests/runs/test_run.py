"""A run in a notebook and in a pool of processes: odd arguments, edits, pickles."""

import copy
import multiprocessing
import pathlib
import pickle
import shutil

import jax
import numpy as np
import pytest

import convex_jax
from convex_jax.errors import UserError
from convex_jax.runs import certified
from convex_jax.runs.workdir import Workdir
from tests.support import ROOT

SAVED = ROOT / "tests" / "fixtures" / "run_1_1"
IMAGES = np.load(SAVED / "logits.npz")["images"]


@pytest.fixture(scope="module")
def run():
  return convex_jax.load(SAVED)


@pytest.mark.parametrize(
  "arguments, expected",
  [
    ({"weights": "RAW"}, "'auto', 'ema' or 'raw'"),
    ({"weights": None}, "'auto', 'ema' or 'raw'"),
    ({"weights": ["raw"]}, "'auto', 'ema' or 'raw'"),
    ({"weights": np.array(["raw", "ema"])}, "'auto', 'ema' or 'raw'"),
    ({"step": "newest"}, "'latest' or 'best'"),
    ({"step": "²"}, "'latest' or 'best'"),
    ({"step": None}, "'latest' or 'best'"),
    ({"step": True}, "'latest' or 'best'"),
    ({"step": 20.0}, "'latest' or 'best'"),
    ({"step": [20]}, "'latest' or 'best'"),
    ({"step": -1}, "expected one of 20, 'latest', 'best'"),
    ({"step": 10**30}, "expected one of 20, 'latest', 'best'"),
    ({"step": "021"}, "expected one of 20, 'latest', 'best'"),
  ],
)
def test_odd_arguments_of_load_are_told(arguments, expected):
  with pytest.raises(UserError, match=expected):
    convex_jax.load(SAVED, **arguments)


def test_a_step_in_any_form_is_found():
  for step in (20, np.int64(20), np.array(20), jax.numpy.array(20), "20", "latest", "best"):
    assert convex_jax.load(pathlib.Path(SAVED), step=step).step == 20


@pytest.mark.parametrize(
  "call, expected",
  [
    (lambda r: r.logits(None), "uint8 of shape"),
    (lambda r: r.logits("a cat"), "uint8 of shape"),
    (lambda r: r.logits([[1], [1, 2]]), "uint8 of shape"),
    (lambda r: r.logits(IMAGES / 255), "images are float64"),
    (lambda r: r.predict(IMAGES[0]), r"shape \(8, 8, 1\)"),
    (lambda r: r.logits(IMAGES, 0), "batch_size is 0"),
    (lambda r: r.logits(IMAGES, -3), "batch_size is -3"),
    (lambda r: r.logits(IMAGES, 2.5), "batch_size is 2.5"),
    (lambda r: r.network(IMAGES[0]), "expected .'any', 8, 8, 1"),
    (lambda r: r.network(IMAGES[:, :4]), "expected .'any', 8, 8, 1"),
    (lambda r: r.apply(None, IMAGES), "expected a dict of params, stats"),
    (lambda r: r.apply(r.params, IMAGES), "expected a dict of params, stats"),
    (lambda r: r.apply({"params": r.params}, IMAGES), "expected a dict of params, stats"),
    (lambda r: r.network(IMAGES[:0]), "there are no images"),
    (lambda r: r.network(IMAGES + 1j), "images are complex"),
    (lambda r: r.convexify(jax.numpy.float64), "within jax.enable_x64"),
    (lambda r: r.network([IMAGES[0], IMAGES[0, :4]]), "images are no array"),
    (lambda r: r.network(np.full(IMAGES.shape, None)), "images are object"),
    (lambda r: r.network(np.full(IMAGES.shape, "cat")), "images are <U3"),
    (lambda r: r.apply(r.weights, IMAGES, "flot"), "dtype is 'flot'; expected a dtype of floats"),
    (lambda r: r.apply(r.weights, IMAGES, int), "expected a dtype of floats"),
    (lambda r: r.convexify("flt"), "expected a dtype of floats"),
    (lambda r: r.metrics("Eval"), "'train', 'eval', 'final'"),
    (lambda r: r.metrics(np.array(["eval", "x"])), "'train', 'eval', 'final'"),
    (lambda r: r.replace(params=3), "expected a dict of arrays"),
    (lambda r: r.replace(params={"head": {}}), "head/kernel is missing"),
    (lambda r: r.replace(params={**r.params, "x": 1}), "x is unknown"),
    (lambda r: r.replace(params={**r.params, 7: 1}), "7 is unknown"),
    (lambda r: r.replace(params=jax.tree.map(lambda p: p + 1j, r.params)), "is complex"),
    (lambda r: r.replace(params=jax.tree.map(lambda p: p.astype(str), r.params)), "is <U"),
    (lambda r: r.replace(params=jax.tree.map(lambda _: [[1], [1, 2]], r.params)), "is no array"),
    (lambda r: r.replace(params=jax.tree.map(lambda p: p[..., :1], r.params)), "has shape"),
    (lambda r: certified.certify_and_write("runs/x"), "expected a run"),
    (lambda r: certified.certify_run(r, "CONVEX"), "expected one of convex"),
    (lambda r: certified.certify_and_write(r.replace(params=r.params)), "not those of its"),
    (lambda r: certified.certifier("runs/x"), "expected a run"),
    (lambda r: certified.minimise_logit(r, True), "from 0 to 9"),
    (lambda r: certified.minimise_logit(r, 10), "from 0 to 9"),
    (lambda r: certified.minimise_logit(r, "cat"), "from 0 to 9"),
    (lambda r: certified.minimise_logit(r, 0, (0,)), r"expected \(least, greatest\)"),
    (lambda r: certified.minimise_logit(r, 0, (5, 1)), "box is empty"),
    (lambda r: certified.minimise_logit(r, 0, steps=-1), "steps is -1"),
    (lambda r: certified.certifier(r).radius(IMAGES[0], ("l7",)), "expected some of l1"),
    (lambda r: certified.certifier(r).radius(IMAGES[0], "l1"), "expected some of l1"),
  ],
)
def test_odd_arguments_of_a_run_are_told(run, call, expected):
  with pytest.raises(ValueError, match=expected):
    call(run)


def test_what_a_run_hands_out_is_read_only(run):
  def item():
    run.params["head"]["kernel"][:] = 0

  def in_place():
    run.params["head"]["kernel"] *= -1

  def key():
    run.params["head"]["kernel"] = 0

  def field():
    run.params = {}

  def stats():
    run.stats["x"] = 0

  for change in (item, in_place, key, field, stats):
    with pytest.raises((ValueError, AttributeError), match=r"read-only|immutable|cannot assign"):
      change()


def test_replaced_weights_are_what_everything_uses(run):
  before = run.logits(IMAGES)
  head = {name: -leaf for name, leaf in run.params["head"].items()}
  negated = {**run.params, "head": head}
  new = run.replace(params=negated)
  assert "with other weights" in repr(new) and "other" not in repr(run)
  logits = new.logits(IMAGES)
  assert np.abs(logits - before).max() > 0.1
  np.testing.assert_allclose(logits, new.network(IMAGES), atol=1e-5)
  assert (new.predict(IMAGES) == logits.argmax(-1)).all()
  image = IMAGES[:1].astype(np.float32)
  assert convex_jax.certify(run.network, image)
  assert not convex_jax.certify(new.network, image, search_steps=0)
  assert new.certificate is None and run.certificate["verdict"] == "PROVED"
  head["kernel"][...] = 0  # The caller's own array: the run has a copy.
  np.testing.assert_array_equal(new.logits(IMAGES), logits)
  np.testing.assert_array_equal(run.logits(IMAGES), before)
  assert run.digest == run.certificate["weights_sha256"]


def logits_of(run):
  return run.logits(IMAGES)


@pytest.mark.parametrize("used", [False, True])
def test_a_run_can_be_pickled_and_copied(used):
  run = convex_jax.load(SAVED)
  want = convex_jax.load(SAVED).logits(IMAGES)
  if used:
    run.predict(IMAGES)
    run.network(IMAGES)
  for make in (lambda r: pickle.loads(pickle.dumps(r)), copy.copy, copy.deepcopy):
    again = make(run)
    np.testing.assert_array_equal(again.logits(IMAGES), want)
    assert again.config == run.config and repr(again) == repr(run)
    with pytest.raises(ValueError, match="read-only"):
      again.params["head"]["kernel"][:] = 0
  network, predict = pickle.loads(pickle.dumps((run.network, run.predict)))
  np.testing.assert_allclose(network(IMAGES), want, atol=1e-5)
  assert (predict(IMAGES) == want.argmax(-1)).all()


def ask(queue, action):
  try:
    queue.put(str(action()))
  except Exception as error:
    queue.put(str(error))


@pytest.mark.filterwarnings("ignore:.*fork")
@pytest.mark.parametrize("action", [lambda r: r.logits(IMAGES), lambda r: convex_jax.load(SAVED)])
def test_a_forked_process_is_told_what_to_do_instead_of_hanging(run, action):
  run.predict(IMAGES)
  context = multiprocessing.get_context("fork")
  queue = context.SimpleQueue()
  process = context.Process(target=ask, args=(queue, lambda: action(run)))
  process.start()
  assert "get_context('spawn')" in queue.get()
  process.join()


@pytest.mark.slow
def test_a_spawned_pool_computes_what_this_process_does(run):
  with multiprocessing.get_context("spawn").Pool(1) as pool:
    np.testing.assert_allclose(pool.map(logits_of, [run])[0], run.logits(IMAGES), atol=1e-5)


def test_a_run_without_checkpoints_says_so(tmp_path):
  folder = shutil.copytree(SAVED, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
  for step in ("latest", 20):
    with pytest.raises(
      UserError, match=r"There is no checkpoint in .*expected a run that has saved"
    ):
      convex_jax.load(folder, step)


def test_a_workdir_in_which_nothing_was_saved_may_be_given_another_config(tmp_path, tiny_config):
  """As after a memory that was full at the first step: there is nothing to lose."""
  saved = ("checkpoints", "metrics.jsonl")
  new = shutil.copytree(SAVED, tmp_path / "new", ignore=shutil.ignore_patterns(*saved))
  with Workdir(new).claim(tiny_config):
    pass
  for kept in saved:
    begun = shutil.copytree(SAVED, tmp_path / kept, ignore=lambda _, names: {*saved} - {kept})
    with pytest.raises(UserError, match="contains a run"), Workdir(begun).claim(tiny_config):
      pass
