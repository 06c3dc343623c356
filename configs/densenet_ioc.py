r"""The exactly convex twin of `densenet.py`: only `model.parts` differs.

python -m convex_jax.main --config=configs/densenet_ioc.py
"""

from configs import densenet


def get_config(dataset: str = "cifar10"):
  config = densenet.get_config(dataset)
  config.model.parts = "ioc"
  return config
