"""What a model answered, kept on disk as it answers, so that a run that was stopped goes on where it was.

A journal belongs to one model and one version of one task: its file is named after the hash of both. Each line is
`{"key": hash of a request, "output": what the model made of it}`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from zoo.evals.core.processes import rank


class Journal:
    """The lines of every process of earlier runs, and a file to which this process adds its own."""

    def __init__(self, folder: Path, name: str, model: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.model = model
        self.entries: dict[str, Any] = {}
        for path in sorted(folder.glob(f"{name}.*.jsonl")):
            self.entries |= dict(_lines(path))
        self.path = folder / f"{name}.{rank()}.jsonl"
        if self.path.is_file() and not self.path.read_bytes().endswith(b"\n"):
            self._write("\n")  # a line that a kill cut off ends here

    def add(self, found: Mapping[str, Any]) -> None:
        """Write entries through to the disk."""
        self.entries |= found
        self._write("".join(json.dumps({"key": key, "output": output}) + "\n" for key, output in found.items()))

    def _write(self, text: str) -> None:
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    """The whole lines of a journal; what a kill cut off is asked again."""
    for line in path.read_bytes().split(b"\n"):
        try:
            entry = json.loads(line)
            yield entry["key"], entry["output"]
        except (ValueError, KeyError, TypeError):
            continue


_journal: ContextVar[Journal | None] = ContextVar("journal", default=None)


@contextmanager
def opened(folder: Path | None, name: str, model: Any) -> Iterator[None]:
    """Keep what `model` answers in `folder` under `name` inside the `with`; with no folder nothing is kept."""
    token = _journal.set(None if folder is None else Journal(folder, name, model))
    try:
        yield
    finally:
        _journal.reset(token)


def _of(model: Any) -> Journal | None:
    """The open journal; none for another model than its own, such as a teacher."""
    journal = _journal.get()
    return journal if journal is not None and journal.model is model else None


def known(model: Any, keys: Iterable[str]) -> dict[str, Any]:
    """Outputs of `model` that are there already."""
    entries = {} if (journal := _of(model)) is None else journal.entries
    return {key: entries[key] for key in keys if key in entries}


def remember(model: Any, found: Mapping[str, Any]) -> None:
    """Keep outputs of `model`, if the run keeps any."""
    if (journal := _of(model)) is not None:
        journal.add(found)
