"""The README's tables, from the results beside this file: `python -m experiments.readme`.

Each stands between two comments, `<!-- NAME -->` and `<!-- /NAME -->`.
"""

import csv
import pathlib
import statistics

from convex_jax import report, results

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


def claims() -> str:
  """The report's figures, and ours: a row a panel, variant and schedule."""
  heads = ["network, data", "schedule", "twin", "source: train / test, %", "train, %", "test, %"]
  heads += ["convex", "step, of the base's"]
  rows = []
  for claim in CLAIMS:
    found = results.read(str(FOLDER / claim))
    for panel, variants in report.panels_of(found).items():
      first = next(iter(variants.values()))
      for variant, of_variant in variants.items():
        time, base = (median_seconds(some) for some in (of_variant, first))
        rows.append(
          [
            f"[{panel}](experiments/{claim}/README.md)",
            of_variant[0].schedule,
            variant,
            report.source(of_variant),
            report.mean_and_spread((row.train_accuracy for row in of_variant), 100, 1),
            report.mean_and_spread((row.test_accuracy for row in of_variant), 100, 1),
            report.verdict(of_variant).split(":")[0],
            f"{time / base:.2f}",
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
