"""Which implementation of an op runs a call.

A backend is a module of an op's package (`reference.py`, `chunked.py`, some `triton.py` or `eager.py`) with two
functions that take the op's validated arguments in one fixed order: `supports(*args) -> None | reason` and
`run(*args)`. The automatic choice is the fastest backend that supports the call. A pin (the `backend` keyword, then
`use`, then the variable ZOO_KERNELS) is never replaced silently: a pinned backend that cannot run the call raises its
reason.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

FASTEST_FIRST = ("triton", "chunked", "eager", "reference")

# Process-wide and not a context variable: the backward pass recomputes checkpointed layers in threads of its own.
_pins: list[str] = []


@dataclass(frozen=True)
class Backend:
    name: str
    supports: Callable[..., str | None]
    run: Callable[..., Any]


def load(package: str) -> dict[str, Backend]:
    """The backends of an op's package, fastest first. Called once, by the package itself."""
    found = (name for name in FASTEST_FIRST if importlib.util.find_spec(f"{package}.{name}"))
    return {name: _load_one(package, name) for name in found}


def _load_one(package: str, name: str) -> Backend:
    if name == "triton" and importlib.util.find_spec("triton") is None:
        return Backend(name, lambda *args: "triton is not installed", lambda *args: None)
    module = importlib.import_module(f"{package}.{name}")
    return Backend(name, module.supports, module.run)


def ops() -> list[str]:
    """Names of all ops: every package beside this file is one."""
    path = importlib.import_module(__name__.rpartition(".")[0]).__path__
    return sorted(entry.name for entry in pkgutil.iter_modules(path) if entry.ispkg)


def backends(op: str) -> dict[str, Backend]:
    """The backends of the op called `op`, fastest first."""
    package = importlib.import_module(f"{__name__.rpartition('.')[0]}.{op}")
    found: dict[str, Backend] = package.BACKENDS
    return found


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Pin a backend for every op called inside the `with`. The innermost pin counts; it holds for all threads."""
    if backend not in FASTEST_FIRST:
        raise ValueError(f"backend is {backend!r}; it must be one of {', '.join(FASTEST_FIRST)}")
    _pins.append(backend)
    try:
        yield
    finally:
        _pins.pop()


def pinned() -> str | None:
    """The backend pinned by `use` or by ZOO_KERNELS, if any."""
    return _pins[-1] if _pins else os.environ.get("ZOO_KERNELS") or None


def select(candidates: Mapping[str, Backend], backend: str | None, args: tuple[Any, ...]) -> Backend:
    """The backend that runs this call. Raises ValueError when the pinned one, or every one, cannot."""
    name = backend or pinned()
    if name is not None:
        return _select_pinned(candidates, name, args)
    reasons = []
    for candidate in candidates.values():
        reason = candidate.supports(*args)
        if reason is None:
            return candidate
        reasons.append(f"{candidate.name}: {reason}")
    raise ValueError(f"no backend can run this call ({'; '.join(reasons)})")


def _select_pinned(candidates: Mapping[str, Backend], name: str, args: tuple[Any, ...]) -> Backend:
    if name not in candidates:
        raise ValueError(f"backend is {name!r}; this op has {', '.join(candidates)}")
    reason = candidates[name].supports(*args)
    if reason is not None:
        raise ValueError(f"backend {name!r} cannot run this call: {reason}; unpin it to let another one run")
    return candidates[name]
