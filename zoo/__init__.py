"""hybrid-zoo: efficient and hybrid language-model architectures, conversion and evals in one library.

`import zoo` is light: torch and transformers are imported by the first call that needs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "from_pretrained": "zoo.loading",
    "tokenizer": "zoo.loading",
    "create": "zoo.loading",
    "config": "zoo.loading",
    "save": "zoo.loading",
    "convert": "zoo.conversion.core.convert",
    "heal": "zoo.conversion.core.heal",
    "evaluate": "zoo.evals.core.runner",
    "select": "zoo.selection",
    "verify": "zoo.conversion.core.verification",
    "export": "zoo.conversion.core.export.export",
    "ZooError": "zoo.errors",
}

__all__ = [
    "ZooError",
    "config",
    "convert",
    "create",
    "evaluate",
    "export",
    "from_pretrained",
    "heal",
    "list",
    "save",
    "select",
    "tokenizer",
    "verify",
]

if TYPE_CHECKING:
    from zoo.conversion.core.convert import convert
    from zoo.conversion.core.export.export import export
    from zoo.conversion.core.heal import heal
    from zoo.conversion.core.verification import verify
    from zoo.errors import ZooError
    from zoo.evals.core.runner import evaluate
    from zoo.loading import config, create, from_pretrained, save, tokenizer
    from zoo.selection import select


def list(kind: str = "architectures") -> list[str]:  # type: ignore[valid-type]
    """Names registered under `kind` (see `zoo.registry.KINDS`), sorted.

    Raises:
        ZooError: `kind` is not a registry.
    """
    from zoo import registry

    return registry.names(kind)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'zoo' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:  # type: ignore[valid-type]
    return sorted({*globals(), *_EXPORTS})
