"""`zoo eval`: choose the tasks that can run, run them, and write the page."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoo.errors import ZooError
from zoo.evals.core import suites
from zoo.evals.core.processes import joined, rank
from zoo.evals.core.report import write_html
from zoo.evals.core.runner import evaluate


def run(model: str, tasks: Sequence[str] | None, suite: str | None, out: Path | None, **options: Any) -> dict[str, Any]:
    """Results by task. With `out`, its JSON files and `index.html` are written there; the same call goes on with it.

    Args:
        tasks: names of evals.
        suite: a set of them; one of the two is given, or neither for the suite `quick`.
        options: those of the runner.
    """
    if tasks and suite:
        raise ZooError(f"--tasks and --suite {suite} were both given; give one of them")
    if not tasks:
        given = {name for name, value in options.items() if value is not None}
        ready, lacks = suites.split(suites.suite(suite or "quick"), given)
        for task, what in lacks.items():
            print(f"{task} is left out: it needs --{what}", file=sys.stderr)
        own = {task: {name: x for name, x in set_.items() if name not in given} for task, set_ in ready.items()}
        tasks, options = list(ready), {**options, "options": own}
    with joined():
        results = evaluate(model, tasks=tasks, out=out, **options)
        main = rank() == 0
    if out is not None and main:
        write_html([(model, results)], out / "index.html")
    return results
