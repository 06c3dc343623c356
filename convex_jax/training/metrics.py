"""What an evaluation measures: masked sums, exact on any number of devices and hosts."""

import jax
import jax.numpy as jnp
from clu import metrics as clu_metrics
from flax import struct


@struct.dataclass
class CalibrationError(clu_metrics.Metric):
  """Expected calibration error, sum_b n_b / n |accuracy_b - confidence_b|.

  Over 15 equal bins of the confidence, the largest softmax probability (Guo et al. 2017,
  "On Calibration of Modern Neural Networks", section 2), weighted by each bin's count.
  """

  count_b: jax.Array
  correct_b: jax.Array
  confidence_b: jax.Array

  @classmethod
  def from_model_output(cls, *, logits, labels, mask, **_):
    confidence_B = jax.nn.softmax(logits).max(-1)
    bin_B = jnp.clip((confidence_B * 15).astype(jnp.int32), 0, 14)
    member_Bxb = jax.nn.one_hot(bin_B, 15) * mask[:, None]
    correct_B = (logits.argmax(-1) == labels).astype(jnp.float32)
    return cls(member_Bxb.sum(0), correct_B @ member_Bxb, confidence_B @ member_Bxb)

  @classmethod
  def empty(cls):
    return cls(jnp.zeros(15), jnp.zeros(15), jnp.zeros(15))

  def merge(self, other):
    return jax.tree.map(jnp.add, self, other)

  def compute(self):
    return jnp.abs(self.correct_b - self.confidence_b).sum() / self.count_b.sum()


@struct.dataclass
class Evaluation(clu_metrics.Collection):
  """Mean loss (nats), accuracy and calibration error (0..1) of a split."""

  loss: clu_metrics.Average.from_output("loss")  # pyright: ignore[reportInvalidTypeForm]
  accuracy: clu_metrics.Accuracy
  calibration_error: CalibrationError


def _in_top_five(logits, labels, **_) -> jax.Array:
  """Whether the label is among the five largest logits, (B,); it is not where one is not a number."""
  _, largest = jax.lax.top_k(logits, min(5, logits.shape[-1]))
  is_among = (largest == labels[:, None]).any(-1) & ~jnp.isnan(logits).any(-1)
  return is_among.astype(jnp.float32)


@struct.dataclass
class WithTopFive(clu_metrics.Collection):
  """`Evaluation`, and the fraction of labels among the five largest logits."""

  loss: clu_metrics.Average.from_output("loss")  # pyright: ignore[reportInvalidTypeForm]
  accuracy: clu_metrics.Accuracy
  calibration_error: CalibrationError
  top5_accuracy: clu_metrics.Average.from_fun(_in_top_five)  # pyright: ignore[reportInvalidTypeForm]
