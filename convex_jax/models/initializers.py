"""Initial weights from which a network with weights >= 0 can learn.

Weights of one sign add up: without a correction every layer shifts and shrinks its input. The
method is that of Hoedt and Klambauer 2023, "Principled Weight Initialisation for Input-Convex
Neural Networks".
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Moments:
  """Moments of a layer's inputs g(z), with z ~ N(0, 1) and pairs correlated by 1/2."""

  mean: float  # E g(z)
  square: float  # E g(z)^2
  product: float  # E g(z) g(z')


NORMED = Moments(0.0, 1.0, 0.5)  # g(z) = z, the output of a norm.
ELU = Moments(0.1605209, 0.6449461, 0.3247809)  # g is ELU with alpha = 1.


def log_normal_mean(fan_in: int, inputs: Moments) -> float:
  """The mean weight that keeps pre-activations at variance 1 and correlation r = 1/2.

  m_w^2 = r / (N (m2 + (N - 1) c - N m1^2)) with fan-in N and E g = m1, E g^2 = m2, E g g' = c
  (Hoedt and Klambauer 2023, section 3).
  """
  n, m1, m2, c = fan_in, inputs.mean, inputs.square, inputs.product
  return float(np.sqrt(0.5 / (n * (m2 + (n - 1) * c - n * m1**2))))


def log_normal(inputs: Moments) -> Callable[..., jax.Array]:
  """Log-normal weights of mean `log_normal_mean` and variance (1 - r) / (N m2), r = 1/2.

  The last axis of a kernel is its output, all others are the fan-in.
  """

  def initialize(key, shape, dtype=jnp.float32):
    fan_in = int(np.prod(shape[:-1]))
    mean = log_normal_mean(fan_in, inputs)
    variance = 0.5 / (fan_in * inputs.square)
    log_square = np.log(mean**2 + variance)
    mu, sigma = np.log(mean**2) - log_square / 2, np.sqrt(log_square - np.log(mean**2))
    return jnp.exp(mu + sigma * jax.random.normal(key, shape, dtype))

  return initialize
