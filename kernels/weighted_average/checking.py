"""Validation of weighted_average's arguments (B batch, T tokens, N sequences, D channels)."""

from __future__ import annotations

from torch import Tensor

from zoo.kernels import checks


def check(
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    bonus: Tensor | None,
    initial_state: tuple[Tensor, Tensor, Tensor] | None,
    cu_seqlens: Tensor | None,
) -> None:
    checks.check_tokens("k", k, cu_seqlens)
    check_inputs(k, v, decay, bonus)
    n = checks.count_sequences(k, cu_seqlens)
    checks.check_states("initial_state", initial_state, k, parts(n, k))


def check_inputs(k: Tensor, v: Tensor, decay: Tensor | None, bonus: Tensor | None) -> None:
    checks.check_shape("v", v, k.shape, "B T D")
    checks.check_like("v", v, k, k.dtype)
    _check_decay(decay, k)
    checks.check_gate("bonus", bonus, k, k.shape[2:], "D")


def parts(n: int, k: Tensor) -> checks.Parts:
    """Of a state, with their shapes."""
    return dict.fromkeys(("numerator", "denominator", "maximum"), ((n, k.shape[2]), "N D"))


def _check_decay(decay: Tensor | None, k: Tensor) -> None:
    if decay is None:
        return
    checks.check_tensor("decay", decay)
    if tuple(decay.shape) not in (tuple(k.shape[2:]), tuple(k.shape)):
        raise ValueError(
            f"decay has shape {list(decay.shape)}; it must be None, [D] = {list(k.shape[2:])} or "
            f"[B, T, D] = {list(k.shape)}"
        )
    checks.check_like("decay", decay, k, checks.state_dtype(k.dtype))
