"""float64 as IEEE 754 defines it, on which margins and bounds for rounding rest."""

import contextlib
from collections.abc import Iterator

import jax

ROUNDING = 1e-9  # Relative to values; more than the error of their evaluation in float64.


@contextlib.contextmanager
def plain() -> Iterator[None]:
  """While active, the settings of JAX that change numbers, or refuse programs, have their defaults.

  A `jax_default_matmul_precision` such as BF16_BF16_F32 rounds the factors of float64 products, too.
  """
  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.default_matmul_precision(None))
    stack.enter_context(jax.numpy_rank_promotion("allow"))
    stack.enter_context(jax.numpy_dtype_promotion("standard"))
    stack.enter_context(jax.disable_jit(False))
    stack.enter_context(jax.debug_nans(False))
    stack.enter_context(jax.debug_infs(False))
    stack.enter_context(jax.transfer_guard("allow"))
    yield


@contextlib.contextmanager
def float64() -> Iterator[None]:
  """While active, JAX's 64-bit types are on, and computed by a device that has them: see `plain`.

  TPUs emulate float64 by pairs of float32, less precisely than IEEE 754 and within float32's range;
  there the host's CPU computes.

  Raises `ValueError` on a TPU where JAX may not use the CPU.
  """
  with plain(), jax.enable_x64(True), contextlib.ExitStack() as stack:
    if jax.default_backend() == "tpu":
      try:
        host = jax.local_devices(backend="cpu")[0]
      except RuntimeError as error:
        raise ValueError(
          "certificates and radii need the host's CPU for float64, and JAX may not use it; expected"
          " JAX_PLATFORMS=tpu,cpu, or unset"
        ) from error
      stack.enter_context(jax.default_device(host))
    yield
