"""Training images/s in bfloat16: `base`, `ioc` and compiled PyTorch, on one accelerator.

    python -m experiments.accelerator.rates --out=FOLDER [--cases='All-CNN-C']

The workers of experiments/speed, at each of the batches in `speed.cases.ON_ACCELERATORS`. All
programs of a network are compiled at the same time and then timed in turn; a program that does not
fit into the device's memory has no row. Writes rates.csv network by network; those already there
are not measured again.
"""

import argparse
import csv
import importlib.util
import pathlib
import statistics
import sys

from convex_jax import command_line
from experiments.speed.cases import ON_ACCELERATORS
from experiments.speed.run import Worker

WAYS = ("base", "ioc", "compile")  # The last is PyTorch's best, channels last for convolutions.
FIELDS = ("network", "way", "batch", "images_per_second", "fraction_of_peak", "memory_MB")
FIELDS += ("device", "versions")
SECONDS, ROUNDS = 0.5, 3  # Of each timing; a rate is the median of the rounds.


def read(out: pathlib.Path) -> list[dict[str, str]]:
  """The rows measured so far."""
  path = out / "rates.csv"
  if not path.exists():
    return []
  with open(path, newline="") as file:
    return list(csv.DictReader(file))


def networks() -> dict[str, list[str]]:
  """The names in ON_ACCELERATORS, by network."""
  found: dict[str, list[str]] = {}
  for name in ON_ACCELERATORS:
    found.setdefault(name.partition(", bfloat16")[0], []).append(name)
  return found


def best(rows: list[dict[str, str]], network: str, way: str) -> dict[str, str] | None:
  """The row of a way at its best batch."""
  mine = [row for row in rows if (row["network"], row["way"]) == (network, way)]
  return max(mine, key=lambda row: float(row["images_per_second"]), default=None)


def measure(network: str, ways: tuple[str, ...], patience: float, log) -> list[dict[str, str]]:
  """The rows of a network."""
  names = networks()[network]
  environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # They share the device's memory.
  workers = {(name, way): Worker(name, way, environment, log) for name in names for way in ways}
  try:
    rates, memory = {}, {}
    for key, worker in [(k, w) for k, w in workers.items() if w.answer(patience)]:
      if (first := worker.ask("train 2", patience)) is None:
        continue
      steps = max(1, round(2 * SECONDS / first["seconds"]))
      times = [worker.ask(f"train {steps}", patience) for _ in range(ROUNDS)]
      if all(times) and (memory_of := worker.ask("memory 1", patience)):
        seconds = statistics.median(answer["seconds"] for answer in times)
        rates[key] = steps * ON_ACCELERATORS[key[0]].batch / seconds
        memory[key] = memory_of["device_bytes"]
    one_of = {way: (name, way) for name, way in rates}
    facts = {way: workers[key].ask("facts", patience) or {} for way, key in one_of.items()}
    peak = max((fact["peak_flops"] for fact in facts.values() if fact), default=float("nan"))
    rows = []
    for (name, way), rate in rates.items():
      flops = facts.get("base" if way == "compile" else way, {}).get("flops_an_image")
      row = {"network": network, "way": way, "batch": str(ON_ACCELERATORS[name].batch)}
      row["images_per_second"] = f"{rate:.5g}"
      row["fraction_of_peak"] = f"{rate * flops / peak:.3f}" if flops else ""
      row["memory_MB"] = f"{memory[name, way] / 1e6:.0f}" if memory[name, way] else ""
      row["device"] = next((f["device"] for f in facts.values() if "device" in f), "")
      row["versions"] = facts[way].get("version", "")
      rows.append(row)
    return rows
  finally:
    for worker in workers.values():
      worker.close()


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--out", type=pathlib.Path, required=True)
  parser.add_argument("--cases", default=";".join(networks()), help="separated by semicolons")
  parser.add_argument("--patience", type=float, default=150, help="seconds for a first step")
  args = parser.parse_args()
  peers = [name for name in ("torch", "timm", "torchvision") if not importlib.util.find_spec(name)]
  if peers:
    print(f"Not compared with PyTorch: {', '.join(peers)} not installed")
  ways = WAYS[:2] if peers else WAYS
  rows = read(args.out)
  for network in args.cases.split(";"):
    if any(row["network"] == network for row in rows):
      continue
    with open(args.out / "workers.log", "a") as log:
      rows += measure(network, ways, args.patience, log)
    with open(args.out / "rates.csv", "w", newline="") as file:
      table = csv.DictWriter(file, FIELDS, restval="", lineterminator="\n")
      table.writeheader()
      table.writerows(rows)


if __name__ == "__main__":
  sys.exit(command_line.exit_code(main))
