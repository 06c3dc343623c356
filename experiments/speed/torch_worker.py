"""PyTorch's networks, in a child process: `python -m experiments.speed.torch_worker CASE WAY`.

Ways: eager, channels_last, compile, deform (CycleMLP's published deformable convolutions).
Batches are float32 tensors on the device, a GPU where torch has one; forward, backward, fused Adam.
A case in bfloat16 is computed under `torch.autocast`.
"""

import sys
import time

import timm
import torch
import torchvision

from experiments.speed import worker
from experiments.speed.cases import EVERY, Case
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


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def finish() -> None:
  """Returns when the device has done what it was given."""
  if DEVICE == "cuda":
    torch.cuda.synchronize()


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
    net = net.to(DEVICE)
    images = torch.randn(worker.BATCHES, case.batch, 3, case.px, case.px, device=DEVICE)
    labels = torch.randint(0, worker.CLASSES, (worker.BATCHES, case.batch), device=DEVICE)
    batches = list(zip(images, labels, strict=True))
    if way == "channels_last" or (way == "compile" and case.convolutional):
      net = net.to(memory_format=torch.channels_last)
      batches = [(x.to(memory_format=torch.channels_last), y) for x, y in batches]
    self.adam = torch.optim.Adam(net.parameters(), lr=1e-3, fused=True)
    self.net = torch.compile(net) if way == "compile" else net
    self.batches, self.done = batches, 0
    self.case = case
    self.precision = torch.autocast(DEVICE, torch.bfloat16, enabled=case.dtype == "bfloat16")

  def train(self, steps):
    self.net.train()
    for i in range(self.done, self.done + steps):
      images, labels = self.batches[i % worker.BATCHES]
      self.adam.zero_grad()
      with self.precision:
        loss = torch.nn.functional.cross_entropy(self.net(images), labels)
      loss.backward()
      self.adam.step()
    self.done += steps
    finish()

  def infer(self, steps):
    self.net.eval()
    with torch.inference_mode(), self.precision:
      for i in range(steps):
        self.net(self.batches[i % worker.BATCHES][0])
    finish()

  def after_evaluation(self):
    pass

  def facts(self):
    parameters = sum(p.numel() for p in self.net.parameters())
    version = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    return {
      "parameters": parameters,
      "version": f"{version}, timm {timm.__version__}",
      "peak_flops": matmul_rate(getattr(torch, self.case.dtype)),
    }

  def device_bytes(self):
    return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else None


def matmul_rate(dtype: torch.dtype = torch.float32) -> float:
  """FLOP/s of the fastest of several products of square matrices, large for the device."""
  n = 3072 if DEVICE == "cpu" else 8192
  x, best = torch.randn(n, n, device=DEVICE).to(dtype), float("inf")
  for _ in range(6):
    finish()
    start = time.perf_counter()
    x @ x
    finish()
    best = min(best, time.perf_counter() - start)
  return 2 * n**3 / best


if __name__ == "__main__":
  case, way = sys.argv[1:]
  worker.serve(lambda: Torch(EVERY[case], way))
