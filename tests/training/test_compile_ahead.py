"""What a run takes on a machine that is not here; with their compilers, programs for some."""

import importlib.util
import math
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import base, mixer_ioc
from convex_jax import main, mesh
from convex_jax.data import batches, datasets
from convex_jax.data.in_memory import InMemory, is_resident
from convex_jax.data.photos.records import Records
from convex_jax.data.photos.stream import Stream
from convex_jax.errors import UserError
from convex_jax.training import compile_ahead, machines
from convex_jax.training.collectives import Collectives, collectives
from convex_jax.training.compile_ahead import Compiled, Verdict
from convex_jax.training.program import Computation, Program
from tests.support import PATIENCE, ROOT, of

DIGITS = "--config=configs/mixer_ioc.py:digits"


# Without their compilers.


@pytest.mark.parametrize(
  "name,chip,topology,devices",
  [
    ("v4-8", "v4", "2x2x1", 4),  # Google counts TensorCores here, two a chip,
    ("v5p-256", "v5p", "4x4x8", 128),
    ("v5e-256", "v5e", "16x16", 256),  # and chips here.
    ("v6e-1", "v6e", "1x1", 1),
    ("h100-8", "h100", "1x1x8", 8),
  ],
)
def test_machines_have_their_makers_names(name, chip, topology, devices):
  assert machines.MACHINES[name] == (chip, topology)
  assert machines.chips(topology) == devices


@pytest.mark.parametrize(
  "options,words",
  [
    (["--compile_for=v9-8"], r"Unknown machine --compile_for=v9-8; expected one of v4-8, .*h100-8"),
    (["--compile_for="], "Unknown machine --compile_for=;"),
    (["--compile_for=v5e-4"], r"needs the TPU's compiler, .*: pip install 'convex_jax\[aot\]'"),
    (["--compile_for=h100-8"], r"needs the CUDA compiler, .*: pip install 'convex_jax\[cuda\]'"),
    (["--make_fit"], "need --compile_for=MACHINE"),
    (["--largest_batch"], "need --compile_for=MACHINE"),
    (["--compile_for=v5e-4", "--workdir=runs/x"], "no --workdir with it"),
    (["--compile_for=v5e-4", "--distributed=on"], "no --distributed=on with it"),
    (["--compile_for=v5e-4", "--coordinator=a:1"], "no --coordinator with it"),
    (
      ["--compile_for=v5e-4", "--num_processes=2", "--process_id=0"],
      "no --num_processes and no --process_id with it",
    ),
  ],
)
def test_what_cannot_be_compiled_is_said_in_a_sentence(options, words, monkeypatch, capfd):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  assert main.main([DIGITS, *options]) == UserError.code
  printed = capfd.readouterr().err.strip()
  assert len(printed.splitlines()) == 1
  assert re.search(words, printed)


HLO = """
  %all-reduce.1 = f32[8,128]{1,0:T(8,128)} all-reduce(%x), replica_groups={}, to_apply=%add
  %all-reduce.2 = (f32[10]{0}, bf16[2,3]{1,0}) all-reduce(%a, %b), to_apply=%add
  %ag = (f32[4]{0}, f32[16]{0}) all-gather-start(%y), dimensions={0}
  %all-gather-done.1 = f32[16]{0:T(128)} all-gather-done(%ag)
  ROOT %rs = u8[5,3]{1,0} reduce-scatter(%z), dimensions={0}
  %fusion = f32[99]{0} fusion(%all-reduce.1), kind=kLoop, calls=%c
  %p = pred[7]{0} collective-permute(%q), source_target_pairs={{0,1}}
"""


def test_collectives_are_counted_once_with_the_bytes_of_their_results():
  found = collectives(HLO, 4)
  assert {kind: each[:2] for kind, each in found.items()} == {
    "all-reduce": (2, 8 * 128 * 4 + 10 * 4 + 6 * 2),
    "all-gather": (1, 64),
    "reduce-scatter": (1, 15),
    "collective-permute": (1, 7),
  }
  assert collectives("", 4) == {}


