r"""The exactly convex twin of `efficientnet.py`: only `model.parts` differs.

python -m convex_jax.main --config=configs/efficientnet_ioc.py
"""

from configs import efficientnet


def get_config(dataset: str = "cifar10"):
  config = efficientnet.get_config(dataset)
  config.model.parts = "ioc"
  return config
