"""Unpacks on a bare machine what `pack.py` packed: `python3 unpack.py FOLDER --to=FOLDER`.

Needs the standard library and pip alone. Parts may arrive one by one: it says which are missing.
"""

import argparse
import hashlib
import io
import pathlib
import subprocess
import sys
import tarfile


class Parts(io.RawIOBase):
  """The parts, read one after the other."""

  def __init__(self, paths):
    self._files = [open(path, "rb") for path in paths]  # noqa: SIM115

  def readable(self):
    return True

  def readinto(self, buffer):
    while self._files:
      if count := self._files[0].readinto(buffer):
        return count
      self._files.pop(0).close()
    return 0


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("folder", type=pathlib.Path, help="of the parts and pack.sha256")
  parser.add_argument("--to", type=pathlib.Path, required=True)
  args = parser.parse_args()
  args.to = args.to.absolute()
  lines = (args.folder / "pack.sha256").read_text().splitlines()
  sums = {name: checksum for checksum, name in (line.split() for line in lines)}
  if missing := [name for name in sums if not (args.folder / name).exists()]:
    sys.exit(f"still missing in {args.folder}: {', '.join(missing)}")
  for name, checksum in sums.items():
    if hashlib.sha256((args.folder / name).read_bytes()).hexdigest() != checksum:
      sys.exit(f"{args.folder / name} is damaged: copy it again")
  with tarfile.open(fileobj=Parts(args.folder / name for name in sums), mode="r|") as archive:
    safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Since Python 3.11.4.
    archive.extractall(args.to, **safe)
  site = args.to / "site"
  if wheels := sorted(map(str, (args.to / "wheels").glob("*.whl"))):
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    options = ["--no-compile", "--no-cache-dir", "--upgrade", f"--target={site}"]
    subprocess.run([*pip, *options, *wheels], check=True)
  print(
    f"PYTHONPATH={site} {sys.executable} -m experiments.accelerator.run --minutes=13"
    f" --out=results --data_dir={args.to / 'data'}"
  )


if __name__ == "__main__":
  main()