IN_FOURS = "channel_id=1, replica_groups=[64,4]<=[256], dimensions={0}"
ASYNCHRONOUS = f"""
  %ag.1 = (f32[4]{{0}}, f32[16]{{0:T(8,128)}}) all-gather-start(%y.2), {IN_FOURS}
  %other = (f32[4]{{0}}, f32[8]{{0}}) all-gather-start(%z), replica_groups={{{{0,1}}}}
  %d = f32[16]{{0}} all-gather-done((f32[4]{{0}}, f32[16]{{0:T(8,128)}}) %ag.1), metadata={{}}
"""


@pytest.mark.parametrize(
  "hlo,kind,sent",
  [
    ("%r = f32[10] reduce-scatter(%z), replica_groups=[16,16]<=[256]", "reduce-scatter", 15 * 40),
    (
      "%r = f32[10] reduce-scatter(%z), replica_groups=[16,16]<=[16,16]T(1,0), dimensions={0}",
      "reduce-scatter",
      15 * 40,
    ),
    ("%r = f32[10] reduce-scatter(%z), dimensions={0}", "reduce-scatter", 255 * 40),
    (
      "%r = f32[10] all-reduce(%z), replica_groups={}, to_apply=%a",
      "all-reduce",
      2 * 255 / 256 * 40,
    ),
    ("%r = f32[10] all-reduce(%z), replica_groups={{0,1},{2,3}}, x={{1}}", "all-reduce", 40),
    ("%r = f32[10] all-to-all(%z), replica_groups={{0,2,1,3}}", "all-to-all", 3 / 4 * 40),
    ("%r = f32[10] collective-permute(%z), source_target_pairs={{0,1}}", "collective-permute", 40),
    (
      "%r = f32[10] reduce-scatter(%z), channel_id=1, replica_groups=mesh['a'=16,'b'=1,'c'=16],"
      " device_ids=([16,16]T(1,0)) {'a'}, dimensions={0}",
      "reduce-scatter",
      15 * 40,
    ),
    (
      "%r = f32[10] reduce-scatter(%z), replica_groups=mesh['a'=4,'b'=64] {'a','b':(2)4}, x={'b'}",
      "reduce-scatter",
      15 * 40,
    ),
    (ASYNCHRONOUS, "all-gather", 3 / 4 * 64),
  ],
)
def test_a_device_sends_to_those_of_its_group(hlo, kind, sent):
  found = collectives(hlo, 256)
  assert list(found) == [kind]
  assert found[kind].sent == pytest.approx(sent)


@pytest.mark.parametrize(
  "environment,room",
  [
    ({}, 0.75 * 79.109),  # JAX's default.
    ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"}, 0.9 * 79.109),
    ({"XLA_CLIENT_MEM_FRACTION": ".5"}, 0.5 * 79.109),
  ],
)
def test_a_gpu_has_the_fraction_of_its_memory_that_jax_takes(environment, room, monkeypatch):
  for name in ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION"):
    monkeypatch.delenv(name, raising=False)
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  assert machines.CHIPS["h100"].room == pytest.approx(room, rel=1e-4)
  assert machines.CHIPS["v5e"].room == 15.75


@pytest.mark.parametrize("value", ["most", "0", "-1", "nan", "75"])
def test_a_fraction_of_memory_that_is_none_is_said_so(value, monkeypatch):
  monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", value)
  monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
  with pytest.raises(UserError, match=f"XLA_PYTHON_CLIENT_MEM_FRACTION={value}: expected"):
    _ = machines.CHIPS["h100"].room


def shapes_like(tree):
  return jax.tree.map(lambda a: (a.shape, a.dtype, a.sharding), tree)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("resident", [True, False])
def test_shapes_of_data_are_those_of_data(few_digits, devices, resident):
  over = mesh.make_mesh(jax.devices()[:devices])
  real = InMemory(few_digits.train, over, resident)
  arrays, plan = batches.shapes_of(few_digits.train, over, resident, (2, 16))
  assert shapes_like(arrays) == shapes_like(real.arrays)
  assert shapes_like(plan) == shapes_like(real.train_plan(range(2), 16, 0))
  _, plan = batches.shapes_of(few_digits.train, over, resident, (16,))
  assert shapes_like(plan) == shapes_like(next(iter(real.eval_plans(16, 0))))


