"""Trains both twins of the MLP and the Mixer for five epochs; tabulates and draws the results.

    python -m experiments.first_light.run [--config.data.dir=...] [further overrides]

Further arguments go to every run. A finished run is not repeated, an interrupted one resumes.
Writes results.csv and curves.png next to this file.
"""

import argparse
import csv
import pathlib
import subprocess
import sys

import matplotlib.pyplot as plt

import convex_jax
from convex_jax import command_line

HERE = pathlib.Path(__file__).parent
RUNS = ("mlp", "mlp_ioc", "mixer_ioc", "mixer")
COLUMNS = ("train_accuracy", "test_accuracy", "train_loss", "test_loss", "gap", "zero_share")


def train(name: str, overrides: list[str]) -> None:
  """Trains with the command that a user would type."""
  command = [sys.executable, "-m", "convex_jax", "train", f"--config=configs/{name}.py"]
  command += ["--config.epochs=5", f"--workdir=runs/first_light/{name}", *overrides]
  print(" ".join(command[1:]), flush=True)
  if code := subprocess.run(command, cwd=HERE.parent.parent).returncode:
    sys.exit(code)


def load(name: str) -> convex_jax.Run:
  return convex_jax.load(str(HERE.parent.parent / "runs" / "first_light" / name))


def tabulate() -> None:
  """Writes results.csv, a row for each run."""
  with open(HERE / "results.csv", "w", newline="") as file:
    table = csv.writer(file)
    table.writerow(["run", "parts", "epochs", "batch_size", "seed", *COLUMNS])
    for name in RUNS:
      run, final = load(name), load(name).metrics("final")[-1]
      figures = [f"{final[column]:.4f}" if column in final else "" for column in COLUMNS]
      config = run.config
      table.writerow(
        [name, config.model.parts, config.epochs, config.batch_size, config.seed, *figures]
      )


def draw() -> None:
  """Draws accuracy by epoch, a panel for each architecture with both twins."""
  figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
  for panel, model in zip(panels, ("mlp", "mixer"), strict=True):
    for name, shade, marker in ((model, "0.55", "s"), (f"{model}_ioc", "C3", "o")):
      rows = load(name).metrics("eval")
      label = "convex (ioc)" if name.endswith("ioc") else "base"
      for split, line in (("train", "--"), ("test", "-")):
        panel.plot(
          [row["epoch"] for row in rows],
          [100 * row[f"{split}_accuracy"] for row in rows],
          line,
          color=shade,
          marker=marker,
          markersize=4,
          label=f"{label}, {split}",
        )
    panel.set_title({"mlp": "MLP 3 x 800", "mixer": "MLP-Mixer, 4 blocks, 72 px"}[model])
    panel.set_xlabel("Epoch")
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.grid(alpha=0.3)
  panels[0].set_ylabel("Accuracy on CIFAR-10 (%)")
  panels[1].legend(loc="lower right", fontsize="small")
  figure.savefig(HERE / "curves.png", dpi=130)


def main() -> None:
  parser = argparse.ArgumentParser(description="Trains four networks for five epochs.")
  _, overrides = parser.parse_known_args()
  for name in RUNS:
    train(name, overrides)
  tabulate()
  draw()


if __name__ == "__main__":
  sys.exit(command_line.exit_code(main))
