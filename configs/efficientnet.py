r"""EfficientNet-B0 (Tan and Le 2019; the report's further work) on images of 32 px.

    python -m convex_jax.main --config=configs/efficientnet.py

The stem does not halve, so that the last map is 2 px; AdamW with a cosine in place of the
authors' RMSProp. `:imagenet2012` is the published size, 224 px and 350 epochs, with which they
found 77.1 % (by AutoAugment too).
"""

from ml_collections.config_dict import placeholder

from configs import base


def get_config(dataset: str = "cifar10"):
  config = base.get_config()
  config.data.name = dataset
  config.model.name = "efficientnet"
  config.model.size = "B0"
  config.model.width = placeholder(float)  # Multiplier of features; None: the size's own.
  config.model.depth = placeholder(float)  # Multiplier of blocks.
  config.model.stages = placeholder(int)  # The first so many; None: all 7.
  config.model.dropout = placeholder(float)  # Before the head.
  config.model.drop_path = placeholder(float)  # Stochastic depth after the last block.
  config.model.stem_stride = 1  # px; None: the size's own, 2.
  config.model.variant = placeholder(str)  # tf, torch: padding and norm.
  config.epochs = 100
  config.batch_size = 128
  config.label_smoothing = 0.1
  config.data.flip = dataset not in ("mnist", "fashion_mnist", "svhn_cropped")
  config.data.crop_padding = 4
  config.optimizer.name = "adamw"
  config.optimizer.learning_rate = 1e-3
  config.optimizer.weight_decay = 0.05
  config.optimizer.schedule = "cosine"
  config.optimizer.warmup_steps = 100
  if dataset in base.NATURAL:
    config.data.loader = "stream"
    config.data.image_size = 224
    config.data.crop_padding = 0
    config.model.stem_stride = 2
    config.epochs = 350
    config.batch_size = 1024
    config.ema_decay = 0.9999
    config.optimizer.warmup_steps = 6250  # 5 epochs of ImageNet.
  if dataset == "imagenette":
    config.batch_size = 128
    config.ema_decay = 0.99
    config.optimizer.learning_rate = 2e-4
    config.optimizer.warmup_steps = 370
  if dataset == "digits":
    config.data.image_size = 16
    config.data.flip = False
    config.data.crop_padding = 0
    config.model.width = 0.5
    config.model.depth = 0.5
    config.model.stages = 4
    config.model.drop_path = 0.0
    config.model.variant = "torch"
    config.epochs = 30
    config.batch_size = 32
    config.optimizer.learning_rate = 3e-3
    config.eval.every_epochs = 5.0
  return config
