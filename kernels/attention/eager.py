"""Attention by two plain matrix products and one softmax over all scores [B, H, Tq, Tk]: what transformers calls eager.

It is slow and takes memory for every score; it is here to be compared with, and for small calls.

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
    seen = mask.visible(torch.atleast_2d(q_positions), torch.atleast_2d(k_positions))
    if cu_seqlens is not None:
        owner = owners(cu_seqlens, k.shape[1])
        seen = seen & (owner[:, None] == owner)
    groups = q.shape[2] // k.shape[2]
    keys, values = (x.transpose(1, 2).repeat_interleave(groups, 1) for x in (k, v))
    with torch.autocast(q.device.type, enabled=False):
        scores = q.transpose(1, 2) @ keys.mT * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        weights, lse = _softmax(scores.to(state_dtype(q.dtype)), seen[:, None], sink_logits)
        o = (weights.to(q.dtype) @ values).transpose(1, 2)
    return o, lse.transpose(1, 2) if return_lse else None


def _softmax(scores: Tensor, seen: Tensor, sink_logits: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights [B, H, Tq, Tk] and lse [B, H, Tq]; a row that sees nothing gets zeros and -inf."""
    keys, blind = scores.shape[-1], ~seen.any(-1, keepdim=True)
    scores = scores.masked_fill(~seen, -torch.inf).masked_fill(blind, 0.0)
    if sink_logits is not None:
        scores = torch.cat([scores, sink_logits[:, None, None].expand(*scores.shape[:-1], 1)], -1)
    weights = scores.softmax(-1)[..., :keys].masked_fill(blind, 0.0)
    return weights, scores.logsumexp(-1).masked_fill(blind[..., 0], -torch.inf)
