"""Results for people: a table in the terminal and one self-contained HTML page."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.errors import ZooError
from zoo.evals.core.plots import plots
from zoo.evals.core.records import Record
from zoo.evals.core.summary import Run, summary

if TYPE_CHECKING:
    from rich.table import Table

SHOWN, END = 5, 400  # samples of a kind, and characters of each


def table(runs: Sequence[Run], title: str | None = None) -> Table:
    """One row per metric, one column per run.

    Args:
        runs: (label, results by task) of each model.
    """
    from rich.table import Table

    built = Table(title=title)
    built.add_column("task")
    built.add_column("metric")
    for label, _ in runs:
        built.add_column(label, justify="right")
    for task, lines in groupby(summary(_check(runs)), key=lambda line: line.task):
        for i, line in enumerate(lines):
            built.add_row(task if i == 0 else "", line.metric, *line.cells)
        built.add_section()
    return built


def write_html(runs: Sequence[Run], path: str | Path, title: str = "Evaluation") -> Path:
    """Write one page with the table and the plots of `runs`, without scripts and without anything from the network.

    Args:
        runs: (label, results by task) of each model.
        path: where the page goes; it is written at once.

    Raises:
        ZooError: there are no runs.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    source = files("zoo").joinpath("evals", "core", "report.html.j2").read_text(encoding="utf-8")
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = template.from_string(source).render(
        title=title,
        labels=[label for label, _ in _check(runs)],
        groups=[(task, list(lines)) for task, lines in groupby(summary(runs), key=lambda line: line.task)],
        plots=[(plot.title, plot.caption, Markup(plot.svg)) for plot in plots(runs)],
        samples=list(_samples(runs)),
        notes=_notes(runs),
    )
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(target)
    return target


def _check(runs: Sequence[Run]) -> Sequence[Run]:
    if not runs:
        raise ZooError("there are no results to report; evaluate at least one model")
    return runs


def _notes(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What is needed to repeat each result."""
    return [
        {
            "label": label,
            "task": f"{task} v{result.version}",
            "model": result.model,
            "dtype": result.dtype,
            "options": ", ".join(f"{name} {_plain(value)}" for name, value in result.options.items()),
            "seed": "" if result.seed is None else result.seed,
            "skipped": result.skipped,
            "seconds": f"{result.seconds:.1f}",
            "hardware": ", ".join(f"{name} {value}" for name, value in result.hardware.items()),
        }
        for label, results in runs
        for task, result in results.items()
    ]


def _samples(runs: Sequence[Run]) -> Iterator[tuple[str, str, str, list[dict[str, Any]]]]:
    """Of each task with samples: the run, the task, how many there are, and the first failures and hits."""
    for label, results in runs:
        for task, result in results.items():
            missed = [record for record in result.records if not any(record.scores.values())]
            hits = [record for record in result.records if any(record.scores.values())]
            if result.records:
                counts = f"{len(result.records)} samples, {len(missed)} without any hit"
                yield label, task, counts, [_entry(record) for record in [*missed[:SHOWN], *hits[:SHOWN]]]


def _entry(record: Record) -> dict[str, Any]:
    output = record.output if isinstance(record.output, str) else json.dumps(record.output)
    return {
        "id": record.id,
        "scores": ", ".join(f"{name} {float(value):.4g}" for name, value in record.scores.items()),
        "prompt": record.prompt[-END:],
        "output": output[:END],
        "answers": ", ".join(map(str, record.answers))[:END],
    }


def _plain(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
