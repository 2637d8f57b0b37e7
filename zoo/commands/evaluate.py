"""`zoo eval`: choose the tasks that can run, run them, and write the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoo import registry
from zoo.evals.core.processes import joined, rank
from zoo.evals.core.report import write_html
from zoo.evals.core.runner import evaluate


def run(model: str, tasks: Sequence[str] | None, out: Path | None, **options: Any) -> dict[str, Any]:
    """Results by task. With `out`, its JSON files and `index.html` are written there; the same call goes on with it.

    Args:
        tasks: names of evals; None takes those whose needs are among the options that are given.
        options: those of the runner.
    """
    with joined():
        results = evaluate(model, tasks=tasks or possible(options), out=out, **options)
        main = rank() == 0
    if out is not None and main:
        write_html([(model, results)], out / "index.html")
    return results


def possible(options: dict[str, Any]) -> list[str]:
    """The registered evals that need no data and no teacher beyond what `options` holds."""
    given = {"tokenizer", *(name for name, value in options.items() if value is not None)}
    return [name for name in registry.names("evals") if given.issuperset(registry.get("evals", name, "NEEDS"))]
