"""Linear attention with optional decay: the recurrence of Linear Transformer, RetNet, RWKV-5/6, Mamba-2, GLA, HGRN2.

    S_t = Diag(exp decay_t) S_{t-1} Diag(exp value_decay_t) + k_t^T v_t        o_t = scale q_t S_t

Shapes: B batch, T tokens, N sequences (B, or the packed ones), H key heads, Hv value heads, K and V head widths.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from zoo.kernels import checks, dispatch
from zoo.kernels.linear_attention.step import linear_attention_step

__all__ = ["linear_attention", "linear_attention_step"]

BACKENDS = dispatch.load(__name__)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None = None,
    *,
    value_decay: Tensor | None = None,
    bonus: Tensor | None = None,
    normalize: Literal["sum"] | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Causal linear attention over T tokens.

    Args:
        q, k: [B, T, H, K], one dtype; value head j uses key head j // (Hv // H).
        v: [B, T, Hv, V].
        decay: log decay <= 0, None | [Hv] | [Hv, K] | [B, T, Hv] | [B, T, Hv, K], fp32 (fp64 beside fp64 inputs).
        value_decay: log decay <= 0 on the value axis, [B, T, Hv, V].
        bonus: [Hv] | [Hv, K] (RWKV): o_t = scale q_t (S_{t-1} + Diag(bonus) k_t^T v_t), read before this token's decay.
        normalize: "sum" divides q_t S_t by d = q_t z_t^T, where z sums the decayed keys and |d| is held at 1e-6 or
            more; the scale then cancels and the state is [N, Hv, K, V + 1] with z in its last column.
        scale: factor on q, K ** -0.5 by default.
        initial_state: [N, Hv, K, V], fp32 (fp64).
        output_final_state: return the state after the last token of every sequence.
        cu_seqlens: int32 [N + 1], boundaries of sequences packed along T in a batch of 1; empty sequences are legal.
        backend: pin one of this op's backends.

    Returns:
        o [B, T, Hv, V] in q's dtype, and the final state or None.

    Raises:
        ValueError: a shape, dtype or device is wrong, or the pinned backend cannot run the call.
    """
    q, k, v = checks.autocast(q, k, v)
    _check(q, k, v, decay, value_decay, bonus, normalize, scale, initial_state, cu_seqlens)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    args = (q, k, v, decay, value_decay, bonus, normalize, scale, initial_state, output_final_state, cu_seqlens)
    o, state = dispatch.select(BACKENDS, backend, args).run(*args)
    return o, state


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    value_decay: Tensor | None,
    bonus: Tensor | None,
    normalize: str | None,
    scale: float | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    checks.check_qkv(q, k, v)
    checks.check_decay(decay, q, v)
    checks.check_gate("value_decay", value_decay, q, v.shape, "B T Hv V")
    checks.check_bonus(bonus, q, v)
    checks.check_scale(scale)
    if normalize not in (None, "sum"):
        raise ValueError(f'normalize is {normalize!r}; it must be None or "sum"')
    checks.check_length(q.shape[1], cu_seqlens)
    checks.check_cu_seqlens(cu_seqlens, q)
    columns = v.shape[3] + (normalize == "sum")
    checks.check_state(initial_state, q, v, cu_seqlens, columns)
