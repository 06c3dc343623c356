r"""The exactly convex twin of `binary.py`: only `model.parts` differs.

python -m convex_jax.main --config=configs/binary_ioc.py
"""

from configs import binary


def get_config(dataset: str = "cifar10"):
  config = binary.get_config(dataset)
  config.model.parts = "ioc"
  return config
