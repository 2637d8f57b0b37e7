"""Plots of the numbers of results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from zoo.evals.core.figures import COLOURS, Plot, draw, figure_and_axes, legend, svg
from zoo.evals.core.sample_plots import depth_plots, recall_plot
from zoo.evals.core.summary import Run, count, size


def plots(runs: Sequence[Run]) -> list[Plot]:
    """One plot per kind of result that at least one run has."""
    makers = (_perplexity, _needle, _kl, _state, recall_plot, _speed)
    return [plot for make in makers if (plot := make(runs)) is not None] + depth_plots(runs)


def _perplexity(runs: Sequence[Run]) -> Plot | None:
    def style(axes: Any) -> None:
        axes.set(xlabel="position in the window, tokens", ylabel="perplexity")
        axes.set_yscale("log")
        _plain_ticks(axes)

    caption = "Perplexity of the tokens at each position of a window. Bands are 95% intervals over windows."
    return _curves(runs, "perplexity", "perplexity_by_position", "Perplexity by position", caption, style)


def _needle(runs: Sequence[Run]) -> Plot | None:
    def style(axes: Any) -> None:
        axes.set(xlabel="length, tokens", ylabel="accuracy", ylim=(-0.03, 1.03))
        _length_axis(axes)

    caption = "Share of 7-digit needles read back. Bars are Wilson 95% intervals."
    return _curves(runs, "needle", "needle", "Needle by length", caption, style, bars=True)


def _kl(runs: Sequence[Run]) -> Plot | None:
    def style(axes: Any) -> None:
        axes.set(xlabel="position in the window, tokens", ylabel="KL, nats per token", ylim=(0, None))

    caption = "KL(teacher || model) at each position of a window. Bands are 95% intervals over windows."
    return _curves(runs, "fidelity", "kl_by_position", "Divergence from the teacher", caption, style)


def _state(runs: Sequence[Run]) -> Plot | None:
    def style(axes: Any) -> None:
        axes.set(xlabel="length, tokens", ylabel="bytes per sequence")
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(lambda value, _: size(value))
        _length_axis(axes)

    caption = "Bytes of cache that one sequence needs, both axes logarithmic."
    return _curves(runs, "efficiency", "state_bytes/model", "State by length", caption, style)


def _speed(runs: Sequence[Run]) -> Plot | None:
    bars = [(label, *speed) for label, results in runs if "efficiency" in results for speed in _speeds(results)]
    if not bars:
        return None
    figure, axes = figure_and_axes()
    names = [f"{label}, {length}" for label, kind, length, _ in bars if kind == "prefill"]
    for offset, kind in ((-0.2, "prefill"), (0.2, "decode")):
        speeds = [value for _, which, _, value in bars if which == kind]
        axes.barh([i + offset for i in range(len(speeds))], speeds, 0.38, label=kind, color=COLOURS[offset > 0])
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlabel="tokens per second", xscale="log")
    legend(axes)
    caption = "Median speed after a prompt of the given length, all models on the hardware named below."
    return Plot("Tokens per second", caption, svg(figure))


def _speeds(results: Any) -> Iterator[tuple[str, str, float]]:
    for kind in ("prefill", "decode"):
        for row in results["efficiency"].select(f"{kind}_tokens_per_second"):
            if "of" not in row.at:
                yield kind, count(int(row.at["length"])), row.value


def _curves(
    runs: Sequence[Run],
    task: str,
    series: str,
    title: str,
    caption: str,
    style: Callable[[Any], None],
    bars: bool = False,
) -> Plot | None:
    found = [(label, results[task].series[series]) for label, results in runs if _has(results, task, series)]
    if not found:
        return None
    figure, axes = figure_and_axes()
    for i, (label, curve) in enumerate(found):
        draw(axes, label, curve, COLOURS[i % len(COLOURS)], bars)
    style(axes)
    legend(axes)
    return Plot(title, caption, svg(figure))


def _has(results: Any, task: str, series: str) -> bool:
    return task in results and bool(results[task].series.get(series, {}).get("x"))


def _plain_ticks(axes: Any) -> None:
    for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis(lambda value, _: f"{value:g}")


def _length_axis(axes: Any) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: count(round(value)))
