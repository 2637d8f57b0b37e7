"""Diagonal state spaces: the recurrence of Mamba (arXiv 2312.00752), S4D (arXiv 2206.11893), Longhorn (2407.14207).

    S_t = exp(dt_t A) S_{t-1} + (dt_t x_t) B_t        y_t = Re(S_t C_t) + D x_t
    Longhorn's transition is 1 - dt_t B_t^2 in the place of exp(dt_t A)

Shapes: B batch, T tokens, N sequences (B, or the packed ones), D channels, n states per channel, G groups of channels.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from zoo.kernels import dispatch
from zoo.kernels.selective_scan.checking import cast, check
from zoo.kernels.selective_scan.step import selective_scan_step

__all__ = ["selective_scan", "selective_scan_step"]

BACKENDS = dispatch.load(__name__)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor | None,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    transition: Literal["mamba", "longhorn"] = "mamba",
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """A diagonal state space with n states in each of D channels, over T tokens; [B, T, D, n] is never formed.

    Args:
        x: [B, T, D].
        dt: step size >= 0 after softplus, [B, T, D], fp32 (fp64 beside fp64 inputs); Longhorn's delta.
        A: [D, n] with real part <= 0, fp32 (fp64) or complex64 (complex128); None for Longhorn, which has none.
        B, C: [B, T, n] | [B, T, G, n] (channel d uses group d // (D // G)) | [D, n] (S4D); x's dtype, fp32 (fp64), or
            complex beside a complex A.
        D: [D], the skip, fp32 (fp64).
        transition: "mamba" or "longhorn" (B is its key, C its query).
        initial_state: [N, D, n], fp32 (fp64), complex beside a complex A. None is zeros.
        output_final_state: return the state after the last token of every sequence.
        cu_seqlens: int32 [N + 1], boundaries of sequences packed along T in a batch of 1; empty sequences are legal.
        backend: pin one of this op's backends.

    Returns:
        y [B, T, D] in x's dtype, and the final state [N, D, n] or None. Of a complex state y takes the real part; a
        model that keeps one of each pair of conjugate states doubles C.

    Raises:
        ValueError: a shape, dtype or device is wrong, or the pinned backend cannot run the call.
    """
    x, B, C = cast(x, B, C)
    check(x, dt, A, B, C, D, transition, initial_state, cu_seqlens)
    args = (x, dt, A, B, C, D, initial_state, output_final_state, cu_seqlens)
    y, state = dispatch.select(BACKENDS, backend, args).run(*args)
    return y, state
