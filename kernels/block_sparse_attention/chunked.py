"""Block-sparse attention in torch: each query block gathers its keys, a few query blocks at a time.

    p = exp(s - lse),  o = p v,  dp = do v^T,  ds = p (dp - delta),  delta = rowsum(do * o) - dlse,
    dq = scale ds k,  dk = scale ds^T q,  dv = p^T do,  dbias = sum of ds over the block's keys and its queries

The backward pass gathers anew, so that no gathered key outlives its slice.

Shapes: B batch, Tq queries, Tk keys, H query heads, Hk key heads, K and V head widths; Hs heads of the lists, G query
heads of each; R query blocks of a slice, M queries of a block, L keys that it gathers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.kernels import custom, launch
from zoo.kernels.block_sparse_attention.call import Call
from zoo.kernels.block_sparse_attention.lists import Lists
from zoo.kernels.checks import state_dtype
from zoo.kernels.packed import low_precision, product

LIMIT = 1 << 24  # numbers that a slice gathers or computes


def run(call: Call) -> tuple[Tensor, Tensor]:
    o, lse = OP(*vars(call).values())
    return o, lse


@dataclass(frozen=True)
class Slice:
    """A few query blocks and the keys that they gather, in the state dtype."""

    queries: Tensor  # [B, R, M] rows of q viewed as [B * Tq, ...], B * Tq where there is none
    tokens: Tensor  # [B, Hs, R, L] rows of k viewed as [B * Tk * Hk, K]
    seen: Tensor  # [B, Hs, R, 1, M, L]
    bias: Tensor | None  # [B, Hs, R, 1, 1, L]
    q: Tensor  # [B, Hs, R, G * M, K]
    k: Tensor  # [B, Hs, R, L, K]
    v: Tensor  # [B, Hs, R, L, V]
    blocks: slice
    listed: int

    def scores(self, scale: float, low: torch.dtype | None) -> Tensor:
        """[B, Hs, R, G * M, L], -inf where a key is not seen."""
        m = self.seen.shape[4]
        s = (scale * product(self.q, self.k.mT, low)).unflatten(3, (-1, m))
        s = s if self.bias is None else s + self.bias
        return s.masked_fill(~self.seen, -torch.inf).flatten(3, 4)

    def take(self, x: Tensor) -> Tensor:
        """[B, Tq, H, ...] to [B, Hs, R, G * M, ...]."""
        return _take(x, self.queries, self.tokens.shape[1])

    def put(self, out: Tensor, x: Tensor) -> None:
        """`take` backwards, into rows [B * Tq + 1, H, ...] of which the last takes what belongs nowhere."""
        b, r, m = self.queries.shape
        x = x.unflatten(3, (-1, m)).movedim(3, 4).movedim(1, 3)
        out.index_copy_(0, self.queries.flatten(), x.reshape(b * r * m, *out.shape[1:]).to(out.dtype))


def _take(x: Tensor, queries: Tensor, heads: int) -> Tensor:
    index = queries.clamp(max=x.shape[0] * x.shape[1] - 1).flatten()
    taken = x.flatten(0, 1).index_select(0, index).view(*queries.shape, *x.shape[2:])
    return taken.unflatten(3, (heads, -1)).movedim(3, 1).movedim(4, 3).flatten(3, 4)


def _slices(call: Call) -> Iterator[Slice]:
    lists = Lists.of(call)
    (b, tq, h, width), (_, tk, hk, values) = call.q.shape, call.v.shape
    hs, count = call.blocks.shape[1:3]
    dtype, keys = state_dtype(call.q.dtype), lists.keys
    one = b * keys * (hs * (width + values + call.query_block) + 2 * h * call.query_block)
    rows = max(1, LIMIT // one)
    batch = torch.arange(b, device=call.q.device)
    head = torch.arange(hs, device=call.q.device)[:, None, None] // (hs // hk)
    tokens = torch.where(lists.rows.known, batch[:, None, None] * tq + lists.rows.tokens, b * tq)
    flat_k, flat_v = call.k.reshape(-1, width), call.v.reshape(-1, values)
    for begin in range(0, 0 if launch.held() or tk == 0 else count, rows):
        part = slice(begin, min(begin + rows, count))
        found = lists.gather(part)
        index = (batch[:, None, None, None] * tk + found.tokens) * hk + head
        k, v = (x.index_select(0, index.flatten()).view(*index.shape, -1).to(dtype) for x in (flat_k, flat_v))
        bias = None
        if call.bias is not None:
            bias = call.bias[:, :, part].repeat_interleave(call.block, 3)
            bias = torch.nn.functional.pad(bias, (0, keys - found.listed))[..., None, None, :]
        q = _take(call.q, tokens[:, part], hs).to(dtype)
        yield Slice(tokens[:, part], index, found.seen[..., None, :, :], bias, q, k, v, part, found.listed)


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    call = Call(*args)
    (b, tq, h, _), width, low = call.q.shape, call.v.shape[3], low_precision(call.q)
    o = call.q.new_zeros(b * tq + 1, h, width)
    lse = call.q.new_full((b * tq + 1, h), -torch.inf, dtype=state_dtype(call.q.dtype))
    for part in _slices(call):
        scores = part.scores(call.scale, low)
        top = scores.amax(-1, keepdim=True)
        weights = (scores - top.masked_fill(top == -torch.inf, 0.0)).exp()
        total = weights.sum(-1, keepdim=True)
        blind = total == 0
        part.put(o, product(weights, part.v, low) / total.masked_fill(blind, 1.0))
        part.put(lse, (total.log() + top).squeeze(-1))
    return o[:-1].unflatten(0, (b, tq)).clone(), lse[:-1].unflatten(0, (b, tq)).clone()


def _backward(given: dict[str, Any], results: list[Tensor], grads: list[Tensor | None]) -> dict[str, Any]:
    call, (o, lse), (do, dlse) = Call(**given), results, grads
    dtype, low, (b, tq, h, width) = state_dtype(call.q.dtype), low_precision(call.q), call.q.shape
    do = torch.zeros_like(o) if do is None else do
    delta = (do.to(dtype) * o.to(dtype)).sum(-1)
    delta = delta if dlse is None else delta - dlse.masked_fill(lse == -torch.inf, 0.0)
    norm = lse.masked_fill(lse == -torch.inf, torch.inf)  # against it a row that sees nothing has no weights
    dq = call.q.new_zeros(b * tq + 1, h, width)
    dk, dv = (torch.zeros_like(x, dtype=dtype).view(-1, x.shape[3]) for x in (call.k.contiguous(), call.v.contiguous()))
    dbias = None if call.bias is None else torch.zeros_like(call.bias)
    for part in _slices(call):
        weights = (part.scores(call.scale, low) - part.take(norm)[..., None]).exp()
        grad = part.take(do).to(dtype)
        ds = weights * (product(grad, part.v.mT, low) - part.take(delta)[..., None])
        part.put(dq, call.scale * product(ds, part.k, low))
        _add(dk, part.tokens, call.scale * product(ds.mT, part.q, low))
        _add(dv, part.tokens, product(weights.mT, grad, low))
        if dbias is not None:
            dbias[:, :, part.blocks] = ds[..., : part.listed].sum(3).unflatten(3, (-1, call.block)).sum(4)
    dk, dv = dk.view_as(call.k).to(call.k.dtype), dv.view_as(call.v).to(call.v.dtype)
    return {"q": dq[:-1].unflatten(0, (b, tq)).clone(), "k": dk, "v": dv, "bias": dbias}


def _add(total: Tensor, index: Tensor, x: Tensor) -> None:
    """Rows of x to rows `index` of the total, in a fixed order: on a GPU only the sorted form keeps one."""
    if total.is_cuda:
        total.index_put_((index.flatten(),), x.flatten(0, 3), accumulate=True)
    else:
        total.index_add_(0, index.flatten(), x.flatten(0, 3))


ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor blocks, Tensor? counts, Tensor? columns, Tensor? bias, Tensor? q_positions, "
    "Tensor? starts, Tensor? cu_seqlens, int query_block, int block, bool causal, int window, int sink_tokens, "
    "float scale"
)
OP = custom.differentiable("block_sparse_attention_chunked", ARGUMENTS, 2, _forward, _backward)
