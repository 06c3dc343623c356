"""The README's tables, from the results beside this file: `python -m experiments.readme`.

Each stands between two comments, `<!-- NAME -->` and `<!-- /NAME -->`.
"""

import csv
import pathlib
import statistics

from convex_jax.studies import results, tables

FOLDER = pathlib.Path(__file__).parent
CLAIMS = ("mlp", "mixer", "cycle_mlp", "convolutions", "convex_head")


def read(path: str) -> list[dict[str, str]]:
  with open(FOLDER / path, newline="") as file:
    return list(csv.DictReader(file))


def markdown(heads: list[str], rows: list[list[str]]) -> str:
  lines = [heads, ["---"] * len(heads), *rows]
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def faults() -> str:
  """What was injected, and what was left."""
  rows = read("faults/results.csv")
  keys = ["fault", "injected", "survived", "steps redone at most", "examples lost"]
  keys += ["examples repeated", "seconds to resume"]
  injected, survived = (sum(int(row[key]) for row in rows) for key in ("injected", "survived"))
  return (
    "Faults injected on two cores, and what was left"
    " ([experiments/faults](experiments/faults/README.md),\n"
    f"`python -m experiments.faults.run`): {injected} injected, {survived} survived, no example"
    " lost or repeated, none silently wrong.\n\n"
    + markdown(keys, [[r[k] for k in keys] for r in rows])
  )


def speed() -> str:
  """Training rates, of PyTorch's best, and what the constraint costs."""
  heads = ["training, images/s of PyTorch's best", "base", "`ioc`"]
  heads += ["`ioc`, step of the base's with its norm"]
  cases: dict[str, dict[str, dict[str, str]]] = {}
  for row in read("speed/results.csv"):
    cases.setdefault(row["case"], {})[row["way"]] = row
  rows = [
    [
      name,
      *(f"{float(ways[way]['train_ratio']):.2f}" for way in ("base", "ioc")),
      f"{float(ways['ioc']['cost_of_ioc']):.2f}",
    ]
    for name, ways in cases.items()
  ]
  return markdown(heads, rows)


def median_seconds(rows: list[results.Result]) -> float:
  known = [row.seconds for row in rows if row.outcome == "finished"]
  return statistics.median(known) if known else results.UNKNOWN


def train_and_test(rows: list[results.Result]) -> str:
  """Mean accuracies, and the deviation of the second, where seeds give one."""
  if not rows:
    return ""
  train = f"{100 * statistics.fmean(row.train_accuracy for row in rows):.1f}"
  return f"{train} / {tables.mean_and_spread((row.test_accuracy for row in rows), 100, 1)}"


def claims() -> str:
  """The sources' figures, and ours: a row a panel and schedule."""
  heads = ["network, data", "schedule, seeds", "source: base", "source: convex", "base", "`paper`"]
  heads += ["`ioc`", "`ioc` convex", "a run of it, seconds"]
  panels: dict[tuple[str, str, str], dict[str, list[results.Result]]] = {}
  for claim in CLAIMS:
    for row in results.read(str(FOLDER / claim)).rows:
      where = panels.setdefault((claim, row.panel, row.schedule), {})
      where.setdefault(row.variant, []).append(row)
  rows = []
  for (claim, panel, schedule), variants in panels.items():
    base, paper, ioc = (variants.get(twin, []) for twin in ("base", "paper", "ioc"))
    fair = variants.get("base, BatchNorm", [])  # With the norm of `ioc`: its fair partner.
    of_base = train_and_test(base) or (f"{train_and_test(fair)}, with BatchNorm" if fair else "")
    if ioc:
      rows.append(
        [
          f"[{panel}](experiments/{claim}/README.md)",
          f"{schedule}, {len(ioc)}",
          tables.source(base) if base else "",
          tables.source(ioc) or (tables.source(paper) if paper else ""),
          of_base,
          *map(train_and_test, (paper, ioc)),
          tables.verdict(ioc).split(":")[0],
          f"{median_seconds(ioc):,.0f}",
        ]
      )
  return markdown(heads, rows)


def main() -> None:
  path = FOLDER.parent / "README.md"
  text = path.read_text()
  for mark, made in {"faults": faults(), "speed": speed(), "claims": claims()}.items():
    before, found, rest = text.partition(f"<!-- {mark} -->\n")
    _, closed, after = rest.partition(f"\n<!-- /{mark} -->")
    assert found and closed, f"README.md has no place for {mark}"
    text = before + found + made + closed + after
  path.write_text(text)


if __name__ == "__main__":
  main()
