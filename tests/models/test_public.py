"""Public weight files: where their arrays go, and which files are refused."""

import functools
import pathlib
import sys
import zipfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import save_file

from convex_jax.errors import UserError
from convex_jax.models import catalog
from convex_jax.models.public import files as public_files
from convex_jax.models.public import importer
from convex_jax.models.variables import init_variables
from convex_jax.runs import run
from convex_jax.training import loop
from tests.support import of

ALIKE = dict(patch=2, depth=2, channels=6, tokens_hidden=5, channels_hidden=7)


def build(parts="base", classes=10, **fields):
  return catalog.create_model("mixer", "tiny", parts, classes, **ALIKE | fields)


def official(classes=10, channels=1, side=8, depth=2):
  """Random arrays under the official Mixer's names, for `ALIKE`."""
  rng = np.random.default_rng(0)
  p, c, s = ALIKE["patch"], ALIKE["channels"], (side // ALIKE["patch"]) ** 2
  shapes = {"stem/kernel": (p, p, channels, c), "stem/bias": (c,), "head/kernel": (c, classes)}
  shapes |= {"head/bias": (classes,)}
  norms = ["pre_head_layer_norm"] + [
    f"MixerBlock_{i}/LayerNorm_{j}" for i in range(depth) for j in (0, 1)
  ]
  shapes |= {f"{norm}/{leaf}": (c,) for norm in norms for leaf in ("scale", "bias")}
  for i in range(depth):
    for mixing, width, hidden in (("token", s, 5), ("channel", c, 7)):
      name = f"MixerBlock_{i}/{mixing}_mixing/Dense_"
      shapes |= {f"{name}0/kernel": (width, hidden), f"{name}0/bias": (hidden,)}
      shapes |= {f"{name}1/kernel": (hidden, width), f"{name}1/bias": (width,)}
  return {k: rng.standard_normal(shape).astype(np.float32) for k, shape in shapes.items()}


@pytest.fixture
def save(tmp_path):
  def write(arrays, name="public.npz"):
    path = tmp_path / name
    np.savez(path, **arrays) if name.endswith("npz") else save_file(arrays, path)
    return str(path)

  return write


SHAPE = (8, 8, 1)


def test_every_array_finds_its_place(save):
  public = importer.load_public(build(), save(official()), SHAPE)
  assert len(public.mapped) == len(official()) and not public.fresh and not public.unused
  got = public.weights["params"]["block_1"]["token_mixing"]["dense_1"]["kernel"]
  np.testing.assert_array_equal(got, official()["MixerBlock_1/token_mixing/Dense_1/kernel"])


def under(prefix, arrays):
  return {prefix + key: array for key, array in arrays.items()}


def as_timm(arrays):
  """The same network under timm's names, with torch's layouts and counters."""
  names = {"LayerNorm_0": "norm1", "LayerNorm_1": "norm2", "Dense_0": "fc1", "Dense_1": "fc2"}
  names |= {"token_mixing": "mlp_tokens", "channel_mixing": "mlp_channels", "stem": "stem.proj"}
  names |= {"pre_head_layer_norm": "norm", "kernel": "weight", "scale": "weight"}
  timm = {}
  for key, array in arrays.items():
    words = [names.get(word, word) for word in key.replace("MixerBlock_", "blocks/").split("/")]
    if words[-1] == "weight":
      array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
    timm[".".join(words)] = np.ascontiguousarray(array)
  return timm


def assert_same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a.weights, b.weights)


PREFIXES = ["module.", "model.", "backbone.", "_orig_mod.", "net.module.", "state_dict.model."]


