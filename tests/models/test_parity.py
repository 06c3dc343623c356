"""Every architecture against a public implementation, through public weight files.

The networks of timm and torchvision; where neither has one, a literal torch version of the
published structure. In float64, so that a difference is one of the architecture and not of
rounding. Needs the `parity` extra, which `make parity` installs.

One thing differs by design: torch's BatchNorm keeps a running variance that is unbiased, n / (n - 1)
times that of the batch, Flax's keeps the batch's own; n is the number of values per channel. At
inference with the same stored statistics the networks agree; after a training step the part of the
running variance that is new does so once that factor is removed, as `step_of_torch` does.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")
from safetensors.numpy import save_file  # noqa: E402
from torch import nn  # noqa: E402

from convex_jax import config_files  # noqa: E402
from convex_jax.data import catalog as catalog_of_data  # noqa: E402
from convex_jax.data import datasets  # noqa: E402
from convex_jax.errors import UserError  # noqa: E402
from convex_jax.models import catalog  # noqa: E402
from convex_jax.models.public.importer import load_public  # noqa: E402
from convex_jax.models.variables import apply  # noqa: E402
from convex_jax.training import evaluation, pretrained, step  # noqa: E402
from tests.support import peers  # noqa: E402

slow = pytest.mark.slow
CASES = [  # (network, ours, px)
  pytest.param(peers.seed_mixer, dict(name="mixer", size="seed", gelu="erf"), 72, id="mixer"),
  pytest.param(
    peers.large_mixer, dict(name="mixer", size="B/16", gelu="erf"), 224, id="B16", marks=slow
  ),
  pytest.param(peers.CycleMLP, dict(name="cycle_mlp", size="B1"), 32, id="cycle_mlp"),
  pytest.param(
    peers.CycleMLP, dict(name="cycle_mlp", size="B1"), 224, id="cycle_mlp-224", marks=slow
  ),
  pytest.param(
    lambda k: torchvision.models.densenet121(num_classes=k),
    dict(name="densenet", size="121"),
    64,
    id="densenet121",
    marks=slow,
  ),
  pytest.param(
    peers.densenet_bc_100_12, dict(name="densenet", size="BC-100-12"), 32, id="densenet-bc"
  ),
  pytest.param(
    lambda k: timm.create_model("efficientnet_b0", num_classes=k),
    dict(name="efficientnet", size="B0", variant="torch"),
    64,
    id="efficientnet-torch",
    marks=slow,
  ),
  pytest.param(
    peers.tf_efficientnet,
    dict(name="efficientnet", size="B0", variant="tf"),
    64,
    id="efficientnet-tf",
    marks=slow,
  ),
  pytest.param(
    lambda k: torchvision.models.efficientnet_b0(num_classes=k),
    dict(name="efficientnet", size="B0", variant="torch"),
    64,
    id="efficientnet-torchvision",
    marks=slow,
  ),
  pytest.param(peers.AllCNN, dict(name="all_cnn", size="c"), 32, id="all_cnn"),
  pytest.param(peers.mlp_800, dict(name="mlp", size="800x3"), 32, id="mlp"),
]
CLASSES = 10


def randomise(net):
  """Weights, and running statistics, far from their initial values; no dropout."""
  generator = torch.Generator().manual_seed(0)
  for name, tensor in net.state_dict().items():
    if name.endswith(("num_batches_tracked", "offset")):
      continue
    noise = torch.randn(tensor.shape, generator=generator)
    if tensor.ndim > 1:
      tensor.copy_(noise / np.sqrt(tensor[0].numel()))
    elif name.endswith("running_var"):
      tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    else:
      tensor.copy_(0.2 * noise + (0 if "bias" in name or "mean" in name else 1))
  for module in net.modules():
    for rate in ("p", "drop_prob", "drop_rate"):
      if isinstance(getattr(module, rate, None), float):
        setattr(module, rate, 0.0)
  return net


def without_dropout(fields):
  rates = {
    "all_cnn": ["dropout"],
    "densenet": ["dropout"],
    "efficientnet": ["dropout", "drop_path"],
  }
  rates |= {"mixer": ["drop_path"], "cycle_mlp": ["drop_path"]}
  return {**fields, **dict.fromkeys(rates.get(fields["name"], []), 0.0)}


def build_ours(fields, parts="base", classes=CLASSES):
  return catalog.create_model(
    twin=parts, classes=classes, dtype=jnp.float64, **without_dropout(fields)
  )


def as_ours(model, arrays, path, px):
  """A torch state through a file and the importer, in float64."""
  save_file({k: v.detach().float().numpy().copy() for k, v in arrays.items()}, path)
  public = load_public(model, path, (px, px, 3))
  assert not public.fresh and not public.unused
  return jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), public.weights)


def assert_close(got, want, tolerance=1e-5):
  """Within `tolerance` of the scale, leaf by leaf."""
  for (path, a), b in zip(
    jax.tree_util.tree_flatten_with_path(got)[0], jax.tree.leaves(want), strict=True
  ):
    a, b = np.asarray(a), np.asarray(b)
    scale = max(np.abs(b).max(), 1e-6)
    assert np.abs(a - b).max() <= tolerance * scale, jax.tree_util.keystr(path)


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def step_of_torch(net, images, labels):
  """Gradients, and the state after, with BatchNorm's variances as Flax keeps them: biased."""
  counts = {}
  for name, module in net.named_modules():
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
      module.register_forward_hook(
        lambda _, inputs, __, name=name: counts.update({name: inputs[0][:, 0].numel()})
      )
  before = {k: v.clone() for k, v in net.state_dict().items()}
  net.train()
  nn.functional.cross_entropy(net(images), labels).backward()
  after = net.state_dict()
  for name, module in net.named_modules():
    if name in counts:
      key, n, keep = f"{name}.running_var", counts[name], 1 - module.momentum
      after[key] = keep * before[key] + (after[key] - keep * before[key]) * (n - 1) / n
  grads = {name: p.grad for name, p in net.named_parameters()}
  return {**after, **grads}