def test_shapes_of_streamed_photographs_are_those_of_a_stream(photo_dir):
  config = mixer_ioc.get_config("imagenet2012").data
  config.dir, over = photo_dir, mesh.make_mesh(jax.devices()[:2])
  photos = datasets.load(config, 0, progress=False).train
  fed = Stream(photos, over, workers=0, max_unreadable=0.0)
  for real, rows in (
    (fed.train_plan(range(1), 4, 0), (1, 4)),
    (next(iter(fed.eval_plans(4, 4))), (4,)),
  ):
    arrays, plan = batches.shapes_of(photos, over, False, rows)
    assert (arrays, shapes_like(plan)) == (None, shapes_like(real))
  fed.close()


def test_the_outline_of_a_data_set_has_its_sizes(data_dir):
  config = base.get_config().data
  config.name, config.dir, config.validation_fraction, config.train_fraction = (
    "digits", data_dir, 0.1, 0.5,
  )  # fmt: skip
  real, outline = datasets.load(config, 0, progress=False), datasets.outline(config)
  for name, split in real.splits().items():
    same = outline.splits()[name]
    assert (len(same), same.image_shape) == (len(split), split.image_shape)
    assert same.labels.dtype == split.labels.dtype
  assert len(outline.class_names) == len(real.class_names)


def test_the_outline_of_photographs_takes_no_memory_and_no_file():
  config = mixer_ioc.get_config("imagenet2012,B/16").data
  streamed = datasets.outline(config)
  assert isinstance(streamed.train, Records) and len(streamed.train) == 1_281_167
  config.loader, config.classes = "resident", ("a", "b")
  kept = datasets.outline(config)
  assert kept.train.nbytes == len(kept.train) * 224 * 224 * 3 and len(kept.train) == 2562
  assert kept.train.images.strides == (0, 0, 0, 0)


@pytest.mark.parametrize("loader,memory,kept", [
  ("resident", 0, True), ("host", 1e12, False), ("auto", 4 * 6400, True), ("auto", 4 * 6399, False),
])  # fmt: skip
def test_data_that_fit_in_a_quarter_of_the_memory_are_kept(few_digits, loader, memory, kept):
  assert few_digits.train.nbytes == 6400
  assert is_resident(loader, few_digits.train, memory) == kept


def test_the_program_made_of_shapes_is_that_of_the_run(tiny_config, few_digits):
  over = mesh.make_mesh(jax.devices()[:2])
  job = Program(tiny_config, few_digits, over)
  arrays, plan = batches.shapes_of(few_digits.train, over, True, (1, tiny_config.batch_size))
  ahead = Computation(tiny_config, few_digits, over).lower_train(arrays, plan)
  real = job._train_call.lower(job.init(), job.splits["train"].arrays, job.batches(range(1)))
  assert ahead.as_text() == real.as_text()
  _, plan = batches.shapes_of(few_digits.test, over, True, (tiny_config.batch_size,))
  assert job.lower_eval(arrays, plan).as_text()


def program(temporaries, beside=0.0, refused=""):
  memory = {"arguments": 1.0, "temporaries": temporaries, "other splits": beside}
  found = {"all-reduce": Collectives(3, 4e8, 6e8)}
  return Compiled(1.0, {} if refused else memory, 2e12, 1e9, found, refused)


REFUSED = program(0, refused="Ran out")


@pytest.mark.parametrize(
  "train,evaluate,fits,words",
  [
    (program(14, 0.5), program(2), True, "fits: needs 15.50 GiB per device, which has 15.75"),
    (program(2), program(14, 0.5), True, "fits: needs 15.50 GiB per device, which has 15.75"),
    (
      program(14),
      program(15.5),
      False,
      "does not fit: needs 16.50 GiB per device, which has 15.75",
    ),
    (
      program(14, 2),
      program(2),
      False,
      "does not fit: needs 17.00 GiB per device, which has 15.75",
    ),
    (
      program(2),
      program(14, 2),
      False,
      "does not fit: needs 17.00 GiB per device, which has 15.75",
    ),
    (REFUSED, None, False, "does not fit in 15.75 GiB per device: Ran out"),
    (program(1), REFUSED, False, "does not fit in 15.75 GiB per device: Ran out"),
  ],
)
def test_a_run_fits_if_everything_that_lies_on_a_device_does(train, evaluate, fits, words):
  found = Verdict("v5e-4", 4, train, evaluate)
  assert found.fits == fits
  assert next(compile_ahead.lines(found)) == words


