"""A training run as the host sees it, from top to bottom."""

import collections
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from convex_jax import files, streams
from convex_jax import mesh as meshes
from convex_jax.data import datasets
from convex_jax.data.datasets import Data
from convex_jax.errors import Lost, Stopped
from convex_jax.models.constraints import PENALISED
from convex_jax.models.public.importer import Public
from convex_jax.runs import manifest
from convex_jax.runs.checkpoints import Checkpoints
from convex_jax.runs.run import Run
from convex_jax.runs.workdir import Workdir
from convex_jax.training import pretrained, runtime, schema, step
from convex_jax.training.console import Console, parameter_table
from convex_jax.training.profiling import Profiler
from convex_jax.training.program import MAX_IN_FLIGHT, Program
from convex_jax.training.recorder import Recorder
from convex_jax.training.starting import Start, start_of
from convex_jax.training.stopping import SkippedUpdates, Stopping


def run(config: Any, workdir: str, examples: Data | None = None) -> dict[str, float]:
  """Trains, or resumes the training of, the network that a config describes.

  On a CPU call `runtime.tune_cpu()` first, before JAX computes anything: the command does so,
  and large steps take up to three times as long without it.

  Args:
    config: as `configs/base.py` has it.
    workdir: the folder of the run.
    examples: the data; by default what `config.data` names.

  Returns:
    The final figures, as in the last row of metrics.jsonl.

  Raises:
    UserError: a config, a data set or a workdir that does not fit.
    Diverged: too many updates were skipped.
    Unsaved: a checkpoint could not be written.
    Lost: another process is gone.
    Stopped: after a signal (`signals.STOP_SIGNALS`) or `time_limit`, once everything is saved.
  """
  schema.check(config)
  folder = Workdir(workdir)
  with (
    streams.careful(streams.PATIENCE),
    Stopping(60 * config.time_limit) as stopping,
    folder.claim(config),
    _collectives(),
  ):
    return _run(config, folder, examples, stopping)


def _run(
  config: Any, workdir: Workdir, examples: Data | None, stopping: Stopping
) -> dict[str, float]:
  lead = jax.process_index() == 0
  if examples is None:
    examples = datasets.load(config.data, config.seed, progress=lead)
  meshes.check_equal_hosts([device.process_index for device in jax.devices()])
  meshes.check_divisible(jax.device_count(), config.batch_size, config.fsdp)
  public, examples = _scaled(config, workdir, examples)  # Refused before anything is written.
  workdir.check_same_data(examples)
  program = Program(config, examples, meshes.make_mesh(fsdp=config.fsdp))
  start = None
  if config.init_from and not manifest.steps_in(workdir.checkpoints):
    start = start_of(config, program, public)  # Refused before anything is written.
  console = Console(lead)
  for line in manifest.quarantine_damaged(workdir.checkpoints, workdir.damaged):
    console.print(line)
  if lead:
    workdir.describe(config, examples, program.parameters)
  with contextlib.ExitStack() as stack:
    stack.enter_context(stopping.held())  # Exited last: no signal interrupts a save.
    stack.callback(program.close)
    checkpoints = Checkpoints(
      workdir.checkpoints,
      config.checkpoint.keep,
      report=console.print,
      go_on=not config.checkpoint.must_save,
      patience=config.checkpoint.patience,
      before_seal=workdir.publish,  # No checkpoint is newer than its rows.
    )
    stack.callback(checkpoints.close)
    stack.enter_context(_collectives(checkpoints.abandon))
    state = _first_state(program, checkpoints, start)
    recorder = Recorder(
      workdir,
      console,
      config,
      start=int(state.step),
      total_steps=program.total_steps,
      epochs=program.epochs,
      lead=lead,
    )
    stack.callback(recorder.close)
    if checkpoints.latest_step() is None:
      console.print(parameter_table(state.params, program.constraints))
      if start is not None:
        console.print(start.words)
    else:
      console.print(f"Resumed {workdir.path} at step {int(state.step)} of {program.total_steps}")
    profile = config.log.profile_steps if lead else (0, 0)
    profiler = Profiler(workdir, profile, console.print)
    stack.callback(profiler.close)
    state = train(program, state, checkpoints, recorder, profiler, stopping, workdir)
    figures = program.evaluate(state, final=True)
    recorder.evaluated("final", int(state.step), figures)
  _finish(program, state, figures, workdir, console)
  return figures


