"""The elementwise recurrence of HGRN (arXiv 2311.04823) and RG-LRU (Griffin, arXiv 2402.19427).

    h_t = exp(decay_t) h_{t-1} + x_t

Shapes: B batch, T tokens, N sequences (B, or the packed ones), D channels.
"""

from __future__ import annotations

from torch import Tensor

from zoo.kernels import checks, dispatch
from zoo.kernels.scan.step import scan_step

__all__ = ["scan", "scan_step"]

BACKENDS = dispatch.load(__name__)


def scan(
    x: Tensor,
    decay: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The running, decayed sum of x over T tokens.

    Args:
        x: [B, T, D].
        decay: log decay <= 0, [B, T, D], fp32 (fp64 beside fp64 inputs).
        initial_state: [N, D], fp32 (fp64). None is zeros.
        output_final_state: return the state after the last token of every sequence.
        cu_seqlens: int32 [N + 1], boundaries of sequences packed along T in a batch of 1; empty sequences are legal.
        backend: pin one of this op's backends.

    Returns:
        h [B, T, D] in x's dtype, and the final state [N, D] or None.

    Raises:
        ValueError: a shape, dtype or device is wrong, or the pinned backend cannot run the call.
    """
    (x,) = checks.autocast(x)
    checks.check_tokens("x", x, cu_seqlens)
    checks.check_tensor("decay", decay)
    checks.check_gate("decay", decay, x, x.shape, "B T D")
    shape = (checks.count_sequences(x, cu_seqlens), x.shape[2])
    checks.check_gate("initial_state", initial_state, x, shape, "N D")
    args = (x, decay, initial_state, output_final_state, cu_seqlens)
    h, state = dispatch.select(BACKENDS, backend, args).run(*args)
    return h, state
