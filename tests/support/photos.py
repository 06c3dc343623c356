"""A small ImageNet in its official archives: photographs of many sizes and formats."""

import hashlib
import io
import struct
import tarfile
import zlib

import numpy as np
import PIL.Image

CLASSES = ("n01440764", "n01443537")  # The first two of ImageNet.


def encoded(image: PIL.Image.Image, form: str = "JPEG", **options) -> bytes:
  file = io.BytesIO()
  image.save(file, form, **options)
  return file.getvalue()


def photo(rng, height: int, width: int) -> PIL.Image.Image:
  """Smooth colours, so that every resampling agrees on them."""
  coarse = rng.integers(0, 256, (4, 4, 3)).astype(np.uint8)
  return PIL.Image.fromarray(coarse).resize((width, height), PIL.Image.Resampling.BICUBIC)


def odd(rng) -> dict[str, bytes]:
  """Images that are not ordinary photographs, by kind."""
  image = photo(rng, 60, 80)
  whole = encoded(image, quality=95)
  return {
    "grey": encoded(image.convert("L")),
    "cmyk": encoded(image.convert("CMYK")),
    "png": encoded(image, "PNG"),
    "tiny": encoded(image.resize((1, 1))),
    "progressive": encoded(image, progressive=True),
    "cut": whole[: len(whole) // 2],
    "garbage": b"no image at all",
    "empty": b"",
    "header": whole[:20],
  }


def png(values: np.ndarray, depth: int, kind: int, extra: bytes = b"") -> bytes:
  """A PNG of whole numbers (H, W, channels), `depth` bits each, of a colour type of its standard.

  Types: 0 grey, 2 colour, 3 palette, 4 grey with alpha, 6 colour with alpha; Pillow does not
  write most of them in 16 bits.
  """
  height, width, _ = values.shape
  bits = (values.reshape(height, -1, 1) >> np.arange(depth)[::-1]) & 1
  rows = np.packbits(bits.reshape(height, -1).astype(np.uint8), axis=1)
  head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
  body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
  parts = [(b"IHDR", head), (b"", extra), (b"IDAT", body), (b"IEND", b"")]
  return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*p) if p[0] else p[1] for p in parts)


def chunk(name: bytes, content: bytes) -> bytes:
  """A chunk of a PNG: its length, name, content and checksum."""
  check = struct.pack(">I", zlib.crc32(name + content))
  return struct.pack(">I", len(content)) + name + content + check


def write_archives(folder, train: int, val: int, broken: int = 0) -> None:
  """Writes both archives of ImageNet 2012; the first `broken` training images are unreadable."""
  rng = np.random.default_rng(0)

  def add(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))

  with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as outer:
    for k, label in enumerate(CLASSES):
      inner = io.BytesIO()
      with tarfile.open(fileobj=inner, mode="w") as tar:
        for i in range(k, train, 2):
          content = encoded(photo(rng, *rng.integers(20, 120, 2)))
          add(tar, f"{label}_{i}.JPEG", b"broken" if i < broken else content)
      add(outer, f"{label}.tar", inner.getvalue())
  with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as tar:
    for i in range(val):
      content = encoded(photo(rng, *rng.integers(20, 120, 2)))
      add(tar, f"ILSVRC2012_val_{i + 1:08}.JPEG", content)


def official_archives(builder):
  """The sizes and checksums of the small archives, in place of the official ones."""
  found = {}
  for name in ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"):
    content = (official_archives.folder / name).read_bytes()
    found[name] = (len(content), hashlib.sha256(content).hexdigest())
  return found
