"""Faults of what a run is given, and of its numbers, injected in this process: see `injections`."""

import contextlib
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

import convex_jax
from configs import base, mixer_ioc
from convex_jax import mesh
from convex_jax.data import augment, datasets, prepare
from convex_jax.data.photos import decode, stream
from convex_jax.errors import Diverged, UserError
from convex_jax.models import catalog
from convex_jax.proof import certify
from convex_jax.runs import checkpoints, manifest
from convex_jax.runs.workdir import Workdir
from convex_jax.training import loop, optimizer, program, schema
from convex_jax.training import step as steps
from tests.support import PATIENCE, ROOT, mutants, photos
from tests.support.injections import Result, killed_at_the_end, refusal


def tiny_config(data_dir: str, **changes: Any) -> Any:
  """A convex Mixer of a few hundred weights on digits; `optimizer__name="sgd"` changes a key."""
  config = mixer_ioc.get_config("digits")
  config.update(batch_size=16, steps=20, ema_decay=0.9)
  config.model.update(size="tiny", patch=4, depth=1)
  config.data.update(dir=data_dir, train_fraction=0.2)
  config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
  return config


# Numbers.


@contextlib.contextmanager
def poisoned(config: Any, bad: list[int], factor: float) -> Iterator[None]:
  """The images of the `bad` steps are no numbers; or their loss is `factor` times as large."""
  train_key = jax.random.split(jax.random.key(config.seed))[1]
  keys = [jax.random.fold_in(jax.random.fold_in(train_key, steps._MIX), i) for i in bad]
  of_bad = jnp.stack([jax.random.key_data(key) for key in keys])

  def make_mix(*_):
    def mix(key, images, targets):
      is_bad = (jax.random.key_data(key) == of_bad).all(-1).any()
      times = jnp.where(is_bad, factor, 1.0)
      return (images, times * targets) if np.isfinite(factor) else (times * images, targets)

    return mix

  with mock.patch.object(augment, "make_mix", make_mix):
    yield


def skipped_alone(
  config: Any, examples: datasets.Data, bad: list[int], count: int
) -> Iterator[tuple[int, bool]]:
  """(step, whether it changed nothing but the step, and was counted) of each bad step.

  The others must change the weights and not be counted; else none counts.
  """
  job = program.Program(config, examples, mesh.make_mesh(jax.devices()[:1]))
  state, fine, others = job.init(), {}, True
  for i in range(count):
    before = jax.device_get(state).replace(step=0)
    state, measured = job.train_call(state, job.batches(range(i, i + 1)))
    after = jax.device_get(state)
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after.replace(step=0)), strict=True)
    same = all(np.array_equal(a, b) for a, b in pairs)
    if i in bad:
      fine[i] = same and bool(measured["skipped"]) and int(after.step) == i + 1
    else:
      others &= not same and not measured["skipped"]
  for i, survived in fine.items():
    yield i, survived and others


def bad_batches(data_dir: str, folder: pathlib.Path, n: int, streaks: int) -> Result:
  """`n` batches of NaN, each alone, then `streaks` runs with five in a row, four allowed."""
  rng, result = random.Random(0), Result()
  bad = sorted(rng.sample(range(3 * n), n))
  config = tiny_config(data_dir, steps=3 * n)
  examples = datasets.load(config.data, 0, progress=False)
  with poisoned(config, bad, np.nan):
    for _, survived in skipped_alone(config, examples, bad, 3 * n):
      result.add(survived)
  for i in range(streaks):
    config = tiny_config(data_dir, max_skipped=5, seed=i)
    config.checkpoint.every_steps = 3
    first, workdir = rng.randint(4, 12), str(folder / f"streak_{i}")
    with poisoned(config, list(range(first, first + 5)), np.nan):
      try:
        loop.run(config, workdir)
        result.add(False, note="went on")
      except Diverged as diverged:
        run = convex_jax.load(workdir)
        finite = all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(run.params))
        told = f"(last: step {first + 5}, loss nan" in str(diverged)
        result.add(finite and told and diverged.code == 3 and run.step > 0, note=str(diverged))
  return result


