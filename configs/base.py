"""Every key there is, with its unit and its reason; pure data.

A model's config starts from this one and changes what its source asks for. Any key can
be set on the command line: `--config.optimizer.learning_rate=3e-4`.
"""

from ml_collections import ConfigDict

NATURAL = ("imagenet2012", "imagenette")  # Photographs of natural size.


def get_config() -> ConfigDict:
  config = ConfigDict()
  config.seed = 0  # Of weights, order, augmentation, label noise and held-out examples.
  config.epochs = 100  # Passes over the training split.
  config.steps = 0  # Batches; above 0 it overrides `epochs`.
  config.batch_size = 128  # Images a step, over all devices together.
  config.steps_per_call = (
    1  # Steps a dispatch (`lax.scan`); above 1 where the device waits for the host.
  )
  config.dtype = "float32"  # Of the computation: float32, bfloat16. Parameters stay float32.
  config.fsdp = 1  # Devices over which each large weight is split; 1: all hold all.
  config.batch_norm = "global"  # Over the whole batch; device: over each device's part of it.
  config.label_smoothing = 0.0  # s in targets (1 - s) y + s / classes.
  config.mixup = 0.0  # Alpha of the share that an image keeps; 0: none.
  config.cutmix = 0.0  # The same for rectangles; with both, either at random.
  config.max_skipped = 10  # Updates in a row that are no finite numbers; then the run ends.
  config.skip_spikes = 0.0  # Above 0: nor is a loss so many deviations above its mean an update.
  config.time_limit = 0.0  # Minutes; then the run saves and ends, to be resumed; 0: none.
  config.init_from = ""  # Public weights to start from: .npz, .safetensors, .pth; "": random.
  config.ema_decay = 0.0  # Above 0: weights are averaged, and the average is evaluated.

  config.data = ConfigDict()
  config.data.name = "cifar10"  # `python -m convex_jax data list`
  config.data.classes = ()  # Names of those to keep, in their order; (): all.
  config.data.dir = ""  # Folder of prepared data; "": TFDS's (~/tensorflow_datasets).
  config.data.image_size = 32  # px; the network's input, resized on the device.
  config.data.flip = False  # Mirror left and right, probability 1/2.
  config.data.crop_padding = 0  # px; pad with black and crop at random.
  config.data.whiten = False  # Decorrelate neighbouring pixels and colours, before any resize.
  config.data.jitter = 0.0  # Brightness, contrast, saturation by up to this share.
  config.data.randaugment = (0, 9.0)  # Operations an image, and their magnitude, 0 to 10.
  config.data.repeats = 1  # Times that an example comes in a row, each augmented anew.
  config.data.erasing = 0.0  # Probability that a rectangle becomes noise.
  config.data.label_noise = 0.0  # Share of training labels drawn anew at random.
  config.data.train_fraction = 1.0  # Share of the training split that is used.
  config.data.validation_fraction = 0.0  # Share of it held out, evaluated as "valid".
  # resident: on the devices; host: sent by batch; auto: resident where it fits. Photographs of
  # natural size: stream, decoded by workers as they are needed; resident, host: from `data cache`.
  config.data.loader = "auto"
  config.data.cache_size = (
    0  # px of the images of `data cache`, cropped to image_size; 0: as large.
  )
  config.data.crop_area = (0.08, 1.0)  # Share of a streamed image that a training crop shows.
  config.data.eval_share = 0.875  # Of a streamed image's shorter side, at its centre.
  # Processes that decode on each host; 0: threads; -1: one a core, threads up to 4 cores.
  config.data.workers = -1
  config.data.max_unreadable = 0.001  # Share of images; above it the run stops.

  config.model = ConfigDict()
  config.model.name = "mlp"  # A file of convex_jax/models/.
  config.model.size = "800x3"  # A key of its SIZES.
  config.model.parts = "base"  # base: as published; ioc: exactly convex; paper: the report's.
  config.model.constraint = "clamp"  # max(w, 0); exponentiate: w < 0 becomes exp(w - 5).
  config.model.passthrough = True  # Free-sign maps of the image's affine part; `ioc` only.
  config.model.log_normal_init = True  # `ioc` only; False: its own, with negative weights set to 0.
  config.model.branch_scales = True  # Learnt scales >= 0 on residual branches; `ioc` only.
  config.model.norm = "twin"  # As parts say; own: as published; batch, layer, affine: every twin's.
  config.model.convex_from = "image"  # head: the parts make the head alone, on a free trunk.
  config.model.head_depth = 0  # Hidden layers of the head; 0: linear, as published.
  config.model.head_width = 256  # Units of each.
  config.model.one_logit = False  # Of two classes: y for the first, 0 for the other.
  config.model.remat = (
    False  # Recompute blocks, where there are, in the backward pass: less memory, more time.
  )

  config.optimizer = ConfigDict()
  config.optimizer.name = "adam"  # adam, adamw, sgd (Nesterov), lion, rmsprop (TF's).
  config.optimizer.learning_rate = 1e-3
  config.optimizer.schedule = "constant"  # constant, linear, cosine, exponential, step.
  config.optimizer.warmup_steps = 0  # Updates of linear warm-up from 0.
  config.optimizer.decay_at = (0.5, 0.75)  # step: at these shares of the run ...
  config.optimizer.decay_factor = 0.1  # ... times this; exponential: in all.
  config.optimizer.weight_decay = 0.0  # Decoupled, times the rate; no biases, no norms.
  config.optimizer.clip_norm = 0.0  # Global gradient norm; 0: no clipping.
  config.optimizer.b1 = 0.9  # Adam's and Lion's.
  config.optimizer.b2 = 0.999  # And RMSProp's.
  config.optimizer.momentum = 0.9  # SGD's and RMSProp's.
  config.optimizer.accumulate = 1  # Batches whose mean gradient makes one update.

  config.eval = ConfigDict()
  config.eval.every_epochs = 1.0  # And once more at the end, on every example.
  config.eval.train_examples = 10_000  # Of the training split, in between; 0: all.

  config.checkpoint = ConfigDict()
  config.checkpoint.every_steps = 0  # Between evaluations, each of which saves as well; 0: none.
  config.checkpoint.keep = 2  # The latest so many, and the best; the newest may get damaged.
  config.checkpoint.must_save = True  # False: where one cannot be written the run goes on.
  config.checkpoint.patience = 600.0  # Seconds to write one; after them it counts as failed.

  config.log = ConfigDict()
  config.log.every_steps = 50  # A line, and a row of metrics.jsonl.
  config.log.profile_steps = (0, 0)  # First and last step to trace into workdir/profile.
  return config
