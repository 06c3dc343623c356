r"""The exactly convex twin of `mixer.py`: only `model.parts` differs.

python -m convex_jax.main --config=configs/mixer_ioc.py
"""

from configs import mixer


def get_config(dataset: str = "cifar10"):
  config = mixer.get_config(dataset)
  config.model.parts = "ioc"
  return config
