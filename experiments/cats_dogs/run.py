"""Certified radii of three binary tasks, as Pfrommer et al. 2023 measure them; errors by the image.

    python -m experiments.cats_dogs.run --workdir=runs/cats_dogs [--data_dir=FOLDER] [--trained_only]

"Asymmetric Certified Robustness via Feature-Convex Neural Networks" (NeurIPS 2023): one logit y,
convex, is positive on the sensitive class, and only images of that class are certified. Trains what
is missing in WORKDIR/protocol, each task with and without their feature map and their Jacobian
term, then writes protocol.csv and protocol.png into --out (by default next to this file). Where
WORKDIR is also that of the sweep, memorised.csv counts the errors of each of its networks.
"""

import argparse
import csv
import dataclasses
import itertools
import math
import os
import pathlib
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from ml_collections import ConfigDict

from convex_jax import command_line, config_files, files
from convex_jax.data import datasets
from convex_jax.data.datasets import Data
from convex_jax.data.splits import Split
from convex_jax.proof.radii import NORMS
from convex_jax.proof.rays import dual_size
from convex_jax.runs import certified
from convex_jax.runs.run import Run, load
from convex_jax.runs.workdir import Workdir
from convex_jax.studies import jobs, tables
from convex_jax.studies.jobs import TWINS, Job
from convex_jax.training import loop, runtime

FOLDER = pathlib.Path(__file__).parent
EXAMPLES = 1000  # The first test images of both classes together.
JACOBIAN = 1.0  # Times |J|^2 / 2; theirs is a multiple of |J| over a batch.
LIPSCHITZ = {"l1": 2.0, "l2": math.sqrt(2), "linf": 1.0}  # Of `features`.
MINE = ["task", "feature map", "Jacobian", "convex", "images", "accuracy", "threshold"]
FIELDS = [*MINE, "norm", "radius", "certified", "by pixel"]


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
  """A binary task of theirs; the first class is the sensitive one."""

  name: str
  data: str
  classes: tuple[str, str]
  epochs: int
  padding: int  # px, of random crops in training.
  radii: dict[str, tuple[float, ...]]  # At which theirs are reported; pixels in 0..1.

  def job(self, is_mapped: bool, is_smooth: bool) -> Job:
    """Their schedule: SGD at 1e-3, which is multiplied by 0.99 after each epoch."""
    fields = TWINS["ioc"] | {
      "data.classes": self.classes,
      "data.flip": self.data == "cifar10",
      "data.crop_padding": self.padding,
      "model.one_logit": True,
      "model.width": 200,
      "model.depth": 2,
      "batch_size": 64,
      "steps_per_call": 20,  # Twice as fast on two cores: the steps are small.
      "epochs": self.epochs,
      "jacobian_penalty": JACOBIAN * is_smooth,
      "optimizer.name": "sgd",
      "optimizer.learning_rate": 1e-3,
      "optimizer.schedule": "exponential",
      "optimizer.decay_factor": round(0.99**self.epochs, 4),
      "eval.every_epochs": 10.0,
    }
    words = ["mapped"] * is_mapped + ["jacobian"] * is_smooth
    return Job(self.name, " ".join(words) or "plain", f"configs/mlp.py:{self.data}", fields)


TENTHS = tuple(k / 10 for k in range(5, 30, 5))
GREY = {"l1": (2, 4, 6, 8, 10), "l2": TENTHS, "linf": (0.025, 0.05, 0.075, 0.1, 0.125)}
COLOUR = {"l1": (5, 10, 15, 20), "l2": TENTHS, "linf": tuple(k / 255 for k in range(2, 12, 2))}
TASKS = (
  Task("MNIST 3-8", "mnist", ("3", "8"), 60, 1, GREY),
  Task("Fashion-MNIST shirts", "fashion_mnist", ("T-shirt/top", "Shirt"), 60, 1, GREY),
  Task("cats-dogs", "cifar10", ("cat", "dog"), 150, 3, COLOUR),
)


