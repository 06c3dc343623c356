r"""MLP of three hidden layers of 800 with BatchNorm (report 4.1; Sivaprasad et al. 2021).

    python -m convex_jax.main --config=configs/mlp.py

The report's recipe is a proof of concept (Adam 1e-5, few epochs), so this is the 2021
paper's: Adam 1e-4, and from its code batch 64, flips and crops. It found 63.8 % test
accuracy for the base and 69.9 % for its convex twin, after 1,300 epochs. About 15 s per
epoch on two cores. `:digits` takes seconds.
"""

from ml_collections.config_dict import placeholder

from configs import base


def get_config(dataset: str = "cifar10"):
  config = base.get_config()
  config.data.name = dataset
  config.model.name = "mlp"
  config.model.size = "800x3"
  config.model.width = placeholder(int)  # Units per hidden layer; None: the size's own.
  config.model.depth = placeholder(int)  # Hidden layers.
  config.model.passthrough_rank = placeholder(int)  # Of the map that later layers see.
  config.model.dense_readout = placeholder(bool)  # The head sees the hidden units of every layer.
  config.batch_size = 64
  config.optimizer.learning_rate = 1e-4
  config.data.flip = True
  config.data.crop_padding = 4
  if dataset in ("mnist", "fashion_mnist"):
    config.data.image_size = 28
    config.data.flip = False
    config.data.crop_padding = 2
  if dataset == "stl10":
    config.data.image_size = 96
    config.data.crop_padding = 12
  if dataset == "svhn_cropped":
    config.data.flip = False
  if dataset in base.NATURAL:  # As in the 32 px ImageNet of Chrabaszcz et al. 2017.
    config.data.loader = "stream"
    config.data.cache_size = 36
    config.data.crop_padding = 0
  if dataset == "digits":
    config.data.image_size = 8
    config.data.flip = False
    config.data.crop_padding = 1
    config.epochs = 40
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "cosine"
    config.model.width = 200
    config.eval.every_epochs = 5.0
  return config
