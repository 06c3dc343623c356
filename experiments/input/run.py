"""How fast photographs reach the devices: streamed, from a cache, and from tf.data.

    python -m experiments.input.run [--data_dir=FOLDER] [--rounds=5] [--cores=2]

Reads a prepared imagenet2012, whose JPEGs have their natural sizes. All methods take turns in one
process tree on the same cores; rates are medians over the rounds. The yardstick is simplejpeg
decoding whole images, and nothing else, on one core. tf.data is measured if TensorFlow is
installed. Writes results.csv next to this file.
"""

import argparse
import atexit
import concurrent.futures
import csv
import importlib.util
import multiprocessing
import os
import pathlib
import statistics
import sys
import tempfile
import time

import jax
import numpy as np
import simplejpeg

from configs import base
from convex_jax import command_line, mesh
from convex_jax.data import datasets
from convex_jax.data.batches import batches_of
from convex_jax.data.in_memory import InMemory
from convex_jax.data.photos.records import Records
from convex_jax.data.splits import Split

FOLDER = pathlib.Path(__file__).parent
BATCH = 256
IMAGES = 4096  # Per round and method.
RECORDS_OF_CACHE = 40_000  # More than a processor's caches hold.
held: list[bytes] = []  # In a worker.
FILLED = 1024  # Images that may be ready when a method's turn comes: not counted.


def config_of(data_dir, size, workers):
  config = base.get_config().data
  config.name, config.dir, config.loader = "imagenet2012", data_dir, "stream"
  config.image_size, config.workers = size, workers
  return config


def hold(encoded) -> None:
  """Keeps the images of a worker, which are sent once."""
  global held
  held = encoded


def decode_held(_) -> int:
  """Decodes the images of a worker."""
  return decode_whole(held)


def decode_whole(encoded) -> int:
  """Decodes images and nothing else."""
  for i in range(IMAGES // 4):
    simplejpeg.decode_jpeg(encoded[i % len(encoded)])
  return IMAGES // 4


def plain(records: Records, cores: int):
  """Decodes whole images in memory, on several cores simultaneously."""
  encoded = [bytes(records.read(i)["image"]) for i in range(min(len(records), 512))]
  if cores == 1:
    return lambda _: decode_whole(encoded)
  spawn = multiprocessing.get_context("spawn")
  pool = concurrent.futures.ProcessPoolExecutor(cores, spawn, hold, (encoded,))
  atexit.register(pool.shutdown)
  return lambda _: sum(pool.map(decode_held, range(cores)))


def turns_of(batches):
  """Takes batches onto the device, in training order."""
  state = {"step": 0}

  def take(images):
    for _ in range(images // BATCH):
      step = state["step"]
      plan = batches.train_plan(range(step, step + 1), BATCH, seed=0)
      jax.block_until_ready(plan)
      state["step"] = step + 1
    return images

  def turn(warm):
    return take(FILLED if warm else IMAGES)

  return turn


def cached(size):
  """Reads a memory-mapped file of decoded images, as `data cache` writes it."""
  folder = tempfile.TemporaryDirectory()
  atexit.register(folder.cleanup)
  path = os.path.join(folder.name, "images.npy")
  shape = (RECORDS_OF_CACHE, size, size, 3)
  images = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
  images[:] = np.random.default_rng(0).integers(0, 256, shape[1:], np.uint8)
  images.flush()
  split = Split(np.load(path, mmap_mode="r"), np.zeros(RECORDS_OF_CACHE, np.int32))
  return turns_of(InMemory(split, mesh.make_mesh(), resident=False))


def tf_data(records: Records, size, cores):
  """Random crops decoded, resized and batched by TensorFlow; records already in memory."""
  import tensorflow as tf

  encoded = [records.read(i)["image"] for i in range(len(records))]

  def crop(content):
    shape = tf.io.extract_jpeg_shape(content)
    start, extent, _ = tf.image.sample_distorted_bounding_box(
      shape,
      tf.zeros([1, 0, 4]),
      area_range=(0.08, 1.0),
      aspect_ratio_range=(3 / 4, 4 / 3),
      use_image_if_no_bounding_boxes=True,
    )
    window = tf.concat([start[:2], extent[:2]], 0)
    image = tf.io.decode_and_crop_jpeg(content, window, channels=3)
    return tf.cast(tf.image.resize(image, (size, size)), tf.uint8)

  options = tf.data.Options()
  options.threading.private_threadpool_size = cores
  ways = tf.data.Dataset.from_tensor_slices(encoded).shuffle(len(encoded)).repeat()
  ways = ways.map(crop, num_parallel_calls=cores).batch(BATCH).prefetch(2).with_options(options)
  batches = ways.as_numpy_iterator()

  def turn(warm):
    images = FILLED if warm else IMAGES
    for _ in range(images // BATCH):
      jax.block_until_ready(jax.device_put(next(batches)))
    return images

  return turn


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--data_dir", default="")
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--cores", type=int, default=os.cpu_count())
  args = parser.parse_args()
  ways, opened, records = {}, [], None
  for size in (72, 224):
    config = config_of(args.data_dir, size, args.cores)
    records = datasets.load(config, 0, progress=False).train
    for workers, name in ((args.cores, "processes"), (0, "threads")):
      batches = batches_of(records, mesh.make_mesh(), config_of(args.data_dir, size, workers))
      opened.append(batches)
      ways[f"stream, {args.cores} {name}", size] = turns_of(batches)
    if importlib.util.find_spec("tensorflow"):
      ways["tf.data", size] = tf_data(records, size, args.cores)
  ways["cache, host memory", 80] = cached(80)
  ways["simplejpeg, one core, whole images", 0] = plain(records, 1)
  ways[f"simplejpeg, {args.cores} cores, whole images", 0] = plain(records, args.cores)
  rates = {way: [] for way in ways}
  for _ in range(args.rounds):
    for way, turn in ways.items():
      turn(True)  # Use up what is ready.
      start = time.perf_counter()
      images = turn(False)
      rates[way].append(images / (time.perf_counter() - start))
      time.sleep(2)  # The workers fill their queues again.
  yardstick = statistics.median(rates["simplejpeg, one core, whole images", 0])
  rows = [["way", "px", "images_per_second", "of_yardstick_times_cores"]]
  for (name, size), found in rates.items():
    rate = statistics.median(found)
    rows.append([name, size or "natural", f"{rate:.0f}", f"{rate / yardstick / args.cores:.3f}"])
    print(*rows[-1])
  with open(FOLDER / "results.csv", "w", newline="") as file:
    csv.writer(file).writerows(rows)
  for batches in opened:
    batches.close()


if __name__ == "__main__":
  sys.exit(command_line.exit_code(main))