def features(images: np.ndarray, centre_C: np.ndarray) -> np.ndarray:
  """(p, |p - c|) along the channels, uint8: their feature map (x, |x|) of centred pixels x = p - c.

  The network subtracts the means of its 2 C channels itself, so that p may stand for x. With whole
  numbers c the map is exact.

  A network that is convex in these features need not be convex in p: what is proved is the
  function of the features. Radii in p follow, since the map changes each pixel's second feature
  by at most as much as its first: |phi(p + d) - phi(p)| <= L |d| with L = 2 in l1, sqrt 2 in l2,
  1 in linf (`LIPSCHITZ`; their section 3).
  """
  away = np.abs(images.astype(np.int16) - centre_C).astype(np.uint8)
  return np.concatenate([images, away], axis=-1)


def mapped(data: Data) -> Data:
  """The data in `features`, centred at the mean colour of the training images."""
  centre_C = np.round(data.train.images.mean((0, 1, 2))).astype(np.int16)

  def of(split):
    return Split(features(split.images, centre_C), split.labels)

  return Data(of(data.train), None, of(data.test), data.class_names)


def balance(y_N: np.ndarray, is_sensitive_N: np.ndarray) -> float:
  """The threshold b at which the classes y > b have the most equal accuracies (their section 4).

  Halfway between two logits, so that no image lies on it. As theirs, it is chosen on the images
  that are then reported: one number fitted to the test images.
  """
  y = np.unique(y_N)
  thresholds = np.concatenate([[y[0] - 1], (y[1:] + y[:-1]) / 2, [y[-1] + 1]])
  above = y_N > thresholds[:, None]
  difference = above[:, is_sensitive_N].mean(1) - (~above)[:, ~is_sensitive_N].mean(1)
  return float(thresholds[np.abs(difference).argmin()])


@dataclasses.dataclass(frozen=True, eq=False)
class Measured:
  """What one run shows on the first test images, at its balanced threshold."""

  verdict: str
  accuracy: float  # Of both classes.
  threshold: float
  radii: dict[str, np.ndarray]  # Of each sensitive image, by norm; 0 where it is misclassified.
  sharper: dict[str, np.ndarray]  # By `by_pixel`; empty without a feature map.


def certified_share(radii_N: np.ndarray, radius: float) -> float:
  """The share of the sensitive images that are right, and provably so within `radius`."""
  return float(np.mean((radii_N >= radius) & (radii_N > 0)))


def measure(run: Run, test: Split, is_mapped: bool) -> Measured:
  """Radii y(z) / |grad y(z)|_dual / L at z = phi(p), or at z = p with L = 1 (their theorem 2).

  In float64, for pixels in 0..1: both the logit less its threshold and its gradient.
  """
  is_sensitive = test.labels == 0
  with jax.enable_x64(True):

    def logit(z_HxWxC):
      return run.apply(run.weights, z_HxWxC[None], dtype=jnp.float64)[0, 0]

    z = jnp.asarray(test.images, jnp.float64)
    y, gradient = map(np.asarray, jax.jit(jax.vmap(jax.value_and_grad(logit)))(z))
  b = balance(y, is_sensitive)
  above = (y - b)[is_sensitive], gradient[is_sensitive]
  radii = {norm: radii_of(*above, norm, is_mapped) for norm in NORMS}
  sharper = {norm: by_pixel(*above, norm) for norm in NORMS if is_mapped}
  accuracy = float(np.mean((y > b) == is_sensitive))
  return Measured(verdict_of(run), accuracy, b, radii, sharper)


def radii_of(y_N, gradient_NxHxWxC, norm: str, is_mapped: bool) -> np.ndarray:
  """Radii in p, pixels in 0..1, from logits and their gradients for pixels in 0..255.

  `proof.radii.one_sided_radius` for a batch, over L.
  """
  size_N = dual_size(gradient_NxHxWxC.reshape(len(y_N), -1), norm)
  unit = certified.PIXEL * (LIPSCHITZ[norm] if is_mapped else 1.0)
  return np.maximum(y_N, 0) / size_N / unit


