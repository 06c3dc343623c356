r"""Two classes, one logit: a convex function that is positive on the first of them.

    python -m convex_jax.main --config=configs/binary.py:cifar10

The tasks of Pfrommer et al. 2023 ("Asymmetric Certified Robustness via Feature-Convex Neural
Networks"): cats against dogs of CIFAR-10 (here with a Mixer), 3 against 8 of MNIST, T-shirts
against shirts of Fashion-MNIST (with an MLP), and 3 against 8 of the embedded digits. In the
convex twin each image of the first class has a certified radius in closed form
(`proof.radii.one_sided_radius`); `python -m convex_jax radii` covers both classes.
"""

from configs import mixer, mlp

CLASSES = {  # The first is the one to protect.
  "cifar10": ("cat", "dog"),
  "mnist": ("3", "8"),
  "fashion_mnist": ("T-shirt/top", "Shirt"),
  "digits": ("3", "8"),
}


def get_config(dataset: str = "cifar10"):
  config = (mixer if dataset == "cifar10" else mlp).get_config(dataset)
  config.data.classes = CLASSES.get(dataset, ())  # For another data set, name two.
  config.model.one_logit = True
  config.epochs = 40
  config.optimizer.learning_rate = 1e-3
  config.optimizer.warmup_steps = 100
  config.optimizer.schedule = "cosine"
  return config