@pytest.mark.parametrize("make_net,fields,px", CASES)
def test_logits_gradients_and_statistics_agree(make_net, fields, px, tmp_path):
  torch.manual_seed(0)
  net, model = randomise(make_net(CLASSES)).double().eval(), build_ours(fields)
  images, labels = torch.randn(4, 3, px, px, dtype=torch.float64), torch.arange(4)
  path = str(tmp_path / "public.safetensors")
  ours = as_ours(model, net.state_dict(), path, px)
  x = jnp.asarray(images.numpy().transpose(0, 2, 3, 1))
  want = net(images).detach().numpy()
  got = jax.jit(functools.partial(apply, model))(ours, x)
  assert_close(got, want)
  assert want.std() > 1e-3

  def loss(params):
    logits, mutated = model.apply(
      {"params": params, "batch_stats": ours["stats"]}, x, train=True, mutable=["batch_stats"]
    )
    target = jnp.asarray(labels.numpy())
    return step.cross_entropy(logits, target).mean(), mutated.get("batch_stats", {})

  grads, stats = jax.jit(jax.grad(loss, has_aux=True))(ours["params"])
  theirs = as_ours(model, step_of_torch(net, images, labels), path, px)
  assert_close(stats, theirs["stats"])
  assert_close(grads, theirs["params"], tolerance=1e-4)


def test_the_official_npz_has_tanh_gelu(tmp_path):
  """A state renamed by the official table; the other GELU is off by far more than rounding."""
  net = randomise(peers.seed_mixer(CLASSES, act=peers.tanh_gelu)).double().eval()
  names = {"norm1": "LayerNorm_0", "norm2": "LayerNorm_1", "fc1": "Dense_0", "fc2": "Dense_1"}
  names |= {"mlp_tokens": "token_mixing", "mlp_channels": "channel_mixing"}
  arrays = {}
  for key, tensor in net.state_dict().items():
    *path, leaf = key.replace("stem.proj", "stem").split(".")
    if path[0] == "blocks":
      path = [f"MixerBlock_{path[1]}", *[names[p] for p in path[2:]]]
    if path == ["norm"]:
      path = ["pre_head_layer_norm"]
    array = tensor.float().numpy()
    if leaf == "weight":
      leaf = "kernel" if array.ndim > 1 else "scale"
      array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
    arrays["/".join([*path, leaf])] = array
  np.savez(tmp_path / "official.npz", **arrays)
  torch.manual_seed(0)
  images = torch.randn(4, 3, 72, 72, dtype=torch.float64)
  want = net(images).detach().numpy()
  x = jnp.asarray(images.numpy().transpose(0, 2, 3, 1))
  path = str(tmp_path / "official.npz")
  mixers = {g: build_ours(dict(name="mixer", size="seed", gelu=g)) for g in ("tanh", "erf")}
  public, errors = load_public(mixers["tanh"], path, (72, 72, 3)).weights, {}
  for gelu, model in mixers.items():
    errors[gelu] = np.abs(apply(model, public, x) - want).max() / np.abs(want).max()
  assert errors["tanh"] < 1e-7 < 1e-5 < errors["erf"], errors


class Custom:
  """Of a class that torch does not know to be harmless."""


def test_a_torch_file_is_read_and_its_pickles_are_not(tmp_path):
  net, model = randomise(peers.CycleMLP(CLASSES)), build_ours(dict(name="cycle_mlp", size="B1"))
  torch.save({"model": net.state_dict()}, tmp_path / "weights.pth")
  public = load_public(model, str(tmp_path / "weights.pth"), (32, 32, 3))
  np.testing.assert_array_equal(
    public.weights["params"]["head"]["kernel"], net.head.weight.detach().T
  )
  torch.save({"model": net.state_dict(), "args": Custom()}, tmp_path / "training.pth")
  with pytest.raises(UserError, match=r"it holds a \S*Custom\n  nothing in it was executed"):
    load_public(model, str(tmp_path / "training.pth"), (32, 32, 3))
  state = net.state_dict()
  state["network.0.0.attn.sfc_h.offset"] = -state["network.0.0.attn.sfc_h.offset"]
  torch.save(state, tmp_path / "other.pth")
  with pytest.raises(UserError, match="those of another architecture"):
    load_public(model, str(tmp_path / "other.pth"), (32, 32, 3))