def by_pixel(y_N, gradient_NxHxWxC, norm: str) -> np.ndarray:
  """Radii y / | |u| + |v| |_dual with (u, v) the gradient of y in (p, |p - c|); as `radii_of`.

  Sharper than L and as sound: a step d in p changes the features by d and by an e with
  |e_i| <= |d_i| at each pixel i, so y by at least -sum_i (|u_i| + |v_i|) |d_i|. In linf it is
  the same.
  """
  u, v = np.split(np.abs(gradient_NxHxWxC), 2, axis=-1)
  return radii_of(y_N, u + v, norm, is_mapped=False)


def prepared(task: Task, is_mapped: bool, data_dir: str) -> Data:
  """The data of a task, all of it uint8."""
  config = config_files.load(task.job(is_mapped, False).arguments())
  config.data.dir = data_dir
  data = datasets.load(config.data, config.seed, progress=False)
  return mapped(data) if is_mapped else data


def workdir_of(task: Task, job: Job, folder: str) -> Workdir:
  """The workdir of a job below `folder`."""
  words = (task.name, job.variant)
  return Workdir(os.path.join(folder, "protocol", *map(jobs.file_name, words)))


def is_trained(workdir: Workdir) -> bool:
  """Whether the run in a workdir has ended."""
  return workdir.exists() and bool(workdir.rows("final"))


def train(job: Job, data: Data, data_dir: str, workdir: Workdir) -> None:
  """Trains a job; one that was interrupted goes on, one that has ended is left alone."""
  if not is_trained(workdir):
    config = config_files.load(job.arguments())
    config.data.dir = data_dir
    loop.run(config, workdir.path, data)


def rows_of(task: Task, is_mapped: bool, is_smooth: bool, found: Measured) -> Iterator[dict]:
  """The rows of protocol.csv for one run."""
  words = (task.name, "(x, |x|)" * is_mapped, str(JACOBIAN) * is_smooth, found.verdict)
  numbers = (EXAMPLES, f"{found.accuracy:.4f}", f"{found.threshold:.5g}")
  every = (found.radii, found.sharper)
  for norm in NORMS:
    for r in task.radii[norm]:
      shares = [f"{certified_share(radii[norm], r):.4f}" for radii in every if radii]
      row = (*words, *numbers, norm, f"{r:.4g}", *shares, *[""] * (2 - len(shares)))
      yield dict(zip(FIELDS, row, strict=True))


def table(rows: list[dict[str, str]]) -> str:
  """A Markdown table: a row for each run, with its certified accuracies in %."""
  groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
  for row in rows:
    groups.setdefault(tuple(row[key] for key in MINE), []).append(row)
  lines = []
  for (name, features, jacobian, verdict, _, accuracy, _), own in groups.items():
    for column, words in {"certified": "", "by pixel": ", by pixel"}.items():
      if not own[0][column]:
        continue
      cells = [name, (features or "x") + words, "yes" if jacobian else "no", verdict.lower()]
      curves = [curve([row for row in own if row["norm"] == norm], column) for norm in NORMS]
      lines.append([*cells, f"{100 * float(accuracy):.1f}", *curves])
  headings = ["task", "features", "Jacobian term", "convex in them?", "accuracy", *NORMS]
  return tables.markdown(headings, lines)


def curve(rows: list[dict[str, str]], column: str) -> str:
  """Certified accuracies in %, and the radii of the first and the last of them."""
  shares = " / ".join(f"{100 * float(row[column]):.0f}" for row in rows)
  return f"{shares} ({float(rows[0]['radius']):.3g} ... {float(rows[-1]['radius']):.3g})"


def draw(path: pathlib.Path, found: dict[Task, dict[tuple[bool, bool], Measured]]) -> None:
  """Certified accuracy against radius: a row of axes for each task, a column for each norm."""
  figure = Figure(figsize=(10, 2.6 * len(found)), layout="constrained")
  grid = figure.subplots(len(found), len(NORMS), squeeze=False)
  for (task, runs), row in zip(found.items(), grid, strict=True):
    for norm, axes in zip(NORMS, row, strict=True):
      radii = np.linspace(0, 1.2 * task.radii[norm][-1], 400)
      for (is_mapped, is_smooth), measured in runs.items():
        shares = [100 * certified_share(measured.radii[norm], r) for r in radii]
        label = ("features (x, |x|)" if is_mapped else "x") + ", Jacobian term" * is_smooth
        style = "-" if is_smooth else "--"
        axes.plot(radii, shares, style, color="grey" if is_mapped else "black", label=label)
      axes.set(xlabel=f"Radius in {norm} (pixels in 0..1)", ylim=(0, 100), xlim=(0, radii[-1]))
      axes.xaxis.set_major_locator(MaxNLocator(5))
      axes.grid(alpha=0.3)
    row[0].set_ylabel(f"{task.name}\nCertified (%)")
  figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
  figure.savefig(path, dpi=110)


