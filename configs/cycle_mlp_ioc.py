r"""The exactly convex twin of `cycle_mlp.py`: only `model.parts` differs.

python -m convex_jax.main --config=configs/cycle_mlp_ioc.py
"""

from configs import cycle_mlp


def get_config(dataset: str = "cifar10"):
  config = cycle_mlp.get_config(dataset)
  config.model.parts = "ioc"
  return config
