"""Recipes: YAML files that list the stages of a healing run. Those that come with the library are in `recipes/`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from zoo.conversion.core.stages import FIELDS, KINDS, Check, checked, number, text, whole
from zoo.errors import ZooError

PRESETS = files("zoo.conversion") / "recipes"

RUN: dict[str, Check] = {
    "data": text,
    "seed": whole(0),
    "weight_decay": number(),
    "clip": number(),
    "passes": whole(1),
    "chunk": whole(1),
    "pool_tokens": whole(1),
    "pool_uses": whole(1),
    "sample_batch": whole(1),
}

# arguments of `heal` that set a field of the stages of one kind
OF_STAGES = {
    "align_tokens": ("align", "tokens"),
    "distill_tokens": ("distill", "tokens"),
    "lr_align": ("align", "lr_new"),
    "lr_new": ("distill", "lr_new"),
    "lr_copied": ("distill", "lr_copied"),
}
OF_ALL_STAGES = ("length", "batch_size", "warmup", "hold")  # and those that set a field of every stage


def presets() -> list[str]:
    """Names of the recipes that come with the library."""
    return sorted(entry.name.removesuffix(".yaml") for entry in PRESETS.iterdir() if entry.name.endswith(".yaml"))


def read(recipe: str | Path) -> dict[str, Any]:
    """A recipe, checked: run-wide fields, and `stages`, a list of mappings with `stage`, the kind.

    Args:
        recipe: the name of a preset, or a YAML file.

    Raises:
        ZooError: no such recipe, no YAML, or a key or value that cannot be.
    """
    name = str(recipe)
    content = source(name)
    try:
        found = yaml.safe_load(content)
    except yaml.YAMLError as error:
        raise ZooError(f"recipe {name} is no YAML ({' '.join(str(error).split())})") from None
    where = f"recipe {name}"
    if not isinstance(found, dict) or not isinstance(found.get("stages"), list) or not found["stages"]:
        raise ZooError(f"{where} must be a mapping with `stages`, a list of at least one stage")
    run = fields(found, {**RUN, "stages": lambda value: value}, where)
    run["stages"] = [stage(each, f"{where}, stage {n}") for n, each in enumerate(found["stages"], 1)]
    return run


def source(name: str) -> str:
    """The text of a recipe."""
    if name in presets():
        return (PRESETS / f"{name}.yaml").read_text(encoding="utf-8")
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ZooError(
            f"recipe {name!r} cannot be read ({reason}); give a YAML file or one of {', '.join(presets())}"
        ) from None


def stage(given: Any, where: str) -> dict[str, Any]:
    """One entry of `stages`, checked."""
    kind = given.get("stage") if isinstance(given, Mapping) else given
    if kind not in KINDS:
        raise ZooError(f"{where} was {kind!r}; its key `stage` must be one of {', '.join(KINDS)}")
    return (
        fields(given, {**FIELDS, "stage": text}, f"{where} ({kind})") if isinstance(given, Mapping) else {"stage": kind}
    )


def fields(given: Mapping[Any, Any], known: Mapping[str, Check], where: str) -> dict[str, Any]:
    """The entries of a mapping in their types; an unknown key is refused."""
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, 1)
            hint = f"is {close[0]!r} meant?" if close else f"known are {', '.join(known)}"
            raise ZooError(f"{where} has the unknown key {name!r}; {hint}")
    return {name: checked(name, value, known, f"{where}: ") for name, value in given.items()}


def override(recipe: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with the arguments of `heal` that were given (None: not given) in place of its own.

    Raises:
        ZooError: an unknown argument, a value that cannot be, or one about a stage that the recipe does not have.
    """
    known = {**RUN, **{name: FIELDS[name] for name in OF_ALL_STAGES}}
    known |= {name: FIELDS[field] for name, (_, field) in OF_STAGES.items()}
    if unknown := sorted(set(given) - set(known)):
        raise ZooError(f"unknown setting {unknown[0]!r}; heal takes {', '.join(sorted(known))}")
    result = {**recipe, "stages": [dict(entry) for entry in recipe["stages"]]}
    for name, value in given.items():
        if value is None:
            continue
        value = checked(name, value, known)
        if name in RUN:
            result[name] = value
            continue
        kind, field = OF_STAGES.get(name, (None, name))
        for entry in chosen(result["stages"], kind, name, value):
            entry[field] = value
    return result


def chosen(stages: list[dict[str, Any]], kind: str | None, name: str, value: Any) -> list[dict[str, Any]]:
    """The stages that an argument is about."""
    found = [entry for entry in stages if kind in (None, entry["stage"])]
    if not found and value:  # 0 tokens of a stage that is not there are what they say
        raise ZooError(f"{name} was {value!r}; the recipe has no stage {kind}")
    return found
