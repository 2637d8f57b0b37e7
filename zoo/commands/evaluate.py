"""`zoo eval`: choose the tasks that can run, run them, and write the page."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoo import loading, registry
from zoo.commands.generate import load
from zoo.errors import ZooError
from zoo.evals.core.report import write_html
from zoo.evals.core.runner import evaluate


def run(
    model: str,
    tasks: Sequence[str] | None,
    teacher: str | None,
    data: str | None,
    lengths: Sequence[int] | None,
    samples: int | None,
    out: Path | None,
    progress: bool,
) -> dict[str, Any]:
    """Results by task. With `out`, its JSON files and `index.html` are written there; `out` must not exist."""
    if out is not None and out.exists():
        raise FileExistsError(17, "exists already; choose another --out", str(out))
    names = list(tasks) if tasks else possible(teacher=teacher, data=data)
    results = evaluate(
        load(model),
        loading.tokenizer(model),
        tasks=names,
        teacher=load(teacher) if teacher else None,
        data=data,
        lengths=lengths,
        samples=samples,
        out=out,
        progress=progress,
    )
    if out is not None:
        write_html([(model, results)], out / "index.html")
    return results


def possible(**given: str | None) -> list[str]:
    """The registered evals whose needs are among the options `given`."""
    names = [name for name in registry.names("evals") if not _missing(name, given)]
    if not names:
        raise ZooError("no eval can run without --data or --teacher; pass one of them")
    return names


def _missing(name: str, given: dict[str, str | None]) -> list[str]:
    parameters = inspect.signature(registry.get("evals", name, "evaluate")).parameters
    return [option for option, value in given.items() if value is None and option in parameters]
