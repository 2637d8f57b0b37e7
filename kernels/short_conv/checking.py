"""Validation of short_conv's arguments (B batch, T tokens, N sequences, D channels, W filter width)."""

from __future__ import annotations

from torch import Tensor

from zoo.kernels import checks


def check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    checks.check_float("x", x)
    checks.check_dims("x", x, "B T D")
    if x.shape[0] < 1 or x.shape[2] < 1:
        raise ValueError(f"x has shape {list(x.shape)}; B and D must be at least 1")
    check_filter(x, weight, bias, activation)
    if x.shape[1] < 1 and cu_seqlens is None:
        raise ValueError("x has T = 0; it must hold at least one token (only packed sequences may be empty)")
    checks.check_cu_seqlens(cu_seqlens, x)
    n = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    check_state("initial_state", initial_state, x, (n, x.shape[2], weight.shape[1]))


def check_filter(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
    checks.check_float("weight", weight)
    checks.check_dims("weight", weight, "D W")
    checks.check_shape("weight", weight, (x.shape[2], max(weight.shape[1], 1)), "D W")
    checks.check_like("weight", weight, x, weight.dtype)
    if bias is not None:
        checks.check_float("bias", bias)
        checks.check_shape("bias", bias, x.shape[2:], "D")
        checks.check_like("bias", bias, x, bias.dtype)
    if activation not in (None, "silu"):
        raise ValueError(f'activation is {activation!r}; it must be None or "silu"')


def check_state(name: str, state: Tensor | None, x: Tensor, shape: tuple[int, int, int]) -> None:
    if state is None:
        return
    checks.check_shape(name, state, shape, "N D W")
    checks.check_like(name, state, x, x.dtype if state.dtype == x.dtype else checks.state_dtype(x.dtype))
