"""Averages of the values so far, weighted by exp(key): RWKV-4's WKV (arXiv 2305.13048) and AFT-Simple (2105.14103).

    with bonus u:  o_t = (sum over i < t of e^(k_i + d_it) v_i + e^(k_t + u) v_t) / (the same with v = 1)
    without:       o_t = sum over i <= t of e^(k_i + d_it) v_i / (the same with v = 1)

d_it sums the log decays of the tokens after i: up to t - 1 with bonus (the state before this token is read), up to t
without. RWKV-4's decay is -exp(time_decay); AFT-Simple has neither decay nor bonus.

Shapes: B batch, T tokens, N sequences (B, or the packed ones), D channels.
"""

from __future__ import annotations

from torch import Tensor

from zoo.kernels import checks, dispatch
from zoo.kernels.weighted_average.checking import check
from zoo.kernels.weighted_average.step import weighted_average_step

__all__ = ["weighted_average", "weighted_average_step"]

BACKENDS = dispatch.load(__name__)

State = tuple[Tensor, Tensor, Tensor]


def weighted_average(
    k: Tensor,
    v: Tensor,
    decay: Tensor | None = None,
    bonus: Tensor | None = None,
    *,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, State | None]:
    """The decayed, exponentially weighted average of the values, per channel, over T tokens.

    Args:
        k, v: [B, T, D], one dtype. A key of minus infinity leaves its token out; with none left in, o is 0.
        decay: log decay <= 0, None | [D] | [B, T, D], fp32 (fp64 beside fp64 inputs).
        bonus: [D], fp32 (fp64), added to the key of the token itself (RWKV-4's time_first).
        initial_state: (numerator, denominator, maximum), each [N, D], fp32 (fp64): the sums times exp(-maximum).
        output_final_state: return the state after the last token of every sequence.
        cu_seqlens: int32 [N + 1], boundaries of sequences packed along T in a batch of 1; empty sequences are legal.
        backend: pin one of this op's backends.

    Returns:
        o [B, T, D] in k's dtype, and the final state or None. An empty state has maximum -1e38.

    Raises:
        ValueError: a shape, dtype or device is wrong, or the pinned backend cannot run the call.
    """
    k, v = checks.autocast(k, v)
    check(k, v, decay, bonus, initial_state, cu_seqlens)
    args = (k, v, decay, bonus, initial_state, output_final_state, cu_seqlens)
    o, state = dispatch.select(BACKENDS, backend, args).run(*args)
    return o, state
