"""Torch networks that ours are compared with, in numbers and in speed.

timm's and torchvision's; where neither has one, a literal text of the published structure.
Needs the `parity` extra.
"""

import collections
import functools

import timm
import torch
import torchvision
from timm.models.mlp_mixer import MlpMixer
from torch import nn

tanh_gelu = functools.partial(nn.GELU, approximate="tanh")


class CycleFC(nn.Module):
  """A 1x1 deformable convolution whose fixed offsets are the formula's."""

  def __init__(self, width, along_width):
    super().__init__()
    self.weight = nn.Parameter(torch.empty(width, width, 1, 1))
    self.bias = nn.Parameter(torch.empty(width))
    offset = torch.zeros(1, width, 2, 1, 1)
    offset[0, :, int(along_width), 0, 0] = (torch.arange(width) + 1) % 3 - 1
    self.register_buffer("offset", offset.reshape(1, 2 * width, 1, 1))

  def forward(self, x):
    offset = self.offset.expand(len(x), -1, *x.shape[2:])
    return torchvision.ops.deform_conv2d(x, offset.contiguous(), self.weight, self.bias)


class ShiftFC(nn.Module):
  """The same by slices and one product: what a user in a hurry would write."""

  def __init__(self, width, along_width):
    super().__init__()
    self.weight = nn.Parameter(torch.empty(width, width, 1, 1))
    self.bias = nn.Parameter(torch.empty(width))
    self.axis = 3 if along_width else 2

  def forward(self, x):
    pads, size = [0, 0, 0, 0], x.shape[self.axis]
    pads[2 * (3 - self.axis) : 2 * (3 - self.axis) + 2] = 1, 1
    padded, moved = nn.functional.pad(x, pads), torch.empty_like(x)
    for offset in (0, 1, -1):
      channels = slice(offset % 3, None, 3)
      moved[:, channels] = padded[:, channels].narrow(self.axis, 1 + offset, size)
    y = nn.functional.linear(moved.permute(0, 2, 3, 1), self.weight[..., 0, 0], self.bias)
    return y.permute(0, 3, 1, 2)


def mlp_of(width, hidden, out):
  layers = [("fc1", nn.Linear(width, hidden)), ("act", nn.GELU()), ("fc2", nn.Linear(hidden, out))]
  return nn.Sequential(collections.OrderedDict(layers))


class CycleAttention(nn.Module):
  def __init__(self, width, cycle_fc):
    super().__init__()
    self.sfc_h, self.sfc_w = cycle_fc(width, True), cycle_fc(width, False)
    self.mlp_c = nn.Linear(width, width, bias=False)
    self.reweight = mlp_of(width, width // 4, 3 * width)
    self.proj = nn.Linear(width, width)

  def forward(self, x):
    maps = x.permute(0, 3, 1, 2)
    branches = [self.sfc_h(maps), self.sfc_w(maps), self.mlp_c(x).permute(0, 3, 1, 2)]
    gates = self.reweight(sum(branches).mean((2, 3))).unflatten(1, (-1, 3)).softmax(-1)
    mixed = sum(g[..., None, None] * b for g, b in zip(gates.unbind(-1), branches))
    return self.proj(mixed.permute(0, 2, 3, 1))


class CycleBlock(nn.Module):
  def __init__(self, width, ratio, cycle_fc):
    super().__init__()
    self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
    self.attn, self.mlp = CycleAttention(width, cycle_fc), mlp_of(width, ratio * width, width)

  def forward(self, x):
    x = x + self.attn(self.norm1(x))
    return x + self.mlp(self.norm2(x))


class ChannelsLastConv(nn.Module):
  def __init__(self, *args, **kwargs):
    super().__init__()
    self.proj = nn.Conv2d(*args, **kwargs)

  def forward(self, x):
    return self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class CycleMLP(nn.Module):
  def __init__(self, classes, cycle_fc=CycleFC):
    super().__init__()
    depths, widths, ratio = (2, 2, 4, 2), (64, 128, 320, 512), 4  # B1
    self.patch_embed = ChannelsLastConv(3, widths[0], 7, stride=4, padding=2)
    stages = []
    for i, (depth, width) in enumerate(zip(depths, widths)):
      if i:
        stages.append(ChannelsLastConv(widths[i - 1], width, 3, stride=2, padding=1))
      stages.append(nn.Sequential(*[CycleBlock(width, ratio, cycle_fc) for _ in range(depth)]))
    self.network = nn.Sequential(*stages)
    self.norm, self.head = nn.LayerNorm(widths[-1]), nn.Linear(widths[-1], classes)

  def forward(self, x):
    x = self.network(self.patch_embed(x.permute(0, 2, 3, 1)))
    return self.head(self.norm(x).mean((1, 2)))


class AllCNN(nn.Module):
  """All-CNN-C; a ReLU after each convolution, the class map too."""

  def __init__(self, classes):
    super().__init__()
    plan = [(3, 96, 3, 1, 1), (96, 96, 3, 1, 1), (96, 96, 3, 2, 1)]
    plan += [(96, 192, 3, 1, 1), (192, 192, 3, 1, 1), (192, 192, 3, 2, 1)]
    plan += [(192, 192, 3, 1, 0), (192, 192, 1, 1, 0)]
    for i, sizes in enumerate(plan, 1):
      setattr(self, f"conv{i}", nn.Conv2d(*sizes))
    self.class_conv = nn.Conv2d(192, classes, 1)

  def forward(self, x):
    for layer in self.children():
      x = torch.relu(layer(x))
    return x.mean((2, 3))


def mlp_800(classes):
  width, layers = 3 * 32 * 32, [nn.Flatten()]
  for _ in range(3):
    layers += [nn.Linear(width, 800), nn.BatchNorm1d(800), nn.ReLU()]
    width = 800
  return nn.Sequential(*layers, nn.Linear(800, classes))


def densenet_bc_100_12(classes):
  net = torchvision.models.DenseNet(12, (16, 16, 16), 24, num_classes=classes)
  net.features.conv0 = nn.Conv2d(3, 24, 3, padding=1, bias=False)
  for name in ("norm0", "relu0", "pool0"):
    delattr(net.features, name)
  return net


def tf_efficientnet(classes):
  """With the running averages of the official code, where timm keeps torch's."""
  net = timm.create_model("tf_efficientnet_b0", num_classes=classes)
  for module in net.modules():
    if isinstance(module, nn.BatchNorm2d):
      module.momentum = 0.01
  return net


def seed_mixer(classes, act=nn.GELU):
  return MlpMixer(
    classes, 72, patch_size=9, num_blocks=4, embed_dim=128, mlp_ratio=(0.5, 1.0), act_layer=act
  )


def large_mixer(classes, size="b16", act=nn.GELU):
  return timm.create_model(f"mixer_{size}_224", num_classes=classes, act_layer=act)
