"""What decoding notes about pages of cached keys, kept up to date as the cache grows.

A token that is decoded changes its own page alone, in place and without a wait for the device. The notes have room for
pages to come, whose contents do not matter before their first key.

B batch, T new tokens, S keys, H query heads, G KV heads, K head dimension, R features, n pages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.architectures.core.choosing import follows, widened
from zoo.architectures.core.sparse import Method, SparseAttention, View
from zoo.kernels.block_sparse_attention.budget import BudgetSchedule
from zoo.kernels.block_sparse_attention.scores import extend_pooled, pool_keys
from zoo.kernels.block_sparse_attention.select import select_blocks

ROOM = 64  # pages by which the notes grow


@dataclass(frozen=True)
class Pages:
    """Pages of `size` tokens. Noted is the largest and the smallest of each feature or, of pages of one token, the
    features themselves; `features` makes them `[B, T, G, R]` of keys `[B, T, G, K]`."""

    size: int
    features: Callable[[Tensor], Tensor] = lambda k: k

    @property
    def single(self) -> bool:
        return self.size == 1

    def pool(self, k: Tensor, starts: Tensor | None = None) -> Tensor:
        kind = "antidiagonal" if self.single else "bounds"
        return pool_keys(self.features(k), size=self.size, score=kind, starts=starts, dtype=k.dtype)

    def room(self, length: int) -> int:
        """Pages that the notes about `length` keys have room for."""
        return -(-length // (self.size * ROOM)) * ROOM

    def bytes(self, length: int, kv_heads: int, features: int, itemsize: int) -> int:
        return self.room(length) * kv_heads * features * (1 if self.single else 2) * itemsize

    @torch.no_grad()
    def select(self, view: View, q: Tensor, budget: BudgetSchedule, **options: Any) -> tuple[Tensor, Tensor]:
        """Pages for one query of each row, by features `q [B, 1, H, R]`: `select_blocks` by bounds, or by products."""
        score = "mean" if self.single else "bounds"
        call: dict[str, Any] = dict(query_block=1, block=self.size, score=score, **options)
        if view.notes is None:
            return select_blocks(q, self.features(view.k), budget, **call, **view.places)
        pages = self.noted(view, view.notes)
        count, width = pages.shape[1] * self.size, q.shape[3]
        shape = view.k[:, :1, :, :width].expand(-1, count, -1, -1)  # that of the features, with the room
        call |= dict(q_positions=view.query_positions(), starts=view.starts, pooled=pages)
        return select_blocks(q, shape, budget, **call)

    def noted(self, view: View, notes: dict[str, Any]) -> Tensor:
        """`[B, n, G, R or 2 R]` of all keys up to the one of the query."""
        pages, keys = notes.get("pages"), view.k.shape[1]
        if pages is None or not follows(view, notes["seen"], pages):
            pages = widened(self.pool(view.k, view.starts), self.room(keys))
            self.refresh(view, pages)
        else:
            pages = widened(pages, self.room(keys))
            new = self.features(view.k.gather(1, row_of(view, 0, 1, view.k)))
            kind = "antidiagonal" if self.single else "bounds"
            extend_pooled(pages, new, row_positions(view), size=self.size, score=kind)
        notes["pages"], notes["seen"] = pages, keys
        return pages

    @torch.no_grad()
    def follow(self, view: View) -> None:
        """Bring the notes up to date with a call of several tokens, or drop them where tokens were missed."""
        notes, keys = view.notes, view.k.shape[1]
        if notes is None or "pages" not in notes:
            return
        if follows(view, notes["seen"], notes["pages"]):
            notes["pages"], notes["seen"] = widened(notes["pages"], self.room(keys)), keys
            self.refresh(view, notes["pages"])
        else:
            del notes["pages"], notes["seen"]

    def refresh(self, view: View, pages: Tensor) -> None:
        """Pool anew, in place, the pages that the keys of this call lie in, of their keys up to the last query's."""
        tokens, size = view.q.shape[1], self.size
        count = min((tokens + size - 2) // size + 1, pages.shape[1])
        first = (row_positions(view)[:, None].clamp(min=0) // size).clamp(max=pages.shape[1] - count)
        offset = (first * size - row_positions(view)[:, None])[..., None, None]
        fresh = self.pool(view.k.gather(1, row_of(view, offset, count * size, view.k)))
        index = first + torch.arange(count, device=first.device)
        pages.scatter_(1, index[..., None, None].expand_as(fresh), fresh)


class Paged(Method):
    """A method of decode that chooses pages; `pages` is what the cache notes of them."""

    phases = ("decode",)
    pages: Pages

    def observe(self, view: View) -> None:
        self.pages.follow(view)


class PagedAttention(SparseAttention):
    """A mixer whose method is a `Paged` one."""

    @property
    def features(self) -> int:
        """Features of a key of which pages are made."""
        return self.head_dim

    def state_bytes(self, length: int, itemsize: int = 2) -> int:
        noted: int = self.rule.pages.bytes(length, self.kv_heads, self.features, itemsize)
        return super().state_bytes(length, itemsize) + noted


def row_positions(view: View) -> Tensor:
    """`[B]`: the position of each row's first query."""
    return view.query_positions()[..., 0].expand(view.q.shape[0]).contiguous()


def row_of(view: View, offset: Tensor | int, count: int, k: Tensor) -> Tensor:
    """The index `[B, count, G, K]` of keys from `offset [B, 1, 1, 1]` after the first query's own on; what lies after
    the last query's own is that one."""
    steps = offset + torch.arange(count, device=k.device)[:, None, None]
    at = row_positions(view)[:, None, None, None] + steps.clamp(max=view.q.shape[1] - 1)
    at = at if view.starts is None else at + view.starts[:, None, None, None]
    return at.clamp(min=0).expand(-1, -1, *k.shape[2:])