def spikes(data_dir: str, n: int) -> Result:
  """`n` batches of a hundredfold loss, skipped as asked."""
  rng, result = random.Random(1), Result()
  bad = sorted(rng.sample(range(60, 60 + 4 * n), n))
  config = tiny_config(data_dir, skip_spikes=6.0, optimizer__learning_rate=1e-4)
  config.steps = 60 + 4 * n
  examples = datasets.load(config.data, 0, progress=False)
  with poisoned(config, bad, 100.0):
    for _, survived in skipped_alone(config, examples, bad, config.steps):
      result.add(survived)
  return result


def constrained_updates(n: int) -> Result:
  """Every optimizer, dtype and accumulation: no constrained weight below 0 after any update."""
  result, constraints = Result(), {"kernel": "clamp", "head": "shift", "free": "free"}
  kinds = [
    (name, dtype, accumulate, decay)
    for name in optimizer.OPTIMIZERS
    for dtype in (jnp.float32, jnp.bfloat16)
    for accumulate in (1, 2)
    for decay in ((0.0, 0.1) if name != "adam" else (0.0,))
  ]
  for name, dtype, accumulate, decay in kinds[:n]:
    config = base.get_config().optimizer
    config.update(name=name, accumulate=accumulate, weight_decay=decay, learning_rate=0.3)
    tx = optimizer.make_optimizer(config, 100, constraints)
    rng = np.random.default_rng(0)

    def draw(scale, rng=rng, dtype=dtype):
      shapes = {"kernel": (30, 20), "head": (20, 10), "free": (50,)}
      return {k: jnp.asarray(scale * rng.standard_normal(s), dtype) for k, s in shapes.items()}

    params = jax.tree.map(jnp.abs, draw(1.0))
    state, fine, moved = tx.init(params), True, False

    @jax.jit
    def update(grads, state, params, tx=tx):
      updates, state = tx.update(grads, state, params)
      return optax.apply_updates(params, updates), state

    for _ in range(20):
      params, state = update(draw(3.0), state, params)
      fine &= all(float(params[k].min()) >= 0 for k in ("kernel", "head"))
      moved |= bool((params["free"] < 0).any())
    result.add(fine and moved, note=f"{name} {dtype.__name__} {accumulate}")
  return result


def broken_twins(n: int) -> Result:
  """Mutants that must not be proved convex, of all architectures in turn."""
  result, example = Result(), jax.ShapeDtypeStruct((1, *mutants.SHAPE), jnp.float32)
  found = {name: mutants.mutants(name, training=False) for name in catalog.names()}
  while found and result.injected < n:
    for name in list(found):
      mutant = next((m for m in found[name] if not m.keeps), None)
      if mutant is None:
        del found[name]
      elif result.injected < n:
        proved = certify(mutant.function, mutant.weights, example, search_steps=0)
        # What changes an affine part alone stays convex, and may be proved.
        fine = not proved or mutants.worst_gap(mutant) < 1e-12
        result.add(fine, note=f"{name} {mutant.kind} {mutant.where}")
  return result


# Images.


