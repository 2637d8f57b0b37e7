"""Plots of single samples: where in a text recall is lost, and what a byte of state buys."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from zoo.evals.core.figures import COLOURS, Plot, draw, figure_and_axes, legend, svg
from zoo.evals.core.records import Record
from zoo.evals.core.result import Result, Row
from zoo.evals.core.statistics import curve, proportion
from zoo.evals.core.summary import Run, count, size

DEPTHS = 5  # bands of the depth of a needle
METRIC = "accuracy"


def depth_plots(runs: Sequence[Run]) -> list[Plot]:
    """For every task whose samples have a length and a depth: a heat map per run and the curve by depth."""
    found: list[Plot] = []
    for task in dict.fromkeys(task for _, results in runs for task in results):
        own = [(label, deep) for label, results in runs if (deep := _deep(results.get(task)))]
        found += [_heat(task, label, records) for label, records in own]
        if own:
            found.append(_by_depth(task, own))
    return found


def _deep(result: Result | None) -> list[Record]:
    records = () if result is None else result.records
    return [r for r in records if METRIC in r.scores and {"length", "depth"} <= set(r.at)]


def _band(record: Record) -> int:
    """Band of a depth in percent."""
    return min(DEPTHS - 1, int(record.at["depth"]) * DEPTHS // 100)


def _heat(task: str, label: str, records: Sequence[Record]) -> Plot:
    lengths = sorted({int(record.at["length"]) for record in records})
    hits: dict[tuple[int, int], list[float]] = defaultdict(list)
    for record in records:
        hits[_band(record), lengths.index(int(record.at["length"]))].append(float(record.scores[METRIC]))
    figure, axes = figure_and_axes()
    axes.grid(visible=False)
    cells = [[_mean(hits.get((y, x), [])) for x in range(len(lengths))] for y in range(DEPTHS)]
    axes.pcolormesh(cells, vmin=0, vmax=1, cmap="RdYlGn", edgecolors="white")
    for (y, x), values in hits.items():
        axes.text(x + 0.5, y + 0.5, f"{_mean(values):.2f}\nn {len(values)}", ha="center", va="center", fontsize=8)
    axes.set_xticks([x + 0.5 for x in range(len(lengths))], [count(length) for length in lengths])
    step = 100 // DEPTHS
    axes.set_yticks([y + 0.5 for y in range(DEPTHS)], [f"{step * i} to {step * (i + 1)}%" for i in range(DEPTHS)])
    axes.invert_yaxis()
    axes.set(xlabel="length, tokens", ylabel="depth of the needle")
    caption = "Share of needles read back, by length and by depth in the text; n samples a cell, blank where none lie."
    return Plot(f"{task}: {label}", caption, svg(figure))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def _by_depth(task: str, runs: Sequence[tuple[str, Sequence[Record]]]) -> Plot:
    figure, axes = figure_and_axes()
    for i, (label, records) in enumerate(runs):
        bands: dict[int, list[bool]] = defaultdict(list)
        for record in records:
            bands[_band(record)].append(record.scores[METRIC] == 1)
        rows = [proportion(METRIC, hits, {"band": band}) for band, hits in sorted(bands.items())]
        draw(axes, label, curve(rows, _middle), COLOURS[i % len(COLOURS)], bars=True)
    axes.set(xlabel="depth of the needle, % of the text", ylabel="accuracy", xlim=(0, 100), ylim=(-0.03, 1.03))
    legend(axes)
    caption = "Share of needles read back at every depth, all lengths together. Bars are Wilson 95% intervals."
    return Plot(f"{task} by depth", caption, svg(figure))


def _middle(row: Row) -> float:
    return (int(row.at["band"]) + 0.5) * 100 / DEPTHS


def recall_plot(runs: Sequence[Run], tasks: Sequence[str] = ("key_value", "needle")) -> Plot | None:
    """Recall against the bytes that one sequence keeps, at the length that efficiency has first."""
    points = [
        (label, task, float(state), _accuracy(results[task]))
        for label, results in runs
        for task in tasks
        if task in results and (state := _state(results)) is not None
    ]
    if not points:
        return None
    figure, axes = figure_and_axes()
    for i, task in enumerate(dict.fromkeys(task for _, task, *_ in points)):
        own = [point for point in points if point[1] == task]
        axes.scatter([x for *_, x, _ in own], [y for *_, y in own], color=COLOURS[i], label=task)
        for label, _, x, y in own:
            axes.annotate(label, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: size(value))
    axes.set(xlabel="bytes of state of one sequence", ylabel="accuracy", ylim=(-0.03, 1.08))
    legend(axes)
    caption = "Mean accuracy of a recall task against the bytes of cache at the shortest length that was measured."
    return Plot("Recall against state", caption, svg(figure))


def _state(results: Any) -> float | None:
    rows = [] if "efficiency" not in results else results["efficiency"].select("state_bytes")
    return next((row.value for row in rows if "of" not in row.at), None)


def _accuracy(result: Result) -> float:
    return _mean([row.value for row in result.select(METRIC)])
