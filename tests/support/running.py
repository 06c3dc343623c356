"""Runs the training command, or the compiled step alone."""

import contextlib
import io
import os
import subprocess
from unittest import mock

import jax
import numpy as np

from convex_jax import main, mesh
from convex_jax.training import program
from tests.support import PATIENCE, ROOT


def run_main(*args, env=None, **kwargs):
  return subprocess.run(
    args[0] if len(args) == 1 else list(args),
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=PATIENCE,
    env={**os.environ, **(env or {})},
    **kwargs,
  )


def run_here(*options):
  """The training command in this process: a tenth of the time that a new one takes to begin."""
  with (
    mock.patch.dict(os.environ),
    contextlib.redirect_stdout(io.StringIO()) as out,
    contextlib.redirect_stderr(io.StringIO()) as err,
  ):
    try:
      code = main.main(list(options))
    except SystemExit as end:  # Of argparse.
      code = end.code
  return subprocess.CompletedProcess(options, code, out.getvalue(), err.getvalue())


def leaves_close(got, want, atol):
  pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
  for a, b in pairs:
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=atol)


def run_steps(config, examples, devices, calls):
  job = program.Program(config, examples, mesh.make_mesh(jax.devices()[:devices]))
  state, losses = job.init(), []
  for steps in calls:
    state, metrics = job.train_call(state, job.batches(steps))
    losses += np.atleast_1d(metrics["loss"]).tolist()
  return job, state, losses
