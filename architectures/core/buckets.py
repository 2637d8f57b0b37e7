"""Lists of keys for tokens that were put in buckets, by hashing or by clusters.

Tokens are sorted by their bucket and, inside it, by position. A query then reads neighbours in this order:

    window   the `size` tokens before it in its own bucket (without causality also those after it): what a query reads
             does not depend on tokens to come
    chunks   the chunk of `size` tokens that it is in, and `before` chunks before that, whatever their buckets: what a
             query reads depends on how many tokens fall in which bucket, later ones too

B batch, T new tokens, S keys, H heads, L keys of a list.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from zoo.architectures.core.choosing import lengths
from zoo.architectures.core.mixer import Context, along
from zoo.architectures.core.sparse import View


class Slots(NamedTuple):
    """Where the tokens of a call lie among its keys."""

    queries: Tensor  # [B, T], those of padding left out: a row's other queries come first
    begin: Tensor  # [B, S], the first slot of each key's sequence
    owner: Tensor  # [B, S], which sequence a key belongs to; -1 where it is none's

    @classmethod
    def of(cls, view: View) -> Slots:
        (b, s), slot = view.k.shape[:2], torch.arange(view.k.shape[1], device=view.k.device)
        if view.cu_seqlens is not None:
            bounds = view.cu_seqlens.long()
            owner = torch.searchsorted(bounds, slot, right=True) - 1
            return cls(slot[None], bounds[owner][None], owner[None])
        begin = torch.zeros_like(slot[:1]) if view.starts is None else view.starts.long()[:, None]
        known = (slot >= begin) & (slot < begin + lengths(view)[:, None])
        first = view.query_positions()[..., :1].clamp(min=0) + begin
        queries = (first + torch.arange(view.q.shape[1], device=slot.device)).expand(b, -1).clamp(max=s - 1)
        return cls(queries, begin.expand(b, s), torch.where(known, 0, -1).expand(b, s))


@torch.no_grad()
def bucket_lists(
    view: View, buckets: Tensor, size: int, before: int | None = None, *, causal: bool = True, own: bool = False
) -> Tensor:
    """Positions `[B, H, T, L]`, int32 and -1 where there is none, by `buckets [B, S, H]` of the keys. The first list of
    a row is that of its first token that is no padding.

    `before` chunks, or None: window. The query's own token is listed only with `own`. Without causality all keys of
    `view` must be there (no room behind them).
    """
    at, count = Slots.of(view), buckets.amax() + 1
    last = at.owner.amax() + 1  # those that belong to nobody come last
    kind = torch.where(at.owner[..., None] < 0, last * count, at.owner[..., None] * count + buckets).transpose(1, 2)
    order = kind.argsort(dim=-1, stable=True)  # [B, H, S]
    owner, begin = (x[:, None].expand_as(order) for x in (at.owner, at.begin))
    number = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    slots = at.queries[:, None].expand(*order.shape[:2], -1)
    rank = torch.empty_like(order).scatter_(-1, order, number).gather(-1, slots)[..., None]  # [B, H, T, 1]
    if before is None:
        near = torch.arange(-size, 1 if causal else size + 1, device=order.device)
        wanted, group = rank + near[(near != 0) | own], kind
    else:
        first = begin.gather(-1, slots)[..., None] if view.cu_seqlens is not None else 0
        wanted = first + ((rank - first) // size - before) * size
        wanted, group = wanted + torch.arange((before + 1) * size, device=order.device), owner
    inside = (wanted >= 0) & (wanted < order.shape[-1])
    tokens = order.gather(-1, wanted.clamp(0, order.shape[-1] - 1).flatten(2))
    group_of, owner_of, places = (x.gather(-1, tokens).view_as(wanted) for x in (group, owner, number - begin))
    listed = inside & (group_of == group.gather(-1, slots)[..., None]) & (owner_of >= 0)
    listed = listed if own else listed & (tokens.view_as(wanted) != slots[..., None])
    return torch.where(listed, places, -1).int()


def both_sides(q: Tensor, k: Tensor, v: Tensor, ctx: Context, scale: float | None) -> tuple[View, Tensor | None]:
    """A call without cache as a `View` in which padding lies before the tokens, on whichever side it was, and what
    `back` needs to undo that."""
    if ctx.padding_mask is None:
        return View(q, k, v, cu_seqlens=ctx.cu_seqlens, scale=scale), None
    order = ctx.padding_mask.int().argsort(dim=1, stable=True)
    q, k, v = (along(x, order) for x in (q, k, v))
    return View(q, k, v, starts=(~ctx.padding_mask).sum(1), scale=scale), order.argsort(1)


def back(x: Tensor, order: Tensor | None) -> Tensor:
    """`x [B, T, H, K]` as the tokens of the call lay."""
    return x if order is None else along(x, order)
