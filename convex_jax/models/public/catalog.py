"""The public names of every architecture."""

from convex_jax.models.public import all_cnn, cycle_mlp, densenet, efficientnet, mixer, mlp
from convex_jax.models.public.names import Names

NAMES: dict[str, Names] = {  # By `config.model.name`.
  "all_cnn": all_cnn.NAMES,
  "cycle_mlp": cycle_mlp.NAMES,
  "densenet": densenet.NAMES,
  "efficientnet": efficientnet.NAMES,
  "mixer": mixer.NAMES,
  "mlp": mlp.NAMES,
}
