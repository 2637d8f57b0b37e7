"""The table and the plot of what `sparse_quality.py` measured.

python benchmarks/sparse_quality_report.py docs/sparse.md
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

FILE = Path(__file__).parent / "results" / "sparse-quality.csv"
MARKS = ("<!-- sparse -->", "<!-- /sparse -->")


def read(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") if file.is_file() else open("/dev/null") as lines:
        return list(csv.DictReader(lines))


def table(rows: Sequence[dict[str, str]]) -> str:
    """A line per method: needle and ratio of perplexities at each budget."""
    budgets = sorted({float(row["budget"]) for row in rows if row["method"] != "dense"})
    lines = [
        "| method | chooses in | " + " | ".join(f"needle, {budget:.0%}" for budget in budgets)
        + " | " + " | ".join(f"perplexity, {budget:.0%}" for budget in budgets) + " |",
        "|" + " --- |" * (2 + 2 * len(budgets)),
    ]  # fmt: skip
    for method in dict.fromkeys(row["method"] for row in rows):
        own = {float(row["budget"]): row for row in rows if row["method"] == method}
        if method == "dense":
            row = own[1.0]
            cells = [f"{float(row['needle']):.2f}"] * len(budgets) + [f"{float(row['perplexity']):.2f}"] * len(budgets)
        else:
            found = [own.get(budget, {}) for budget in budgets]
            cells = [f"{float(row['needle']):.2f}" if row.get("needle") else "" for row in found]
            cells += [f"{float(row['ratio']):.3f}" if row.get("ratio") else "" for row in found]
        phases = next(iter(own.values()))["phases"].replace("+", " and ")
        lines.append(f"| `{method}` | {phases} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def best(rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """The rows without errors of the run with the most samples, the last of each method and budget."""
    rows = [row for row in rows if not row["error"]]
    most = max((int(row["samples"]), int(row["windows"])) for row in rows)
    kept = [row for row in rows if (int(row["samples"]), int(row["windows"])) == most]
    return list({(row["method"], row["budget"]): row for row in kept}.values())


def plot(rows: Sequence[dict[str, str]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    budgets = sorted({float(row["budget"]) for row in rows if row["method"] != "dense"})
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), sharex=True)
    dense = next(row for row in rows if row["method"] == "dense")
    for column, phase in enumerate(("prefill", "decode")):
        for line, (name, label) in enumerate((("needle", "needle accuracy"), ("ratio", "perplexity / dense"))):
            axis = axes[line][column]
            for method in dict.fromkeys(row["method"] for row in rows if phase in row["phases"].split("+")):
                own = sorted((float(row["budget"]), float(row[name])) for row in rows if row["method"] == method)
                axis.plot(*zip(*own, strict=True), marker="o", markersize=3, label=method)
            axis.axhline(float(dense[name]), color="black", linewidth=0.8, linestyle="--")
            axis.set(ylabel=label, xscale="log")
            axis.set_xticks(budgets, [f"{budget:.0%}" for budget in budgets], minor=False)
            axis.set_xticks([], minor=True)
        axes[0][column].set_title(f"methods that choose in {phase}")
        axes[0][column].legend(fontsize=7)
        axes[1][column].set_xlabel("budget")
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def write_table(rows: Sequence[dict[str, str]], page: Path) -> None:
    """Put the table between the marks of a page."""
    before, _, rest = page.read_text().partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    page.write_text(f"{before}{MARKS[0]}\n{table(rows)}\n{MARKS[1]}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="the page whose table is rewritten")
    parser.add_argument("--results", type=Path, default=FILE, help="the plot is written beside it")
    args = parser.parse_args()
    rows = best(read(args.results))
    write_table(rows, args.page)
    plot(rows, args.results.with_suffix(".png"))


if __name__ == "__main__":
    main()
