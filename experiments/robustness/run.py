"""What convexity gains: certified radii, attacked; the least value of each logit, proved.

    python -m experiments.robustness.run WORKDIR [--examples=100] [--data_dir=FOLDER]

For the proved run in WORKDIR: certified radii of test images in l1, l2 and linf; projected
gradient attacks and steepest corners inside each certified ball, in float64, none of which
may change a class; for the first images the smallest radius at which an attack is found,
which bounds the slack of a certificate; the global minimum of each logit over all images. Writes
radii_NAME.csv and NAME.png, and adds rows to summary.csv, next to this file.
"""

import argparse
import csv
import functools
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from rich.progress import track

import convex_jax
from convex_jax import command_line
from convex_jax.data import datasets
from convex_jax.proof import radii as robustness
from convex_jax.runs import certified, radii_command
from tests.support import attacks

FOLDER = pathlib.Path(__file__).parent
INSIDE = 0.9999  # Attacks are made at this fraction of a certified radius.


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("workdir")
  parser.add_argument("--examples", type=int, default=100)
  parser.add_argument("--smallest", type=int, default=20, help="images to find attacks for")
  parser.add_argument("--data_dir", default="")
  args = parser.parse_args()
  run = convex_jax.load(args.workdir)
  name = "_".join([run.config.model.name, run.config.data.name, *run.config.data.classes])
  config = ConfigDict(run.config.data.to_dict())
  config.dir = args.data_dir or config.dir
  test = datasets.load_test(config, progress=False).first(args.examples)
  images, labels = test.images, test.labels
  certifier, start = certified.certifier(run), time.perf_counter()
  radii = list(track(certifier.radii(images), "radii", total=len(images)))
  seconds = (time.perf_counter() - start) / len(images)
  measured = radii_command.Measured(labels, radii)
  attempts, changes, smallest = attack(run, images, radii, args.smallest)
  sides = run.class_names if run.config.model.one_logit else ()
  write(name, sides, measured, attempts, changes, smallest, least(run), seconds)
  draw(name, measured, smallest)


def attack(run, images, radii, count):
  """(attempts, changes of class) inside the radii; smallest radii at which an attack succeeds."""
  attempts, changes = (dict.fromkeys(robustness.NORMS, 0) for _ in range(2))
  smallest = {norm: [] for norm in robustness.NORMS}
  with jax.enable_x64(True):
    weights = {"params": run.params, "stats": run.stats}
    attacker = attacks.Attacker(functools.partial(run.apply, weights, dtype=jnp.float64))
    for i, (image, r) in enumerate(zip(track(images, "attacks"), radii, strict=True)):
      x = image.astype(np.float64)
      for norm in robustness.NORMS:
        radius = r.radii[norm] * certified.PIXEL
        outcome = attacker.attack(x, norm, INSIDE * radius, seed=i)
        attempts[norm] += outcome.attempts
        changes[norm] += outcome.changes
        if i < count and radius > 0:
          smallest[norm].append(attacker.smallest(x, norm, radius, seed=i) / radius)
  return attempts, changes, smallest


def least(run):
  """The global minimum of each logit over all images: (value, gap, seconds)."""
  found = []
  for k in track(range(len(run.class_names)), "minima"):
    start = time.perf_counter()
    minimum = certified.minimise_logit(run, k)
    found.append((minimum.value, minimum.gap, time.perf_counter() - start))
  return found


def write(name, sides, measured, attempts, changes, smallest, least, seconds) -> None:
  with open(FOLDER / f"radii_{name}.csv", "w", newline="") as file:
    rows = csv.writer(file)
    rows.writerow(["example", "label", "predicted", *robustness.NORMS])
    for i, (label, r) in enumerate(zip(measured.labels, measured.radii, strict=True)):
      rows.writerow([i, int(label), r.predicted, *(f"{r.radii[n]:.5g}" for n in robustness.NORMS)])
  path = FOLDER / "summary.csv"
  kept = []
  if path.exists():
    with open(path, newline="") as file:
      kept = [row for row in list(csv.reader(file))[1:] if row[0] != name]
  rows = [("images", len(measured.labels)), ("accuracy", f"{measured.right.mean():.3f}")]
  rows.append(("seconds an image", f"{seconds:.2f}"))
  for norm in robustness.NORMS:
    rows.append((f"{norm} median certified radius", f"{np.median(measured.of(norm)):.4g}"))
    for k, label in enumerate(sides):
      rows.append((f"{norm} median, predicted {label}", f"{median_of(measured, norm, k):.4g}"))
    rows.append((f"{norm} attempts inside", attempts[norm]))
    rows.append((f"{norm} changes of class inside", changes[norm]))
    ratio = f"{np.median(smallest[norm]):.3g}"
    rows.append((f"{norm} smallest attack over certified radius, median", ratio))
  rows.append(("largest gap of a logit's global minimum", f"{max(m[1] for m in least):.2g}"))
  rows.append(("largest such value", f"{max(abs(m[0]) for m in least):.4g}"))
  rows.append(("seconds a minimum, median", f"{np.median([m[2] for m in least]):.2f}"))
  with open(path, "w", newline="") as file:
    lines = [["run", "what", "value"], *kept, *([name, *row] for row in rows)]
    csv.writer(file).writerows(lines)
  for what, value in rows:
    print(f"{name}: {what}: {value}")


def median_of(measured, norm, k):
  """Median certified radius of the images classified as k."""
  predicted = np.array([r.predicted for r in measured.radii])
  return np.median(measured.of(norm)[predicted == k])


def draw(name, measured, smallest) -> None:
  """Draws certified accuracy against radius; dashed: where attacks begin, by the median ratio."""
  figure = Figure(figsize=(10, 3), layout="constrained")
  for axes, norm in zip(figure.subplots(1, 3), robustness.NORMS, strict=True):
    steps = np.sort([0.0, *measured.of(norm)[measured.right]])
    accuracies = [100 * measured.certified_accuracy(norm, r) for r in steps]
    axes.step(steps, accuracies, where="pre", color="black", label="certified")
    ratio = np.median(smallest[norm])
    label = f"times {ratio:.2g}, where attacks begin"
    axes.step(ratio * steps, accuracies, where="pre", color="grey", ls="--", label=label)
    axes.legend(fontsize="small")
    axes.set(xlabel=f"Radius in {norm} (pixels in 0..1)", ylim=(0, 100))
    axes.set_xlim(0, None)
    axes.grid(alpha=0.3)
  figure.axes[0].set_ylabel("Certified accuracy (%)")
  figure.savefig(FOLDER / f"{name}.png", dpi=110)


if __name__ == "__main__":
  sys.exit(command_line.exit_code(main))
