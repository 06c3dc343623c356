"""Training and inference rates, ours and PyTorch's, measured in turn.

    pip install -e '.[parity,notebooks]'
    python -m experiments.speed.run [--cases='MLP 3x800;All-CNN-C'] [--ways=base,ioc,eager]

Every way of running a network is a child process that computes on request, so that they take
turns on the same cores, in an order that rotates from round to round. A ratio is the median over
rounds of (theirs / ours) of that round: a machine that drifts drifts for both. Updates the chosen
cases in rounds.csv (every timing) and results.csv next to this file, from which
`experiments.speed.report` makes report.md and the figure.
"""

import argparse
import csv
import datetime
import json
import os
import pathlib
import platform
import selectors
import statistics
import subprocess
import sys
import time

from rich.console import Console
from rich.progress import Progress

from convex_jax import command_line
from experiments.speed.cases import CASES, names_of

FOLDER = pathlib.Path(__file__).parent
OURS = {"base": ("base",), "base, norm of ioc": ("base", "batch"), "ioc": ("ioc",)}
THEIRS = ("eager", "channels_last", "compile", "deform")


def ways_of(name: str) -> list[str]:
  """The ways that make sense for a case: the norm of ioc only where base has another, and so on."""
  case = CASES[name]
  left_out = {"deform"} if case.config != "cycle_mlp" else set()
  left_out |= set() if case.convolutional else {"channels_last"}
  left_out |= set() if case.config in ("mixer", "cycle_mlp") else {"base, norm of ioc"}
  return [way for way in (*OURS, *THEIRS) if way not in left_out]


class Worker:
  """A child process and its answers."""

  def __init__(self, case: str, way: str, environment: dict[str, str], log):
    module = "jax_worker" if way in OURS else "torch_worker"
    command = [sys.executable, "-m", f"experiments.speed.{module}", case, *OURS.get(way, (way,))]
    self.way, self.began = way, time.perf_counter()
    self.process = subprocess.Popen(
      command,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=log,
      text=True,
      env=os.environ | environment,
    )

  def answer(self, patience: float) -> dict | None:
    """The next answer; None if the process ended, or took too long and was killed."""
    with selectors.DefaultSelector() as selector:
      selector.register(self.process.stdout, selectors.EVENT_READ)
      line = self.process.stdout.readline() if selector.select(patience) else ""
    if not line:
      self.close()
      return None
    return json.loads(line)

  def ask(self, request: str, patience: float = 600) -> dict | None:
    try:
      self.process.stdin.write(request + "\n")
      self.process.stdin.flush()
    except BrokenPipeError:
      return None
    return self.answer(patience)

  def close(self) -> None:
    self.process.kill()
    self.process.wait()


