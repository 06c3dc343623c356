"""Networks by name, and the errors in names and sizes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import convex_jax
from convex_jax.models import catalog, overview
from convex_jax.models.parts import Parts


def test_a_network_is_created_by_its_name():
  model = convex_jax.create_model("mixer", size="S/16", twin="ioc", classes=10)
  assert model.parts.twin.name == "ioc" and model.depth == 8 and model.patch == 16
  images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), images)
  assert jax.eval_shape(model.apply, nn.meta.unbox(variables), images).shape == (2, 10)


def test_every_choice_of_a_network_is_taken():
  model = convex_jax.create_model(
    "mixer", "tiny", "ioc", dtype=jnp.bfloat16, overlap=1, passthrough=False, norm="affine",
    head_depth=2, remat=True,
  )  # fmt: skip
  twin, numerics = model.parts.twin, model.parts.numerics
  assert (model.classes, model.overlap, twin.passthrough, twin.norm_kind) == (
    1000,
    1,
    False,
    "affine",
  )
  assert (numerics.dtype, numerics.remat, model.parts.head_spec.depth) == (jnp.bfloat16, True, 2)


@pytest.mark.parametrize(
  "args,changes,words",
  [
    (("mixr", "S/16"), {}, "Unknown architecture 'mixr'; expected one of all_cnn.*'mixer'"),
    (("mixer", "S16"), {}, "Unknown size 'S16' of 'mixer'; expected one of B/16.*mean 'S/16'"),
    (("mixer", "tiny", "ico"), {}, "Unknown twin 'ico'; expected one of base, ioc, paper.*'ioc'"),
    (("mixer", "tiny"), {"overlp": 1}, "Unknown key 'overlp' of 'mixer'; .*mean 'overlap'"),
    (("mlp", "tiny"), {"overlap": 1}, "Unknown key 'overlap' of 'mlp'"),
    (("mlp", "tiny"), {"parts": "ioc"}, "Unknown key 'parts' of 'mlp'"),
    (("mlp", "tiny"), {"norm": "bach"}, "Unknown norm 'bach'; expected one of .*mean 'batch'"),
    (("mlp", "tiny"), {"constraint": "clmp"}, "Unknown constraint 'clmp'; .*mean 'clamp'"),
    (("mlp", "tiny"), {"gates": "none"}, "Unknown gates 'none'; expected one of static, twin"),
    (("mlp", "tiny"), {"convex_from": "heads"}, "Unknown convex_from 'heads'; .*mean 'head'"),
    (("mlp", "tiny"), {"classes": 0}, "classes is 0; expected an integer >= 1"),
    (("mlp", "tiny"), {"classes": "ten"}, "classes is 'ten'; expected an integer >= 1"),
  ],
)
def test_unknown_names_are_refused_with_the_nearest(args, changes, words):
  with pytest.raises(ValueError, match=words):
    convex_jax.create_model(*args, **changes)


@pytest.mark.parametrize("name", catalog.names())
def test_no_field_of_an_architecture_has_the_name_of_a_shared_key(name):
  """One would hide the other: `config.model` holds both."""
  assert len(catalog.shared_keys()) > 10
  assert not catalog.fields(name).keys() & catalog.shared_keys().keys()


def test_the_architecture_of_a_network_is_known():
  for name in catalog.names():
    assert catalog.name_of(catalog.create_model(name, "tiny")) == name

  class Small(nn.Module):
    parts: Parts = Parts()

  with pytest.raises(
    ValueError, match=r"Small is not an architecture .*expected a Model of all_cnn"
  ):
    catalog.name_of(Small())


@pytest.mark.slow
def test_the_overview_lists_every_model_and_size():
  table = overview.table()
  assert table.row_count == sum(len(catalog.module_of(n).SIZES) - 1 for n in catalog.names())


@pytest.mark.parametrize(
  "name,fields,px,words",
  [
    ("cycle_mlp", dict(depths=(1, 1), widths=(4,), ratios=(2, 2)), 8, "the same number in each"),
    ("densenet", dict(blocks=(1,) * 5, growth=4, stem_width=8), 32, "too small for the halvings"),
    ("densenet", dict(blocks=(1, 1), growth=4, stem_width=8, compression=0.01), 32, "compression"),
    ("cycle_mlp", dict(depths=(1,), widths=(4,), ratios=(2,)), 2, ">= 3"),
    ("efficientnet", dict(stages=9), 32, "from 1 to 7"),
    ("all_cnn", dict(kernels=(3,)), 8, "padding='same'"),
  ],
)
def test_sizes_that_clash_are_refused(name, fields, px, words):
  assert words in catalog.module_of(name).check(fields, px)[0]


def test_a_size_that_patches_do_not_tile_is_refused():
  check = catalog.module_of("mixer").check
  assert check(dict(patch=9), 72) == [] == check(dict(patch=9, cells=4), 72)
  assert "a multiple of 9" in check(dict(patch=9), 32)[0]
  assert "a divisor of 8" in check(dict(patch=9, cells=3), 72)[0]


@pytest.mark.parametrize("px,side", [(32, 1), (224, 7)])
def test_cells_that_no_map_of_a_cycle_mlp_has_are_refused(px, side):
  module = catalog.module_of("cycle_mlp")
  fields = module.SIZES["B1"] | dict(cells=2)
  assert f"({side}); expected 1" in module.check(fields, px)[0]
  assert module.check(fields | dict(dense_readout=True), px) == []
