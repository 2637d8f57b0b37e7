"""Leaving out listed blocks of keys whose scores turn out small (stage 2 of SpargeAttn, Zhang et al. 2025, arXiv
2502.18137).

In the order of their keys, block j is skipped by a block of queries if, with s(q, k) = scale q . k,

    max over q of (max over k in j of s(q, k) - max over k in the listed blocks up to j of s(q, k)) < skip

A skipped block leaves the softmax altogether, as in the published kernels (the paper keeps it in the denominator, where
each of its keys weighs less than exp(skip) of the largest). `block_sparse_attention` has no such rule: the scores of
the listed blocks are computed here, a few blocks of queries at a time, and again by the op for those that stay.

B batch, H query heads, h those of one KV head, G KV heads, K head dimension; R query blocks of M queries, N key blocks
of M' keys, L listed blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.architectures.core.block_lists import Lists, Span, cut_keys, cut_queries, join
from zoo.architectures.core.choosing import slices
from zoo.architectures.core.mixer import wide
from zoo.architectures.core.sparse import View


def unskipped(view: View, span: Span, lists: Lists, query_block: int, block: int, skip: float) -> Lists:
    """The lists without the blocks that stage 2 skips."""
    last = -(-view.k.shape[1] // block)
    read = torch.arange(lists.blocks.shape[3], device=view.q.device) < lists.counts[..., None]
    ordered = torch.where(read, lists.blocks.long(), last).sort(dim=-1).values  # by the place of their keys
    q, known = cut_queries(view, span, query_block)
    at = span.first[:, None, None] + torch.arange(q.shape[1] * query_block, device=q.device).view(-1, query_block)
    k, group = cut_keys(view, span, block)[0], view.q.shape[2] // view.k.shape[2]
    one = view.q.shape[0] * group * ordered.shape[3] * block * (q.shape[4] + query_block)
    kept = torch.zeros_like(ordered, dtype=torch.bool)
    for g in range(k.shape[3]):
        heads = slice(g * group, (g + 1) * group)
        for rows in slices(q.shape[1], one):
            queries = q[:, rows, :, heads] * view.factor
            places = torch.where(known[:, rows], at[:, rows], -1)
            kept[:, heads, rows] = differences(queries, k[:, :, :, g], ordered[:, heads, rows], places) >= skip
    kept = kept & (ordered < last)
    blocks = torch.where(kept, ordered, last).sort(dim=-1).values
    return join([Lists(blocks.int(), kept.sum(3, dtype=torch.int32))])


def differences(q: Tensor, k: Tensor, blocks: Tensor, places: Tensor) -> Tensor:
    """`[B, h, R, L]`: of the listed `blocks` the largest score of a query beside its largest so far, for the scaled
    queries `[B, R, M, h, K]` of one KV head at `places [B, R, M]` and its keys `[B, N, M', K]`."""
    count, size = k.shape[1:3]
    batch = torch.arange(len(k), device=k.device)[:, None, None, None]
    listed = wide(k[batch, blocks.clamp(max=count - 1)])  # [B, h, R, L, M', K]
    scores = torch.einsum("brmhk,bhrlnk->bhrmln", wide(q), listed)
    at = blocks[..., None] * size + torch.arange(size, device=k.device)
    unseen = at[:, :, :, None] > places[:, None, :, :, None, None]
    largest = scores.masked_fill(unseen, -torch.inf).amax(5)
    beside = largest - largest.cummax(4).values
    return beside.masked_fill(largest == -torch.inf, -torch.inf).amax(3)