@pytest.mark.parametrize("prefix", [*PREFIXES, "a.b_c.0.", "blocks."])
def test_any_prefix_common_to_all_keys_is_stripped(prefix, save):
  want = importer.load_public(build(), save(official()), SHAPE)
  path = save(under(prefix, as_timm(official())), "public.safetensors")
  got = importer.load_public(build(gelu="erf"), path, SHAPE)
  assert_same(got, want)
  assert got.mapped["params/stem/bias"] == f"{prefix}stem.proj.bias" and not got.fresh
  got = importer.load_public(build(), save(under(prefix.replace(".", "/"), official())), SHAPE)
  assert_same(got, want)


BESIDE = {  # {another entry of a file: (its arrays, what is said of it)}
  "optimizer": (under("optimizer.state.", {"0.exp_avg": np.ones(3)}), "not read: optimizer"),
  "moments": (under("opt/0/mu/", official()) | under("opt/0/nu/", official()), "not read: opt"),
  "counters": ({"epoch": np.int64(3), "model.n_averaged": np.int64(3)}, "not read: epoch"),
  "another": ({"criterion.weight": np.ones(1000)}, "not read: criterion"),
  "best": ({"best_acc1": np.float32(3)}, "not read: best_acc1"),
}


@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize("prefix", ["params/", "model.", "state_dict."])
def test_what_stands_beside_a_network_is_not_read_and_said(name, prefix, save):
  beside, words = BESIDE[name]
  got = importer.load_public(build(), save(under(prefix, official()) | beside), SHAPE)
  assert_same(got, importer.load_public(build(), save(official()), SHAPE))
  assert words in str(got)


@pytest.mark.parametrize(
  "raw,average",
  [
    ("model.", "model_ema."),
    ("state_dict.", "state_dict_ema."),
    ("state_dict.model.", "state_dict.ema_model.module."),
    ("params/", "ema/params/"),
    ("net.", "swa_net."),
  ],
)
def test_of_a_network_and_its_average_the_average_is_taken_and_said(raw, average, save):
  theirs = {key: array + 1 for key, array in official().items()}
  path = save(under(raw, official()) | under(average, theirs))
  got = importer.load_public(build(), path, SHAPE)
  assert_same(got, importer.load_public(build(), save(theirs, "theirs.npz"), SHAPE))
  assert f"taken from the average {average!r}, not from {raw!r}" in str(got)
  alone = importer.load_public(build(), save(under(average, theirs)), SHAPE)
  assert_same(alone, got)


def test_an_average_without_all_arrays_is_not_taken(save):
  theirs = {key: array for key, array in official().items() if "head" not in key}
  path = save(under("model.", official()) | under("model_ema.", theirs))
  got = importer.load_public(build(), path, SHAPE)
  assert_same(got, importer.load_public(build(), save(official()), SHAPE))
  assert "taken from 'model.', since the average 'model_ema.' lacks arrays" in str(got)


def test_two_networks_are_refused_by_their_prefixes(save):
  path = save(under("student.", official()) | under("teacher.", official()))
  with pytest.raises(UserError, match=r"'student.' \(30\), 'teacher.' \(30\); expected one"):
    importer.load_public(build(), path, SHAPE)
  split = under("module.", official())
  split["head/kernel"] = split.pop("module.head/kernel")
  with pytest.raises(UserError, match=r"head/kernel stand outside 'module.'"):
    importer.load_public(build(), save(split), SHAPE)


@pytest.mark.parametrize("gelu", ["tanh", "erf"])
def test_a_file_of_another_architecture_is_refused_for_that_and_nothing_else(gelu, save):
  names = ["conv0.weight", "norm0.weight", "denseblock1.denselayer1.conv1.weight"]
  path = save({f"module.features.{name}": np.ones(3) for name in names})
  with pytest.raises(UserError, match=r"holds no model 'mixer'.*module.features.conv0") as refused:
    importer.load_public(build(gelu=gelu), path, SHAPE)
  message = str(refused.value)
  assert "gelu" not in message and all(message.count(name) == 1 for name in names)