def _scaled(config: Any, workdir: Workdir, examples: Data) -> tuple[Public | None, Data]:
  """The public weights that a run starts from, if any, and the data, scaled for it."""
  normalise, source = config.data.normalise, files.expand(config.init_from)
  if not source:
    return None, examples.scaled("own" if normalise == "auto" else normalise)
  begun = manifest.steps_in(workdir.checkpoints) and workdir.exists()
  if not begun and not files.is_folder(source):
    return pretrained.start(config, examples)
  if not begun and normalise != "auto":
    return None, examples.scaled(normalise)
  # As the run has it: the file may be gone. Or as the network of the other run saw its pixels.
  about = (workdir if begun else Workdir(source)).description()["data"]
  statistics = tuple(about["mean"]), tuple(about["std"])
  return None, dataclasses.replace(examples, known_statistics=statistics)


def _first_state(program: Program, checkpoints: Checkpoints, start: Start | None) -> step.State:
  """The state of the newest checkpoint; without one a fresh state, or what `start` makes of it."""
  state = program.init()
  if checkpoints.latest_step() is not None:
    return step.State.of(checkpoints.restore(state.items()))
  return state if start is None else start.state(state)


@contextlib.contextmanager
def _collectives(when_lost: Callable[[], None] = lambda: None) -> Iterator[None]:
  """While active, a failed collective of several processes is raised as `Lost`."""
  try:
    yield
  except Exception as error:
    if jax.process_count() == 1 or not meshes.is_collective_error(error):
      raise
    when_lost()
    raise Lost(str(error).splitlines()[0][:200]) from error


def train(
  program: Program,
  state: step.State,
  checkpoints: Checkpoints,
  recorder: Recorder,
  profiler: Profiler,
  stopping: Stopping,
  workdir: Workdir,
) -> step.State:
  """The loop: calls of a few steps each, logs, evaluations, checkpoints."""
  in_flight, skipped = collections.deque(), SkippedUpdates(program.config.max_skipped)

  def take_in(limit):
    while len(in_flight) > limit or (in_flight and in_flight[0][1]["loss"].is_ready()):
      at, measured = in_flight.popleft()
      metrics = {name: np.atleast_1d(np.asarray(v)) for name, v in measured.items()}
      recorder.train(at, metrics, skipped.count(at, metrics))

  first = int(state.step)
  recorder.restart_clock()
  for steps in program.calls(first):
    profiler.before(steps)
    began = time.monotonic()
    plan = program.batches(steps)
    if not in_flight or in_flight[-1][1]["loss"].is_ready():
      recorder.add_input_wait(time.monotonic() - began)
    state, measured = program.train_call(state, plan)
    if steps.start == first:  # Leave compilation and worker start-up out of the rate.
      recorder.restart_clock()
    in_flight.append((steps.stop, measured))
    take_in(MAX_IN_FLIGHT)
    checkpoints.check()
    evaluates, saves = program.evaluates_at(steps.stop), program.saves_at(steps.stop)
    stops = stopping.should_stop(steps.stop)
    if evaluates or saves or stops:
      take_in(0)  # Skipped updates may end the run, before it is saved.
      program.refuse_not_finite(state)
      recorder.flush()
      figures = program.evaluate(state, final=False) if evaluates else None
      if figures is not None:
        recorder.evaluated("eval", steps.stop, figures)
      recorder.sync()
      checkpoints.save(steps.stop, state.items(), figures[program.decides] if figures else None)
      runtime.return_freed_memory()  # Whose holes the next step's buffer may not fit.
      recorder.restart_clock()
    if stops:
      raise Stopped(
        f"Stopped at step {steps.stop}, saved in {workdir.path}. Run the same command to resume."
      )
  return state


def _finish(
  program: Program, state: step.State, figures: dict[str, float], workdir: Workdir, console: Console
) -> None:
  """Reports the figures, and certifies what is meant to be convex."""
  config = program.config
  name = f"{config.model.name} {config.model.parts} on {config.data.name}"
  console.report(name, figures)
  if config.model.parts == "ioc" and config.model.constraint != PENALISED:
    weights = program.gathered(state.weights())  # A collective: every host calls it.
    if jax.process_index() == 0:
      from convex_jax.runs import certified  # A first step should not wait for the prover.

      # As `load` would give it, without the reading, in which all hosts would take part.
      trained = Run.described(workdir.path, workdir.description(), int(state.step), weights)
      console.print(certified.summary(certified.certify_and_write(trained)))
  console.print(f'Saved to {workdir.path}. Reload with convex_jax.load("{workdir.path}").')