def test_each_program_is_counted_with_what_lies_beside_it(tiny_config, few_digits, monkeypatch):
  """On two devices; nothing twice, and the whole training state also while evaluating."""
  seen = []

  def compiled(lowered, chip, devices, beside):
    arguments = jax.tree.leaves(lowered.args_info)
    seen.append((lowered, beside))
    return program(sum(math.prod(a.shape) * a.dtype.itemsize for a in arguments) / 2**30)

  monkeypatch.setattr(compile_ahead, "compiled", compiled)
  monkeypatch.setattr(compile_ahead, "devices_of", lambda name: tuple(jax.devices()[:2]))
  monkeypatch.setattr(datasets, "outline", lambda config: few_digits)
  tiny_config.data.loader = "resident"
  compile_ahead.verdict(tiny_config, "v5e-4")
  (_, train), (_, evaluate) = seen
  over = mesh.make_mesh(jax.devices()[:2])
  job = Program(tiny_config, few_digits, over)
  state = job.init()

  def held(tree):
    on_first = [a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(tree)]
    return pytest.approx(sum(on_first) / 2**30)

  splits = {name: split.arrays for name, split in job.splits.items()}
  plan = job.batches(range(1))
  plans = [next(iter(s.eval_plans(tiny_config.batch_size, 0))) for s in job.splits.values()]
  assert train == {
    "other splits": held([splits[name] for name in splits if name != "train"]),
    "16 batches ahead": held([plan] * 16),
  }
  assert evaluate == {
    "rest of the training state": held((state.opt_state, state.step, state.losses)),
    "other splits": held([splits[name] for name in splits if name != "test"]),
    "last batch of training": held(plan),
    "16 batches ahead": held([plans[0]] * 16),
  }


def test_the_time_is_about_that_of_the_slowest_resource():
  found = program(1).seconds_by(machines.CHIPS["v5e"])
  assert found == pytest.approx(
    {"arithmetic": 2e12 / 197e12, "memory": 1e9 / 819e9, "links": 6e8 / 200e9}
  )
  lines = list(compile_ahead.lines(Verdict("v5e-4", 4, program(1), None)))
  assert "2,000 GFLOP and 1 GB per device and step" in lines[1]
  assert "  about 10.2 ms per step, bound by arithmetic" in lines[-1]
  assert "  all-reduce: 3, 400 MB" in lines


@pytest.mark.parametrize("largest", [0, 8, 48, 1000])
def test_the_largest_batch_is_found_to_a_sixteenth(largest, monkeypatch):
  monkeypatch.setattr(compile_ahead, "devices_of", lambda name: (None,) * 8)
  tried = []

  def verdict(config, machine, evaluation):
    tried.append(config.batch_size)
    temporaries = 0.0 if config.batch_size <= largest else math.inf
    return Verdict(machine, 8, program(temporaries), None)

  monkeypatch.setattr(compile_ahead, "verdict", verdict)
  config = of(mixer_ioc.get_config("digits"), batch_size=128)
  *_, (batch, end) = compile_ahead.largest_batch(config, "v5e-8")
  assert end is None and largest * 15 / 16 - 8 < batch <= largest
  assert batch % 8 == 0 and len(tried) < 12


def test_remedies_keep_the_images_of_an_update():
  config = of(mixer_ioc.get_config("digits"), batch_size=64)
  changes = list(compile_ahead.remedies(config, 8))
  assert changes[0] == {"model.remat": True}
  for change in changes:
    changed = compile_ahead.changed_by(config, change)
    assert changed.batch_size * changed.optimizer.accumulate == 64
    mesh.check_divisible(8, changed.batch_size, changed.fsdp)
  assert {"model.remat": True, "fsdp": 8} in changes