def memorised(workdir: str, data_dir: str) -> list[dict[str, str]]:
  """The errors of each finished run of the sweep on its own training images, by the image.

  At inference, with the last weights and BatchNorm's running averages. The least margin is that of y
  on the side of the label: with it at 0 or below, an image is an error.
  """
  rows = []
  for task in jobs.tasks_of(jobs.read_sweep(str(FOLDER)), "memorise", workdir):
    if not is_trained(Workdir(task.workdir)):
      continue
    final = Workdir(task.workdir).rows("final")[-1]
    run = load(task.workdir)
    config = ConfigDict(run.config.data.to_dict())
    config.dir = data_dir
    train = datasets.load(config, run.config.seed, progress=False).train
    margins = run.logits(train.images)[:, 0] * np.where(train.labels == 0, 1, -1)
    is_free = run.config.model.parts == "base"
    row = {"variant": task.job.variant, "seed": task.job.seed}
    row |= {"convex": "" if is_free else verdict_of(run)}
    row |= {"images": len(margins), "errors": int(np.sum(margins <= 0))}
    row |= {"least margin": f"{margins.min():.4g}", "test": f"{final['test_accuracy']:.4f}"}
    rows.append({key: str(value) for key, value in row.items()})
  return rows


def verdict_of(run: Run) -> str:
  """PROVED, REFUTED or UNKNOWN, as its training ended."""
  assert run.certificate is not None, f"{run.workdir} has no certificate"
  return run.certificate["verdict"]


def memorised_table(rows: list[dict[str, str]]) -> str:
  """A Markdown table: a row for each network of the sweep."""
  headings = ["network", "seed", "errors", "of", "training accuracy (%)", "least margin"]
  headings += ["test accuracy (%)", "convex?"]
  lines = []
  for row in rows:
    count, errors = int(row["images"]), int(row["errors"])
    cells = [row["variant"], row["seed"], f"{errors:,}", f"{count:,}"]
    cells += [f"{100 * (1 - errors / count):.2f}", row["least margin"]]
    lines.append([*cells, f"{100 * float(row['test']):.1f}", row["convex"].lower()])
  return tables.markdown(headings, lines)


def write(path: pathlib.Path, rows: list[dict]) -> None:
  with files.atomic_write(str(path)) as file:
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--workdir", default="runs/cats_dogs")
  parser.add_argument("--data_dir", default="")
  parser.add_argument("--trained_only", action="store_true", help="measure what there is")
  parser.add_argument("--out", type=pathlib.Path, default=FOLDER)
  args = parser.parse_args()
  runtime.tune_cpu()
  if rows := memorised(args.workdir, args.data_dir):
    write(args.out / "memorised.csv", rows)
    print(memorised_table(rows))
  found: dict[Task, dict[tuple[bool, bool], Measured]] = {}
  for task in TASKS:
    for is_mapped in (True, False):
      data = prepared(task, is_mapped, args.data_dir)
      for is_smooth in (False, True):
        job = task.job(is_mapped, is_smooth)
        workdir = workdir_of(task, job, args.workdir)
        if not args.trained_only:
          train(job, data, args.data_dir, workdir)
        if is_trained(workdir):
          measured = measure(load(workdir.path), data.test.first(EXAMPLES), is_mapped)
          found.setdefault(task, {})[is_mapped, is_smooth] = measured
    every = [[(t, *how, m) for how, m in runs.items()] for t, runs in found.items()]
    if rows := [row for one in itertools.chain(*every) for row in rows_of(*one)]:
      write(args.out / "protocol.csv", rows)
      draw(args.out / "protocol.png", found)
      print(table(rows))


if __name__ == "__main__":
  sys.exit(command_line.exit_code(main))
