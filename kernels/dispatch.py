"""Which implementation of an op runs a call.

A backend is a module of an op's package (`reference.py`, `chunked.py`, some `triton.py` or `eager.py`) with two
functions that take the op's validated arguments in one fixed order: `run(*args)` and, unless it runs every call,
`supports(*args) -> None | reason`. The automatic choice is the fastest backend that supports the call. A pin (the
`backend` keyword, then `use`, then the variable ZOO_KERNELS) is never replaced silently: a pinned backend that cannot
run the call raises its reason.

What all recurrences take: `output_final_state` returns the state after the last token of every sequence; `cu_seqlens`,
int32 [N + 1], are the boundaries of N sequences packed along T in a batch of 1, some of which may be empty; `backend`
pins one. They raise ValueError where a shape, dtype or device is wrong, or the pinned backend cannot run the call. A
step takes the same arguments with T = 1 and a state in fp32 (fp64 beside fp64 inputs), which it overwrites; its result
has the dtype of the first argument.

Shapes in all ops: B batch, T tokens, N sequences (B, or the packed ones), H key heads, Hv value heads, K and V head
widths; elementwise ones have D channels.
"""

import importlib
import importlib.util
import os
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from zoo.kernels import checks

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
    return {name: _load(package, name) for name in FASTEST_FIRST if importlib.util.find_spec(f"{package}.{name}")}


def _load(package: str, name: str) -> Backend:
    if name == "triton" and importlib.util.find_spec("triton") is None:
        return Backend(name, lambda *args: "triton is not installed", lambda *args: None)
    module = importlib.import_module(f"{package}.{name}")
    return Backend(name, getattr(module, "supports", lambda *args: None), module.run)


def ops() -> list[str]:
    """Names of all ops: every package beside this file is one."""
    return sorted(entry.name for entry in pkgutil.iter_modules([str(Path(__file__).parent)]) if entry.ispkg)


def backends(op: str) -> dict[str, Backend]:
    """The backends of the op called `op`, fastest first."""
    found: dict[str, Backend] = importlib.import_module(f"zoo.kernels.{op}").BACKENDS
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
    name, reasons = backend or pinned(), []
    if name is not None and name not in candidates:
        raise ValueError(f"backend is {name!r}; this op has {', '.join(candidates)}")
    for candidate in candidates.values() if name is None else [candidates[name]]:
        reason = candidate.supports(*args)
        if reason is None:
            return candidate
        reasons.append(f"{candidate.name}: {reason}")
    if name is not None:
        raise ValueError(f"backend {name!r} cannot run this call: {reason}; unpin it to let another one run")
    raise ValueError(f"no backend can run this call ({'; '.join(reasons)})")


def recur(candidates: Mapping[str, Backend], backend: str | None, *args: Any) -> tuple[Tensor, Any]:
    """The results of a recurrence: o in the dtype of its first argument, and the final state where it is wanted.

    The last three arguments of every recurrence are initial_state, output_final_state and cu_seqlens.
    """
    chosen = select(candidates, backend, args)
    with checks.autocast_off(args[0]):
        o, state = chosen.run(*args)
        return o.to(args[0].dtype), state if args[-2] else None
