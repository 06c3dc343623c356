"""The certificate, tested on mutants of certified twins and against an independent prover."""

import jax
import jax.numpy as jnp
import pytest

from convex_jax.models import catalog
from convex_jax.proof import certify
from tests.support import mutants, oracle

EXAMPLE = jax.ShapeDtypeStruct((1, *mutants.SHAPE), jnp.float32)
HARMLESS = {  # Mutations of a part that is affine in the image, which stays convex.
  ("cycle_mlp", "stage_0_block_0/dense_0"),
  ("densenet", "block_0_layer_0/norm_0/scale"),
  ("mlp", "norm_0/scale"),
}


def is_judged_right(mutant) -> bool:
  """Proved if convex by construction; else not proved, unless it changes an affine part only."""
  proved = bool(certify(mutant.function, mutant.weights, EXAMPLE, search_steps=0))
  if mutant.keeps or not proved:
    return proved == mutant.keeps
  harmless = (mutant.architecture, mutant.where) in HARMLESS
  return harmless and mutants.worst_gap(mutant) < 1e-12


def misjudged(found):
  return [(m.architecture, m.kind, m.where) for m in found if not is_judged_right(m)]


@pytest.mark.parametrize("name", catalog.names())
def test_no_mutant_that_is_not_convex_is_proved(name):
  assert misjudged(list(mutants.mutants(name, training=False))[::3]) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", catalog.names())
def test_none_of_all_mutants_that_is_not_convex_is_proved(name):
  assert misjudged(mutants.mutants(name)) == []


def test_there_are_two_hundred_mutants_that_break():
  untrained = {"train": lambda model, tx: None}  # They are only counted.
  kinds = [m.keeps for name in catalog.names() for m in mutants.mutants(name, **untrained)]
  assert kinds.count(False) >= 200


@pytest.mark.parametrize("kind", ["product of two features", "LayerNorm for BatchNorm"])
def test_the_midpoint_test_of_survivors_can_fail(kind):
  """The negative control: it sees a gap where a mutant is not convex."""
  mutant = next(m for m in mutants.mutants("mixer", training=False) if m.kind == kind)
  assert mutants.worst_gap(mutant) > 1e-6


def test_cvxpy_agrees():
  rows = oracle.compare(range(120))
  assert [r["ours"] for r in rows] == [r["theirs"] for r in rows]
  proved = [all(r["ours"][0]) for r in rows if r["broken"]]
  assert len(proved) == 60 and not all(proved)