def checkpoints(net):
  """{name: (what torch.save is given, words of the importer)} of trainers in use."""
  optimizer = torch.optim.Adam(net.parameters())
  net(torch.ones(2, 3, 32, 32)).sum().backward()
  optimizer.step()
  state = net.state_dict()
  ema = {key: value + 1 for key, value in state.items()}
  averaged = torch.optim.swa_utils.AveragedModel(net)
  args, best = argparse.Namespace(lr=0.1), np.float64(0.8)
  under = {f"model.{key}": value for key, value in state.items()}
  beside = {"epoch": 3, "optimizer": optimizer.state_dict(), "args": args, "best_acc1": best}
  return {
    "bare": (state, ""),
    "imagenet.pth.tar": (
      {"state_dict": {f"module.{k}": v for k, v in state.items()}, **beside},
      "",
    ),
    "lightning.ckpt": ({"state_dict": under, "optimizer_states": [optimizer.state_dict()]}, ""),
    "deit.pth": ({"model": state, "model_ema": ema, **beside}, "the average 'model_ema.'"),
    "timm.pth.tar": ({"state_dict": state, "state_dict_ema": ema, **beside}, "state_dict_ema"),
    "ema.pt": ({"model_ema": state}, ""),
    "tutorial.bin": (
      {"model_state_dict": state, "optimizer_state_dict": optimizer.state_dict()},
      "",
    ),
    "averaged.pt": (averaged.state_dict(), "not read: n_averaged"),
    "bfloat16.pt": ({key: value.bfloat16() for key, value in state.items()}, ""),
    "compiled.pt": ({f"_orig_mod.module.{k}": v for k, v in state.items()}, ""),
  }


def test_what_trainers_save_is_read_whatever_wraps_it(tmp_path):
  net, model = randomise(peers.AllCNN(CLASSES)), build_ours(dict(name="all_cnn", size="c"))
  given = checkpoints(net)
  for name, (content, words) in given.items():
    for new in (True, False):  # A zip archive since torch 1.6, a pickle before.
      path = str(tmp_path / name)
      torch.save(content, path, _use_new_zipfile_serialization=new)
      public = load_public(model, path, (32, 32, 3))
      ema = 1.0 if "ema" in words else 0.0
      want = net.class_conv.bias.detach().numpy() + np.float32(ema)
      tolerance = 0.01 if name == "bfloat16.pt" else 0
      np.testing.assert_allclose(public.weights["params"]["head"]["bias"], want, rtol=tolerance)
      assert len(public.mapped) == 18 and not public.fresh and words in str(public), name


PUBLISHED = [  # (network, config, its further keys, pixels as the network sees them)
  pytest.param(
    lambda: timm.create_model("mixer_b16_224"),
    "mixer.py:imagenet2012,B/16",
    ["--config.model.gelu=erf"],
    ((0.5,) * 3, (0.5,) * 3),
    id="mixer-b16",
  ),
  pytest.param(
    lambda: torchvision.models.densenet121(),
    "densenet.py:imagenet2012",
    [],
    catalog_of_data.IMAGENET,
    id="densenet121",
  ),
]


@slow
@pytest.mark.parametrize("make_net,file,more,scaling", PUBLISHED)
def test_a_published_file_is_evaluated_as_in_torch(
  make_net, file, more, scaling, photo_dir, tmp_path
):
  """Loss and accuracies of random weights on photographs, from the file to the figures."""
  net = randomise(make_net()).eval()
  path = str(tmp_path / "net.pth.tar")
  torch.save({"state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}}, path)
  more = [f"--config.data.dir={photo_dir}", "--config.batch_size=8", *more]
  config = config_files.load([f"--config=configs/{file}", f"--config.init_from={path}", *more])
  with jax.enable_x64(False):
    public, examples = pretrained.start(config, datasets.load(config.data, 0, progress=False))
    got = evaluation.evaluate(config, public, examples)
  split = examples.test.first(len(examples.test))
  mean, std = (torch.tensor(numbers)[:, None, None] for numbers in scaling)
  images = (torch.tensor(split.images).permute(0, 3, 1, 2) / 255 - mean) / std
  logits, labels = net(images).detach(), torch.tensor(split.labels, dtype=torch.long)
  ranks = (logits > logits[torch.arange(len(labels)), labels][:, None]).sum(1).numpy()
  assert got["loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-4)
  assert got["accuracy"] == np.mean(ranks < 1) and got["top5_accuracy"] == np.mean(ranks < 5)
