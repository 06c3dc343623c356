"""Planted counterexamples: none is proved; and convex functions as people write them: most are."""

import dataclasses

import numpy as np
import pytest

from tests.support import convex, planted

STRIDE = 12  # The default part: every twelfth of the cases.


def misjudged(cases):
  """Those that are proved, and those whose certificate is an error."""
  return [f"{c}: {v}" for c in cases if (v := planted.verdict(c)) != "UNKNOWN"]


def test_none_of_some_planted_cases_is_proved():
  assert misjudged(list(planted.cases(planted.QUICK))[::STRIDE]) == []


@pytest.mark.slow
@pytest.mark.parametrize("family", planted.FAMILIES, ids=lambda f: f.__name__)
def test_none_of_all_planted_cases_is_proved(family):
  cases = list(family())
  assert [str(c) for c in cases if not planted.gap(c) > 1] == []
  assert misjudged(cases) == []


def test_every_planted_pair_violates_the_inequality_and_they_are_many():
  """In long doubles, by a reference in numpy: the certificate takes no part."""
  cases = list(planted.cases(planted.QUICK))
  assert [str(c) for c in cases if not planted.gap(c) > 1] == []
  assert len(cases) >= 600 and len({str(c) for c in cases}) == len(cases)


def test_a_convex_function_has_no_such_pair():
  """The negative control of `gap`."""
  case = next(planted.scalars())
  for reference in (np.abs, np.exp, lambda x: x * x, lambda x: 3 * x - 1):
    assert not planted.gap(dataclasses.replace(case, reference=reference)) > 1


@pytest.mark.slow
@pytest.mark.parametrize("family", planted.FAMILIES, ids=lambda f: f.__name__)
def test_programs_are_what_their_references_say(family):
  cases = [c for c in family() if not c.change and c.family not in planted.ROUNDED]
  assert [str(c) for c in cases if not planted.disagreement(c) < 0.05] == []


def test_some_convex_functions_are_proved():
  cases = list(convex.cases())
  assert len(cases) >= 200 and len({str(c) for c in cases}) == len(cases)
  known = [c for c in cases if str(c) not in convex.UNPROVED][::STRIDE]
  assert [str(c) for c in known if not planted.proved(c)] == []


@pytest.mark.slow
def test_nearly_all_convex_functions_are_proved():
  cases = list(convex.cases())
  missed = {str(c) for c in cases if planted.verdict(c) != "PROVED"}
  assert missed <= convex.UNPROVED and len(missed) <= 0.05 * len(cases)


@pytest.mark.slow
def test_convex_functions_are_convex():
  assert [str(c) for c in convex.cases() if not convex.largest_gap(c) < convex.tolerance(c)] == []


def test_the_sampling_of_convex_functions_can_fail():
  case = dataclasses.replace(next(convex.cases()), program=lambda x: -x * x)
  assert convex.largest_gap(case) > convex.tolerance(case)
