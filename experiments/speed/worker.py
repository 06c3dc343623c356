"""The protocol of both kinds of worker: a child process that computes on request.

A request is a line on the standard input, an answer a line of JSON on the standard output:
`train N` and `infer N` (seconds of N steps), `memory N` (peak resident bytes while training N
steps), `facts`.
"""

import json
import os
import resource
import sys
import time
from typing import Protocol

CLASSES = 10
BATCHES = 4  # Distinct batches, used in turn.


class Net(Protocol):
  """A network in training; each method returns when its result is ready."""

  def train(self, steps: int) -> None: ...
  def infer(self, steps: int) -> None: ...
  def after_evaluation(self) -> None: ...  # What a run does then.
  def facts(self) -> dict: ...
  def device_bytes(self) -> int | None: ...  # Peak of its memory; None on a CPU.


def peak_memory() -> int:
  """Largest resident size since `forget_peak`, or since the start where that is not permitted."""
  try:
    with open("/proc/self/status") as status:
      return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))
  except (OSError, StopIteration):
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def forget_peak() -> bool:
  try:
    with open("/proc/self/clear_refs", "w") as file:
      file.write("5")
    return True
  except OSError:
    return False


def serve(make_net) -> None:
  """Makes the network, takes a first step, reports it, and then answers requests."""
  answers = os.fdopen(os.dup(1), "w", buffering=1)
  os.dup2(2, 1)  # Output of libraries must not mix with the answers.

  def timed(function, *args) -> float:
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start

  def answer(**fields) -> None:
    answers.write(json.dumps(fields) + "\n")

  net: Net = make_net()
  answer(first_step=timed(net.train, 1), start_bytes=peak_memory())
  for line in sys.stdin:
    what, _, count = line.strip().partition(" ")
    if what == "facts":
      answer(**net.facts())
    elif what == "memory":
      net.after_evaluation()
      alone = forget_peak()
      net.train(int(count))
      answer(bytes=peak_memory(), while_training=alone, device_bytes=net.device_bytes())
    else:
      answer(seconds=timed(getattr(net, what), int(count)))
