"""Measurements that a run has finished, one JSON line each, so that a later run goes on after them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

Scores = dict[str, float]


class Scored:
    """Scores by name, from `file` where they stand there.

    Args:
        file: JSON lines; None keeps nothing.
        step: told the name of each measurement once it is there.
    """

    def __init__(self, file: Path | None = None, step: Callable[[str], None] = lambda name: None) -> None:
        self.file, self.step = file, step
        self.found = dict(_read(file)) if file is not None and file.exists() else {}

    def get(self, name: str, measure: Callable[[], Scores]) -> Scores:
        """The scores called `name`, measured now unless they are known."""
        if name not in self.found:
            self.found[name] = measure()
            if self.file is not None:
                with self.file.open("a") as stream:
                    stream.write(json.dumps({"name": name, "scores": self.found[name]}) + "\n")
        self.step(name)
        return self.found[name]


def _read(file: Path) -> list[tuple[str, Scores]]:
    """The whole lines of a file; a line that was cut off is removed, so that the next one begins a new line."""
    text = file.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole)
    entries = [json.loads(line) for line in whole.splitlines()]
    return [(entry["name"], entry["scores"]) for entry in entries]