def odd_images(n: int) -> Result:
  """Odd and damaged images, one of hostile size: pixels, or a refusal, never anything else."""
  rng, result = np.random.default_rng(2), Result()
  odd = list(photos.odd(rng).values())
  hostile = bytearray(odd[4])
  at = hostile.find(b"\xff\xc2")
  hostile[at + 5 : at + 9] = b"\xff\xff\xff\xff"  # 65,535 x 65,535 px.
  odd.append(bytes(hostile))
  for i in range(n):
    content = bytearray(odd[i % len(odd)])
    for place in rng.integers(0, max(len(content), 1), i // len(odd)) if content else ():
      content[place] ^= 1 << int(rng.integers(8))
    try:
      image, _ = decode.random_crop(bytes(content), rng, 8, (0.1, 1.0))
      result.add(image.shape == (8, 8, 3) and image.dtype == np.uint8)
    except decode.Unreadable:
      result.add(True)
  return result


def prepare_photos(folder: pathlib.Path, train_count: int, val: int) -> str:
  """A prepared imagenet2012 of a few photographs; its data_dir."""
  manual, where = folder / "manual", folder / "photos"
  manual.mkdir(parents=True)
  photos.write_archives(manual, train=train_count, val=val)
  photos.official_archives.folder = manual
  with mock.patch.object(prepare, "official_archives", photos.official_archives):
    prepare.prepare("imagenet2012", str(where), str(manual))
  return str(where)


def streaming(photo_dir: str, workdir: pathlib.Path) -> subprocess.Popen:
  """A run with two workers, in a process group of its own, once it has saved a step."""
  args = ["--config=configs/mixer_ioc.py:imagenet2012", f"--config.data.dir={photo_dir}"]
  args += ["--config.data.image_size=16", "--config.model.size=tiny", "--config.model.patch=4"]
  args.append("--config.model.depth=1")
  args += ["--config.batch_size=16", "--config.steps=100000", "--config.data.workers=2"]
  args += ["--config.checkpoint.every_steps=2", "--config.data.cache_size=0"]
  args.append("--config.data.randaugment=(0, 9.0)")  # Most of what would be compiled.
  program = [sys.executable, "-m", "convex_jax.main", *args, f"--workdir={workdir}"]
  pipe = subprocess.PIPE
  process = subprocess.Popen(
    program, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, start_new_session=True
  )
  while not (workdir / "checkpoints" / "2" / "manifest.json").exists():
    assert process.poll() is None, process.communicate()
    time.sleep(0.1)
  return process


def children(pid: int) -> list[int]:
  """Processes that it started and that are alive."""
  found = subprocess.run(["ps", "-o", "pid=,stat=", "--ppid", str(pid)], capture_output=True)
  rows = [line.split() for line in found.stdout.decode().splitlines()]
  return [int(child) for child, state in rows if not state.startswith("Z")]


def lost_workers(photo_dir: str, folder: pathlib.Path, n: int) -> Result:
  """A process that decodes images is killed: one message, exit code 2, no hang."""
  result = Result()
  for i in range(n):
    with killed_at_the_end(streaming(photo_dir, folder / f"workers_{i}")) as process:
      for pid in children(process.pid):
        if b"spawn_main" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes():
          os.kill(pid, 9)
          break
      began = time.monotonic()
      _, err = process.communicate(timeout=PATIENCE)
      told = "A decoding worker died" in err and "Traceback" not in err
      result.add(process.returncode == 2 and told, time.monotonic() - began, err[-300:])
  return result


# Data sets.


def edit(path: pathlib.Path, old: str, new: str) -> None:
  """Replaces words of a text file, which must be there."""
  text = path.read_text()
  assert old in text, path
  path.write_text(text.replace(old, new))


def first(folder: pathlib.Path, pattern: str) -> pathlib.Path:
  """The first file of a name."""
  return sorted(folder.rglob(pattern))[0]


NO_DATA: dict[str, tuple[str, Callable[[pathlib.Path], Any]]] = {
  "cifar10 absent": ("cifar10", lambda f: None),
  "mnist absent": ("mnist", lambda f: None),
  "imagenet2012 absent": ("imagenet2012", lambda f: shutil.rmtree(f / "imagenet2012")),
  "a shard is missing": ("imagenet2012", lambda f: first(f, "imagenet2012-train*").unlink()),
  "a shard is cut": ("imagenet2012", lambda f: os.truncate(first(f, "imagenet2012-train*"), 9999)),
  "a shard is empty": ("imagenet2012", lambda f: os.truncate(first(f, "imagenet2012-val*"), 0)),
  "half built": (
    "imagenet2012",
    lambda f: first(f, "5.1.0").rename(first(f, "5.1.0").with_name("incomplete.X_5.1.0")),
  ),
  "another version": (
    "imagenet2012",
    lambda f: first(f, "5.1.0").rename(first(f, "5.1.0").parent / "0.0.1"),
  ),
  "dataset_info.json is cut": (
    "digits",
    lambda f: os.truncate(first(f / "digits", "dataset_info.json"), 100),
  ),
  "TFRecord form": (
    "digits",
    lambda f: edit(first(f / "digits", "dataset_info.json"), "array_record", "tfrecord"),
  ),
  "labels out of range": (
    "digits",
    lambda f: rewrite(first(f / "digits", "*train*array_record*"), label_77),
  ),
  "labels out of range, streamed": (
    "imagenet2012",
    lambda f: rewrite(first(f, "imagenet2012-train*"), lambda e: set_label(e, 1000)),
  ),
  "images of another size": (
    "digits",
    lambda f: rewrite(first(f / "digits", "*test*array_record*"), larger),
  ),
  "an image is none": (
    "digits",
    lambda f: rewrite(first(f / "digits", "*test*array_record*"), none),
  ),
  "a record's bytes are turned": (
    "digits",
    lambda f: turn_middle(first(f / "digits", "*train*array_record*")),
  ),
}


def set_label(example: Any, label: int) -> None:
  """Of a tf.train.Example."""
  example.features.feature["label"].int64_list.value[0] = label


def label_77(example: Any) -> None:
  """No digit."""
  set_label(example, 77)


def larger(example: Any) -> None:
  """9 x 9 px instead of 8 x 8."""
  image = photos.encoded(photos.photo(np.random.default_rng(0), 9, 9).convert("L"), "PNG")
  example.features.feature["image"].bytes_list.value[0] = image


def none(example: Any) -> None:
  """Bytes that are no image."""
  example.features.feature["image"].bytes_list.value[0] = b"no image"


def rewrite(path: pathlib.Path, change: Callable[[Any], None]) -> None:
  """Changes the third record of an ArrayRecord file."""
  from array_record.python import array_record_module
  from tensorflow_datasets.proto import tf_example_generated_pb2

  reader = array_record_module.ArrayRecordReader(str(path))
  records = reader.read_all()
  reader.close()
  example = tf_example_generated_pb2.Example.FromString(records[2])
  change(example)
  records[2] = example.SerializeToString()
  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
  for record in records:
    writer.write(record)
  writer.close()


def turn_middle(path: pathlib.Path) -> None:
  """Bits of a thousand bytes in a file's middle."""
  content = bytearray(path.read_bytes())
  for i in range(len(content) // 2, len(content) // 2 + 1000):
    content[i] ^= 0x55
  path.write_bytes(content)


def no_data(data_dir: str, photo_dir: str, folder: pathlib.Path, n: int) -> Result:
  """Data sets that are absent, half built or damaged: a `UserError` with a cure, in 5 s."""
  result = Result()
  for i, (what, (name, damage)) in enumerate(list(NO_DATA.items())[:n]):
    where = folder / f"data_{i}"
    shutil.copytree(photo_dir, where)
    shutil.copytree(pathlib.Path(data_dir) / "digits", where / "digits")
    damage(where)
    config = mixer_ioc.get_config(name)
    config.data.dir, config.batch_size = str(where), 10
    if name == "imagenet2012":
      config.data.update(loader="stream", image_size=16, workers=0, cache_size=0)
    began = time.monotonic()

    def load(config=config):
      examples = datasets.load(config.data, 0, progress=False)
      if config.data.loader == "stream":  # Read as they are needed: an epoch of them.
        job = program.Program(config, examples, mesh.make_mesh(jax.devices()[:1]))
        job.batches(range(7))
        list(job.splits["test"].eval_plans(10, 0))

    try:
      words = refusal(load)
    except Exception as error:
      words, what = "", f"{what}: {error!r}"
    spent = time.monotonic() - began
    cure = any(word in words for word in ("prepare", "convert", "damaged", "again"))
    result.add(cure, spent, f"{what} -> {words[:300]}")
    shutil.rmtree(where)
  return result


# Configs.


def wrong_values() -> Iterator[tuple[str, Any]]:
  """A value that a key may not have, for every key that has a rule."""
  wrong = [None, -1, -0.5, "", "nonsense", (3, 1), (0.9, 0.1), 1.5, 7, True, ("a",)]
  for path, rule in schema.RULES.items():
    for value in wrong:
      if rule.mistake(path, value):
        yield path, value
        break


def bad_configs(n: int) -> Result:
  """A config with two wrong values, or an unknown key: every mistake named, no device touched."""
  result, wrong = Result(), list(wrong_values())
  for i in range(n):
    pairs = [wrong[i % len(wrong)], wrong[(7 * i + 3) % len(wrong)]]
    config = base.get_config()
    for path, value in pairs:
      target = config
      *parents, last = path.split(".")
      for parent in parents:
        target = target[parent]
      with target.ignore_type():
        target[last] = value
    config.unlock()
    config[f"key_{i}"] = 1
    words = refusal(lambda config=config: schema.check(config))
    result.add(
      all(path in words for path, _ in pairs) and f"Unknown key config.key_{i}" in words, note=words
    )
  # On a machine whose devices cannot be started, the mistake is told all the same.
  args = ["--config=configs/mlp.py:digits", "--config.batch_size=-1", "--config.modle.parts=ioc"]
  told = subprocess.run(
    [sys.executable, "-m", "convex_jax.main", *args],
    cwd=ROOT,
    capture_output=True,
    text=True,
    env={**os.environ, "JAX_PLATFORMS": "no_such_platform"},
  )
  named = "batch_size is -1" in told.stderr and "Unknown key config.modle.parts" in told.stderr
  result.add(told.returncode == 2 and named and "Traceback" not in told.stderr, note=told.stderr)
  return result


# Restoring.


def other_meshes(data_dir: str, folder: pathlib.Path, n: int) -> Result:
  """Saved on 8 devices, weights split over two; restored on 1, 2, 4: equal arrays."""
  result, config = Result(), tiny_config(data_dir)
  examples = datasets.load(config.data, 0, progress=False)
  config.fsdp = 2
  with mock.patch.object(mesh, "LEAST", 1):
    job = program.Program(config, examples, mesh.make_mesh(jax.devices()[:8], fsdp=2))
    state, _ = job.train_call(job.init(), job.batches(range(1)))
    ours = checkpoints.Checkpoints(str(folder / "eight"), 2)
    ours.save(int(state.step), state.items(), 0.5)
    ours.close()
  config.fsdp = 1
  for i in range(n):
    count = (1, 2, 4)[i % 3]
    fewer = program.Program(config, examples, mesh.make_mesh(jax.devices()[:count]))
    again = checkpoints.Checkpoints(str(folder / "eight"), 2)
    restored = type(state).of(again.restore(fewer.state_shapes().items()))
    again.close()
    pairs = list(zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True))
    same = all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)
    result.add(same and all(len(b.sharding.device_set) == count for _, b in pairs))
  return result


