r"""The exactly convex twin of `all_cnn.py`: only `model.parts` differs.

python -m convex_jax.main --config=configs/all_cnn_ioc.py
"""

from configs import all_cnn


def get_config(dataset: str = "cifar10"):
  config = all_cnn.get_config(dataset)
  config.model.parts = "ioc"
  return config
