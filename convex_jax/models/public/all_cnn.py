"""All-CNN: torch files of modules conv1 to conv8 and class_conv."""

from convex_jax.models.public.names import Names, fixed, minus_one

NAMES = Names([(r"conv(\d)", lambda m: f"conv_{minus_one(m[1])}"), *fixed(head="class_conv")])
