"""Attention, query by query.

    s_j = scale q_i . k_j, softcapped;  o_i = sum over visible j of exp(s_j - lse) v_j,
    lse = log(sum over visible j of exp(s_j) + exp(sink_logit));  a query that sees nothing gives o = 0, lse = -inf

Shapes: B batch, Tq queries, Tk keys, H query heads, Hk key heads, K and V head widths.
"""

import torch
from torch import Tensor

from zoo.kernels.attention.mask import Call
from zoo.kernels.checks import state_dtype


def run(call: Call) -> tuple[Tensor, Tensor]:
    return attend(call, 1, state_dtype(call.q.dtype))


def attend(call: Call, block: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """o and lse from the scores of `block` queries at a time; products in `dtype`, the softmax in fp32 (fp64)."""
    groups = call.q.shape[2] // call.k.shape[2]
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (call.q, call.k, call.v))
    k, v = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (k, v))
    outputs = [v.new_zeros(*q.shape[:2], 0, v.shape[3])]
    norms = [q.new_zeros(*q.shape[:2], 0, dtype=state_dtype(dtype))]
    with torch.autocast(q.device.type, enabled=False):
        for begin in range(0, q.shape[2], max(block, 1)):
            queries = slice(begin, min(begin + block, q.shape[2]))
            keys = call.near(begin, queries.stop)
            scores = call.scale * (q[:, :, queries] @ k[:, :, keys].mT)
            if call.softcap is not None:
                scores = call.softcap * torch.tanh(scores / call.softcap)
            seen = call.visible(queries, keys)[:, None]
            weights, lse = _softmax(scores.to(state_dtype(dtype)), seen, call.sink_logits)
            outputs.append(weights.to(dtype) @ v[:, :, keys])
            norms.append(lse)
    return torch.cat(outputs, 2).transpose(1, 2).to(call.q.dtype), torch.cat(norms, 2).transpose(1, 2)


def _softmax(scores: Tensor, seen: Tensor, sink_logits: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights [B, H, n, Tk] and lse [B, H, n]; a row that sees nothing gets zeros and -inf."""
    keys, blind = scores.shape[-1], ~seen.any(-1)
    scores = scores.masked_fill(~seen, -torch.inf).masked_fill(blind[..., None], 0.0)
    if sink_logits is not None:
        scores = torch.cat([scores, sink_logits[:, None, None].expand(*scores.shape[:-1], 1)], -1)
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp()[..., :keys].masked_fill(blind[..., None], 0.0)
    return weights, lse.masked_fill(blind, -torch.inf)
