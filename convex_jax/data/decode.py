"""JPEG bytes to uint8 crops, on the host; pure functions of the bytes and a generator.

libjpeg-turbo decodes, in training at 1/2, 1/4 or 1/8 of the size where a crop is reduced by
as much (it skips most of the inverse DCT then); Pillow resizes, and reads what is no
ordinary JPEG.
"""

import io
from typing import Any

import numpy as np
import PIL.Image
import simplejpeg

MAX_PIXELS = 2**27  # 400 MB decoded: no photograph of a data set, but an attack on memory.
RATIO = (3 / 4, 4 / 3)  # Width over height of a crop, before it is resized.
ATTEMPTS = 10  # To draw a crop that lies inside the image.
# What the decoders raise about bytes; simplejpeg a KeyError where a header ends too soon.
_ABOUT_BYTES = (ValueError, KeyError, OSError, SyntaxError, PIL.Image.DecompressionBombError)
FORMATS = ("JPEG", "PNG")  # Of Pillow's many readers, of which one starts a program.
FINE, DAMAGED, UNREADABLE = 0, 1, 2  # As announced; recovered in part; replaced by another.


class Unreadable(ValueError):
  """Bytes that are no image, or one of hostile size."""


def inception_crop(
  rng: np.random.Generator, height: int, width: int, area: tuple[float, float]
) -> tuple[int, int, int, int]:
  """(top, left, height, width) of a random crop (Szegedy et al. 2015, section 6).

  A share of the image's area uniform in `area`, an aspect ratio log-uniform in 3/4 .. 4/3,
  anywhere inside; the largest central crop of an allowed ratio if ten draws do not fit.
  """
  for _ in range(ATTEMPTS):
    size = rng.uniform(*area) * height * width
    ratio = np.exp(rng.uniform(*np.log(RATIO)))
    w, h = round(np.sqrt(size * ratio)), round(np.sqrt(size / ratio))
    if 0 < w <= width and 0 < h <= height:
      return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
  w = min(width, max(1, round(height * RATIO[1])))
  h = min(height, max(1, round(width / RATIO[0])))
  return (height - h) // 2, (width - w) // 2, h, w


def random_crop(
  data: bytes, rng: np.random.Generator, size: int, area: tuple[float, float]
) -> tuple[np.ndarray, int]:
  """An `inception_crop` resized to (size, size, 3), and its state; for training.

  Raises:
    Unreadable: no image can be made of the bytes.
  """
  height, width = shape_of(data)
  top, left, h, w = inception_crop(rng, height, width, area)
  return _resized(data, (height, width), (top, left, h, w), size, reduce=True)


def central_crop(data: bytes, size: int, share: float = 1.0) -> tuple[np.ndarray, int]:
  """The central square of `share` of the shorter side, resized; for evaluation and caches.

  With share 0.875 what resizing to 256 and cropping 224 px gives. Raises `Unreadable`.
  """
  height, width = shape_of(data)
  side = max(1, round(share * min(height, width)))
  box = ((height - side) // 2, (width - side) // 2, side, side)
  return _resized(data, (height, width), box, size, reduce=False)


def shape_of(data: bytes) -> tuple[int, int]:
  """(height, width) from the header, which is all that is read; raises `Unreadable`."""
  try:
    if data[:2] == b"\xff\xd8":
      height, width = map(int, simplejpeg.decode_jpeg_header(data, strict=False)[:2])
    else:
      with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as image:
        width, height = image.size
  except _ABOUT_BYTES as error:
    raise Unreadable(str(error)) from error
  if not 0 < height * width <= MAX_PIXELS:
    raise Unreadable(f"{height} x {width} px; allowed: up to {MAX_PIXELS:,} in all")
  return height, width


def _resized(data, shape, box, size, reduce) -> tuple[np.ndarray, int]:
  """The box of an image of this shape, resized to (size, size, 3)."""
  (height, width), (top, left, h, w) = shape, box
  shrink = 1
  while reduce and shrink < 8 and min(h, w) >= 2 * shrink * size:
    shrink *= 2
  image, state = _decode(data, -(-height // shrink), -(-width // shrink), fast=reduce)
  down, right = image.shape[0] / height, image.shape[1] / width
  y0, x0, y1, x1 = top * down, left * right, (top + h) * down, (left + w) * right
  y, x = int(y0), int(x0)  # Pillow copies what it is given: the crop alone, and its edges within.
  part = np.ascontiguousarray(image[y : int(np.ceil(y1)), x : int(np.ceil(x1))])
  edges = (x0 - x, y0 - y, min(x1 - x, part.shape[1]), min(y1 - y, part.shape[0]))
  # The mean over what falls together is faster than a triangle filter, and as good in training.
  mean = reduce and min(y1 - y0, x1 - x0) > size
  kind = PIL.Image.Resampling.BOX if mean else PIL.Image.Resampling.BILINEAR
  resized = PIL.Image.fromarray(part).resize((size, size), kind, box=edges)
  return np.asarray(resized), state


def _decode(data: bytes, height: int, width: int, fast: bool) -> tuple[np.ndarray, int]:
  """RGB pixels of at least this height and width."""
  want: dict[str, Any] = dict(min_height=height, min_width=width, fastdct=fast, fastupsample=fast)
  try:
    return simplejpeg.decode_jpeg(data, **want), FINE
  except _ABOUT_BYTES:  # CMYK, PNG under another name, or damaged.
    pass
  try:
    with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as image:
      if image.format == "PNG" or image.mode == "CMYK":
        return np.asarray(image.convert("RGB")), FINE
  except _ABOUT_BYTES:
    pass
  try:
    return simplejpeg.decode_jpeg(data, strict=False, **want), DAMAGED
  except _ABOUT_BYTES as error:
    raise Unreadable(str(error)) from error