FIXTURES = sorted((ROOT / "tests" / "fixtures").glob("run_*"))


def older_formats() -> Result:
  """A run that was kept when its format was new: the logits that it had then."""
  result = Result()
  for fixture in FIXTURES:
    want = np.load(fixture / "logits.npz")
    logits = convex_jax.load(str(fixture)).logits(want["images"])
    result.add(np.allclose(logits, want["logits"], atol=1e-5), note=fixture.name)
  return result


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
  """Bits flipped, a piece cut, doubled, or filled with zeros or nines."""
  bad = bytearray(content)
  start = int(rng.integers(len(bad)))
  stop = start + int(rng.integers(1, 40))
  kind = rng.integers(6)
  if kind == 0:
    for _ in range(rng.integers(1, 5)):
      bad[rng.integers(len(bad))] ^= 1 << int(rng.integers(8))
  elif kind == 1:
    del bad[start:]
  elif kind == 2:
    del bad[start:stop]
  elif kind == 3:
    bad[start:start] = bad[start:stop]
  else:
    bad[start:stop] = (b"\0" if kind == 4 else b"9") * len(bad[start:stop])
  return bytes(bad)


def mutated_descriptions(workdir: pathlib.Path, n: int) -> Result:
  """config.json, the newest manifest and certificate.json, mutated: refused, or read as before."""

  rng, result = np.random.default_rng(3), Result()
  folder = workdir / "checkpoints"
  newest = manifest.steps_in(str(folder))[-1]
  readers = {
    "config.json": lambda: Workdir(str(workdir)).description(),
    "certificate.json": lambda: Workdir(str(workdir)).certificate(),
    f"checkpoints/{newest}/manifest.json": lambda: manifest.faults(str(folder))[newest],
  }
  for i in range(n):
    name, read = list(readers.items())[i % 3]
    path = workdir / name
    good = path.read_bytes()
    want = json.dumps(read())
    path.write_bytes(mutated(good, rng))
    try:
      got = json.dumps(read())
      told = name.endswith("manifest.json") and "manifest.json" in got
      result.add(got == want or told, note=f"{name}: read as something else")
    except UserError as error:
      result.add("damaged" in str(error), note=str(error))
    finally:
      path.write_bytes(good)
  return result


def worker_counts(photo_dir: str, n: int) -> Result:
  """Batches of photographs with 0 to 3 processes: the same pixels, labels, places."""
  config = mixer_ioc.get_config("imagenet2012")
  config.data.update(dir=photo_dir, loader="stream", image_size=16, cache_size=0)
  records, over = datasets.load(config.data, 0).train, mesh.make_mesh(jax.devices()[:1])
  result, batches = Result(), []
  for i in range(n + 1):
    fed = stream.Stream(records, over, i % 4, 0.0)
    batches.append(jax.device_get(fed.train_plan(range(9), 12, seed=0)))
    fed.close()
  for other in batches[1:]:
    result.add(all(np.array_equal(other[key], batches[0][key]) for key in other))
  return result
