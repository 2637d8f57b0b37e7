"""Calls of block-sparse attention, and a naive masked softmax to compare them with."""

from __future__ import annotations

import torch

from zoo.kernels.block_sparse_attention import query_blocks


def inputs(tq, tk=None, *, b=2, dtype=torch.float64):
    tk = tk or tq
    return {
        "q": torch.randn(b, tq, 4, 6, dtype=dtype),
        "k": torch.randn(b, tk, 2, 6, dtype=dtype),
        "v": torch.randn(b, tk, 2, 5, dtype=dtype),
    }


def lists(tensors, query_block, block, *, heads=2, entries=3, columns=0, bias=False, cu_seqlens=None):
    """Random lists: repeated blocks, missing ones, empty lists; with columns and a bias on request."""
    (b, tq), tk = tensors["q"].shape[:2], tensors["k"].shape[1]
    shape = (b, heads, query_blocks(tq, query_block, cu_seqlens), entries)
    sequences = b if cu_seqlens is None else len(cu_seqlens) - 1
    made = {"query_block": query_block, "block": block, "blocks": torch.randint(-1, -(-tk // block) + 1, shape)}
    made["counts"] = torch.randint(0, entries + 1, shape[:3])
    if columns:
        made["columns"] = torch.randint(-1, tk + 2, (sequences, heads, columns))
    extra = {"bias": torch.randn(shape, dtype=tensors["q"].dtype)} if bias else {}
    return tensors | extra, made


def sees(i, j, entries, columns, *, block, causal=True, window=0, sink_tokens=0):
    """Whether a query at position i sees the key at j, and the place of the entry whose bias it takes."""
    if i < 0 or j < 0 or (causal and j > i):
        return False, None
    if abs(i - j) < window or j < sink_tokens or j in columns:
        return True, None
    return (True, entries.index(j // block)) if j // block in entries else (False, None)


def naive(q, k, v, bias=None, *, blocks, counts, query_block, block, columns=None, pq=None, pk=None, **mask):
    """One score after another. pq and pk are lists of positions by batch row."""
    (b, tq, h, _), tk, hs = q.shape, k.shape[1], blocks.shape[1]
    pq, pk = pq or [list(range(tk - tq, tk))] * b, pk or [list(range(tk))] * b
    k, v = (x.repeat_interleave(h // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bihk,bjhk->bhij", q, k) / q.shape[-1] ** 0.5
    seen, shift = torch.zeros(b, hs, tq, tk, dtype=torch.bool), {}
    for n in range(b):
        skipped = sum(i < 0 for i in pq[n])
        for g in range(hs):
            own = [] if columns is None else columns[n, g].tolist()
            for i in range(skipped, tq):
                row = (i - skipped) // query_block
                entries = blocks[n, g, row, : counts[n, g, row]].tolist()
                for j in range(tk):
                    seen[n, g, i, j], at = sees(pq[n][i], pk[n][j], entries, own, block=block, **mask)
                    if at is not None:
                        shift[n, g, i, j] = (n, g, row, at)
    if bias is not None and shift:
        added = torch.zeros(seen.shape, dtype=q.dtype)
        to, source = (torch.tensor(list(x)).unbind(1) for x in (shift, shift.values()))
        scores = scores + added.index_put(to, bias[source]).repeat_interleave(h // hs, 1)
    seen = seen.repeat_interleave(h // hs, 1)
    weights = torch.where(seen, scores.exp(), 0.0)
    total = weights.sum(-1, keepdim=True)
    blind = total == 0
    total = torch.where(blind, 1.0, total)
    o = torch.einsum("bhij,bjhv->bihv", weights / total, v)
    return o, total.log().masked_fill(blind, -torch.inf).squeeze(-1).transpose(1, 2)
