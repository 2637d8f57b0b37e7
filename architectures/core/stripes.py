"""Attention as vertical and slash stripes: keys that every query sees, and distances at which every query sees a key.

How much attention each of them gets is read off the newest queries. In block-sparse attention a vertical is a column,
and a slash is widened to the blocks that its diagonal crosses: block (r, c) of M queries and M keys holds parts of the
diagonals of distances e - M + 1 .. e + M - 1, where e is the distance of its first query and first key.

B batch, T new tokens, S keys, H query heads, h some of them, G KV heads, K head dimension; R query blocks, N key
blocks, M tokens of a block, C columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from zoo.architectures.core.block_lists import (
    Lists,
    Span,
    best,
    cut_keys,
    cut_queries,
    enough,
    first_of,
    join,
    listed,
    mean,
    some_heads,
    span_of,
)
from zoo.architectures.core.mixer import repeat_heads, wide
from zoo.architectures.core.sparse import View
from zoo.kernels import checks
from zoo.kernels.block_sparse_attention.budget import BudgetSchedule


class Stripes(NamedTuple):
    """A number for each key position and for each distance, both `[B, H, S]`."""

    vertical: Tensor
    slash: Tensor


def stripes(view: View, span: Span, last: int) -> Stripes:
    """The attention weights of the `last` newest queries, summed by key and by distance."""
    number = torch.arange(view.k.shape[1], device=view.q.device)
    queries, q = span.queries[:, -last:, None], wide(view.q[:, -last:])
    own = queries + span.starts[:, None, None]  # [B, n, 1] where each query's own key lies
    hidden = (number < span.starts[:, None, None]) | (number > own)
    back, beyond = (own - number).clamp(min=0)[:, None], (number > queries)[:, None]
    found = []
    for g in range(view.k.shape[2]):  # one KV head after the other, as n x S weights of all may be too many
        group = q.unflatten(2, (view.k.shape[2], -1))[:, :, g]
        scores = view.factor * torch.einsum("bnhk,bsk->bhns", group, wide(view.k[:, :, g]))
        weights = scores.masked_fill(hidden[:, None], -torch.inf).softmax(-1).masked_fill(hidden[:, None], 0.0)
        slash = weights.gather(3, back.expand_as(weights)).masked_fill(beyond, 0.0)
        found.append(Stripes(weights.sum(2), slash.sum(2)))
    vertical, slash = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    at = (number + span.starts[:, None])[:, None]  # from where keys lie to their positions
    outside = at >= len(number)
    vertical = vertical.gather(2, at.clamp(max=len(number) - 1).expand_as(vertical)).masked_fill(outside, 0.0)
    return Stripes(vertical, slash)


def ranks(x: Tensor) -> Tensor:
    """`[..., S]`: 1 for the largest number of each row, 1/2 for the next, and so on."""
    order = x.argsort(dim=-1, descending=True, stable=True)
    falling = 1 / torch.arange(1, x.shape[-1] + 1, device=x.device, dtype=x.dtype)
    return torch.empty_like(x).scatter(-1, order, falling.expand_as(x))


def fewest(rank: Tensor, mass: Tensor, share: float) -> Tensor:
    """How many of the highest rank hold that share of the mass `[..., n]`."""
    every = torch.full_like(mass[..., 0], mass.shape[-1], dtype=torch.long)
    return enough(rank, mass, BudgetSchedule(mass=share), every)


def crossed(rank: Tensor, first: Tensor, block: int, shape: Sequence[int]) -> Tensor:
    """`[B, h, R, N]`, the highest `rank [B, h, S]` of the diagonals that cross a block, 0 where there is none.

    The first query lies at position `first [B]`. All blocks as far apart are crossed by the same diagonals.
    """
    (rows, columns), (h, keys) = shape, rank.shape[1:]
    at = (first % block)[:, None] + torch.arange((columns + 2) * block - 1, device=rank.device) - 2 * block + 1
    around = rank.gather(2, at.clamp(0, keys - 1)[:, None].expand(-1, h, -1))
    around = around.masked_fill(((at < 0) | (at >= keys))[:, None], 0.0)
    apart = around.unfold(2, 2 * block - 1, block).amax(3)  # [B, h, 1 + N], by r - c + first // block from -1 on
    row, column = torch.arange(rows, device=rank.device)[:, None], torch.arange(columns, device=rank.device)
    index = ((first // block)[:, None, None] + row - column + 1).clamp(0, columns).flatten(1)
    return apart.gather(2, index[:, None].expand(-1, h, -1)).unflatten(2, (rows, columns))


def pooled_weights(q: Tensor, k: Tensor, visible: Tensor, scale: float) -> Tensor:
    """`[B, h, R, N]`, softmax over the `visible [B, R, N]` key blocks of the products of mean queries `q [B, R, h, K]`
    and mean keys `k [B, N, h, K]`."""
    scores, hidden = scale * torch.einsum("brhk,bnhk->bhrn", q, k), ~visible[:, None]
    return scores.masked_fill(hidden, -torch.inf).softmax(-1).masked_fill(hidden, 0.0)


@dataclass(frozen=True)
class Pattern:
    """How each head reads.

    Of a budget in blocks a head has verticals for `share` of what the last block of queries may read; what the
    verticals that a block of queries sees leave of its budget goes to slashes. With a budget by mass the verticals hold
    that share of the vertical mass and the slashes of the slash mass, `least` of each at least.
    """

    mass: Stripes
    rank: Stripes  # which come first
    share: Tensor  # [B or 1, H], fp64
    pooled: Tensor | None = None  # [B or 1, H] heads that read the blocks of the greatest `pooled_weights` instead
    least: int = 0


def read(view: View, pattern: Pattern, budget: BudgetSchedule, block: int) -> Tensor:
    """`[B, T, H, V]`: attention to the keys that the pattern chooses, by blocks of `block` queries and keys."""
    with torch.no_grad():
        lists, columns = choose(view, pattern, budget, block)
    return view.attend(lists.blocks, lists.counts, columns=columns, query_block=block, block=block)


def choose(view: View, pattern: Pattern, budget: BudgetSchedule, block: int) -> tuple[Lists, Tensor | None]:
    """The lists of `read` and its columns `[B, H, C]`."""
    span, rank = span_of(view), pattern.rank.slash
    visible, own = span.seen(block, block, -(-view.k.shape[1] // block))
    if budget.mass is None:
        verticals, numbers = split(pattern, budget, visible.sum(2), span.ends(block), block)
    else:
        verticals, slashes = holding(pattern, budget.mass)
        rank = torch.where(rank * (slashes[..., None] + 0.5) >= 1, rank, 0.0)  # a rank is 1 / its place
    means = None if pattern.pooled is None else pooled(view, span, block)
    parts = []
    for some in some_heads(view, block, block):
        weights = crossed(rank[:, some], span.first, block, visible.shape[1:])
        marked = (weights > 0) & visible[:, None]
        if means is not None and pattern.pooled is not None:
            estimate = pooled_weights(means[0][:, :, some], means[1][:, :, some], visible, view.factor)
            instead = pattern.pooled[:, some, None, None]
            weights = torch.where(instead, estimate, weights)
            if budget.mass is not None:
                flat = estimate.flatten(2)
                marked = marked | instead & best(flat, fewest(flat, flat, budget.mass)).view_as(estimate)
        if budget.mass is None:
            number = numbers[:, some]
        else:
            number = (marked | own[:, None]).sum(3).clamp(budget.least, budget.most)
            weights = weights + marked
        parts.append(listed(first_of(weights, number, visible, own)))
    return join(parts), highest(pattern.rank.vertical, verticals)


def split(pattern: Pattern, budget: BudgetSchedule, visible: Tensor, ends: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """How many verticals a head has, `[B, H]`, and how many blocks each block of queries lists, `[B, H, R]`, of
    `visible [B, R]` ones: its budget less the verticals up to its last query at `ends [B, R]`, or all of them."""
    rank, number = pattern.rank.vertical, budget.counts(visible, visible)[:, None]  # weights matter by mass alone
    verticals = (pattern.share * number.amax(2) * block + 1e-9).long().expand(rank.shape[:2])
    seen = best(rank, verticals).cumsum(2).gather(2, ends.clamp(min=0)[:, None].expand(-1, rank.shape[1], -1))
    return verticals, torch.where(number < visible[:, None], number - (seen + block - 1) // block, number)


def holding(pattern: Pattern, share: float) -> tuple[Tensor, Tensor]:
    """How many verticals and how many slashes a head reads, both `[B, H]`."""
    counts = [fewest(*x, share).clamp(min=pattern.least) for x in zip(pattern.rank, pattern.mass, strict=True)]
    if pattern.pooled is not None:
        counts = [count.masked_fill(pattern.pooled, pattern.least) for count in counts]
    return counts[0], counts[1]


def pooled(view: View, span: Span, block: int) -> tuple[Tensor, Tensor]:
    """Mean queries `[B, R, H, K]` and keys `[B, N, H, K]` of the blocks."""
    q, k = mean(*cut_queries(view, span, block)), mean(*cut_keys(view, span, block))
    return q, repeat_heads(k, view.q.shape[2] // view.k.shape[2])


def highest(rank: Tensor, counts: Tensor) -> Tensor | None:
    """`[B, H, C]`, as many places as `counts [B, H]` of the highest `rank [B, H, S]`, filled up with -1."""
    most = min(int(counts.max()), rank.shape[2]) if checks.readable(counts) else rank.shape[2]
    if most == 0:
        return None
    places, number = rank.topk(most).indices, torch.arange(most, device=rank.device)
    return places.masked_fill(number >= counts[..., None], -1)
