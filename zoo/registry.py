"""A folder is a registry: a module directly in it registers itself by being there.

Standard library only, so that every layer of the project may import it. Packages (`core/`) are not entries,
except in `kernels/`, where every op is a package, and `checkpoints/`, where every folder holds released weights.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from functools import cache
from importlib.resources import files
from types import ModuleType
from typing import Any

from zoo.errors import ZooError

KINDS: dict[str, str] = {
    "architectures": "zoo.architectures",
    "mixers": "zoo.architectures.mixers",
    "channels": "zoo.architectures.channels",
    "blocks": "zoo.architectures.blocks",
    "kernels": "zoo.kernels",
    "sources": "zoo.conversion.sources",
    "evals": "zoo.evals",
    "checkpoints": "zoo.model_cards.checkpoints",
}


def names(kind: str) -> list[str]:
    """Sorted names registered under `kind`; `sources` includes the architectures that own a checkpoint format."""
    found = set(_modules(_package(kind)))
    if kind == "sources":
        found |= {name for name in _modules(KINDS["architectures"]) if hasattr(load("architectures", name), "matches")}
    return sorted(found)


def load(kind: str, name: str) -> ModuleType:
    """Import the module registered as `name` under `kind`; an unknown name raises with the close matches."""
    package = _package(kind)
    if name not in _modules(package):
        if kind == "sources" and name in names(kind):
            return load("architectures", name)
        raise unknown(kind, name)
    return importlib.import_module(f"{package}.{name}")


def get(kind: str, name: str, attribute: str) -> Any:
    """`attribute` of the module registered as `name` under `kind`."""
    return getattr(load(kind, name), attribute)


def unknown(kind: str, name: str) -> ZooError:
    """The error for a name that `kind` does not have: it suggests close matches and lists the rest."""
    known = names(kind)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"choose one of: {', '.join(known) or '(none)'}"
    return ZooError(f"{kind.removesuffix('s')} {name!r} is not registered; {hint}")


def _package(kind: str) -> str:
    if kind not in KINDS:
        raise ZooError(f"kind {kind!r} is not a registry; choose one of: {', '.join(sorted(KINDS))}")
    return KINDS[kind]


@cache
def _modules(package: str) -> tuple[str, ...]:
    if package.endswith(".checkpoints"):
        folder = files("zoo").joinpath("model_cards", "checkpoints")
        return tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and "." not in entry.name))
    wants_package = package == KINDS["kernels"]
    path = importlib.import_module(package).__path__
    return tuple(m.name for m in pkgutil.iter_modules(path) if m.ispkg is wants_package)
