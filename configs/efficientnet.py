r"""EfficientNet-B0 (Tan and Le 2019; the report's further work) on images of 32 px.

    python -m convex_jax.main --config=configs/efficientnet.py

The stem does not halve, so that the last map is 2 px; AdamW with a cosine. `:imagenet2012` is
the published size and recipe: 224 px, 350 epochs, RMSProp, the rate of 0.016 for 256 images
falling to 1.2 % of it (smoothly, where the authors multiply by 0.97 every 2.4 epochs),
averaged weights; timm's RandAugment and erasing stand for AutoAugment. 77.1 % for the base.
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
  config.model.stages = placeholder(int)  # Number of stages; None: all 7.
  config.model.dropout = placeholder(float)  # Before the head.
  config.model.drop_path = placeholder(float)  # Stochastic depth after the last block.
  config.model.stem_stride = 1  # px; None: the size's own, 2.
  config.model.variant = placeholder(str)  # tf, torch: padding and norm; None: tf.
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
    config.optimizer.name = "rmsprop"
    config.optimizer.b2 = 0.9
    config.optimizer.learning_rate = 0.064
    config.optimizer.schedule = "exponential"
    config.optimizer.decay_factor = 0.0118  # 0.97 to the power 350 / 2.4.
    # The authors' 1e-5 is a term of the gradient, which RMSProp divides by 0.03 (the root of its
    # epsilon) where gradients are small and momentum multiplies by 10: this much of the rate.
    config.optimizer.weight_decay = 3e-3
    config.data.randaugment = (2, 9.0)
    config.data.erasing = 0.2
  if dataset == "imagenette":
    config.batch_size = 128
    config.ema_decay = 0.99
    config.optimizer.learning_rate = 0.008
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
