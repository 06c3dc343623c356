"""Converts TFDS's TFRecord folders, which most labs have, to array_record, without TensorFlow.

A TFRecord shard is a sequence of records: length (8 bytes), its checksum (4), the record, its
checksum (4), all little-endian; checksums are CRC-32C, masked (tensorflow.org/tutorials/
load_data/tfrecord). The records themselves are copied unchanged.
"""

import json
import os
import shutil
import struct
from collections.abc import Iterator
from typing import Any

import google_crc32c
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

from convex_jax.errors import UserError
from convex_jax.progress import track


def masked(data: bytes) -> int:
  """The masked CRC-32C of TFRecords: rotated by 15 bits, plus a constant."""
  crc = google_crc32c.value(data)
  return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def records_of(path: str) -> Iterator[bytes]:
  """The records of a TFRecord shard; raises `UserError` at the first damaged one."""
  with open(path, "rb") as file:
    end, start = os.path.getsize(path), 0
    while head := file.read(12):
      size, crc = struct.unpack("<QI", head) if len(head) == 12 else (0, None)
      # Checked before memory is allocated: a damaged length can be any number.
      intact = crc == masked(head[:8]) and start + 16 + size <= end
      data = file.read(size) if intact else b""
      if not intact or struct.unpack("<I", file.read(4))[0] != masked(data):
        raise UserError(f"{path} is damaged at byte {start:,}. Fetch or prepare it again")
      yield data
      start += 16 + size


def convert(source: str, target: str) -> str:
  """Copies the prepared folder `source` to `target` in array_record format; returns a message.

  An interrupted command resumes at the first missing shard; `target` appears only when it is
  complete. Raises `UserError` where `source` is damaged or not a TFRecord folder of TFDS.
  """
  about = _about(source)
  if os.path.exists(target):
    return f"{target} already exists"
  partial = target.rstrip("/") + ".partial"
  os.makedirs(partial, exist_ok=True)
  shards = [shard for split in about["splits"] for shard in _shards(about["name"], split)]
  need = sum(os.path.getsize(os.path.join(source, old)) for old, _, _ in shards)
  free = shutil.disk_usage(partial).free
  done = sum(os.path.getsize(entry.path) for entry in os.scandir(partial))
  if need - done > free:
    raise UserError(
      f"{target} needs {need / 1e9:.1f} GB and has {free / 1e9:.1f} GB free. Make room"
    )
  for old, new, count in track(shards, f"converting {about['name']}"):
    _convert_shard(os.path.join(source, old), os.path.join(partial, new), count)
  for name in os.listdir(source):
    path = os.path.join(source, name)  # A subfolder is a cache: it is not copied.
    if os.path.isfile(path) and "tfrecord" not in name and name != "dataset_info.json":
      shutil.copy(path, partial)
  about["fileFormat"] = "array_record"
  for split in about["splits"]:
    split["filepathTemplate"] = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
  with open(os.path.join(partial, "dataset_info.json"), "w") as file:
    json.dump(about, file, indent=2)
  os.rename(partial, target)
  return f"{len(shards)} shards in {target}"


def _about(source: str) -> dict[str, Any]:
  path = os.path.join(source, "dataset_info.json")
  try:
    with open(path) as file:
      about = json.load(file)
    found = about.get("fileFormat", "tfrecord")
  except (OSError, ValueError, AttributeError) as error:
    raise UserError(f"{source} is not a folder prepared by TFDS: {path}: {error}") from error
  if found != "tfrecord":
    raise UserError(f"{source} is in {found} format; expected tfrecord")
  return about


def _shards(dataset: str, split: dict[str, Any]) -> Iterator[tuple[str, str, int]]:
  """(TFRecord file, array_record file, number of examples) of each shard of a split."""
  counts = [int(n) for n in split["shardLengths"]]
  template = split.get("filepathTemplate", "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}")
  for i, count in enumerate(counts):
    place = f"{i:05}-of-{len(counts):05}"
    parts = {"DATASET": dataset, "SPLIT": split["name"], "SHARD_X_OF_Y": place}
    old = template
    for key, value in {**parts, "FILEFORMAT": "tfrecord"}.items():
      old = old.replace("{" + key + "}", value)
    if os.path.basename(old) != old or "{" in old:
      raise UserError(f"Split {split['name']!r} has files named {template!r}, an unknown pattern")
    yield old, f"{dataset}-{split['name']}.array_record-{place}", count


def _convert_shard(old: str, new: str, count: int) -> None:
  if os.path.exists(new):
    return
  writer = array_record_module.ArrayRecordWriter(new + ".tmp", "group_size:1")
  written = 0
  try:
    for record in records_of(old):
      writer.write(record)
      written += 1
  except OSError as error:
    raise UserError(f"{old} cannot be read: {error}") from error
  finally:
    writer.close()
  if written != count:
    raise UserError(f"{old} has {written:,} records; dataset_info.json says {count:,}")
  os.rename(new + ".tmp", new)
