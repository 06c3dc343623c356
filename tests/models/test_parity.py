"""Every architecture against a public implementation, through public weight files.

The networks of timm and torchvision; where neither has one, a literal torch version of the
published structure. In float64, so that a difference is one of the architecture and not of
rounding. Needs the `parity` extra, which `make parity` installs.
"""

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

from convex_jax.models import catalog  # noqa: E402
from convex_jax.models.public.importer import load_public  # noqa: E402
from convex_jax.models.variables import apply  # noqa: E402
from convex_jax.training import step  # noqa: E402
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


def test_a_torch_file_is_read_and_its_pickles_are_not(tmp_path):
  import argparse

  from convex_jax.errors import UserError

  net, model = randomise(peers.CycleMLP(CLASSES)), build_ours(dict(name="cycle_mlp", size="B1"))
  torch.save({"model": net.state_dict()}, tmp_path / "weights.pth")
  public = load_public(model, str(tmp_path / "weights.pth"), (32, 32, 3))
  np.testing.assert_array_equal(
    public.weights["params"]["head"]["kernel"], net.head.weight.detach().T
  )
  torch.save({"model": net.state_dict(), "args": argparse.Namespace()}, tmp_path / "training.pth")
  with pytest.raises(UserError, match="nothing in it was executed"):
    load_public(model, str(tmp_path / "training.pth"), (32, 32, 3))
  state = net.state_dict()
  state["network.0.0.attn.sfc_h.offset"] = -state["network.0.0.attn.sfc_h.offset"]
  torch.save(state, tmp_path / "other.pth")
  with pytest.raises(UserError, match="those of another architecture"):
    load_public(model, str(tmp_path / "other.pth"), (32, 32, 3))
