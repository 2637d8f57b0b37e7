"""What methods share that weigh blocks of keys by estimates of their own.

B batch, T tokens, S keys, H query heads, K head dimension; R query blocks, N key blocks, M tokens of a block, L listed
blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.architectures.core.choosing import slices
from zoo.architectures.core.mixer import wide
from zoo.architectures.core.sparse import View
from zoo.errors import ZooError
from zoo.kernels import checks
from zoo.kernels.block_sparse_attention.budget import BudgetSchedule


def check_block(name: str, size: object) -> None:
    """Raise `ZooError` unless `size` is a size of blocks."""
    if not isinstance(size, int) or not (size == 1 or 16 <= size <= 128):
        raise ZooError(f"{name} was {size!r}; it must be 1 or 16 to 128")


class Span(NamedTuple):
    """Where the queries of a view lie that holds no packed sequences."""

    queries: Tensor  # [B, T] positions, negative on padding
    first: Tensor  # [B] position of the first query that is not padding
    last: Tensor  # [B] position of the last one
    padding: Tensor  # [B] queries of padding, which come first
    starts: Tensor  # [B] keys of padding

    def begins(self, size: int) -> Tensor:
        """`[B, R]`: position of the first query of each block of `size` queries."""
        count = -(-self.queries.shape[1] // size)
        return self.first[:, None] + torch.arange(count, device=self.first.device) * size

    def ends(self, size: int) -> Tensor:
        """`[B, R]`: position of the last query of each block of `size` queries, -1 of a block that has none."""
        begins, last = self.begins(size), self.last[:, None]
        return torch.minimum(begins + size - 1, last).masked_fill(begins > last, -1)

    def seen(self, query_block: int, block: int, count: int) -> tuple[Tensor, Tensor]:
        """Which of `count` key blocks a block of queries may see, and which hold its own keys, both `[B, R, N]`."""
        number = torch.arange(count, device=self.first.device) * block
        visible = number <= self.ends(query_block)[..., None]
        return visible, visible & (number > self.begins(query_block)[..., None] - block)


def span_of(view: View) -> Span:
    queries = torch.atleast_2d(view.query_positions()).expand(view.q.shape[0], -1)
    starts = torch.zeros_like(queries[:, 0]) if view.starts is None else view.starts.long()
    return Span(queries, queries[:, 0].clamp(min=0), queries[:, -1], (queries < 0).sum(1), starts)


def by_sequence(rule: Callable[[View], Tensor], view: View) -> Tensor:
    """`rule` of each packed sequence as of one alone; estimates are made as the sparse ops are, without autocast."""
    q, k, v = checks.autocast(view.q, view.k, view.v)
    view = replace(view, q=q, k=k, v=v)
    with checks.autocast_off(q):
        if view.cu_seqlens is None:
            return rule(view)
        views = (
            replace(view, q=q[:, begin:end], k=k[:, begin:end], v=v[:, begin:end], cu_seqlens=None)
            for begin, end in pairwise(checks.host_values(view.cu_seqlens))
            if begin < end
        )
        return torch.cat([rule(part) for part in views], 1)


def cut(x: Tensor, size: int, begin: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """`x [B, T, H, K]` in blocks `[B, n, M, H, K]` that begin at token `begin [B]`, n = T / size rounded up, and which
    of their tokens there are `[B, n, M]`: those before `end [B]`; others are 0."""
    tokens, count = x.shape[1], -(-x.shape[1] // size)
    at = begin[:, None] + torch.arange(count * size, device=x.device)
    known = at < end[:, None]
    index = at.clamp(max=tokens - 1)[..., None, None].expand(-1, -1, *x.shape[2:])
    pieces = x.gather(1, index).masked_fill(~known[..., None, None], 0.0)
    return pieces.unflatten(1, (count, size)), known.unflatten(1, (count, size))


def cut_queries(view: View, span: Span, size: int) -> tuple[Tensor, Tensor]:
    """The blocks of queries that the sparse ops count, `[B, R, M, H, K]`."""
    return cut(view.q, size, span.padding, torch.full_like(span.padding, view.q.shape[1]))


def cut_keys(view: View, span: Span, size: int) -> tuple[Tensor, Tensor]:
    """The blocks of keys, `[B, N, M, G, K]`, without those of a static cache that are not written yet."""
    return cut(view.k, size, span.starts, span.starts + span.last + 1)


def mean(pieces: Tensor, known: Tensor) -> Tensor:
    """Blocks `[B, n, M, H, K]` to `[B, n, H, K]`, in fp32 (fp64)."""
    return wide(pieces).sum(2) / known.sum(2).clamp(min=1)[..., None, None]


def some_heads(view: View, query_block: int, block: int) -> Iterator[slice]:
    """The query heads, as many at a time as their weights allow."""
    (b, tokens, heads, _), keys = view.q.shape, view.k.shape[1]
    return slices(heads, b * -(-tokens // query_block) * -(-keys // block))


class Lists(NamedTuple):
    """`blocks [B, H, R, L]` in ascending order, `counts [B, H, R]`"""

    blocks: Tensor
    counts: Tensor


def best(order: Tensor, counts: Tensor) -> Tensor:
    """Which of the last axis of `order [..., n]` are the `counts [...]` greatest."""
    ranked = order.argsort(dim=-1, descending=True, stable=True)
    first = torch.arange(order.shape[-1], device=order.device) < counts[..., None]
    return torch.zeros_like(first).scatter(-1, ranked, first)


def enough(order: Tensor, weights: Tensor, budget: BudgetSchedule, visible: Tensor) -> Tensor:
    """`[...]`, how many of `weights [..., n]`, the greatest of `order` first, the budget takes of `visible [...]`."""
    ranked = order.argsort(dim=-1, descending=True, stable=True) if budget.mass is not None else None
    ordered = weights if ranked is None else weights.gather(-1, ranked)
    return budget.counts(visible.expand(weights.shape[:-1]), ordered)


def first_of(weights: Tensor, number: Tensor, visible: Tensor, own: Tensor) -> Tensor:
    """`[B, h, R, N]`: the own blocks of a block of queries and, of the others that it sees, those of the greatest
    weights (at least 0), `number [B, h, R]` in all."""
    order = weights.masked_fill(~visible[:, None], -1.0).masked_fill(own[:, None], torch.inf)
    number = torch.maximum(number, own.sum(2)[:, None])
    return best(order, torch.minimum(number, visible.sum(2)[:, None]).expand(order.shape[:-1]))


def listed(marked: Tensor) -> Lists:
    """The lists of the `marked [B, H, R, N]` blocks."""
    count = marked.shape[3]
    blocks = torch.where(marked, torch.arange(count, device=marked.device, dtype=torch.int32), count).sort(-1).values
    return Lists(blocks.masked_fill(blocks == count, -1), marked.sum(3, dtype=torch.int32))


def join(parts: Sequence[Lists]) -> Lists:
    """The lists of all heads from those of some each, no longer than need be."""
    width = max(part.blocks.shape[3] for part in parts)
    if all(checks.readable(part.counts) for part in parts):
        width = max(1, *(int(part.counts.max()) for part in parts))
    blocks = [F.pad(part.blocks, (0, width - part.blocks.shape[3]), value=-1) for part in parts]
    return Lists(torch.cat(blocks, 1), torch.cat([part.counts for part in parts], 1))
