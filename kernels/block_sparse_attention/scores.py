"""Estimates of what blocks of queries want of blocks of keys, from pooled queries and keys.

    mean          scale mean(q) . mean(k)                          over the queries and over the keys of the blocks
    bounds        scale max over q of sum_d max(q_d M_d, q_d m_d)  M, m the largest and smallest k_d: no key of a block
                  scores more (Quest, Tang et al. 2024, arXiv 2406.10774; scale must be positive)
    antidiagonal  sum over tiles of softmax over tiles (scale / s sum_t q_{s-1-t} . k_t)    tiles of s x s scores, of
                  which the antidiagonal is summed (XAttention, Xu et al. 2025, arXiv 2503.16428)

Shapes: B batch, Tk keys, H query heads, Hk key heads, K head width, F width of pooled keys; R query blocks, M queries
of a block, P pooled queries of a block; n pieces of keys: blocks, or s tokens each.
"""

import torch
from torch import Tensor

from zoo.kernels.block_sparse_attention.rows import rows
from zoo.kernels.checks import state_dtype

SCORES = ("mean", "bounds", "antidiagonal")


def pool_keys(
    k: Tensor, *, size: int, score: str = "mean", starts: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Keys [B, Tk, Hk, K] in pieces of `size` tokens, [B, n, Hk, F] in fp32 (fp64).

    Pieces count real tokens as the blocks of `block_sparse_attention` do; those of packed sequences follow each other.
    F is K of "mean", 2 K of "bounds" (largest, then smallest), and size * K of "antidiagonal".
    """
    b, tk = k.shape[:2]
    found = rows(b, tk, size, starts, cu_seqlens, k)
    index = (torch.arange(b, device=k.device)[:, None, None] * tk + found.tokens).flatten()
    pieces = k.flatten(0, 1).index_select(0, index).to(state_dtype(k.dtype)).view(*found.tokens.shape, *k.shape[2:])
    known = found.known[..., None, None]
    if score == "mean":
        return pieces.masked_fill(~known, 0.0).sum(2) / found.known.sum(2).clamp(min=1)[..., None, None]
    if score == "bounds":
        high, low = pieces.masked_fill(~known, -torch.inf).amax(2), pieces.masked_fill(~known, torch.inf).amin(2)
        return torch.cat([high, low], -1).masked_fill(~found.known.any(2)[..., None, None], 0.0)
    return pieces.masked_fill(~known, 0.0).movedim(2, 3).flatten(3)


def pool_queries(q: Tensor, known: Tensor, score: str, stride: int) -> Tensor:
    """Queries [B, R, M, H, K] of which some are `known` [B, R, M], as [B, R, P, H, F]: their products with pooled keys
    are the estimates."""
    q = q.masked_fill(~known[..., None, None], 0.0)
    if score == "mean":
        return (q.sum(2) / known.sum(2).clamp(min=1)[..., None, None])[:, :, None]
    if score == "bounds":
        return torch.cat([q.clamp(min=0), q.clamp(max=0)], -1)
    return q.unflatten(2, (-1, stride)).flip(3).movedim(3, 4).flatten(4)


def estimate(pooled_q: Tensor, pooled_k: Tensor) -> Tensor:
    """Products [B, Hk, G, R, P, n] of [B, R, P, H, F] and [B, n, Hk, F]."""
    heads = pooled_k.shape[2]
    return torch.einsum("brpxgf,bnxf->bxgrpn", pooled_q.unflatten(3, (heads, -1)), pooled_k)
