"""Twins compared: the cells of a report's tables, as text."""

import itertools
import math
import statistics
from collections.abc import Callable, Iterable

from convex_jax.studies.results import Point, Result, Results


def panels_of(found: Results) -> dict[str, dict[str, list[Result]]]:
  """The results by panel and variant, in the order of the rows.

  Several schedules get a panel each: they are not comparable.
  """
  several = len({row.schedule for row in found.rows}) > 1
  panels: dict[str, dict[str, list[Result]]] = {}
  for row in found.rows:
    name = f"{row.panel} ({row.schedule})" if several else row.panel
    panels.setdefault(name, {}).setdefault(row.variant, []).append(row)
  return panels


def mean_and_spread(values: Iterable[float], scale: float = 1.0, digits: int = 2) -> str:
  """Mean ± standard deviation of a sample (n - 1); the mean alone of one value; "" of none."""
  known = [scale * value for value in values if not math.isnan(value)]
  if not known:
    return ""
  form = f".{digits}f" if statistics.fmean(known) < 1e5 else ".1e"
  mean = f"{statistics.fmean(known):{form}}"
  return mean if len(known) == 1 else f"{mean} ± {statistics.stdev(known):{form}}"


def difference(ours: list[Result], reference: list[Result]) -> str:
  """Test accuracy minus the reference's, points; with its standard error from 2 runs of each.

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
  """The verdict of the certificates of a variant's runs."""
  certified = [row.certificate.lower() for row in rows if row.certificate]
  if not certified:
    return "not certified"
  words = " and ".join(sorted(set(certified)))
  return words if len(certified) == len(rows) else f"{words} ({len(certified)} of {len(rows)} runs)"


def broken_by(rows: list[Result]) -> str:
  """The first operation that breaks the convexity of a variant, or ""."""
  return next((row.broken_by for row in rows if row.broken_by), "")


def source(rows: list[Result]) -> str:
  """The train / test accuracy that the claim's source reports, %."""
  both = (rows[0].source_train_accuracy, rows[0].source_test_accuracy)
  if all(math.isnan(value) for value in both):
    return ""
  return " / ".join("-" if math.isnan(value) else f"{100 * value:.2f}" for value in both)


def _runs(rows: list[Result]) -> str:
  diverged = sum(row.outcome == "diverged" for row in rows)
  return f"{len(rows)} ({diverged} diverged)" if diverged else str(len(rows))


def epochs(value: float) -> str:
  """A number of epochs, an integer where the run ended with the first step after it."""
  nearest = round(value)
  return str(nearest) if nearest and abs(value - nearest) < 0.05 else f"{value:.3g}"


def peak_epoch(rows: list[Result]) -> str:
  """The epoch of the best evaluation, a mean over runs."""
  known = [row.peak_epoch for row in rows if not math.isnan(row.peak_epoch)]
  return f"{statistics.fmean(known):.0f}" if known else ""


def stopped_early(rows: list[Result], baseline: list[Point]) -> str:
  """Test accuracy of the baseline, stopped where it reaches these runs' train accuracy, %.

  `baseline`: its evaluations; a run is compared with those of its own seed, interpolated
  linearly. What a free network achieves that fits the training split no better than a convex
  one: a fair comparison of generalisation. A seed that never gets there, or is beyond it at
  its first evaluation, is left out, and the cell says how many count.
  """
  found = []
  for row in rows:
    points = sorted((p for p in baseline if p.seed == row.seed), key=lambda p: p.epoch)
    if not points or points[0].train_accuracy > row.train_accuracy:
      continue
    for before, after in itertools.pairwise(points):
      if row.train_accuracy <= after.train_accuracy:  # For the first time.
        rise = after.train_accuracy - before.train_accuracy
        fraction = (row.train_accuracy - before.train_accuracy) / rise if rise else 0.0
        found.append(before.test_accuracy + fraction * (after.test_accuracy - before.test_accuracy))
        break
  counted = f" ({len(found)} of {len(rows)} seeds)" if 0 < len(found) < len(rows) else ""
  return mean_and_spread(found, 100) + counted


# A cell from the runs of a variant, the runs of the baseline (the first variant), and the
# baseline's evaluations.
Cell = Callable[[list[Result], list[Result], list[Point]], str]


def _mean(field: str, scale: float = 1.0, digits: int = 2) -> Cell:
  return lambda rows, *_: mean_and_spread((getattr(row, field) for row in rows), scale, digits)


RESULTS: dict[str, Cell] = {
  "train accuracy (%)": _mean("train_accuracy", 100),
  "test accuracy (%)": _mean("test_accuracy", 100),
  "vs. baseline (points)": lambda rows, baseline, _: (
    "" if rows is baseline else difference(rows, baseline)
  ),
  "baseline early-stopped at equal train accuracy, test (%)": lambda rows, baseline, points: (
    "" if rows is baseline else stopped_early(rows, points)
  ),
  "gap (points)": _mean("gap", 100),
  "source, train / test (%)": lambda rows, *_: source(rows),
  "convex": lambda rows, *_: verdict(rows),
}
DETAILS: dict[str, Cell] = {
  "runs": lambda rows, *_: _runs(rows),
  "epochs": lambda rows, *_: epochs(rows[0].epochs),
  "best test accuracy (%)": _mean("peak_test_accuracy", 100),
  "its epoch": lambda rows, *_: peak_epoch(rows),
  "train loss (nats)": _mean("train_loss", 1, 3),
  "test loss (nats)": _mean("test_loss", 1, 3),
  "calibration error (%)": _mean("test_calibration_error", 100),
  "zero weights (%)": _mean("zero_share", 100, 1),
  "parameters": lambda rows, *_: f"{rows[0].parameters:,}",
  "seconds per run": _mean("seconds", 1, 0),
}


def table(
  columns: dict[str, Cell], variants: dict[str, list[Result]], baseline: list[Point]
) -> str:
  """A Markdown table with a row for each variant; columns that would be empty are left out.

  `baseline`: the evaluations of the first variant.
  """
  first = next(iter(variants.values()))
  body = {
    heading: [cell(rows, first, baseline) for rows in variants.values()]
    for heading, cell in columns.items()
  }
  body = {heading: cells for heading, cells in body.items() if any(cells)}
  return markdown(["variant", *body], zip(variants, *body.values(), strict=True))


def markdown(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
  """A Markdown table, with the columns of numbers to the right."""
  lines = [list(headings), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
  columns = list(zip(*lines[1:], strict=True))
  are_numbers = [all(c[:1] in "+-0123456789" for c in cells) for cells in columns]
  lines.insert(1, ["---:" if numbers else "---" for numbers in are_numbers])
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)
