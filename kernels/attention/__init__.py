"""Softmax attention under a structured mask.

    o_i = sum over visible j of softmax_j(scale q_i . k_j) v_j

Shapes: B batch, Tq queries, Tk keys, H query heads, Hk key heads (H a multiple of Hk), K and V head widths.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from zoo.kernels import checks, dispatch
from zoo.kernels.attention.checking import check
from zoo.kernels.attention.mask import PADDING, Mask

__all__ = ["PADDING", "attention"]

BACKENDS = dispatch.load(__name__)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    sink_tokens: int = 0,
    sink_logits: Tensor | None = None,
    chunk: int | None = None,
    stride: int | None = None,
    dilation: int | None = None,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Any:
    """Attention of every query over the keys it sees.

    A key is visible when it is not later than the query (`causal`) and is local, a sink token, or on the stride.

    Args:
        q: [B, Tq, H, K]; k: [B, Tk, Hk, K]; v: [B, Tk, Hk, V]. Query head h uses key head h // (H // Hk).
        causal: key j is visible only if k_positions[j] <= q_positions[i].
        window: local keys are the `window` nearest, the own one counted (on both sides without `causal`).
        chunk: local keys share the query's chunk: p_q // chunk == p_k // chunk.
        dilation: local keys lie at multiples of `dilation`; the window then counts keys, not positions.
        sink_tokens: keys at positions below this are seen by everyone after them.
        stride: keys at distances that are multiples of `stride` are seen as well; alone, they are all that is seen.
        sink_logits: [H], one learned logit per head in the softmax's denominator (gpt-oss), fp32 (fp64).
        q_positions, k_positions: integers, [T] or [B, T]. Defaults: keys 0 .. Tk - 1, queries the last Tq of them;
            with cu_seqlens both count from the start of their sequence. A key at PADDING (2 ** 30) or later is never
            seen, and a query before every key sees nothing.
        softcap: scores become softcap * tanh(scores / softcap).
        scale: factor on the scores, K ** -0.5 by default.
        return_lse: also return the log of the softmax's denominator.
        cu_seqlens: int32 [N + 1], B = 1, Tq = Tk: sequences packed along T do not see each other.
        backend: pin one of this op's backends.

    Returns:
        o [B, Tq, H, V] in q's dtype; with `return_lse` the pair (o, lse), lse [B, Tq, H] fp32 (fp64), differentiable.
        A query that sees no key gets o = 0, lse = -inf and zero gradient.

    Raises:
        ValueError: a shape, dtype, device or option is wrong, or the pinned backend cannot run the call.
    """
    q, k, v = checks.autocast(q, k, v)
    mask = Mask(causal, window, sink_tokens, chunk, stride, dilation)
    check(q, k, v, mask, sink_logits, q_positions, k_positions, softcap, scale, cu_seqlens)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    args = (q, k, v, mask, sink_logits, q_positions, k_positions, softcap, scale, return_lse, cu_seqlens)
    o, lse = dispatch.select(BACKENDS, backend, args).run(*args)
    return (o, lse) if return_lse else o
