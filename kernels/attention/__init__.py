"""Softmax attention under a structured mask.

    o_i = sum over visible j of softmax_j(scale q_i . k_j) v_j

Shapes: B batch, Tq queries, Tk keys, H query heads, Hk key heads (H a multiple of Hk), K and V head widths.
"""

from typing import Any

import torch
from torch import Tensor

from zoo.kernels import checks, dispatch
from zoo.kernels.attention.mask import PADDING, Call, Mask

__all__ = ["PADDING", "attention"]

BACKENDS = dispatch.load(__name__)


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, window: int | None = None, sink_tokens: int = 0,
    sink_logits: Tensor | None = None, chunk: int | None = None, stride: int | None = None, dilation: int | None = None,
    q_positions: Tensor | None = None, k_positions: Tensor | None = None, softcap: float | None = None,
    scale: float | None = None, return_lse: bool = False, cu_seqlens: Tensor | None = None, backend: str | None = None,
) -> Any:  # fmt: skip
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
    checks.check_keys(q, k, v)
    mask, scale = Mask(causal, window, sink_tokens, chunk, stride, dilation), checks.default_scale(scale, q)
    call = Call(q, k, v, mask, sink_logits, q_positions, k_positions, softcap, scale, return_lse, cu_seqlens)
    _check_options(call)
    o, lse = dispatch.select(BACKENDS, backend or dispatch.pinned() or _best(call), (call,)).run(call)
    return (o, lse) if return_lse else o


def _best(call: Call) -> str | None:
    """torch's own attention where it needs no mask tensor (to decode it splits the keys), unless gradients must be
    deterministic; else our kernels, first in the order, which skip what a mask hides. FlexAttention does too, but
    takes many seconds to compile each mask."""
    return "chunked" if call.sdpa and not torch.are_deterministic_algorithms_enabled() else None


def _check_options(call: Call) -> None:
    q, k, mask = call.q, call.k, call.mask
    for name in ("window", "chunk", "stride", "dilation"):
        value = getattr(mask, name)
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} is {value!r}; it must be None or an integer of at least 1")
    if not isinstance(mask.sink_tokens, int) or mask.sink_tokens < 0:
        raise ValueError(f"sink_tokens is {mask.sink_tokens!r}; it must be an integer of at least 0")
    if call.softcap is not None and not call.softcap > 0:
        raise ValueError(f"softcap is {call.softcap!r}; it must be None or positive")
    checks.check_gate("sink_logits", call.sink_logits, q, (q.shape[2],), "H")
    checks.check_cu_seqlens(call.cu_seqlens, k)
    for name, x, like in (("q_positions", call.q_positions, q), ("k_positions", call.k_positions, k)):
        b, t = like.shape[:2]
        if x is not None:
            checks.check_tensor(name, x)
            if tuple(x.shape) not in ((t,), (b, t)):
                raise ValueError(f"{name} has shape {list(x.shape)}; it must be [T] = [{t}] or [B, T] = [{b}, {t}]")
            if x.dtype not in (torch.int32, torch.int64):
                raise ValueError(f"{name} has dtype {x.dtype}; it must be torch.int32 or torch.int64")
            checks.check_like(name, x, q, x.dtype)
    if call.cu_seqlens is not None and q.shape[1] != k.shape[1]:
        raise ValueError(f"q has {q.shape[1]} tokens and k {k.shape[1]}; with cu_seqlens both must have the same")
    if call.cu_seqlens is None and 0 in (q.shape[1], k.shape[1]):
        raise ValueError(f"q has T = {q.shape[1]} and k has T = {k.shape[1]}; both must hold at least one token")