def test_remedies_keep_the_number_of_updates_and_the_decay_per_update():
  config = of(
    mixer_ioc.get_config("digits"),
    **{"batch_size": 64, "steps": 100, "ema_decay": 0.99, "optimizer.accumulate": 2},
    **{"checkpoint.every_steps": 10, "log.every_steps": 5},
  )
  for change in compile_ahead.remedies(config, 8):
    changed = compile_ahead.changed_by(config, change)
    parts = 64 // changed.batch_size
    assert changed.optimizer.accumulate == 2 * parts
    assert changed.steps / changed.optimizer.accumulate == 50
    assert changed.ema_decay**parts == pytest.approx(0.99)
    assert changed.checkpoint.every_steps == 10 * parts
    assert changed.log.every_steps == 5 * parts


def test_remedies_set_nothing_that_is_off():
  config = of(mixer_ioc.get_config("digits"), batch_size=64)
  for change in compile_ahead.remedies(config, 8):
    assert not {"steps", "ema_decay", "checkpoint.every_steps"} & set(change)


# With them: `make test-aot`.


def command(*options):
  done = subprocess.run(
    [sys.executable, "-m", "convex_jax.main", *options],
    capture_output=True, text=True, timeout=PATIENCE, cwd=ROOT,
    env={k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")},
  )  # fmt: skip
  return done.returncode, done.stdout, done.stderr


def needs(module):
  missing = importlib.util.find_spec(module) is None
  return pytest.mark.skipif(missing, reason=f"no {module}; `make test-aot` installs it")


@pytest.mark.slow
@pytest.mark.parametrize("config", [
  pytest.param(["mixer_ioc.py:digits", "--config.model.size=tiny"], id="mixer"),
  pytest.param(["densenet_ioc.py:digits", "--config.model.size=tiny"], id="densenet"),
])  # fmt: skip
@pytest.mark.parametrize(
  "machine",
  [
    pytest.param("v5e-4", marks=needs("libtpu")),
    pytest.param("h100-8", marks=needs("jax_cuda13_plugin")),
  ],
)
def test_a_run_compiles_for_a_machine_that_is_not_here(config, machine, tmp_path):
  file, *options = config
  before = set(ROOT.iterdir())
  code, out, err = command(f"--config=configs/{file}", *options, f"--compile_for={machine}")
  assert code == 0, err
  assert "fits: " in out and "all-reduce: " in out and "evaluation: compiled in" in out
  assert ("bound by" in out) == (machine == "v5e-4")  # The CUDA compiler does not count.
  assert set(ROOT.iterdir()) == before


@pytest.mark.slow
@needs("libtpu")
def test_what_does_not_fit_is_made_to_fit():
  code, out, err = command(
    DIGITS, "--config.batch_size=262144", "--config.steps=9", "--compile_for=v5e-1", "--make_fit"
  )
  assert code == UserError.code, err
  first, *tried = [line for line in out.splitlines() if "fit" in line]
  assert "does not fit" in first
  assert ": fits: " in tried[-1] and "--config." in tried[-1]


@pytest.mark.slow
@needs("libtpu")
@pytest.mark.parametrize("machine,fsdp", [("v4-128", 8), ("v5p-256", 2), ("v6e-256", 4)])
def test_weights_are_split_on_slices_of_any_shape(machine, fsdp):
  code = "from convex_jax.training import compile_ahead as c; from convex_jax import mesh;"
  code += f"m = mesh.make_mesh(c.devices_of({machine!r}), {fsdp}); print(m.devices.shape)"
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
  )  # fmt: skip
  devices = np.prod([int(n) for n in machines.MACHINES[machine][1].split("x")])
  assert done.stdout.strip() == f"({devices // fsdp}, {fsdp})", done.stderr


@pytest.mark.slow
@needs("libtpu")
@pytest.mark.parametrize("fsdp", [1, 2, 8])
def test_weights_are_split_within_a_slice(fsdp):
  """Two slices of v5e-8."""
  code = "from convex_jax import mesh; from jax.experimental import topologies as t;"
  code += "d = t.get_topology_desc(platform='tpu', topology_name='v5e:2x4', num_slices=2).devices;"
  code += f"m = mesh.make_mesh(d, {fsdp});"
  code += "print(m.devices.shape, all(len({d.slice_index for d in row}) == 1 for row in m.devices))"
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
  )  # fmt: skip
  assert done.stdout.strip() == f"({16 // fsdp}, {fsdp}) True", done.stderr
