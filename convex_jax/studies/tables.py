"""Twins side by side: what a report's tables hold, as text."""

import itertools
import math
import statistics
from collections.abc import Callable, Iterable

from convex_jax.studies.results import Point, Result, Results


def panels_of(found: Results) -> dict[str, dict[str, list[Result]]]:
  """The results by panel and variant, in the order in which they stand.

  Where there are several schedules each is a panel of its own: they are not to be compared.
  """
  several = len({row.schedule for row in found.rows}) > 1
  panels: dict[str, dict[str, list[Result]]] = {}
  for row in found.rows:
    name = f"{row.panel} ({row.schedule})" if several else row.panel
    panels.setdefault(name, {}).setdefault(row.variant, []).append(row)
  return panels


def mean_and_spread(values: Iterable[float], scale: float = 1.0, digits: int = 2) -> str:
  """Mean +- standard deviation of a sample (n - 1); the mean alone of one; "" of none."""
  known = [scale * value for value in values if not math.isnan(value)]
  if not known:
    return ""
  mean = f"{statistics.fmean(known):.{digits}f}"
  return mean if len(known) == 1 else f"{mean} ± {statistics.stdev(known):.{digits}f}"


def difference(ours: list[Result], reference: list[Result]) -> str:
  """Test accuracy less the reference's, points, with its standard error from 2 runs of each.

  sqrt(s1^2 / n1 + s2^2 / n2), as in Welch's test.
  """
  samples = [
    [100 * row.test_accuracy for row in rows if not math.isnan(row.test_accuracy)]
    for rows in (ours, reference)
  ]
  if not all(samples):
    return ""
  by = statistics.fmean(samples[0]) - statistics.fmean(samples[1])
  if min(map(len, samples)) < 2:
    return f"{by:+.2f}"
  error = math.sqrt(sum(statistics.variance(sample) / len(sample) for sample in samples))
  return f"{by:+.2f} ± {error:.2f}"


def verdict(rows: list[Result]) -> str:
  """What the certificates say of all of a variant's runs."""
  asked = [row for row in rows if row.certificate]
  if not asked:
    return "not asked"
  verdicts = {row.certificate for row in asked}
  if verdicts == {"PROVED"}:
    return "proved" if len(asked) == len(rows) else f"proved, {len(asked)} of {len(rows)} asked"
  words = " and ".join(sorted(verdict.lower() for verdict in verdicts))
  first = next((row.broken_by for row in asked if row.broken_by), "")
  return f"{words}: {first}" if first else words


def source(rows: list[Result]) -> str:
  """What the claim's source found: train / test accuracy, %."""
  both = (rows[0].source_train_accuracy, rows[0].source_test_accuracy)
  if all(math.isnan(value) for value in both):
    return ""
  return " / ".join("-" if math.isnan(value) else f"{100 * value:.2f}" for value in both)


def _ended(rows: list[Result]) -> str:
  diverged = sum(row.outcome == "diverged" for row in rows)
  return f"{len(rows)}, {diverged} diverged" if diverged else str(len(rows))


def peak(rows: list[Result]) -> str:
  """The best test accuracy of all evaluations, and the epoch of it."""
  best = mean_and_spread((row.peak_test_accuracy for row in rows), 100)
  epochs = [row.peak_epoch for row in rows if not math.isnan(row.peak_epoch)]
  return f"{best} (mean epoch {statistics.fmean(epochs):.0f})" if best and epochs else ""


def stopped_early(rows: list[Result], course: list[Point]) -> str:
  """Test accuracy of another variant, stopped where it reaches these runs' train accuracy.

  `course`: its evaluations; those of a run's own seed count, with a straight line between two
  of them. What a free network is worth that fits the training split no better than a convex
  one: a fair comparison of generalisation. A seed that never gets there, or is beyond it at
  its first evaluation, is left out, and the cell says how many count.
  """
  found = []
  for row in rows:
    points = sorted((p for p in course if p.seed == row.seed), key=lambda p: p.epoch)
    if not points or points[0].train_accuracy > row.train_accuracy:
      continue
    for before, after in itertools.pairwise(points):
      if row.train_accuracy <= after.train_accuracy:  # For the first time.
        rise = after.train_accuracy - before.train_accuracy
        share = (row.train_accuracy - before.train_accuracy) / rise if rise else 0.0
        found.append(before.test_accuracy + share * (after.test_accuracy - before.test_accuracy))
        break
  counted = f" ({len(found)} of {len(rows)} seeds)" if 0 < len(found) < len(rows) else ""
  return mean_and_spread(found, 100) + counted


# Of a variant's runs, the first variant's, and the evaluations of these.
Cell = Callable[[list[Result], list[Result], list[Point]], str]
COLUMNS: dict[str, Cell] = {
  "runs": lambda rows, *_: _ended(rows),
  "epochs": lambda rows, *_: f"{rows[0].epochs:g}",
  "train accuracy, %": lambda rows, *_: mean_and_spread((r.train_accuracy for r in rows), 100),
  "test accuracy, %": lambda rows, *_: mean_and_spread((r.test_accuracy for r in rows), 100),
  "of the first, points": lambda rows, first, _: "" if rows is first else difference(rows, first),
  "source, train / test, %": lambda rows, *_: source(rows),
  "gap, points": lambda rows, *_: mean_and_spread((r.gap for r in rows), 100),
  "peak test accuracy, %": lambda rows, *_: peak(rows),
  "the first's, stopped early at this train accuracy, %": lambda rows, first, course: (
    "" if rows is first else stopped_early(rows, course)
  ),
  "train loss, nats": lambda rows, *_: mean_and_spread((r.train_loss for r in rows), 1, 3),
  "test loss, nats": lambda rows, *_: mean_and_spread((r.test_loss for r in rows), 1, 3),
  "calibration error, %": lambda rows, *_: mean_and_spread(
    (r.test_calibration_error for r in rows), 100
  ),
  "zero weights, %": lambda rows, *_: mean_and_spread((r.zero_share for r in rows), 100, 1),
  "parameters": lambda rows, *_: f"{rows[0].parameters:,}",
  "seconds a run": lambda rows, *_: mean_and_spread((r.seconds for r in rows), 1, 0),
  "convex": lambda rows, *_: verdict(rows),
}


def table(variants: dict[str, list[Result]], course: list[Point]) -> str:
  """A panel's Markdown table, a row a variant; columns that would be empty are left out.

  `course`: the evaluations of the first variant.
  """
  first = next(iter(variants.values()))
  body = {
    heading: [cell(rows, first, course).replace("|", "\\|") for rows in variants.values()]
    for heading, cell in COLUMNS.items()
  }
  body = {heading: cells for heading, cells in body.items() if any(cells)}
  lines = ["| variant | " + " | ".join(body) + " |", "|---|" + "---:|" * (len(body) - 1) + "---|"]
  for name, cells in zip(variants, zip(*body.values(), strict=True), strict=True):
    lines.append(f"| {name} | " + " | ".join(cells) + " |")
  return "\n".join(lines)
