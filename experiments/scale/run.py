"""What a training step asks of a machine, and what limits it.

    python -m experiments.scale.run [--programs=mixer,densenet_ioc] [--machines=v5e-256]
        [--forms=native]

Compiles the training program of each imagenet2012 config (its published recipe, bfloat16) for each
machine by that machine's own compiler (`pip install 'convex_jax[aot]'`), and takes memory, FLOPs,
bytes and collectives from it. With peak rates they give the time of a step by each resource.
Each program is compiled in two forms: `native`, as it runs there, and `cpu`, in the forms that suit
a CPU's compiler, which all machines had before.

Writes compiled.csv next to this file, a row after each program; what is there already is not
compiled again, so that the command resumes where it stopped. Delete rows to have them again.
"""

import argparse
import contextlib
import csv
import pathlib
import sys
from collections.abc import Iterator
from unittest import mock

from convex_jax.training import machines

machines.prepare_process("v5e-8")  # Before JAX is imported.

import jax  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import track  # noqa: E402

from convex_jax import command_line  # noqa: E402
from convex_jax import mesh as meshes  # noqa: E402
from convex_jax.errors import UserError  # noqa: E402
from convex_jax.studies import tables  # noqa: E402
from convex_jax.training import compile_ahead, loading  # noqa: E402

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
FORMS = ("native", "cpu")


@contextlib.contextmanager
def cpu_forms() -> Iterator[None]:
  """In it programs are traced in the forms for a CPU's compiler, whatever their mesh.

  What asks for the platform of the mesh (convolutions, gradients computed once, skipped updates),
  and what is chosen when a program is lowered (RandAugment).
  """
  target = meshes.target

  def as_cpu():
    return "cpu", target()[1]

  def by_default(*args, default, **_):
    return default(*args)

  with (
    mock.patch.object(meshes, "target", as_cpu),
    mock.patch.object(jax.lax, "platform_dependent", by_default),
  ):
    yield


def decode_rates() -> dict[int, float]:
  """Images per second and core, by size, as `experiments.input` measured them (2 cores)."""
  with open(FOLDER.parent / "input" / "results.csv") as file:
    rows = [row for row in csv.DictReader(file) if row["way"] == "stream, 2 threads"]
  return {int(row["px"]): float(row["images_per_second"]) / 2 for row in rows}


def row_of(name: str, machine: str, forms: str, decode: dict[int, float]) -> dict[str, str]:
  """What a machine's compiler says of a program; times are milliseconds by each resource alone."""
  config = loading.load_config(PROGRAMS[name], ["--config.dtype=bfloat16"])
  row = {"program": name, "machine": machine, "forms": forms, "batch": str(config.batch_size)}
  try:
    with cpu_forms() if forms == "cpu" else contextlib.nullcontext():
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
FIELDS = ["program", "machine", "forms", "batch", "fits", "seconds", *COLUMNS, "about_ms", "why"]


def read() -> list[dict[str, str]]:
  if not RESULTS.exists():
    return []
  with open(RESULTS, newline="") as file:
    return list(csv.DictReader(file))


def write(rows: list[dict[str, str]]) -> None:
  orders = {"program": [*PROGRAMS], "machine": [*CORES], "forms": FORMS}
  rows = sorted(rows, key=lambda row: [order.index(row[key]) for key, order in orders.items()])
  with open(RESULTS, "w", newline="") as file:
    writer = csv.DictWriter(file, FIELDS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def table(rows: list[dict[str, str]]) -> str:
  """A row for each program and machine, in Markdown."""
  lines = []
  for row in rows:
    if row["forms"] == "native":
      cells = [_plain(row[name]) for name in COLUMNS if name != "gib"]
      lines.append([*_named(row), _fit(row), *cells])
  return tables.markdown(["program, batch", "machine", *COLUMNS.values()], lines)


def overview(rows: list[dict[str, str]]) -> str:
  """A row for each program: GiB and about the milliseconds of a step, on each machine."""
  found: dict[str, dict[str, str]] = {}
  for row in rows:
    if row["forms"] == "native":
      name, machine = _named(row)
      about = f" GiB, {float(row['about_ms']):.3g} ms" if row["about_ms"] else ""
      found.setdefault(name, {})[machine] = _fit(row) + about
  machines = list(dict.fromkeys(row["machine"] for row in rows))
  lines = [[name, *(cells.get(each, "") for each in machines)] for name, cells in found.items()]
  return tables.markdown(["program, batch", *machines], lines)


def changes(rows: list[dict[str, str]]) -> str:
  """GB and the best possible milliseconds of a step, before native forms and with them."""
  found = {(row["program"], row["machine"], row["forms"]): row for row in rows}
  lines = []
  for row in rows:
    before = found.get((row["program"], row["machine"], "cpu"))
    if row["forms"] == "native" and before is not None and row["fits"] != "uneven":
      both = (before, row)
      lines.append([
        *_named(row),
        *[_plain(each["gb"]) or _fit(each) for each in both],
        *[_plain(_device_ms(each)) for each in both],
      ])  # fmt: skip
  header = ["GB per device, before", "after", "about ms per step, before", "after"]
  return tables.markdown(["program, batch", "machine", *header], lines)


def _named(row: dict[str, str]) -> list[str]:
  return [f"{row['program']}, {int(row['batch']):,}", row["machine"]]


def _plain(text: str) -> str:
  """A large number with thousands separators, and without an exponent."""
  try:
    number = float(text)
  except ValueError:
    return text
  return f"{number:,.0f}" if number >= 1000 else text


def _fit(row: dict[str, str]) -> str:
  """GiB per device, or why there is none."""
  if row["fits"] == "uneven":
    return "batch not divisible"
  return row["gib"] if row["fits"] == "yes" else f"does not fit{row['gib'] and ': '}{row['gib']}"


def _device_ms(row: dict[str, str]) -> str:
  """Of a step, without the host."""
  times = [row[f"{name}_ms"] for name in ("arithmetic", "memory", "links")]
  return max(times, key=float) if all(times) else ""


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--programs", default=",".join(PROGRAMS))
  parser.add_argument("--machines", default=",".join(CORES))
  parser.add_argument("--forms", default=",".join(FORMS))
  args = parser.parse_args()
  for given, known in ((args.programs, PROGRAMS), (args.machines, CORES), (args.forms, FORMS)):
    if unknown := set(given.split(",")) - set(known):
      parser.error(f"unknown: {', '.join(unknown)}; expected some of {', '.join(known)}")
  rows, decode, console = read(), decode_rates(), Console()
  known = {(row["program"], row["machine"], row["forms"]) for row in rows}
  wanted = [
    (p, m, f)
    for f in args.forms.split(",")
    for m in args.machines.split(",")
    for p in args.programs.split(",")
  ]
  for each in track([w for w in wanted if w not in known], "compiling", console=console):
    rows.append(row_of(*each, decode))
    write(rows)
  for text in (table(read()), changes(read())):
    console.print(text, soft_wrap=True)


if __name__ == "__main__":
  sys.exit(command_line.exit_code(main))
