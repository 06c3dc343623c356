"""Every config key, with its unit and its reason; pure data.

The config of an architecture starts from this one and changes what its source prescribes. Any
key can be set on the command line: `--config.optimizer.learning_rate=3e-4`.
"""

from ml_collections import ConfigDict

NATURAL = ("imagenet2012", "imagenette")  # Photographs of natural size.


def get_config() -> ConfigDict:
  config = ConfigDict()
  config.seed = 0  # Of initial weights, order, augmentation, label noise and held-out examples.
  config.epochs = 100  # Passes over the training split.
  config.steps = 0  # Training steps; if > 0 it overrides `epochs`.
  config.batch_size = 128  # Images per step, over all devices together.
  # Steps per dispatch (`lax.scan`); > 1 where the device waits for the host.
  config.steps_per_call = 1
  config.dtype = "float32"  # Of the computation: float32 or bfloat16. Parameters stay float32.
  config.fsdp = 1  # Devices over which each large weight is split; 1: every device holds all of it.
  # Statistics of the whole batch; "device": of each device's part of it.
  config.batch_norm = "global"
  config.label_smoothing = 0.0  # s in targets (1 - s) y + s / classes.
  # l in the term l / 2 |J|^2 of the loss, J the Jacobian of the logits in the normalised image.
  config.jacobian_penalty = 0.0
  config.mixup = 0.0  # Alpha of mixup's Beta distribution; 0: no mixup.
  # Alpha of CutMix; 0: none. With mixup as well, one of them at random per batch.
  config.cutmix = 0.0
  config.max_skipped = 10  # Stop after this many consecutive non-finite updates.
  # If > 0, skip updates whose loss is this many standard deviations above its mean.
  config.skip_spikes = 0.0
  # Minutes, after which the run saves and stops, to be resumed; 0: no limit.
  config.time_limit = 0.0
  # Weights to start from: public ones (.npz, .safetensors, .pth), or a run's folder; "": random.
  config.init_from = ""
  config.init_optimizer = False  # With the optimizer state of the run in init_from.
  # If > 0, weights are averaged with this decay, and the average is evaluated.
  config.ema_decay = 0.0

  config.data = ConfigDict()
  config.data.name = "cifar10"  # `python -m convex_jax data list`
  config.data.classes = ()  # Names of the classes to keep, in this order; (): all.
  config.data.dir = ""  # Folder of prepared data; "": TFDS's default (~/tensorflow_datasets).
  config.data.image_size = 32  # Side of the network's input, px; images are resized on the device.
  # Mean and deviation that pixels are scaled by. own: the data set's; imagenet; half: to -1..1;
  # unit: to 0..1; auto: as the network of `init_from` saw them, without one the data set's own.
  config.data.normalise = "auto"
  config.data.flip = False  # Mirror left and right with probability 1/2.
  config.data.crop_padding = 0  # Pad with this many black px on each side, then crop at random.
  config.data.whiten = False  # Decorrelate neighbouring pixels and colours, before any resize.
  config.data.jitter = 0.0  # Change brightness, contrast and saturation by up to this fraction.
  # Operations per image, and their magnitude, 0 to 10; 0 operations: none.
  config.data.randaugment = (0, 9.0)
  # Consecutive occurrences of each example, each with its own augmentation.
  config.data.repeats = 1
  config.data.erasing = 0.0  # Probability that a rectangle becomes noise.
  config.data.label_noise = 0.0  # Fraction of training labels replaced by random ones.
  config.data.train_fraction = 1.0  # Fraction of the training split that is used.
  # Fraction of the training split held out and evaluated as "valid".
  config.data.validation_fraction = 0.0
  # resident: on the devices; host: sent batch by batch; auto: resident if it fits. For photographs
  # of varying size, stream: decoded by workers as needed; resident, host: from `data cache`.
  config.data.loader = "auto"
  # Side of the images of `data cache`, px, cropped to image_size; 0: equal to image_size.
  config.data.cache_size = 0
  # Fraction of a streamed image's area that a training crop shows.
  config.data.crop_area = (0.08, 1.0)
  # Fraction of a streamed image's shorter side shown in evaluation, centred.
  config.data.eval_share = 0.875
  # At inference logits are means over the image moved down and right by each pair of these numbers
  # of px, filled with black; (0,): as it is.
  config.data.eval_shifts = (0,)
  config.data.eval_flip = False  # Means over the image and its mirror image, too.
  # Decoding processes per host; 0: threads; -1: one per core, or threads on up to 4 cores.
  config.data.workers = -1
  # Stop if more than this fraction of the images cannot be read.
  config.data.max_unreadable = 0.001

  config.model = ConfigDict()
  config.model.name = "mlp"  # An architecture; `python -m convex_jax models` lists them.
  config.model.size = "800x3"  # One of its sizes.
  # The twin. base: as published; ioc: exactly convex; paper: the report's.
  config.model.parts = "base"
  # clamp: w becomes max(w, 0); exponentiate: w < 0 becomes exp(w - 5); penalised: any w, at the price
  # of common_penalty.
  config.model.constraint = "clamp"
  # Maps of free sign from the image's affine part to later layers; `ioc` only.
  config.model.passthrough = True
  # `ioc` only; False: the architecture's own, with negative weights set to 0.
  config.model.log_normal_init = True
  config.model.branch_scales = True  # Learnt scales >= 0 on residual branches; `ioc` only.
  # twin: the twin's; own: as published; batch, layer, affine: this kind in any twin.
  config.model.norm = "twin"
  # twin: the twin's; static: learnt weights, or none, in place of gates made of features.
  config.model.gates = "twin"
  # head: only the head is the twin's, on an unconstrained trunk.
  config.model.convex_from = "image"
  config.model.head_depth = 0  # Hidden layers of the head; 0: linear, as published.
  config.model.head_width = 256  # Units of each hidden layer of the head.
  config.model.one_logit = False  # With two classes: logits (y, 0), from a single output y.
  # Times the negative shares of weights that are >= 0 in `ioc`, a term of the loss: of `base`, or of
  # the twin whose constraint is penalised.
  config.model.common_penalty = 0.0
  config.model.remat = False  # Recompute blocks in the backward pass: less memory, more time.

  config.optimizer = ConfigDict()
  config.optimizer.name = "adam"  # adam, adamw, sgd (Nesterov), lion, rmsprop (as in TensorFlow).
  config.optimizer.learning_rate = 1e-3
  config.optimizer.schedule = "constant"  # constant, linear, cosine, exponential, step.
  config.optimizer.warmup_steps = 0  # Updates of linear warm-up from 0.
  config.optimizer.decay_at = (0.5, 0.75)  # step: at these fractions of the run ...
  # ... the rate is multiplied by this; exponential: the final fraction of the rate.
  config.optimizer.decay_factor = 0.1
  config.optimizer.weight_decay = (
    0.0  # Decoupled, multiplied by the rate; not applied to biases and norms.
  )
  config.optimizer.clip_norm = 0.0  # Largest global gradient norm; 0: no clipping.
  config.optimizer.b1 = 0.9  # Adam's and Lion's.
  config.optimizer.b2 = 0.999  # Adam's, Lion's and RMSProp's.
  config.optimizer.momentum = 0.9  # SGD's and RMSProp's.
  config.optimizer.accumulate = 1  # Batches whose mean gradient makes one update.

  config.eval = ConfigDict()
  config.eval.every_epochs = 1.0  # Also once at the end, on every example.
  # Training examples in each evaluation before the last; 0: all.
  config.eval.train_examples = 10_000

  config.checkpoint = ConfigDict()
  # Extra checkpoints every n steps, besides one per evaluation; 0: none.
  config.checkpoint.every_steps = 0
  config.checkpoint.keep = 2  # Keep this many of the latest checkpoints, and the best.
  config.checkpoint.must_save = True  # False: continue when a checkpoint cannot be written.
  # Seconds to write a checkpoint, after which it counts as failed.
  config.checkpoint.patience = 600.0

  config.log = ConfigDict()
  config.log.every_steps = 50  # Steps between two log lines and rows of metrics.jsonl.
  # First and last step to trace into workdir/profile; (0, 0): none.
  config.log.profile_steps = (0, 0)
  return config
