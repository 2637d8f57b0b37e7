"""The parts of one model by kind and name, in a file that holds nothing else."""

from __future__ import annotations

from typing import Any

from zoo.errors import ZooError

MODULES: dict[str, dict[str, Any]] = {}  # filled at the end of the file


def names(kind: str) -> list[str]:
    """Sorted names of the parts of a kind."""
    return sorted(MODULES.get(kind, {}))


def load(kind: str, name: str) -> Any:
    """The part of this name."""
    if name not in names(kind):
        raise unknown(kind, name)
    return MODULES[kind][name]


def get(kind: str, name: str, attribute: str) -> Any:
    """`attribute` of the part of this name."""
    return getattr(load(kind, name), attribute)


def unknown(kind: str, name: str) -> ZooError:
    """The error for a name that the file does not have."""
    return ZooError(f"{kind.removesuffix('s')} {name!r} is not in this file; it has: {', '.join(names(kind))}")
