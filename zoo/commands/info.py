"""`zoo info`: what is registered under a name, as text."""

from __future__ import annotations

import difflib
import inspect
import json
from dataclasses import MISSING, Field, fields, is_dataclass
from importlib.resources import files
from types import ModuleType
from typing import Any

from zoo import registry
from zoo.errors import ZooError


def describe(name: str) -> list[str]:
    """One paragraph per thing registered as `name`; `KIND/NAME` asks for one of them.

    Raises:
        ZooError: nothing has that name.
    """
    found = _kinds(name)
    short = name.rpartition("/")[2]
    return [f"{kind}/{short}\n{_body(kind, short)}".rstrip() for kind in found]


def _kinds(name: str) -> list[str]:
    kind, _, short = name.rpartition("/")
    if kind:
        if short not in registry.names(kind):
            raise registry.unknown(kind, short)
        return [kind]
    found = [kind for kind in registry.KINDS if short in registry.names(kind)]
    if not found:
        raise _unknown(short)
    # An architecture that owns a checkpoint format is listed under both kinds; it is described once.
    return [kind for kind in found if not (kind == "sources" and "architectures" in found)]


def _unknown(name: str) -> ZooError:
    known = sorted({known for kind in registry.KINDS for known in registry.names(kind)})
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else "`zoo list` shows what is"
    return ZooError(f"{name!r} is not registered; {hint}")


def _body(kind: str, name: str) -> str:
    if kind == "checkpoints":
        return _checkpoint(name)
    module = registry.load(kind, name)
    parts = [inspect.getdoc(module) or "", _options(module), _presets(kind, name, module)]
    return "\n\n".join(part for part in parts if part)


def _checkpoint(name: str) -> str:
    folder = files("zoo").joinpath("model_cards", "checkpoints", name)
    config = json.loads(folder.joinpath("config.json").read_text(encoding="utf-8"))
    size = sum(len(part.read_bytes()) for part in folder.iterdir() if part.name.endswith(".safetensors"))
    kind = config.get("architecture") or config["model_type"]
    return f"{kind}, {size / 1e6:.1f} MB of weights\n\nzoo.from_pretrained({name!r})"


def _options(module: ModuleType) -> str:
    """The arguments of a mixer, channel or block."""
    args = getattr(getattr(module, "MODULE", None), "options", None)
    if args is None or not is_dataclass(args):
        return ""
    return "arguments:\n" + "\n".join(f"  {_field(field)}" for field in fields(args))


def _field(field: Field[Any]) -> str:
    if field.default is not MISSING:
        return f"{field.name}: {field.type} = {field.default!r}"
    return f"{field.name}: {field.type}" + (" = ..." if field.default_factory is not MISSING else "")


def _presets(kind: str, name: str, module: ModuleType) -> str:
    presets = getattr(module, "PRESETS", None)
    if presets is None:
        return ""
    from zoo.cards import preset_rows

    lines = [f"  {row[0]}: {row[1]} parameters, {row[2]} layers" for row in preset_rows(name)]
    return "presets:\n" + "\n".join(lines)