def test_a_key_is_listed_once(save):
  arrays = under("module.", official())
  arrays["module.MixerBlock_7/LayerNorm_0/bias"] = arrays.pop("module.stem/bias")
  with pytest.raises(UserError) as refused:
    importer.load_public(build(), save(arrays), SHAPE)
  lines = str(refused.value).splitlines()
  assert sum("MixerBlock_7/LayerNorm_0/bias" in line for line in lines) == 1
  assert sum("stem/bias" in line for line in lines) == 1
  assert len(lines) == 4


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float64])
@pytest.mark.parametrize("name", ["public.npz", "public.safetensors"])
def test_any_precision_loads(dtype, name, save):
  arrays = {key: array.astype(dtype) for key, array in official().items()}
  got = importer.load_public(build(), save(arrays, name), SHAPE)
  want = {key: array.astype(np.float32) for key, array in arrays.items()}
  assert_same(got, importer.load_public(build(), save(want, "float32.npz"), SHAPE))
  assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(got.weights))


@pytest.mark.parametrize("suffix", ["npz", "ckpt", "pt", "pth.tar", "bin", "pth", "weights", ""])
def test_the_content_of_a_file_counts_and_not_its_name(suffix, save, tmp_path):
  for kind in ("npz", "safetensors"):
    path = pathlib.Path(save(official(), f"public.{kind}"))
    got = importer.load_public(build(), str(path.rename(tmp_path / f"file.{suffix}")), SHAPE)
    assert len(got.mapped) == len(official())


@pytest.mark.parametrize("magic", [b"\x80\x02", b"PK"])
def test_the_length_of_a_header_is_no_magic_number(magic, tmp_path):
  """A safetensors file starts with it, and it may spell what other formats start with."""
  length = int.from_bytes(magic, "little")
  header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(length)
  path = tmp_path / "public"
  path.write_bytes(length.to_bytes(8, "little") + header + np.float32(3).tobytes())
  assert public_files.read(str(path))["a"] == 3


