"""Lists of examples: one JSON object per line, in the form of LLM Foundry's local evaluation data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoo.errors import ZooError


def read_examples(examples: str | Path | None, task: str, name: str, fields: Sequence[str]) -> list[dict[str, Any]]:
    """The objects in `examples`, a .jsonl file or a directory that holds one called `name`.

    Args:
        fields: what every object must hold; a `gold` must index its `choices` or `context_options`.

    Raises:
        ZooError: no file, an empty one, or a line that is no such object.
    """
    if examples is None:
        raise ZooError(f"task {task!r} needs examples and none were given; pass --examples FILE.jsonl or a directory")
    path = Path(examples) / name if Path(examples).is_dir() else Path(examples)
    if not path.is_file():
        raise ZooError(f"task {task!r}: examples file {str(path)!r} does not exist; it is one JSON object per line")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ZooError(f"task {task!r}: examples file {str(path)!r} is not UTF-8 text ({error})") from error
    found = [_object(line, f"{path}:{number}", task, fields) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise ZooError(f"task {task!r}: examples file {str(path)!r} is empty; it must have one JSON object per line")
    return found


def _object(line: str, place: str, task: str, fields: Sequence[str]) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ZooError(f"task {task!r}: {place} is not JSON ({error})") from error
    missing = [name for name in fields if name not in entry] if isinstance(entry, dict) else list(fields)
    if missing:
        raise ZooError(f"task {task!r}: {place} has no {', '.join(missing)}; an example holds {', '.join(fields)}")
    options = entry.get("choices", entry.get("context_options"))
    if "gold" in fields and not (isinstance(entry["gold"], int) and 0 <= entry["gold"] < len(options)):
        raise ZooError(f"task {task!r}: {place} has gold {entry['gold']!r}; it must be from 0 to {len(options) - 1}")
    return dict(entry)