def measure(name: str, ways: list[str], rounds: int, patience: float, progress, log) -> list[dict]:
  """The rows of a case, one for each way, with all its timings."""
  workers, rows = {}, {}
  task = progress.add_task(name, total=len(ways) + rounds)
  # Starts are cold: compilations of earlier runs are not used.
  cold = {"JAX_ENABLE_COMPILATION_CACHE": "0", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
  for way in ways:
    worker = Worker(name, way, cold, log)
    started = worker.answer(patience)
    if started is None:
      progress.console.print(f"{name}, {way}: ended, or no first step in {patience:g} s")
    else:
      workers[way] = worker
      rows[way] = started | {"to_first_step": time.perf_counter() - worker.began}
      rows[way] |= {"train": [], "infer": []}
    progress.advance(task)
  counts = {}
  for what in ("train", "infer"):
    for worker in workers.values():  # The first call of inference compiles.
      worker.ask(f"{what} 1", patience)
    alone = [worker.ask(f"{what} 1")["seconds"] for worker in workers.values()]
    counts[what] = max(1, round(1.0 / statistics.median(alone)))
  for i in range(rounds):
    order = list(workers)
    for way in order[i % len(order) :] + order[: i % len(order)]:
      for what, count in counts.items():
        seconds = workers[way].ask(f"{what} {count}")["seconds"]
        rows[way][what].append(seconds / count)
    progress.advance(task)
  for way, worker in workers.items():
    rows[way] |= {"memory": worker.ask("memory 2"), "facts": worker.ask("facts")}
    worker.close()
  progress.remove_task(task)
  return [{"case": name, "way": way, **row} for way, row in rows.items()]


def summaries(rows: list[dict]) -> list[dict[str, str]]:
  """The rows of the table: rates, spread, and median ratios to the best way of PyTorch."""
  name = rows[0]["case"]
  case, by_way = CASES[name], {row["way"]: row for row in rows}
  best = {}
  for what in ("train", "infer"):
    theirs = [way for way in THEIRS if way in by_way]
    if theirs:
      best[what] = min(theirs, key=lambda way: statistics.median(by_way[way][what]))
  flops = by_way.get("base", rows[0])["facts"].get("flops_an_image")
  peak = max(row["facts"]["peak_flops"] for row in rows)
  table = []
  for row in rows:
    line = {"case": name, "batch": case.batch, "px": case.px, "way": row["way"]}
    for what in ("train", "infer"):
      low, median, high = quartiles(row[what])
      line[f"{what}_images_per_second"] = f"{case.batch / median:.4g}"
      line[f"{what}_spread"] = f"{(high - low) / median:.2f}"
      if what in best:
        pairs = zip(by_way[best[what]][what], row[what], strict=True)
        line[f"{what}_ratio"] = f"{statistics.median(a / b for a, b in pairs):.3f}"
    same_norm = by_way.get("base, norm of ioc", by_way.get("base"))
    if row["way"] == "ioc" and same_norm:
      pairs = zip(row["train"], same_norm["train"], strict=True)
      line["cost_of_ioc"] = f"{statistics.median(a / b for a, b in pairs):.3f}"
    if flops and not row["way"].startswith("ioc"):
      line["share_of_peak"] = f"{flops * case.batch / statistics.median(row['train']) / peak:.3f}"
    line["memory_MB"] = f"{row['memory']['bytes'] / 1e6:.0f}"
    if "train" in best:
      line["memory_ratio"] = (
        f"{row['memory']['bytes'] / by_way[best['train']]['memory']['bytes']:.2f}"
      )
    line["start_MB"] = f"{row['start_bytes'] / 1e6:.0f}"
    line["compile_s"] = f"{max(0.0, row['first_step'] - statistics.median(row['train'])):.2f}"
    line["to_first_step_s"] = f"{row['to_first_step']:.1f}"
    line["flops_an_image"] = f"{row['facts'].get('flops_an_image', flops or 0):.4g}"
    line["parameters"] = row["facts"]["parameters"]
    line["peak_gflops"] = f"{peak / 1e9:.0f}"
    line["rounds"], line["versions"] = len(row["train"]), row["facts"]["version"]
    line["machine"], line["date"] = machine(), datetime.date.today().isoformat()
    table.append({key: str(value) for key, value in line.items()})
  return table


def quartiles(values: list[float]) -> tuple[float, float, float]:
  if len(values) < 2:
    return values[0], values[0], values[0]
  low, median, high = statistics.quantiles(values, n=4, method="inclusive")
  return low, median, high


def machine() -> str:
  """The number of cores and their kind."""
  kind = platform.processor() or platform.machine()
  if os.path.exists("/proc/cpuinfo"):
    with open("/proc/cpuinfo") as file:
      kind = next((x.split(": ")[1].strip() for x in file if x.startswith("model name")), kind)
  return f"{os.cpu_count()} cores of {kind}"


def update(path: pathlib.Path, rows: list[dict[str, str]]) -> None:
  """Replaces the rows of the cases in `rows`, in the order of CASES."""
  kept = []
  if path.exists():
    with open(path, newline="") as file:
      measured = {row["case"] for row in rows}
      kept = [row for row in csv.DictReader(file) if row["case"] not in measured]
  every = sorted(kept + rows, key=lambda row: list(CASES).index(row["case"]))
  fields = list(dict.fromkeys(key for row in every for key in row))
  with open(path, "w", newline="") as file:
    writer = csv.DictWriter(file, fields, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(every)


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--cases", type=names_of, default=";".join(CASES), help="separated by ;")
  parser.add_argument("--ways", default=",".join((*OURS, *THEIRS)).replace(", ", " "))
  parser.add_argument("--rounds", type=int, default=9)
  parser.add_argument(
    "--patience", type=float, default=900, help="seconds to wait for a first step"
  )
  parser.add_argument("--out", type=pathlib.Path, default=FOLDER)
  args = parser.parse_args()
  wanted, console = args.ways.split(","), Console()
  with Progress(console=console) as progress, open(os.devnull, "w") as log:
    for name in args.cases:
      ways = [way for way in ways_of(name) if way.replace(", ", " ") in wanted]
      rows = measure(name, ways, args.rounds, args.patience, progress, log)
      timings = [
        {"case": name, "way": row["way"], "what": what, "seconds_a_step": f"{s:.5g}"}
        for row in rows
        for what in ("train", "infer")
        for s in row[what]
      ]
      table = summaries(rows)
      update(args.out / "rounds.csv", timings)
      update(args.out / "results.csv", table)
      for line in table:
        shown = {k: v for k, v in line.items() if k not in ("case", "batch", "px", "machine")}
        console.print(name, " ".join(f"{k}={v}" for k, v in list(shown.items())[:12]))


if __name__ == "__main__":
  sys.exit(command_line.exit_code(main))
