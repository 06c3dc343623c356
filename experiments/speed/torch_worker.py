"""PyTorch's networks, in a child process: `python -m experiments.speed.torch_worker CASE WAY`.

Ways: eager, channels_last, compile, deform (CycleMLP's published deformable convolutions).
Batches are float32 tensors in memory; forward, backward, fused Adam.
"""

import sys
import time

import timm
import torch
import torchvision

from experiments.speed import worker
from experiments.speed.cases import CASES, Case
from tests.support import peers

PEERS = {
  "mlp": peers.mlp_800,
  "mixer seed": lambda k: peers.seed_mixer(k, peers.tanh_gelu),
  "mixer S/16": lambda k: peers.large_mixer(k, "s16", peers.tanh_gelu),
  "mixer B/16": lambda k: peers.large_mixer(k, "b16", peers.tanh_gelu),
  "cycle_mlp": lambda k: peers.CycleMLP(k, peers.ShiftFC),
  "cycle_mlp deform": lambda k: peers.CycleMLP(k, peers.CycleFC),
  "densenet 121": lambda k: torchvision.models.densenet121(num_classes=k),
  "densenet BC-100-12": peers.densenet_bc_100_12,
  "all_cnn": peers.AllCNN,
  "efficientnet": lambda k: timm.create_model("efficientnet_b0", num_classes=k),
}


class Torch:
  """A torch network, run in one of the ways that users run it."""

  def __init__(self, case: Case, way: str):
    torch.manual_seed(0)
    net = PEERS[f"{case.peer} deform" if way == "deform" else case.peer](worker.CLASSES)
    for parameter in net.parameters():  # Some implementations leave theirs uninitialised.
      if parameter.ndim > 1:
        torch.nn.init.normal_(parameter, std=0.02)
      elif not parameter.isfinite().all() or parameter.abs().max() > 10:
        torch.nn.init.zeros_(parameter)
    images = torch.randn(worker.BATCHES, case.batch, 3, case.px, case.px)
    labels = torch.randint(0, worker.CLASSES, (worker.BATCHES, case.batch))
    batches = list(zip(images, labels, strict=True))
    if way == "channels_last" or (way == "compile" and case.convolutional):
      net = net.to(memory_format=torch.channels_last)
      batches = [(x.to(memory_format=torch.channels_last), y) for x, y in batches]
    self.adam = torch.optim.Adam(net.parameters(), lr=1e-3, fused=True)
    self.net = torch.compile(net) if way == "compile" else net
    self.batches, self.done = batches, 0

  def train(self, steps):
    self.net.train()
    for i in range(self.done, self.done + steps):
      images, labels = self.batches[i % worker.BATCHES]
      self.adam.zero_grad()
      torch.nn.functional.cross_entropy(self.net(images), labels).backward()
      self.adam.step()
    self.done += steps

  def infer(self, steps):
    self.net.eval()
    with torch.inference_mode():
      for i in range(steps):
        self.net(self.batches[i % worker.BATCHES][0])

  def facts(self):
    parameters = sum(p.numel() for p in self.net.parameters())
    version = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    return {
      "parameters": parameters,
      "version": f"{version}, timm {timm.__version__}",
      "peak_flops": matmul_rate(),
    }


def matmul_rate(n: int = 3072) -> float:
  """FLOP/s of the fastest of several float32 products of square matrices."""
  x, best = torch.ones(n, n) / n, float("inf")
  for _ in range(6):
    start = time.perf_counter()
    x @ x
    best = min(best, time.perf_counter() - start)
  return 2 * n**3 / best


if __name__ == "__main__":
  case, way = sys.argv[1:]
  worker.serve(lambda: Torch(CASES[case], way))
