"""The scores of all methods by layer, as one SVG picture."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zoo.conversion.core.select import Ranking


def plot(rankings: Mapping[str, Ranking], depth: int) -> str:
    """One row per method and one column per layer: darker is a higher score, from the method's least to its most; a
    dot marks the layers it keeps. A method without scores has dots alone."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    figure = Figure(figsize=(1.8 + 0.32 * depth, 0.9 + 0.34 * len(rankings)), layout="constrained")
    axes = figure.add_subplot()
    for row, ranking in enumerate(rankings.values()):
        low, high = min(ranking.scores.values(), default=0.0), max(ranking.scores.values(), default=0.0)
        for layer, score in ranking.scores.items():
            shade = (score - low) / (high - low) if high > low else 0.0
            axes.add_patch(Rectangle((layer - 0.5, row - 0.5), 1, 1, color="#2563a8", alpha=shade))
        axes.plot(ranking.keep, [row] * len(ranking.keep), "o", color="#c2571a", markersize=5)
    axes.set(xlim=(-0.5, depth - 0.5), ylim=(len(rankings) - 0.5, -0.5), xlabel="layer")
    axes.set_yticks(range(len(rankings)), list(rankings))
    axes.set_xticks(range(0, depth, max(1, depth // 16)))
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "zoo"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
