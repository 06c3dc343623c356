r"""DenseNet-BC, 100 layers, growth 12, on images of 32 px (Huang et al. 2017, section 4.2).

    python -m convex_jax.main --config=configs/densenet.py

The authors' recipe: SGD with Nesterov momentum, batch 64, rate 0.1 divided by 10 at 50 %
and 75 % of 300 epochs, flips and crops; 95.5 % test accuracy for the base. Sivaprasad et
al. 2021 found 94.1 % for their smaller base (`model.size=ioc_paper`) and 91.1 % for its
twin. `:imagenet2012` is DenseNet-121, which the report trained there to about 75 % and its twin
to 10 %: 224 px, batch 256, 90 epochs, the rate divided by 10 after 30 and 60.
"""

from ml_collections.config_dict import placeholder

from configs import base


def get_config(dataset: str = "cifar10"):
  config = base.get_config()
  config.data.name = dataset
  config.model.name = "densenet"
  config.model.size = "BC-100-12"
  config.model.blocks = placeholder(tuple)  # Layers per block; None: the size's own.
  config.model.growth = placeholder(int)  # Features that a layer adds.
  config.model.stem_width = placeholder(int)  # Features of the stem.
  config.model.stem = placeholder(str)  # imagenet, cifar.
  config.model.bottleneck = placeholder(bool)  # 1x1 convolution before each 3x3.
  config.model.compression = placeholder(float)  # Fraction of the features that a transition keeps.
  config.model.transition = placeholder(int)  # Features after one; 0: compression decides.
  config.model.dropout = placeholder(float)  # After every convolution but the first.
  config.model.pool = placeholder(str)  # global, 2x2: before the head.
  config.epochs = 300
  config.batch_size = 64
  config.data.flip = dataset not in ("mnist", "fashion_mnist", "svhn_cropped")
  config.data.crop_padding = 4
  config.optimizer.name = "sgd"
  config.optimizer.learning_rate = 0.1
  config.optimizer.schedule = "step"
  # Decoupled; pulls as an L2 penalty of 1e-4 does through a momentum of 0.9.
  config.optimizer.weight_decay = 1e-3
  if dataset in base.NATURAL:
    config.data.loader = "stream"
    config.model.size = "121"
    config.data.image_size = 224
    config.data.crop_padding = 0
    config.epochs = 90
    config.batch_size = 256
    config.optimizer.decay_at = (1 / 3, 2 / 3)
  if dataset == "imagenette":
    config.batch_size = 64
    config.optimizer.learning_rate = 0.025
  if dataset == "digits":
    config.data.image_size = 8
    config.data.flip = False
    config.data.crop_padding = 0
    config.model.blocks = (4, 4)
    config.epochs = 30
    config.eval.every_epochs = 5.0
  return config
