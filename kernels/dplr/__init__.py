"""Diagonal-plus-low-rank transitions: RWKV-7, and every delta rule whose erase and write vectors differ.

    S_t = Diag(exp decay_t) S_{t-1} + b_t^T (a_t S_{t-1}) + k_t^T v_t        o_t = scale q_t S_t

Both terms read the undecayed S_{t-1}. RWKV-7 passes a = -kappa, b = kappa * eta and scale = 1.

Shapes: B batch, T tokens, N sequences (B, or the packed ones), H key heads, Hv value heads, K and V head widths.
"""

from __future__ import annotations

from torch import Tensor

from zoo.kernels import checks, dispatch
from zoo.kernels.dplr.checking import check
from zoo.kernels.dplr.step import dplr_step

__all__ = ["dplr", "dplr_step"]

BACKENDS = dispatch.load(__name__)


def dplr(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    decay: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The recurrence with a diagonal-plus-rank-one transition over T tokens.

    Args:
        q, k: [B, T, H, K], one dtype; value head j uses key head j // (Hv // H).
        v: [B, T, Hv, V].
        a: what is read from the state before its decay, [B, T, H, K], q's dtype.
        b: where that is written back, [B, T, H, K], q's dtype. The state stays bounded as long as the norm of
            Diag(exp decay) + b^T a is at most 1, as in RWKV-7; that is not checked.
        decay: log decay <= 0, None | [Hv] | [Hv, K] | [B, T, Hv] | [B, T, Hv, K], fp32 (fp64 beside fp64 inputs).
        scale: factor on q, K ** -0.5 by default.
        initial_state: [N, Hv, K, V], fp32 (fp64).
        output_final_state: return the state after the last token of every sequence.
        cu_seqlens: int32 [N + 1], boundaries of sequences packed along T in a batch of 1; empty sequences are legal.
        backend: pin one of this op's backends.

    Returns:
        o [B, T, Hv, V] in q's dtype, and the final state [N, Hv, K, V] or None.

    Raises:
        ValueError: a shape, dtype or device is wrong, or the pinned backend cannot run the call.

    Source: RWKV-7 "Goose" (arXiv 2503.14456), transposed to row vectors.
    """
    q, k, v, a, b = checks.autocast(q, k, v, a, b)
    check(q, k, v, a, b, decay, scale)
    checks.check_length(q.shape[1], cu_seqlens)
    checks.check_cu_seqlens(cu_seqlens, q)
    checks.check_state(initial_state, q, v, cu_seqlens, v.shape[3])
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    args = (q, k, v, a, b, decay, scale, initial_state, output_final_state, cu_seqlens)
    o, state = dispatch.select(BACKENDS, backend, args).run(*args)
    return o, state
