r"""The exactly convex twin of `mlp.py`: only `model.parts` differs.

python -m convex_jax.main --config=configs/mlp_ioc.py
"""

from configs import mlp


def get_config(dataset: str = "cifar10"):
  config = mlp.get_config(dataset)
  config.model.parts = "ioc"
  return config
