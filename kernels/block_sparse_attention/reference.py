"""Block-sparse attention, query by query.

    S(i) = {j : p_j <= p_i} & ({j : p_j // block in blocks[r(i)]} | columns | {|p_i - p_j| < window} | {p_j < sinks})
    s_j = scale q_i . k_j + (bias of the first entry that lists j, if nothing else shows j)
    o_i = sum over j in S(i) of exp(s_j - lse) v_j,  lse = log(sum over j in S(i) of exp(s_j))

with positions p inside each sequence and query blocks r(i) = i // query_block of it; an empty S(i) gives o = 0,
lse = -inf.

Shapes: B batch, Tq queries, Tk keys, H query heads, Hk key heads, K and V head widths; Hs heads of the lists.
"""

import torch
from torch import Tensor

from zoo.kernels.block_sparse_attention.call import Call
from zoo.kernels.checks import state_dtype


def run(call: Call) -> tuple[Tensor, Tensor]:
    dtype, (b, tq, h, _) = state_dtype(call.q.dtype), call.q.shape
    q = call.q.to(dtype)
    k, v = (x.to(dtype).repeat_interleave(h // x.shape[2], 2) for x in (call.k, call.v))
    outputs, norms = [v.new_zeros(b, 0, h, v.shape[3])], [q.new_zeros(b, 0, h)]
    at = _places(call)
    for i in range(tq):
        seen, bias = (x.repeat_interleave(h // x.shape[1], 1) for x in _visible(call, i, *at))
        blind = ~seen.any(-1)
        scores = call.scale * torch.einsum("bhk,bjhk->bhj", q[:, i], k) + bias
        scores = scores.masked_fill(~seen, -torch.inf).masked_fill(blind[..., None], 0.0)
        lse = scores.logsumexp(-1)
        weights = (scores - lse[..., None]).exp().masked_fill(blind[..., None], 0.0)
        outputs.append(torch.einsum("bhj,bjhv->bhv", weights, v)[:, None])
        norms.append(lse.masked_fill(blind, -torch.inf)[:, None])
    return torch.cat(outputs, 1).to(call.q.dtype), torch.cat(norms, 1)


def _places(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Positions of queries [B, Tq] and keys [B, Tk], the query block of each query [B, Tq], and the packed sequence of
    each token [Tk]."""
    (b, tq), tk = call.q.shape[:2], call.k.shape[1]
    keys = torch.arange(tk, device=call.q.device)
    if call.cu_seqlens is not None:
        ends = call.cu_seqlens.long()
        owner = torch.searchsorted(ends, keys, right=True) - 1
        counts = -(-ends.diff() // call.query_block)
        at = keys - ends[owner]
        return at[None], at[None], ((counts.cumsum(0) - counts)[owner] + at // call.query_block)[None], owner
    starts = keys.new_zeros(b) if call.starts is None else call.starts.long()
    pk = keys - starts[:, None]
    pq = torch.arange(tk - tq, tk, device=keys.device) - starts[:, None]
    pq = pq if call.q_positions is None else call.q_positions.long().expand(b, -1)
    real = (pq >= 0).long().cumsum(1) - 1
    return pq, pk, real.clamp(min=0) // call.query_block, torch.zeros_like(keys)


def _visible(call: Call, i: int, pq: Tensor, pk: Tensor, block: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each list's query i sees each key [B, Hs, Tk], and the bias on its score."""
    batch = torch.arange(len(pk), device=pk.device)
    own, pk = pq[:, i, None, None], pk[:, None]
    entries = call.blocks[batch, :, block[:, i], :, None]
    match = entries == (pk // call.block)[:, :, None]
    if call.counts is not None:
        read = torch.arange(entries.shape[2], device=pk.device) < call.counts[batch, :, block[:, i], None]
        match = match & read[..., None]
    sure = ((own - pk).abs() < call.window) | (pk < call.sink_tokens)
    if call.columns is not None:
        columns = call.columns if call.cu_seqlens is None else call.columns[owner[i], None]
        sure = sure | (columns[..., None] == pk[:, :, None]).any(2)
    bias = torch.zeros_like(match[:, :, 0], dtype=state_dtype(call.q.dtype))
    if call.bias is not None:
        first = match & (match.long().cumsum(2) == 1)
        bias = (first * call.bias[batch, :, block[:, i], :, None]).sum(2).masked_fill(sure, 0.0)
    real = (own >= 0) & (pk >= 0) & ((pk <= own) | (not call.causal))
    if call.cu_seqlens is not None:
        real = real & (owner == owner[i])
    return (match.any(2) | sure) & real, bias
