"""What a training step asks of a machine, and what limits it.

    python -m experiments.scale.run [--programs=mixer,densenet_ioc] [--machines=v5e-256]

Compiles the training program of each imagenet2012 config (its published recipe, bfloat16) for each
machine by that machine's own compiler (`pip install 'convex_jax[aot]'`), and takes memory, FLOPs,
bytes and collectives from it. With peak rates they give the time of a step by each resource.
Writes compiled.csv, a row after each program, and roofline.png next to this file; what is there
already is not compiled again, so that the command resumes where it stopped.
"""

import argparse
import csv
import pathlib

from convex_jax.training import machines

machines.prepare_process("v5e-8")  # Before JAX is imported.

import matplotlib.pyplot as plt  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import track  # noqa: E402

from convex_jax import main as command  # noqa: E402
from convex_jax.errors import UserError  # noqa: E402
from convex_jax.studies import tables  # noqa: E402
from convex_jax.training import compile_ahead  # noqa: E402

FOLDER = pathlib.Path(__file__).parent
RESULTS = FOLDER / "compiled.csv"
PROGRAMS = {
  name + size.replace(",", " "): f"configs/{name}.py:imagenet2012{size}"
  for base in ("mixer", "cycle_mlp", "densenet", "efficientnet", "all_cnn", "mlp")
  for size in (("", ",S/16", ",B/16") if base == "mixer" else ("",))
  for name in (base, f"{base}_ioc")
}
# Host cores of each machine (docs.cloud.google.com/tpu/docs/v4, /v5e, /v6e).
CORES = {"v4-8": 240, "v5e-8": 224, "v5e-256": 64 * 112, "v6e-8": 180}


def decode_rates() -> dict[int, float]:
  """Images per second and core, by size, as `experiments.input` measured them (2 cores)."""
  with open(FOLDER.parent / "input" / "results.csv") as file:
    rows = [row for row in csv.DictReader(file) if row["way"] == "stream, 2 threads"]
  return {int(row["px"]): float(row["images_per_second"]) / 2 for row in rows}


def row_of(name: str, machine: str, decode: dict[int, float]) -> dict[str, str]:
  """What a machine's compiler says of a program; times are milliseconds by each resource alone."""
  config = command.load_config(PROGRAMS[name], ["--config.dtype=bfloat16"])
  row = {"program": name, "machine": machine, "batch": str(config.batch_size)}
  try:
    found = compile_ahead.verdict(config, machine, evaluation=False)
  except UserError as error:  # A published batch that does not divide.
    return row | {"fits": "uneven", "why": str(error)}
  train = found.train
  row |= {"fits": "yes" if found.fits else "no", "seconds": f"{train.seconds:.0f}"}
  if train.refused:
    return row | {"why": train.refused}
  number, size, _ = train.collectives.get("all-reduce", (0, 0.0, 0.0))
  times = train.seconds_by(found.chip)
  if (rate := decode.get(config.data.image_size)) is not None and config.data.loader == "stream":
    times["host"] = config.batch_size / (rate * CORES[machine])
  bound = max(times, key=lambda key: times[key])
  return row | {
    "gib": f"{found.needs:.2f}",
    "gflop": f"{train.flops / 1e9:.4g}",
    "gb": f"{train.bytes / 1e9:.3g}",
    "all_reduces": str(number),
    "all_reduce_mb": f"{size / 1e6:.3g}",
    **{f"{key}_ms": f"{1e3 * value:.3g}" for key, value in times.items()},
    "bound": bound,
    "about_ms": f"{1e3 * times[bound]:.3g}",
  }


COLUMNS = {  # Of the table, by their names in the file.
  "gib": "GiB per device",
  "gflop": "GFLOP per device",
  "gb": "GB per device",
  "all_reduces": "all-reduces",
  "all_reduce_mb": "MB",
  "arithmetic_ms": "arithmetic, ms",
  "memory_ms": "memory, ms",
  "links_ms": "links, ms",
  "host_ms": "host, ms",
  "bound": "bound by",
}
FIELDS = ["program", "machine", "batch", "fits", "seconds", *COLUMNS, "about_ms", "why"]


def read() -> list[dict[str, str]]:
  if not RESULTS.exists():
    return []
  with open(RESULTS, newline="") as file:
    return list(csv.DictReader(file))


def write(rows: list[dict[str, str]]) -> None:
  order = {pair: i for i, pair in enumerate((p, m) for p in PROGRAMS for m in CORES)}
  rows = sorted(rows, key=lambda row: order[row["program"], row["machine"]])
  with open(RESULTS, "w", newline="") as file:
    writer = csv.DictWriter(file, FIELDS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def table(rows: list[dict[str, str]]) -> str:
  """A row for each program and machine, in Markdown."""
  lines = []
  for row in rows:
    cells = [row[name] for name in COLUMNS]
    if row["fits"] == "no":
      cells[0] = f"does not fit{row['gib'] and ': '}{row['gib']}"
    elif row["fits"] == "uneven":
      cells[0] = "batch not divisible"
    lines.append([f"{row['program']}, {int(row['batch']):,}", row["machine"], *cells])
  return tables.markdown(["program, batch", "machine", *COLUMNS.values()], lines)


def draw(rows: list[dict[str, str]]) -> None:
  """Draws FLOPs per byte against the ceiling of each chip."""
  figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
  intensity = [2**i for i in range(0, 12)]
  for name, style in {"v4": "-", "v5e": "--", "v6e": ":"}.items():
    chip = machines.CHIPS[name]
    ceiling = [min(chip.flops, chip.bandwidth * i) / 1e12 for i in intensity]
    axes.plot(intensity, ceiling, style, color="black", label=f"{name}, one chip")
  for i, row in enumerate(row for row in rows if row["machine"] == "v5e-256" and row["gb"]):
    x, chip = float(row["gflop"]) / float(row["gb"]), machines.CHIPS["v5e"]
    y = min(chip.flops, chip.bandwidth * x) / 1e12
    face, marker = ("none" if "_ioc" in row["program"] else "tab:blue"), "os^vDP"[i // 2 % 6]
    style = {"color": "tab:blue", "markerfacecolor": face, "linestyle": ""}
    axes.plot(x, y, marker, label=row["program"], **style)
  axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte (least effort: a lower bound)")
  axes.set_ylabel("Attainable TFLOP/s (bfloat16)")
  figure.legend(loc="outside right upper", fontsize=7)
  figure.savefig(FOLDER / "roofline.png", dpi=120)


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--programs", default=",".join(PROGRAMS))
  parser.add_argument("--machines", default=",".join(CORES))
  args = parser.parse_args()
  rows, decode, console = read(), decode_rates(), Console()
  known = {(row["program"], row["machine"]) for row in rows}
  wanted = [(p, m) for m in args.machines.split(",") for p in args.programs.split(",")]
  for pair in track([p for p in wanted if p not in known], "compiling", console=console):
    rows.append(row_of(*pair, decode))
    write(rows)
  draw(read())
  console.print(table(read()), soft_wrap=True)


if __name__ == "__main__":
  main()
