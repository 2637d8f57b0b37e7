"""Uncertainty of the numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from zoo.evals.core.result import Row

Z95 = 1.959964


def wilson(hits: int, n: int) -> tuple[float, float]:
    """Wilson's 95% interval for a proportion: honest at 0 and 1, where the normal interval has no width."""
    p, z2 = hits / n, Z95 * Z95
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half))


def proportion(metric: str, hits: Sequence[bool], at: Mapping[str, int | str]) -> Row:
    """Share of hits, with its binomial standard error and Wilson interval."""
    n, total = len(hits), sum(hits)
    p = total / n
    return Row(metric, p, n=n, stderr=math.sqrt(p * (1 - p) / n), ci95=wilson(total, n), at=dict(at))


def mean_row(metric: str, values: Sequence[float], at: Mapping[str, int | str] | None = None) -> Row:
    """Mean of independent values (one per window), with standard error and normal interval."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return Row(metric, mean, n=n, at=dict(at or {}))
    stderr = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)
    return Row(metric, mean, n=n, stderr=stderr, ci95=(mean - Z95 * stderr, mean + Z95 * stderr), at=dict(at or {}))


def exponential(metric: str, row: Row) -> Row:
    """exp of a row; the interval is transformed, the standard error by the delta method."""
    value = math.exp(row.value)
    interval = None if row.ci95 is None else (math.exp(row.ci95[0]), math.exp(row.ci95[1]))
    return Row(
        metric, value, n=row.n, stderr=None if row.stderr is None else value * row.stderr, ci95=interval, at=row.at
    )


def curve(rows: Sequence[Row], place: Callable[[Row], float]) -> dict[str, list[float]]:
    """The rows as a curve over `place(row)`, with their intervals."""
    low, high = ([(row.ci95 or (row.value, row.value))[side] for row in rows] for side in (0, 1))
    return {"x": [place(row) for row in rows], "y": [row.value for row in rows], "low": low, "high": high}


def centre(row: Row) -> float:
    """Middle of the row's range of positions."""
    return (int(row.at["position"]) + int(row.at["end"])) / 2
