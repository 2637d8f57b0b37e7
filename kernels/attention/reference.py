"""Attention, query by query.

    s_j = scale q_i . k_j, softcapped;  o_i = sum over visible j of exp(s_j - lse) v_j,
    lse = log(sum over visible j of exp(s_j) + exp(sink_logit));  a query that sees nothing gives o = 0, lse = -inf

Shapes: B batch, Tq queries, Tk keys, H query heads, Hk key heads, K and V head widths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.attention.mask import Mask, owners, positions
from zoo.kernels.checks import state_dtype


def supports(*args: object) -> str | None:
    return None


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    sink_logits: Tensor | None,
    q_positions: Tensor | None,
    k_positions: Tensor | None,
    softcap: float | None,
    scale: float,
    return_lse: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    q_positions, k_positions = positions(q, k, q_positions, k_positions, cu_seqlens)
    pq, pk = q_positions.expand(q.shape[:2]), k_positions.expand(k.shape[:2])
    groups, dtype = q.shape[2] // k.shape[2], state_dtype(q.dtype)
    keys, values = (x.to(dtype).repeat_interleave(groups, 2) for x in (k, v))
    outputs = [torch.zeros_like(values[:, :0])]
    norms = [values[:, :0, :, 0]]
    with torch.autocast(q.device.type, enabled=False):
        for i in range(q.shape[1]):
            seen = mask.visible(pq[:, i : i + 1], pk)[:, 0]  # [B, Tk]
            if cu_seqlens is not None:
                seen = seen & (owners(cu_seqlens, k.shape[1]) == owners(cu_seqlens, k.shape[1])[i])
            o, lse = _query(q[:, i].to(dtype), keys, values, seen, sink_logits, softcap, scale)
            outputs.append(o[:, None])
            norms.append(lse[:, None])
    return torch.cat(outputs, 1).to(q.dtype), torch.cat(norms, 1) if return_lse else None


def _query(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, sink_logits: Tensor | None, softcap: float | None, scale: float
) -> tuple[Tensor, Tensor]:
    scores = scale * torch.einsum("bhk,bjhk->bhj", q, k)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return weigh(scores, seen[:, None], v.transpose(1, 2), sink_logits)


def weigh(scores: Tensor, seen: Tensor, v: Tensor, sink_logits: Tensor | None) -> tuple[Tensor, Tensor]:
    """o [..., V] and lse [...] from scores [B, H, ..., Tk], what is seen, v [B, H, Tk, V] and sink_logits [H]."""
    scores = scores.masked_fill(~seen, -torch.inf)
    blind = ~seen.any(-1)
    if sink_logits is not None:
        sink = sink_logits.reshape(-1, *[1] * (scores.dim() - 2)).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], -1)
    lse = scores.masked_fill(blind[..., None], 0.0).logsumexp(-1)
    weights = (scores - lse[..., None]).exp().masked_fill(blind[..., None], 0.0)[..., : v.shape[-2]]
    o = torch.einsum("bh...j,bhjv->bh...v", weights, v)
    return o, lse.masked_fill(blind, -torch.inf)
