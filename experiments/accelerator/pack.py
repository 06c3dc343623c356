"""Packs what a bare machine without a network lacks: wheels, and CIFAR-10 as it is prepared.

    python -m experiments.accelerator.pack --out=FOLDER [--data_dir=FOLDER] \
        [--installed=packages.txt] [--python=3.12] [--part_mib=50]

`packages.txt` is what `python3 -m pip list --format=freeze` printed on that machine; what it names
is left out, and everything else is chosen to fit it. Writes pack.000, pack.001, ... of at most so
many MiB, with their checksums in pack.sha256, and says what to type. Needs uv, as `make lock`.
"""

import argparse
import configparser
import hashlib
import io
import pathlib
import re
import subprocess
import sys
import tarfile
import tempfile

from convex_jax import command_line
from convex_jax.data import datasets

ROOT = pathlib.Path(__file__).parents[2]
EXTRAS = ("train", "report")
TESTS = ("pytest", "pytest-xdist")  # Of the extra `test`.
GLIBC = (28, 27, 26, 24, 17, 12, 5)  # manylinux_2_N: pip matches each exactly.
TAGS = [f"manylinux_2_{minor}_x86_64" for minor in GLIBC] + ["manylinux2014_x86_64"]
TAGS += ["manylinux2010_x86_64", "manylinux1_x86_64"]


def canonical(name: str) -> str:
  return re.sub(r"[-_.]+", "-", name).lower()


def name_of(requirement: str) -> str:
  return canonical(re.match(r"[\w.-]+", requirement)[0])


def requirements() -> list[str]:
  """What the measurements need, from setup.cfg."""
  setup = configparser.ConfigParser(inline_comment_prefixes=("#",))
  setup.read(ROOT / "setup.cfg")
  extras = setup["options.extras_require"]
  found = [line for extra in EXTRAS for line in extras[extra].split("\n")]
  found += setup["options"]["install_requires"].split("\n")
  found += [line for line in extras["test"].split("\n") if line and name_of(line) in TESTS]
  return [line.strip() for line in found if line.strip() and name_of(line) != "convex-jax"]


def pins(installed: list[str], python: str) -> list[str]:
  """NAME==VERSION of everything that is needed and not installed."""
  with tempfile.TemporaryDirectory() as folder:
    needed, fixed = pathlib.Path(folder) / "needed.in", pathlib.Path(folder) / "fixed.txt"
    needed.write_text("\n".join(requirements()))
    fixed.write_text("\n".join(line for line in installed if "==" in line and "+" not in line))
    command = ["uv", "pip", "compile", str(needed), "--constraint", str(fixed), "--quiet"]
    command += ["--python-version", python, "--python-platform", "x86_64-manylinux_2_28"]
    command += ["--no-header", "--no-annotate"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
  there = {name_of(line) for line in installed}
  return [line for line in text.split() if name_of(line) not in there]


def fetch(pin: str, folder: pathlib.Path, python: str) -> None:
  """Downloads the wheel of a pin; builds it where there is none, if it is pure Python."""
  pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
  options = [f"--python-version={python}", *(f"--platform={tag}" for tag in TAGS)]
  options += ["--implementation=cp", "--only-binary=:all:", "--no-deps", f"--dest={folder}"]
  if subprocess.run([*pip, "download", *options, pin], capture_output=True).returncode == 0:
    return
  before = {*folder.iterdir()}
  subprocess.run([*pip, "wheel", "--no-deps", f"--wheel-dir={folder}", pin], check=True)
  if other := [p.name for p in {*folder.iterdir()} - before if not p.name.endswith("-any.whl")]:
    raise SystemExit(f"{other[0]} was built for this machine alone; there is no wheel of {pin}")


class Parts(io.RawIOBase):
  """Writes a stream into files of at most `size` bytes, with their checksums."""

  def __init__(self, folder: pathlib.Path, size: int):
    self._folder, self._size, self._part, self._sums = folder, size, bytearray(), []

  def writable(self) -> bool:
    return True

  def write(self, data) -> int:
    self._part += data
    while len(self._part) >= self._size:
      self._flush_part(self._size)
    return len(data)

  def _flush_part(self, size: int) -> None:
    name, content = f"pack.{len(self._sums):03}", bytes(self._part[:size])
    del self._part[:size]
    (self._folder / name).write_bytes(content)
    self._sums.append(f"{hashlib.sha256(content).hexdigest()}  {name}")

  def close(self) -> None:
    if not self.closed:
      if self._part:
        self._flush_part(len(self._part))
      (self._folder / "pack.sha256").write_text("\n".join(self._sums) + "\n")
    super().close()


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--out", type=pathlib.Path, required=True)
  parser.add_argument("--data_dir", default="", help="folder of CIFAR-10 (default: TFDS's)")
  parser.add_argument("--dataset", default="cifar10")
  parser.add_argument("--installed", type=pathlib.Path, help="pip list --format=freeze, there")
  parser.add_argument("--python", default="3.12", help="its version there")
  parser.add_argument("--part_mib", type=float, default=50)
  args = parser.parse_args()
  args.out.mkdir(parents=True, exist_ok=True)
  data = pathlib.Path(str(datasets.open_prepared(args.dataset, args.data_dir).data_dir))
  installed = args.installed.read_text().split() if args.installed else []
  with tempfile.TemporaryDirectory() as folder:
    wheels = pathlib.Path(folder) / "wheels"
    wheels.mkdir()
    for pin in pins(installed, args.python):
      fetch(pin, wheels, args.python)
      print(pin, flush=True)
    with (
      Parts(args.out, int(args.part_mib * 2**20)) as parts,
      tarfile.open(fileobj=parts, mode="w|") as archive,
    ):
      archive.add(wheels, "wheels")
      archive.add(data, f"data/{args.dataset}/{data.name}")
  count = len(list(args.out.glob("pack.[0-9]*")))
  print(
    f"\n{count} parts in {args.out}. On the machine, in a checkout of this project, with the parts"
    "\nand pack.sha256 in one folder:\n\n"
    "  python3 experiments/accelerator/unpack.py FOLDER --to=/tmp/packed\n"
  )


if __name__ == "__main__":
  sys.exit(command_line.exit_code(main))
