"""The numbers of several runs side by side; a run is (label, results by task)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from zoo.evals.core.result import Result, Row

Run = tuple[str, Mapping[str, Result]]
Key = tuple[str, str, tuple[tuple[str, int | str], ...]]
_UNITS = ("B", "KB", "MB", "GB", "TB")
_HIDDEN = ("nll", "tokens", "first_number", "position_perplexity", "position_kl")


@dataclass(frozen=True)
class Line:
    """One metric at one place, and its text in each run ("" where the run did not measure it)."""

    task: str
    metric: str
    cells: tuple[str, ...]


def summary(runs: Sequence[Run]) -> list[Line]:
    """Every metric that belongs in a table, in the order in which the runs first have it."""
    found: list[dict[Key, Row]] = [_rows(results) for _, results in runs]
    keys = list(dict.fromkeys(key for rows in found for key in rows))
    order = {task: i for i, task in enumerate(dict.fromkeys(key[0] for key in keys))}
    keys.sort(key=lambda key: order[key[0]])
    return [Line(key[0], _title(key), tuple(_cell(rows.get(key)) for rows in found)) for key in keys]


def _rows(results: Mapping[str, Result]) -> dict[Key, Row]:
    return {
        (task, row.metric, tuple(sorted(row.at.items()))): row
        for task, result in results.items()
        for row in result.rows
        if row.metric not in _HIDDEN and "of" not in row.at
    }


def _title(key: Key) -> str:
    _, metric, at = key
    places = ", ".join(f"{name} {count(value) if isinstance(value, int) else value}" for name, value in at)
    name = metric.replace("_", " ").replace("tokens per second", "tokens/s")
    return f"{name} ({places})" if places else name


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    text = number(row)
    if row.stderr is None or row.metric.endswith("_per_second"):
        return text
    return f"{text} ± {row.stderr:.2g}"


def number(row: Row) -> str:
    """The value of a row in the unit that suits its metric."""
    styles: dict[str, Callable[[float], str]] = {"bytes": size, "second": lambda x: f"{x:,.0f}"}
    # acc_bytes is an accuracy per byte
    style = None if row.metric.startswith("acc") else styles.get(row.metric.rpartition("_")[2])
    return style(row.value) if style else f"{row.value:.4g}"


def count(value: int) -> str:
    """1024 -> 1k, 1048576 -> 1M, 1900 -> 1900."""
    for power, letter in ((20, "M"), (10, "k")):
        if value >= 1 << power and value % (1 << power) == 0:
            return f"{value >> power}{letter}"
    return str(value)


def size(value: float) -> str:
    """Bytes in units of 1024."""
    for unit in _UNITS:
        if abs(value) < 1024 or unit == _UNITS[-1]:
            return f"{value:.4g} {unit}"
        value /= 1024
    return ""
