r"""All-CNN-C on images of 32 px (Springenberg et al. 2015).

    python -m convex_jax.main --config=configs/all_cnn.py

The recipe of Sivaprasad et al. 2021, Adam 1e-3 and batch 64: they found 92.8 % test
accuracy for their base (`model.size=ioc_paper`) and 90.6 % for its convex twin.
Springenberg et al.: 92.75 % with flips and shifts.
"""

from ml_collections.config_dict import placeholder

from configs import base


def get_config(dataset: str = "cifar10"):
  config = base.get_config()
  config.data.name = dataset
  config.model.name = "all_cnn"
  config.model.size = "c"
  config.model.kernels = placeholder(tuple)  # Sides before each halving, px; None: the size's.
  config.model.width = placeholder(int)  # Features; twice as many after the first halving.
  config.model.dropout = placeholder(float)  # After each halving; 0.4 of it on the image.
  config.model.padding = placeholder(str)  # valid, same: of the last 3x3 convolution.
  config.model.form = placeholder(str)  # published, ioc_paper.
  config.epochs = 350
  config.batch_size = 64
  config.data.flip = dataset not in ("mnist", "fashion_mnist", "svhn_cropped")
  config.data.crop_padding = 4
  if dataset == "digits":
    config.data.image_size = 8
    config.data.flip = False
    config.data.crop_padding = 0
    config.model.width = 32
    config.model.padding = "same"
    config.epochs = 40
    config.batch_size = 32
    config.optimizer.schedule = "cosine"
    config.eval.every_epochs = 5.0
  return config
