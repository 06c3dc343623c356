"""JPEG bytes to uint8 crops, on the host; pure functions of the bytes and a generator.

libjpeg-turbo decodes; in training at 1/2, 1/4 or 1/8 of the size where the crop is reduced by
as much anyway, which skips most of the inverse DCT. OpenCV resizes training crops, whose scale
is random; Pillow, which antialiases and is several times slower, resizes images for evaluation
and caches, and reads images that are not ordinary JPEGs.
"""

import contextlib
import io
from typing import Any

import cv2
import numpy as np
import PIL.Image
import simplejpeg

MAX_PIXELS = 2**27  # 400 MB decoded: larger than any real photograph.
RATIO = (3 / 4, 4 / 3)  # Width over height of a crop, before it is resized.
ATTEMPTS = 10  # At drawing a crop inside the image.
# Raised by the decoders for bad bytes; simplejpeg raises KeyError for a truncated header.
_ABOUT_BYTES = (ValueError, KeyError, OSError, SyntaxError, PIL.Image.DecompressionBombError)
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's, of 8 bits a channel, by channels.
FORMATS = ("JPEG", "PNG")  # Pillow has many more readers, one of which starts a program.
FINE, DAMAGED, UNREADABLE = 0, 1, 2  # Decoded; decoded in part; not at all.


class Unreadable(ValueError):
  """Bytes that are not an image, or an image of hostile size."""


def inception_crop(
  rng: np.random.Generator, height: int, width: int, area: tuple[float, float]
) -> tuple[int, int, int, int]:
  """(top, left, height, width) of a random crop (Szegedy et al. 2015, section 6).

  It covers a fraction of the area uniform in `area`, with an aspect ratio log-uniform in
  [3/4, 4/3]. If ten draws do not fit, the largest central crop with a ratio in that range.
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

  Raises `Unreadable` if the bytes cannot be decoded.
  """
  height, width = shape_of(data)
  top, left, h, w = inception_crop(rng, height, width, area)
  shrink = 1
  while shrink < 8 and min(h, w) >= 2 * shrink * size:
    shrink *= 2
  image, state = _decode(data, -(-height // shrink), -(-width // shrink), fast=True)
  down, right = image.shape[0] / height, image.shape[1] / width
  y, x = int(top * down), int(left * right)
  part = image[y : max(y + 1, round((top + h) * down)), x : max(x + 1, round((left + w) * right))]
  # Mostly reduced by less than 2 now, where linear interpolation skips no pixel.
  kind = cv2.INTER_LINEAR if min(part.shape[:2]) < 2 * size else cv2.INTER_AREA
  return cv2.resize(part, (size, size), interpolation=kind), state


def central_crop(data: bytes, size: int, share: float = 1.0) -> tuple[np.ndarray, int]:
  """The resized central square, and its state; for evaluation and caches.

  Its side is a fraction `share` of the shorter side: 0.875 corresponds to resizing to 256 px
  and cropping 224 px. Raises `Unreadable` if the bytes cannot be decoded.
  """
  height, width = shape_of(data)
  side = max(1, round(share * min(height, width)))
  top, left = (height - side) // 2, (width - side) // 2
  image, state = _decode(data, height, width, fast=False)
  part = PIL.Image.fromarray(image[top : top + side, left : left + side])
  return np.asarray(part.resize((size, size), PIL.Image.Resampling.BILINEAR)), state


def whole_image(data: bytes, shape: tuple[int, int, int]) -> np.ndarray:
  """The pixels of an image of `shape` (H, W, C); raises `Unreadable` for any other."""
  try:
    with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as image:
      channels = shape[2] if image.mode == "P" else len(image.getbands())  # Any: of colours.
      found = (image.height, image.width, channels)
      if found == shape and channels in MODES:
        return np.asarray(_in_8_bits(image, MODES[channels])).reshape(shape)
  except _ABOUT_BYTES as error:
    raise Unreadable(f"not a readable image: {error}") from error
  raise Unreadable(f"an image of {found} (height, width, channels); expected {shape}")


def shape_of(data: bytes) -> tuple[int, int]:
  """(height, width) from the header, the only part read; raises `Unreadable`."""
  try:
    if data[:2] == b"\xff\xd8":
      height, width = map(int, simplejpeg.decode_jpeg_header(data, strict=False)[:2])
    else:
      with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as image:
        width, height = image.size
  except _ABOUT_BYTES as error:
    raise Unreadable(str(error)) from error
  if not 0 < height * width <= MAX_PIXELS:
    raise Unreadable(f"{height} x {width} px; expected at most {MAX_PIXELS:,} pixels")
  return height, width


def _in_8_bits(image: PIL.Image.Image, mode: str) -> PIL.Image.Image:
  """The image in a mode of 8 bits a channel; transparency is ignored, as TensorFlow ignores it.

  Pillow itself clips grey of 16 bits at 255 (Pillow#3011).
  """
  if image.mode.startswith("I"):  # I;16, and I in some versions.
    grey = np.round(np.asarray(image, np.float64) * (255 / 65535)).clip(0, 255)
    image = PIL.Image.fromarray(grey.astype(np.uint8))
  image.info.pop("transparency", None)  # Of which Pillow would warn, for each palette.
  return image.convert(mode)


def _decode(data: bytes, height: int, width: int, fast: bool) -> tuple[np.ndarray, int]:
  """RGB pixels of at least this height and width, and the state of the image."""
  want: dict[str, Any] = dict(min_height=height, min_width=width, fastdct=fast, fastupsample=fast)
  with contextlib.suppress(*_ABOUT_BYTES):
    return simplejpeg.decode_jpeg(data, **want), FINE
  # CMYK, a PNG named JPEG, or damaged.
  with (
    contextlib.suppress(*_ABOUT_BYTES),
    PIL.Image.open(io.BytesIO(data), formats=FORMATS) as image,
  ):
    if image.format == "PNG" or image.mode == "CMYK":
      return np.asarray(_in_8_bits(image, "RGB")), FINE
  try:
    return simplejpeg.decode_jpeg(data, strict=False, **want), DAMAGED
  except _ABOUT_BYTES as error:
    raise Unreadable(str(error)) from error
