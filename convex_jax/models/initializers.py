"""Initial values under which a network of weights >= 0 starts to learn.

Weights of one sign add up: without care every layer shifts and shrinks what it sees. After
Hoedt and Klambauer 2023, "Principled Weight Initialisation for Input-Convex Neural Networks".
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Moments:
  """What a layer's inputs look like: g(z) for z ~ N(0, 1), pairs correlated by 1/2."""

  mean: float  # E g(z)
  square: float  # E g(z)^2
  product: float  # E g(z) g(z')


NORMED = Moments(0.0, 1.0, 0.5)  # g = identity: the output of a norm.
ELU = Moments(0.1605209, 0.6449461, 0.3247809)  # g = ELU with alpha = 1.


def log_normal_mean(fan_in: int, inputs: Moments) -> float:
  """Mean weight that keeps pre-activations at variance 1 and correlation r = 1/2.

  m_w^2 = r / (N (m2 + (N - 1) c - N m1^2)) with fan-in N (Hoedt and Klambauer 2023,
  "Principled Weight Initialisation for Input-Convex Neural Networks", section 3).
  """
  n, m1, m2, c = fan_in, inputs.mean, inputs.square, inputs.product
  return float(np.sqrt(0.5 / (n * (m2 + (n - 1) * c - n * m1**2))))


def log_normal(inputs: Moments) -> Callable[..., jax.Array]:
  """Log-normal weights >= 0 of the mean above and variance (1 - r) / (N m2).

  The last axis is the output, all others are the fan-in (dense and conv kernels).
  """

  def initialize(key, shape, dtype=jnp.float32):
    fan_in = int(np.prod(shape[:-1]))
    mean = log_normal_mean(fan_in, inputs)
    variance = 0.5 / (fan_in * inputs.square)
    log_square = np.log(mean**2 + variance)
    mu, sigma = np.log(mean**2) - log_square / 2, np.sqrt(log_square - np.log(mean**2))
    return jnp.exp(mu + sigma * jax.random.normal(key, shape, dtype))

  return initialize
