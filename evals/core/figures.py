"""Figures as SVG text, to stand inside an HTML page."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import Any

COLOURS = ("#2563a8", "#c2571a", "#2f8f5b", "#7b4ea3", "#b03a5b", "#6b6b6b", "#a08a1c", "#1c8fa0")


@dataclass(frozen=True)
class Plot:
    """A heading, a sentence that says how to read it, and the picture."""

    title: str
    caption: str
    svg: str


def figure_and_axes() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw(axes: Any, label: str, curve: Any, colour: str, bars: bool) -> None:
    """A curve with its intervals, as bars or as a band."""
    x, y, low, high = (curve.get(name) for name in ("x", "y", "low", "high"))
    if not bars or low is None:
        axes.plot(x, y, marker="o", markersize=3, color=colour, label=label)
        if low is not None:
            axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
        return
    below = [max(0.0, value - bound) for value, bound in zip(y, low, strict=True)]
    above = [max(0.0, bound - value) for value, bound in zip(y, high, strict=True)]
    axes.errorbar(x, y, [below, above], marker="o", markersize=4, capsize=3, color=colour, label=label)


def legend(axes: Any) -> None:
    axes.legend(frameon=False, fontsize="small")


def svg(figure: Any) -> str:
    """The figure as an `<svg>` element with its text as text, without anything that changes from run to run."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "zoo", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'width="100%" role="img"', text, count=1)
