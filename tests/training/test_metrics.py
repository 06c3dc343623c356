"""Evaluation metrics against scikit-learn and numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics

from convex_jax.training.metrics import Evaluation, WithTopFive
from convex_jax.training.step import cross_entropy


def evaluate(logits, labels, mask):
  loss = cross_entropy(jnp.asarray(logits), jnp.asarray(labels))
  return Evaluation.single_from_model_output(
    loss=loss, logits=jnp.asarray(logits), labels=jnp.asarray(labels), mask=jnp.asarray(mask)
  )


@pytest.fixture
def case():
  rng = np.random.default_rng(0)
  logits = rng.normal(0, 2, (300, 5)).astype(np.float32)
  return logits, rng.integers(0, 5, 300).astype(np.int32), rng.random(300) < 0.7


def test_masked_sums_agree_with_scikit_learn(case):
  logits, labels, mask = case
  got = evaluate(*case).compute()
  probabilities = np.asarray(jax.nn.softmax(logits.astype(np.float64)[mask]))
  probabilities = probabilities / probabilities.sum(1, keepdims=True)
  assert float(got["loss"]) == pytest.approx(
    sklearn.metrics.log_loss(labels[mask], probabilities, labels=range(5)), rel=1e-5
  )
  accuracy = sklearn.metrics.accuracy_score(labels[mask], logits[mask].argmax(1))
  assert float(got["accuracy"]) == pytest.approx(accuracy, rel=1e-6)
  # Expected calibration error, weighted by count, from its definition.
  confidence, hit = probabilities.max(1), logits[mask].argmax(1) == labels[mask]
  bins = np.minimum((confidence * 15).astype(int), 14)
  parts = [abs(hit[bins == b].sum() - confidence[bins == b].sum()) for b in range(15)]
  assert float(got["calibration_error"]) == pytest.approx(sum(parts) / mask.sum(), rel=1e-4)


def test_parts_merge_into_the_whole(case):
  logits, labels, mask = case
  whole = evaluate(*case).compute()
  merged = evaluate(logits[:100], labels[:100], mask[:100]).merge(
    evaluate(logits[100:], labels[100:], mask[100:])
  )
  for name, value in merged.compute().items():
    assert float(value) == pytest.approx(float(whole[name]), rel=1e-5)


def test_label_smoothing_is_the_mixture_of_targets():
  logits = jnp.asarray([[1.0, 2.0, -1.0]])
  logp = np.asarray(jax.nn.log_softmax(logits))[0]
  want = -(0.7 * logp[1] + 0.3 * logp.mean())
  assert float(cross_entropy(logits, jnp.asarray([1]), 0.3)[0]) == pytest.approx(want, rel=1e-6)


def test_top_five_accuracy_agrees_with_scikit_learn_and_counts_no_nan(case):
  rng = np.random.default_rng(1)
  logits, (_, _, mask) = rng.normal(0, 2, (300, 9)).astype(np.float32), case
  labels = rng.integers(0, 9, 300).astype(np.int32)

  def top_five(logits):
    loss = jnp.zeros(len(logits))
    arrays = map(jnp.asarray, (logits, labels, mask))
    fields = dict(zip(("logits", "labels", "mask"), arrays, strict=True))
    found = WithTopFive.single_from_model_output(loss=loss, **fields).compute()
    return float(found["top5_accuracy"])

  want = sklearn.metrics.top_k_accuracy_score(labels[mask], logits[mask], k=5, labels=range(9))
  assert top_five(logits) == pytest.approx(want, rel=1e-6)
  assert top_five(np.full_like(logits, np.nan)) == 0
  constant = np.mean(labels[mask] < 5)  # Of equal logits the first count.
  assert top_five(np.zeros_like(logits)) == pytest.approx(constant, rel=1e-6)
