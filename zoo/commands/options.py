"""Options of the command line that are lists or mappings, from their text."""

from __future__ import annotations

import json
from typing import Any

from zoo.errors import ZooError


def integers(option: str, text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ZooError(f"{option} was {text!r}; it must be integers with commas between them, like 2,5,8") from None


def heads_by_layer(option: str, texts: list[str]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for text in texts:
        layer, colon, heads = text.partition(":")
        numbers = [number.strip() for number in heads.split(",")]
        if not colon or not all(number.isdecimal() for number in (layer.strip(), *numbers)):
            raise ZooError(f"{option} was {text!r}; it must be a layer and heads of it, like 11:0,2")
        if int(layer) in found:
            raise ZooError(f"{option} names layer {int(layer)} twice; name its heads together, like {int(layer)}:0,2")
        found[int(layer)] = [int(number) for number in numbers]
    return found


def parse_json(option: str, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ZooError(f'{option} was {text!r}; it must be a JSON object, like {{"budget": 0.1}}')
    return found


def names_in(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]