def test_a_torch_file_without_torch_names_the_cure(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", None)
  with zipfile.ZipFile(tmp_path / "new.bin", "w") as archive:
    archive.writestr("archive/data.pkl", b"\x80\x02.")
  (tmp_path / "old.ckpt").write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9")
  for name in ("new.bin", "old.ckpt"):
    with pytest.raises(UserError, match=f"{name} is a torch file and torch is not installed"):
      public_files.read(str(tmp_path / name))


def test_a_torch_that_can_be_made_to_execute_a_file_is_refused(tmp_path, monkeypatch):
  class Torch:
    __version__ = (2, 5, 1)

  monkeypatch.setitem(sys.modules, "torch", Torch)
  (tmp_path / "old.ckpt").write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9")
  with pytest.raises(UserError, match=r"expected 2\.6 or newer"):
    public_files.read(str(tmp_path / "old.ckpt"))


@pytest.mark.parametrize("parts", ["base", "ioc"])
def test_a_file_without_a_head_gets_a_fresh_one(parts, save):
  arrays = {key: array for key, array in official().items() if not key.startswith("head")}
  got = importer.load_public(build(parts), save(arrays), SHAPE)
  assert {"params/head/bias", "params/head/kernel"} <= {*got.fresh}
  assert "the head is a new one: the file has none" in str(got)
  other = importer.load_public(build(parts, classes=3), save(official()), SHAPE)
  assert "the head is a new one: the file's has 10 classes" in str(other)


@pytest.mark.parametrize("parts", ["base", "ioc"])
def test_another_image_size_is_named(parts, save):
  with pytest.raises(
    UserError, match=r"8 px and this one of 16 px; set --config.data.image_size=8"
  ):
    importer.load_public(build(parts), save(official()), (16, 16, 1))
  with pytest.raises(UserError) as refused:  # Another size of the network as well.
    importer.load_public(build(parts, channels=8), save(official()), (16, 16, 1))
  assert "see config.model.size and config.data.image_size" in str(refused.value)


def test_only_what_is_fresh_is_drawn(save):
  """As the network itself would be drawn, with the same seed."""
  got = importer.load_public(build("ioc", classes=3), save(official()), SHAPE, seed=5)
  want = init_variables(build("ioc", classes=3), jax.random.key(5), SHAPE)
  want = traverse_util.flatten_dict(nn.meta.unbox(want), sep="/")
  flat = traverse_util.flatten_dict(got.weights, sep="/")
  assert len(got.fresh) > 5
  for leaf in got.fresh:
    np.testing.assert_allclose(flat[leaf], want[leaf], rtol=1e-6)


PIXELS = {  # {case: (network, a key, pixels, words)}
  "official": ("mixer", {}, "stem/kernel", "half", ""),
  "timm": ("mixer", dict(gelu="erf"), "blocks.0.norm1.weight", "half", "miil"),
  "own": ("mixer", dict(gelu="erf"), "mixer_blocks.0.token_mix.0.weight", "own", "epsilon 1e-5"),
  "densenet": ("densenet", {}, "features.norm5.weight", "imagenet", ""),
  "tf": ("efficientnet", dict(variant="tf"), "bn1.weight", "imagenet", "timm's tf_efficientnet"),
  "torch": ("efficientnet", dict(variant="torch"), "bn1.weight", "imagenet", "timm's efficientnet"),
  "torchvision": ("efficientnet", dict(variant="torch"), "features.0.1.weight", "imagenet", ""),
  "cycle_mlp": ("cycle_mlp", {}, "norm.weight", "imagenet", ""),
  "mlp": ("mlp", {}, "2.weight", "own", ""),
  "all_cnn": ("all_cnn", {}, "conv1.weight", "own", ""),
}


@pytest.mark.parametrize("case", PIXELS)
def test_what_a_file_cannot_tell_is_assumed_and_said(case):
  name, fields, key, pixels, words = PIXELS[case]
  size = "800x3" if name == "mlp" else "c" if name == "all_cnn" else "tiny"
  model, names = catalog.create_model(name, size, **fields), importer.NAMES[name]
  assert names.pixels([key]) == pixels
  told = "\n".join(names.untold(model, [key]))
  assert words in told and (words or not told)


def test_the_older_naming_and_its_unit_axes(save):
  older = {}
  for key, array in official().items():
    new = key.replace("stem/", "embedding/").replace("pre_head_layer_norm", "Mixer/encoder_norm")
    new = new.replace("MixerBlock_", "Mixer/encoderblock_").replace("_mixing/", "_mixing_phase_0/")
    for i in (0, 1):
      new = new.replace(f"Dense_{i}/kernel", f"kernel{i + 1}").replace(
        f"Dense_{i}/bias", f"bias{i + 1}"
      )
    older[new] = array[None] if "kernel1" in new else array
  a, b = (importer.load_public(build(), save(x), SHAPE).weights for x in (official(), older))
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_convex_twin_is_feasible_and_reports_what_is_its_own(save):
  public = importer.load_public(build("ioc"), save(official()), SHAPE)
  block = public.weights["params"]["block_1"]
  theirs = official()["MixerBlock_1/channel_mixing/Dense_0/kernel"]
  np.testing.assert_array_equal(block["channel_mixing"]["dense_0"]["kernel"], np.maximum(theirs, 0))
  assert "params/block_1/token_mixing/passthrough/scale" in public.fresh
  assert all("passthrough" in k or "scale" in k or k.startswith("stats/") for k in public.fresh)
  assert "re-initialised" in str(public)


def test_another_head_is_reinitialised_and_reported(save):
  public = importer.load_public(build(classes=3), save(official()), SHAPE)
  assert public.fresh == ("params/head/bias", "params/head/kernel")
  assert public.weights["params"]["head"]["kernel"].shape == (6, 3)


@pytest.mark.parametrize(
  "change,words",
  [
    (lambda a: a.update({"extra/kernel": np.ones((2, 2), np.float32)}), "extra/kernel"),
    (lambda a: a.pop("MixerBlock_1/LayerNorm_0/bias"), "params/block_1/norm_0/bias"),
    (lambda a: a.update({"stem/bias": np.ones(3, np.float32)}), r"stem/bias \(3,\)"),
    (lambda a: a.update({"stem/bias": np.full(6, np.nan, np.float32)}), "not finite"),
    (lambda a: a.update({"stem/bias": np.arange(6)}), "int64"),
  ],
)
def test_leftovers_gaps_and_wrong_values_are_refused_by_name(save, change, words):
  arrays = official()
  change(arrays)
  with pytest.raises(UserError, match=words):
    importer.load_public(build(), save(arrays), SHAPE)


def test_pickles_and_damaged_files_are_refused(tmp_path):
  np.savez(tmp_path / "evil.npz", stem=np.array([object()], dtype=object))
  (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 cut")
  (tmp_path / "cut.safetensors").write_bytes(b"\xff" * 40)
  (tmp_path / "weights.h5").write_bytes(b"")
  for name in ("evil.npz", "cut.npz", "cut.safetensors", "weights.h5", "absent.npz"):
    with pytest.raises(UserError, match=name):
      importer.load_public(build(), str(tmp_path / name), SHAPE)


def test_an_archive_that_would_fill_the_memory_is_refused(tmp_path):
  """128 MB of zeros in 130 kB; a smaller file of zeros is read."""
  path = str(tmp_path / "bomb.npz")
  np.savez_compressed(path, kernel=np.zeros(2**25, np.float32))
  with pytest.raises(UserError, match=r"would unpack to 134,\d+,\d+; expected at most 20 times"):
    public_files.read(path)
  np.savez_compressed(path, kernel=np.zeros(2**20, np.float32))
  assert public_files.read(path)["kernel"].shape == (2**20,)


def test_damaged_and_hostile_files_are_refused(tmp_path, monkeypatch):
  """Cut, swapped and lying files: an error of ours, never one of a reader's."""
  slots = functools.cache(importer._Slots)  # Of a network, traced once and not for each file.
  monkeypatch.setattr(importer, "_Slots", slots)
  np.savez(tmp_path / "good.npz", **official())
  save_file(official(), tmp_path / "good.safetensors")
  rng, model = np.random.default_rng(0), build(gelu="tanh")
  for name in ("good.npz", "good.safetensors"):
    refused = 0
    whole = (tmp_path / name).read_bytes()
    for i in range(60):
      bad = bytearray(whole[: rng.integers(1, len(whole))] if i % 2 else whole)
      for at in rng.integers(0, min(len(bad), 400), 3):
        bad[at] = rng.integers(0, 256)
      (tmp_path / f"bad{name[4:]}").write_bytes(bad)
      try:
        importer.load_public(model, str(tmp_path / f"bad{name[4:]}"), SHAPE)
      except UserError:
        refused += 1
    assert refused > 30  # Every cut file; a changed byte may be one of a weight.
  np.save(tmp_path / "array.npy", np.ones(3))
  (tmp_path / "array.npy").rename(tmp_path / "array.npz")
  with pytest.raises(UserError, match=r"array.npz"):
    importer.load_public(build(), str(tmp_path / "array.npz"), SHAPE)


PUBLIC_NAMES = {  # (network, {key: (rank, our leaf, or None where there is none)})
  "mixer": (
    dict(depth=4, gelu="erf"),
    {
      "blocks.3.mlp_tokens.fc2.weight": (2, "params/block_3/token_mixing/dense_1/kernel"),
      "mixer_blocks.1.channel_mix.1.net.2.bias": (1, "params/block_1/channel_mixing/dense_1/bias"),
      "mixer_blocks.1.token_mix.0.weight": (1, "params/block_1/norm_0/scale"),
    },
  ),
  "densenet": (
    dict(blocks=(1, 7), bottleneck=True),
    {
      "features.denseblock2.denselayer7.norm.1.running_var": (
        1,
        "stats/block_1_layer_6/norm_0/var",
      ),
      "features.transition1.conv.weight": (4, "params/transition_1/kernel"),
    },
  ),
  "efficientnet": (
    dict(depth=1.0, variant="torch"),
    {
      "blocks.0.0.bn2.weight": (1, "params/stage_0_block_0/project/norm/scale"),
      "blocks.2.1.conv_pwl.weight": (4, "params/stage_2_block_1/project/conv/kernel"),
      "features.3.0.block.3.0.weight": (4, "params/stage_2_block_0/project/conv/kernel"),
      "features.1.0.block.2.1.bias": (1, "params/stage_0_block_0/project/norm/bias"),
      "blocks.0.0.conv_pwl.weight": (4, None),
      "features.1.0.block.5.0.weight": (4, None),
    },
  ),
  "cycle_mlp": (
    dict(depths=(1, 1, 3, 1), widths=(4, 4, 4, 4), ratios=(1, 1, 1, 1)),
    {
      "network.5.proj.weight": (4, "params/down_3/kernel"),
      "network.4.2.attn.sfc_w.weight": (4, "params/stage_2_block_2/mix/along_height/kernel"),
    },
  ),
  "all_cnn": ({}, {"class_conv.weight": (4, "params/head/kernel")}),
}


@pytest.mark.parametrize("name", PUBLIC_NAMES)
def test_public_names_and_ours(name, save):
  """Arrays of a wrong shape: the error says for which of our weights each was read."""
  fields, keys = PUBLIC_NAMES[name]
  arrays = {key: np.ones((97,) * rank, np.float32) for key, (rank, _) in keys.items() if rank < 4}
  arrays |= {key: np.ones((97, 97, 1, 1), np.float32) for key in keys.keys() - arrays.keys()}
  model, path = catalog.create_model(name, "tiny", **fields), save(arrays, "public.safetensors")
  with pytest.raises(UserError) as refused:
    importer.load_public(model, path, SHAPE)
  lines = {line.split()[0]: line for line in str(refused.value).splitlines()}
  for key, (_, leaf) in keys.items():
    assert lines[key].endswith(f", for {leaf}" if leaf else ": unknown key"), lines[key]


def test_a_users_own_network_has_no_public_names(save):
  class Small(nn.Module):
    pass

  with pytest.raises(ValueError, match="Small is not an architecture of convex_jax"):
    importer.load_public(Small(), save(official()), SHAPE)


def test_the_shifts_in_a_cycle_mlps_file_are_checked(save):
  """What its formula gives is no weight; other shifts would be another network."""
  model = catalog.create_model("cycle_mlp", "tiny")
  shifts = np.zeros((1, 8, 1, 1), np.float32)  # Pairs (dy, dx) of 4 channels.
  shifts[0, 1::2, 0, 0] = [0, 1, -1, 0]
  for sign, words in ((1, r"stem/kernel .*: missing"), (-1, "sfc_h.offset are those of another")):
    path = save({"network.0.0.attn.sfc_h.offset": sign * shifts}, "cycle.safetensors")
    with pytest.raises(UserError, match=words):
      importer.load_public(model, path, SHAPE)


def test_fields_that_a_file_implies_are_checked(save):
  timm = {"blocks.0.norm1.weight": np.ones(6, np.float32)}
  with pytest.raises(UserError, match=r"--config.model.gelu=erf"):
    importer.load_public(build(), save(timm, "timm.safetensors"), SHAPE)
  with pytest.raises(UserError, match=r"--config.model.gelu=tanh"):
    importer.load_public(build(gelu="erf"), save(official()), SHAPE)
  with pytest.raises(UserError, match=r"--config.model.parallel=False"):
    importer.load_public(build(parallel=True), save(official()), SHAPE)


def test_an_efficientnets_variant_is_asked_for_where_the_file_does_not_tell_it(save):
  """timm's two kinds name their weights alike, so that a default would be wrong in silence."""
  for key, words in (
    ("bn1.weight", r"model.variant=tf for the former, --config.model.variant=torch for the latter"),
    ("features.0.1.weight", r"variant is None; set --config.model.variant=torch"),
  ):
    path = save({key: np.ones(32, np.float32)}, f"{key}.safetensors")
    with pytest.raises(UserError, match=words):
      importer.load_public(catalog.create_model("efficientnet", "tiny"), path, SHAPE)
    chosen = catalog.create_model("efficientnet", "tiny", variant="torch")
    with pytest.raises(UserError, match="missing from the file"):  # Further on.
      importer.load_public(chosen, path, SHAPE)


def test_half_a_head_and_negative_variances_are_refused(save):
  arrays = official()
  arrays["head/kernel"] = np.zeros((5, 10), np.float32)
  with pytest.raises(UserError, match=r"head/kernel \(5, 10\)"):
    importer.load_public(build(), save(arrays), SHAPE)
  negative = {"model.2.running_var": -np.ones(4, np.float32)}
  with pytest.raises(UserError, match="negative variances"):
    importer.load_public(build(), save(negative, "mlp.safetensors"), SHAPE)


def test_an_mlps_first_layer_is_permuted(save):
  """Torch flattens (C, H, W): a weight on channel 1 of pixel (0, 0) moves."""
  model = catalog.create_model("mlp", "800x3", classes=3, width=4)
  arrays, width = {}, 2 * 2 * 3
  for i in range(3):
    arrays[f"model.{3 * i + 1}.weight"] = np.zeros((4, width), np.float32)
    arrays[f"model.{3 * i + 1}.bias"] = np.zeros(4, np.float32)
    for leaf in ("weight", "bias", "running_mean", "running_var"):
      arrays[f"model.{3 * i + 2}.{leaf}"] = np.ones(4, np.float32)
    width = 4
  arrays |= {
    "model.10.weight": np.zeros((3, 4), np.float32),
    "model.10.bias": np.zeros(3, np.float32),
  }
  arrays["model.1.weight"][0, 4] = 1.0  # Channel 1 starts at 2 x 2 = 4.
  public = importer.load_public(model, save(arrays, "mlp.safetensors"), (2, 2, 3))
  kernel = public.weights["params"]["dense_0"]["kernel"]
  assert np.flatnonzero(kernel[:, 0]).tolist() == [1]  # Pixel (0, 0), channel 1.


def test_a_run_starts_from_public_weights(
  tiny_config, few_digits, save, tmp_path, monkeypatch, capsys
):
  config = of(tiny_config, model__parts="base", init_from=save(official()), steps=1)
  config.model.update(ALIKE)
  config.optimizer.learning_rate = 1e-9
  workdir = str(tmp_path / "run")
  loop.run(config, workdir, few_digits)
  out = capsys.readouterr().out
  assert "Weights from" in out and "scaled by mean 0.5 and deviation 0.5" in out
  got = run.load(workdir).params["block_0"]["token_mixing"]["dense_0"]["kernel"]
  np.testing.assert_allclose(got, official()["MixerBlock_0/token_mixing/Dense_0/kernel"], atol=1e-6)
  # A file that does not fit leaves nothing behind that the corrected command would meet.
  wrong = of(config, init_from="nowhere.npz")
  with pytest.raises(UserError, match=r"nowhere.npz does not exist"):
    loop.run(wrong, str(tmp_path / "other"), few_digits)
  assert not (tmp_path / "other" / "config.json").exists()
  # Once there are checkpoints, the public file may go; pixels are scaled as before.
  (tmp_path / "public.npz").unlink()
  loop.run(config, workdir, few_digits)
  assert (run.load(workdir).mean, run.load(workdir).std) == ((0.5,), (0.5,))
