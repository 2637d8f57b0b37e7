"""Attention over a bounded memory: keys and values written into slots, read by softmax over the slots, in two passes of
linear attention.

B batch, T new tokens, H heads, M slots, K key and V value head dimension.
"""

from __future__ import annotations

from torch import Tensor

from zoo.architectures.core.cache import LayerCache
from zoo.architectures.core.linear import recur, recurrent_bytes
from zoo.architectures.core.mixer import Context, wide


def slot_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    write: Tensor,
    decay: Tensor,
    ctx: Context,
    cache: LayerCache | None,
    *,
    scale: float | None,
    total: Tensor | None = None,
) -> Tensor:
    """`softmax(scale q_t Kt_t^T) Vt_t`, `[B, T, H, V]`, over slots `Kt_t = Diag(exp decay_t) Kt_{t-1} + write_t^T k_t`
    and `Vt_t` likewise; each slot is divided by `total_t` if that is given.

    `q, k [B, T, H, K]`, `v [B, T, H, V]`; `write`, `decay` (log) and `total`: `[B, T, H, M]`. Padding has to be masked
    in `write` and `decay`.
    """
    keys, values = (None, None) if cache is None else (cache.view("keys"), cache.view("values"))
    scores = wide(recur(q, k, write, None, ctx, keys, value_decay=decay, scale=scale))
    if total is None:
        return recur(scores.softmax(-1).to(v.dtype), write, v, decay, ctx, values, scale=1.0)
    reads = (scores / total).softmax(-1) / total
    return recur(reads.to(v.dtype), write, v, decay, ctx, values, scale=1.0)


def slot_bytes(heads: int, slots: int, keys: int, values: int) -> int:
    """Bytes of the slots of one sequence in fp32."""
    return recurrent_bytes(heads, slots, keys + values)
