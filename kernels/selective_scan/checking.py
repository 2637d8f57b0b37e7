"""Validation of selective_scan's arguments.

Shapes: B batch, T tokens, N sequences, D channels, n states per channel, G groups of channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels import checks


def cast(x: Tensor, b: Tensor, c: Tensor) -> list[Tensor]:
    """Under autocast x, and B and C where they are made from tokens; parameters [D, n] keep their precision."""
    x, *made = checks.autocast(x, *(y for y in (b, c) if not _is_parameter(y)))
    return [x, *(y if _is_parameter(y) else made.pop(0) for y in (b, c))]


def _is_parameter(x: object) -> bool:
    return isinstance(x, Tensor) and x.dim() == 2


def check(
    x: Tensor,
    dt: Tensor,
    a: Tensor | None,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    transition: str,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    checks.check_tokens("x", x, cu_seqlens)
    check_parameters(x, dt, a, b, c, d, transition)
    shape = (checks.count_sequences(x, cu_seqlens), x.shape[2], b.shape[-1])
    check_state("initial_state", initial_state, x, a, shape)


def check_parameters(
    x: Tensor, dt: Tensor, a: Tensor | None, b: Tensor, c: Tensor, d: Tensor | None, transition: str
) -> None:
    checks.check_tensor("dt", dt)
    checks.check_gate("dt", dt, x, x.shape, "B T D")
    if transition not in ("mamba", "longhorn"):
        raise ValueError(f'transition is {transition!r}; it must be "mamba" or "longhorn"')
    checks.check_tensor("B", b)
    states = b.shape[-1] if b.dim() else 0
    _check_transition(x, a, transition, states)
    _check_projection("B", b, x, a, states)
    _check_projection("C", c, x, a, states)
    checks.check_gate("D", d, x, x.shape[2:], "D")


def check_state(name: str, state: Tensor | None, x: Tensor, a: Tensor | None, shape: tuple[int, int, int]) -> None:
    if state is not None:
        checks.check_shape(name, state, shape, "N D n")
        checks.check_like(name, state, x, state_type(x, a))


def _check_transition(x: Tensor, a: Tensor | None, transition: str, states: int) -> None:
    if transition == "longhorn":
        if a is not None:
            raise ValueError("A is given; Longhorn's transition has none, so it must be None")
        return
    checks.check_tensor("A", a)
    assert a is not None
    checks.check_shape("A", a, (x.shape[2], states), "D n")
    checks.check_like("A", a, x, state_type(x, a))


def _check_projection(name: str, y: Tensor, x: Tensor, a: Tensor | None, states: int) -> None:
    checks.check_tensor(name, y)
    groups = y.shape[2] if y.dim() == 4 else 1
    shapes = {2: (x.shape[2], states), 3: (*x.shape[:2], states), 4: (*x.shape[:2], groups, states)}
    if tuple(y.shape) != shapes.get(y.dim()) or states < 1 or groups < 1 or x.shape[2] % groups:
        raise ValueError(
            f"{name} has shape {list(y.shape)}; it must be [B, T, n], [B, T, G, n] or [D, n] beside x {list(x.shape)}, "
            "with n of at least 1 and the same for A, B and C, and D a multiple of G"
        )
    _check_dtype(name, y, x, a)


def _check_dtype(name: str, y: Tensor, x: Tensor, a: Tensor | None) -> None:
    allowed = dict.fromkeys((x.dtype, checks.state_dtype(x.dtype), state_type(x, a)))
    if y.dtype not in allowed:
        words = " or ".join(str(z) for z in allowed)
        raise ValueError(f"{name} has dtype {y.dtype}; beside these x and A it must be {words}")
    checks.check_like(name, y, x, y.dtype)


def state_type(x: Tensor, a: Tensor | None) -> torch.dtype:
    """The dtype of the state: fp32 or fp64, complex beside a complex A."""
    wide = checks.state_dtype(x.dtype)
    return wide.to_complex() if a is not None and a.is_complex() else wide
