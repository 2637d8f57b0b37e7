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

from zoo.kernels import checks
from zoo.kernels.block_sparse_attention import triton_launch
from zoo.kernels.block_sparse_attention.rows import rows
from zoo.kernels.block_sparse_attention.validate import check_integers, check_size

SCORES = ("mean", "bounds", "antidiagonal")


def pool_keys(
    k: Tensor, *, size: int, score: str = "mean", starts: Tensor | None = None, cu_seqlens: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """Keys [B, Tk, Hk, K] in pieces of `size` tokens, [B, n, Hk, F].

    Pieces count real tokens as the blocks of `block_sparse_attention` do; those of packed sequences follow each other.
    F is K of "mean", 2 K of "bounds" (largest, then smallest), and size * K of "antidiagonal".

    Args:
        dtype: fp32 (fp64) by default; it may be that of k, which holds "bounds" and "antidiagonal" exactly and rounds
            "mean".
    """
    dtype = pooled_dtype(k, dtype)
    learns = torch.is_grad_enabled() and k.requires_grad
    if score != "antidiagonal" and not learns and triton_launch.reason(k) is None:
        pooled: Tensor = triton_launch.POOL(k, starts, cu_seqlens, score, size, dtype)
        return pooled
    b, tk = k.shape[:2]
    found = rows(b, tk, size, starts, cu_seqlens, k)
    index = (torch.arange(b, device=k.device)[:, None, None] * tk + found.tokens).flatten()
    kind = checks.state_dtype(k.dtype)
    pieces = k.flatten(0, 1).index_select(0, index).to(kind).view(*found.tokens.shape, *k.shape[2:])
    known = found.known[..., None, None]
    if score == "mean":
        means = pieces.masked_fill(~known, 0.0).sum(2) / found.known.sum(2).clamp(min=1)[..., None, None]
        return means.to(dtype)
    if score == "bounds":
        high, low = pieces.masked_fill(~known, -torch.inf).amax(2), pieces.masked_fill(~known, torch.inf).amin(2)
        return torch.cat([high, low], -1).masked_fill(~found.known.any(2)[..., None, None], 0.0).to(dtype)
    return pieces.masked_fill(~known, 0.0).movedim(2, 3).flatten(3).to(dtype)


@torch.no_grad()
def extend_pooled(pooled: Tensor, k: Tensor, positions: Tensor, *, size: int, score: str = "mean") -> None:
    """Take one new key of each row into `pooled`, which is overwritten: what `pool_keys` gives of all keys so far.

    Nothing is read on the host. Where a key begins a piece, what stood there before does not matter, so that `pooled`
    may have room for keys to come. "bounds" and "antidiagonal" are exact; "mean" is up to rounding.

    Args:
        pooled: [B, n, Hk, F], contiguous, in fp32 (fp64); of other scores than "mean" also in k's dtype.
        k: [B, 1, Hk, K], the new keys.
        positions: [B], int32 or int64, their positions in their sequences; keys at negative ones, and those beyond the
            n pieces, are left out.
        size, score: those of `pool_keys`.

    Raises:
        ValueError: a shape, dtype or option is wrong.
    """
    checks.check_float("k", k)
    checks.check_shape("k", k, None, "B 1 Hk K")
    checks.check_shape("k", k, (k.shape[0], 1, *k.shape[2:]), "B 1 Hk K")
    check_size("size", size, 1)
    check_score(score)
    check_pooled(pooled, k, score, size, None)
    if score == "mean" and pooled.dtype != checks.state_dtype(k.dtype):
        raise ValueError(f"pooled has dtype {pooled.dtype}; means must be kept in {checks.state_dtype(k.dtype)}")
    if not pooled.is_contiguous():
        raise ValueError("pooled is not contiguous; it must be, as it is overwritten")
    check_integers("positions", positions, k, [(k.shape[0],)], "B")
    if triton_launch.reason(k) is None:
        triton_launch.EXTEND(pooled, k, positions, score, size)
        return
    _extend(pooled, k[:, 0].to(pooled.dtype), positions.long(), size, score)


def _extend(pooled: Tensor, key: Tensor, positions: Tensor, size: int, score: str) -> None:
    row, piece = torch.arange(len(key), device=key.device), (positions // size).clamp(0, pooled.shape[1] - 1)
    before = (positions % size)[:, None, None]
    old, width = pooled[row, piece], key.shape[2]
    if score == "mean":
        old_mean = torch.where(before > 0, old, 0.0)
        new = old_mean + (key - old_mean) / (before + 1)
    elif score == "bounds":
        new = torch.cat([torch.maximum(old[..., :width], key), torch.minimum(old[..., width:], key)], -1)
        new = torch.where(before > 0, new, torch.cat([key, key], -1))
    else:
        at = torch.arange(size * width, device=key.device) // width
        new = torch.where(at == before, key.repeat(1, 1, size), torch.where(before > 0, old, 0.0))
    seen = (positions >= 0) & (positions < pooled.shape[1] * size)
    pooled[row, piece] = torch.where(seen[:, None, None], new, old)


def pooled_dtype(k: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The checked dtype of pooled keys."""
    checks.check_float("k", k)
    exact = checks.state_dtype(k.dtype)
    if dtype not in (None, exact, k.dtype):
        raise ValueError(f"dtype is {dtype}; it must be {exact} or {k.dtype}")
    return dtype or exact


def check_score(score: object) -> None:
    if score not in SCORES:
        raise ValueError(f"score is {score!r}; it must be one of {', '.join(SCORES)}")


def check_pooled(pooled: Tensor, k: Tensor, score: str, size: int, pieces: int | None) -> None:
    """Pieces of `size` tokens of k [B, Tk, Hk, K], any number of them with None."""
    checks.check_shape("pooled", pooled, None, "B n Hk F")
    width = k.shape[3] * {"mean": 1, "bounds": 2, "antidiagonal": size}[score]
    shape = (k.shape[0], pooled.shape[1] if pieces is None else pieces, k.shape[2], width)
    checks.check_shape("pooled", pooled, shape, "B n Hk F")
    exact = checks.state_dtype(k.dtype)
    if pooled.dtype not in (exact, k.dtype):
        raise ValueError(f"pooled has dtype {pooled.dtype}; it must be {exact} or {k.dtype}")
    checks.check_like("pooled", pooled, k, pooled.dtype)


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
