"""DenseNet: torchvision's and timm's files."""

from convex_jax.models.public.names import Names, Rule, fixed, minus_one

RULES: list[Rule] = [
  *fixed(stem="features.conv0", stem_norm="features.norm0", norm="features.norm5"),
  *fixed(norm="features.norm_final", head="classifier"),
  (
    # Older files have norm.1 for norm1.
    r"features\.denseblock(\d+)\.denselayer(\d+)\.(norm|conv)\.?([12])",
    lambda m: f"block_{minus_one(m[1])}_layer_{minus_one(m[2])}/{m[3]}_{minus_one(m[4])}",
  ),
  (r"features\.transition(\d+)\.norm", lambda m: f"transition_{m[1]}_norm"),
  (r"features\.transition(\d+)\.conv", lambda m: f"transition_{m[1]}"),
]

NAMES = Names(RULES, pixels=lambda _: "imagenet")
