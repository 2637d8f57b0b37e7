"""The matrix by which each head of a mixer mixes the values of its tokens, and how large a state it takes.

A head's output is `W v` with a lower-triangular `W [T, T]`. A recurrence that gives the same output needs at token i a
state of at least rank(W[i:, :i]) rows: its effective state size (Parnichkun et al. 2025, arXiv 2504.19561). With that
block's singular values s_1 >= s_2 >= ... and p_j = s_j / sum(s):

    tolerance variant: #{s_j > tolerance * s_1},     entropy variant: exp(-sum_j p_j ln p_j)

B batch, T tokens, H heads, D hidden size, K head dimension, Q queries.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from zoo.architectures.core.mixer import Context, wide

TOLERANCE = 1e-3
PLACES = 8


def mixing_matrix(mixer: Any, x: Tensor, ctx: Context) -> Tensor:
    """By head, what share of each token's value (column) each token (row) reads for the input `x [B, T, D]`:
    `[B, H, T, T]`, in fp32 (fp64 beside fp64), with gradients.

    Raises:
        ZooError: a mixer that has no such matrix.
    """
    basis = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    values = basis[None, :, None].expand(x.shape[0], -1, value_heads(mixer), -1)
    return wide(mixer.mix_values(x, values, ctx)).transpose(1, 2)


def value_heads(mixer: Any) -> int:
    """How many heads read values."""
    heads = getattr(mixer, "value_heads", None)
    return int(getattr(mixer, "heads", 0) if heads is None else heads)


def state_places(tokens: int, count: int = PLACES) -> list[int]:
    """Up to `count` tokens of a row, evenly spread, at which a state is measured."""
    spread = (max(1, round(tokens * n / (count + 1))) for n in range(1, count + 1))
    return sorted({place for place in spread if place < tokens})


def state_sizes(weights: Tensor, places: Collection[int], tolerance: float = TOLERANCE) -> tuple[Tensor, Tensor]:
    """Effective state sizes `[B, H]` by tolerance and by entropy, mean over `places`, of `weights [B, H, T, T]`.

    Args:
        places: tokens i, from 1 to T - 1.
        tolerance: share of the largest singular value that still counts.
    """
    counts, entropies = zip(*(state_sizes_at(weights, place, tolerance) for place in places), strict=True)
    return torch.stack(counts).mean(0), torch.stack(entropies).mean(0)


def state_sizes_at(weights: Tensor, place: int, tolerance: float = TOLERANCE) -> tuple[Tensor, Tensor]:
    """The same at one token, in fp64."""
    values = torch.linalg.svdvals(weights[..., place:, :place].double())
    shares = values / values.sum(-1, keepdim=True).clamp(min=1e-300)
    return (values > tolerance * values[..., :1]).sum(-1).double(), torch.special.entr(shares).sum(-1).exp()


def softmax_weights(
    args: Any, q: Tensor, k: Tensor, positions: Tensor, queries: Tensor | None = None, sinks: Tensor | None = None
) -> Tensor:
    """Attention of `args` (those of mixer `attention`) from q `[B, H, Q, K]` and k `[B, H, T, K]`, written out:
    `[B, H, Q, T]`.

    Args:
        positions: of the keys, `[T]`.
        queries: positions of the queries, `[Q]` (default: those of the keys).
        sinks: logits of one more key per head that has no value, `[H]`.
    """
    scores = q @ k.transpose(-1, -2) * (args.scale or args.head_dim**-0.5)
    if args.softcap is not None:
        scores = args.softcap * torch.tanh(scores / args.softcap)
    query, key = (positions if queries is None else queries)[:, None], positions[None, :]
    seen = key <= query
    if args.window is not None:
        seen = seen & ((query - key < args.window) | (key < args.sinks))
    if args.chunk is not None:
        seen = seen & (query // args.chunk == key // args.chunk)
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is None:
        return scores.softmax(-1)
    extra = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat([scores, extra], dim=-1).softmax(-1)[..., :-1]
