"""What to measure in a quarter of an hour of one GPU, in order of importance.

    python -m experiments.accelerator.run --minutes=13 --out=FOLDER [--data_dir=FOLDER]
    python -m experiments.accelerator.run --minutes=1 --tiny --out=FOLDER     # a check, on a CPU

Steps run in the order of `STEPS`. One starts only if its expected time fits into what is left, is
stopped at the end of the time, and writes its result as soon as it exists; the same command goes
on where the last one stopped. A table is printed last, and written to summary.md.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable

from convex_jax import command_line
from convex_jax.runs.workdir import Workdir
from convex_jax.studies import jobs, results, tables
from experiments.accelerator import rates

FOLDER = pathlib.Path(__file__).parent
TESTS = FOLDER.parents[1] / "tests" / "training" / "test_accelerator.py"  # Others need more.
GRACE = 20.0  # Seconds that a step may take to save and end.
START = 45.0  # Seconds to the first training step of a sweep's runs, which compile side by side.
IMAGES = 50_000  # CIFAR-10's, per epoch.


@dataclasses.dataclass(frozen=True)
class Context:
  """Where the steps read and write, and how long they may take in all."""

  out: pathlib.Path
  data_dir: str
  tiny: bool
  deadline: float  # Of `time.monotonic`.

  def left(self) -> float:
    """Seconds left for a step to work in."""
    return self.deadline - GRACE - time.monotonic()

  def python(self, name: str, *words: str, **environment: str) -> str:
    """Runs `python -m WORDS` with its output in NAME.log: "done", "stopped", or what it ended with.

    At the end of the time it gets a signal, upon which it saves, and `GRACE` seconds.
    """
    programs = str(self.out / "programs")  # Compiled ones, for the next time.
    found = os.environ | {"JAX_COMPILATION_CACHE_DIR": programs, "PYTHONUNBUFFERED": "1"}
    with open(self.out / f"{name}.log", "a") as log:
      process = subprocess.Popen(
        [sys.executable, "-m", *words],
        stdout=log,
        stderr=subprocess.STDOUT,
        env=found | environment,
        start_new_session=True,
      )
    try:
      code = process.wait(max(0.0, self.left()))
      return "done" if code == 0 else f"ended with exit code {code}, see {name}.log"
    except subprocess.TimeoutExpired:
      process.terminate()
      with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
      with contextlib.suppress(ProcessLookupError):  # Its children, and it, where it hangs.
        os.killpg(process.pid, signal.SIGKILL)
      process.wait()
      return "stopped"


# The steps: what each runs, and the figure that it leaves.


def run_tests(context: Context) -> tuple[str, str]:
  """The tests marked `accelerator`."""
  words = [
    "pytest",
    "-m",
    "accelerator",
    "-n",
    "2" if context.tiny else "4",
    "-rs",
    "-W",
    "default",
  ]
  words += ["-p", "no:cacheprovider", str(TESTS)]
  environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
  if context.tiny:  # The tests themselves, with a CPU in the accelerator's place.
    words += ["-k", "mlp or memory"]
    environment["CONVEX_JAX_TEST_DEVICE"] = "cpu"
  outcome = context.python("tests", *words, **environment)
  ended = re.findall(r"\d+ (?:passed|failed|skipped|error).* in ", read(context, "tests.log"))
  if outcome.startswith("ended with exit code 1,"):
    outcome = "done, with failures"
  return outcome, ended[-1].removesuffix(" in ") if ended else ""


def run_rates(context: Context) -> tuple[str, str]:
  """Training images/s of base, ioc and PyTorch."""
  cases = ["--cases=MLP 3x800"] if context.tiny else []
  outcome = context.python("rates", "experiments.accelerator.rates", f"--out={context.out}", *cases)
  rows = rates.read(context.out)
  return outcome, f"{len({row['network'] for row in rows})} networks: {rate_words(rows)}"


def rate_words(rows: list[dict[str, str]]) -> str:
  """The ratios to PyTorch, in a line."""
  words = []
  for network in rates.networks():
    ours = [rates.best(rows, network, way) for way in ("base", "ioc", "compile")]
    if all(ours):
      numbers = [float(row["images_per_second"]) for row in ours]
      words.append(f"{network} {numbers[0] / numbers[2]:.2f} / {numbers[1] / numbers[2]:.2f}")
  return f"of PyTorch's, base / ioc: {'; '.join(words)}" if words else "PyTorch not compared"


def run_epoch(context: Context) -> tuple[str, str]:
  """One epoch of the seed Mixer over as many synthetic images as ImageNet has, on the device."""
  workdir = Workdir(str(context.out / "runs" / "epoch"))
  words = ["--config=configs/mixer_ioc.py:synthetic", f"--workdir={workdir.path}"]
  keys = {"epochs": 1, "data.loader": "resident", "dtype": "bfloat16", "batch_size": 4096}
  keys |= {"log.every_steps": 20, "eval.train_examples": 4096}
  if context.tiny:
    keys |= {"data.train_fraction": 1e-4, "data.image_size": 8, "model.patch": 4}
    keys |= {"model.depth": 1, "model.channels": 8, "batch_size": 64, "log.every_steps": 1}
  words += [f"--config.{key}={value}" for key, value in keys.items()]
  outcome = context.python("epoch", "convex_jax", "train", *words)
  rows = workdir.rows("train") if workdir.exists() else []
  if not rows:
    return outcome, ""
  seconds = results.training_seconds(rows, keys["batch_size"])
  images = rows[-1]["step"] * keys["batch_size"]
  return outcome, f"{images:,} images in {seconds:.3g} s, {images / seconds:,.0f}/s"


def sweep(name: str, folder: str, network: str, runs: int, epochs: tuple[int, ...]) -> "Step":
  """A step that is a sweep: the schedule of the most epochs that fit.

  `network` is its name in `rates`, `runs` how many train at the same time on the one device.
  """

  def seconds(context: Context, epochs: int) -> float:
    rows = rates.read(context.out)
    measured = [
      float(row["images_per_second"])
      for row in rows
      if (row["network"], row["way"]) == (network, "ioc")
    ]
    # At the smaller batch, which is the one that it is trained with; unmeasured: a guess.
    return START + runs * epochs * IMAGES / (measured[0] if measured else GUESS[network])

  def schedule(context: Context) -> tuple[str, float]:
    """Its name and its expected seconds; one that has begun goes on."""
    if context.tiny:
      return "tiny", 1.0
    for count in epochs:
      if (context.out / "runs" / name / schedule_name(count)).exists():
        return schedule_name(count), START
    for count in epochs:
      if seconds(context, count) <= context.left():
        break
    return schedule_name(count), seconds(context, count)

  def schedule_name(count: int) -> str:
    return "table_1" if name == "table_1" else f"{name}_{count}"

  def run(context: Context) -> tuple[str, str]:
    chosen, _ = schedule(context)
    out = context.out / name
    words = ["convex_jax", "sweep", str(FOLDER if context.tiny else FOLDER.parent / folder)]
    words += [f"--schedule={chosen}", f"--workdir={context.out / 'runs' / name}", f"--out={out}"]
    words += [f"--at_once={2 if context.tiny else runs}"]
    words += [f"--data_dir={context.data_dir}"] if context.data_dir else []
    if context.tiny:
      words += [f"--only={TINY[name]}"]
    outcome = context.python(name, *words)
    return outcome, f"{chosen}: {accuracies(out)}"

  return Step(name, lambda context: schedule(context)[1], run)


def accuracies(out: pathlib.Path) -> str:
  """Test accuracy by variant, and what was proved."""
  words = []
  for variants in tables.panels_of(results.read(str(out))).values():
    for variant, rows in variants.items():
      accuracy = tables.mean_and_spread((row.test_accuracy for row in rows), 100)
      proved = "" if variant.startswith("base") else f", {tables.verdict(rows)}"
      words.append(f"{variant} {accuracy} % (seeds: {len(rows)}{proved})")
  return "; ".join(words)


@dataclasses.dataclass(frozen=True)
class Step:
  """What is run, and how long it is expected to take."""

  name: str
  seconds: Callable[[Context], float]
  run: Callable[[Context], tuple[str, str]]  # Its outcome, and a figure.
  most: float = math.inf  # Seconds, after which the others come first.


# Images/s of one H100 where `rates` has none yet: low guesses, so that what starts also ends.
GUESS = {
  "Mixer seed, 512": 100_000,
  "All-CNN-C": 15_000,
  "CycleMLP-B1, 32 px": 20_000,
  "DenseNet-BC(100,12)": 6_000,
}
TINY = {"table_1": "Mixer", "all_cnn": "All-CNN", "cycle_mlp": "CycleMLP", "densenet": "DenseNet"}
EPOCHS = jobs.read_sweep(str(FOLDER)).EPOCHS
STEPS = (
  Step("tests", lambda context: 1 if context.tiny else 60, run_tests),
  Step("rates", lambda context: 1 if context.tiny else 120, run_rates, most=180),
  Step("epoch", lambda context: 1 if context.tiny else 60, run_epoch),
  sweep("table_1", "mixer", "Mixer seed, 512", 12, (100,)),
  sweep("all_cnn", "accelerator", "All-CNN-C", 2, EPOCHS["all_cnn"]),
  sweep("cycle_mlp", "accelerator", "CycleMLP-B1, 32 px", 2, EPOCHS["cycle_mlp"]),
  sweep("densenet", "accelerator", "DenseNet-BC(100,12)", 2, EPOCHS["densenet"]),
)


def read(context: Context, name: str) -> str:
  path = context.out / name
  return path.read_text(errors="replace") if path.exists() else ""


def run_step(step: Step, context: Context, most: float = math.inf) -> dict[str, str]:
  """Runs a step for so many seconds, unless it is done or does not fit; returns its line."""
  path = context.out / f"{step.name}.json"
  line = json.loads(path.read_text()) if path.exists() else {"step": step.name, "seconds": 0}
  if line.get("outcome", "").startswith("done"):
    return line
  expected = step.seconds(context)
  if expected > context.left():
    words = f"needs {expected:.0f} s of {max(0, context.left()):.0f}"
    return {"outcome": f"not started: {words}", "figure": ""} | line
  start = time.monotonic()
  print(f"{step.name}: about {expected:.0f} of {context.left():.0f} s", flush=True)
  within = min(context.deadline, start + most + GRACE)
  outcome, figure = step.run(dataclasses.replace(context, deadline=within))
  line |= {"outcome": outcome, "figure": figure}
  line["seconds"] += round(time.monotonic() - start)
  path.write_text(json.dumps(line))
  return line


def summary(lines: list[dict[str, str]], rows: list[dict[str, str]]) -> str:
  """Both tables, as Markdown."""
  headings = ("step", "outcome", "seconds", "figure")
  text = tables.markdown(headings, [[str(line[key]) for key in headings] for line in lines])
  if rows:
    cells = [[row[field] for field in rates.FIELDS] for row in rows]
    text += "\n\n" + tables.markdown(rates.FIELDS, cells)
  return text + "\n"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--minutes", type=float, default=13)
  parser.add_argument("--out", type=pathlib.Path, required=True)
  parser.add_argument("--data_dir", default="", help="folder of CIFAR-10 (default: TFDS's)")
  parser.add_argument("--tiny", action="store_true", help="sizes for a check on a CPU")
  args = parser.parse_args()
  out = args.out.absolute()
  out.mkdir(parents=True, exist_ok=True)
  context = Context(out, args.data_dir, args.tiny, time.monotonic() + 60 * args.minutes)
  lines = {}
  for step, most in [(step, step.most) for step in STEPS] + [(step, math.inf) for step in STEPS]:
    lines[step.name] = run_step(step, context, most)
    text = summary([*lines.values()], rates.read(out))
    (out / "summary.md").write_text(text)
  print(text)


if __name__ == "__main__":
  sys.exit(command_line.exit_code(main))
