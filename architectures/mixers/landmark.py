"""Landmark attention (Mohtashami & Jaggi 2023, arXiv 2305.16300): a landmark token behind each block stands for it.

    w_ij = softmax_j(s_ij; landmarks of past blocks, own block)                       j in the own block, up to i
    w_ij = softmax_b(s_ib; ...) softmax_j(s_ij; tokens of block b)                    j in a past block b

with s = scale q . k and the outer softmax over the same keys in both lines: a landmark's weight goes to the tokens of
its block, and no landmark gives a value of its own. Nobody sees the landmark of the own block. A query reads the blocks
of the best landmarks, as many as the budget has, each head by itself; in decode those alone are loaded.

Every (block + 1)-th token of a sequence is a landmark: `with_landmarks` puts them into a text, and who generates text
must go on so. Training needs budget 1.0. Prefill and decode are the same function.

B batch, T new tokens, R queries of a slice, S keys, N blocks, C tokens of a block with its landmark, H query heads,
G KV heads, K head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from zoo.architectures.core.block_lists import by_sequence
from zoo.architectures.core.choosing import slices
from zoo.architectures.core.linear import check_sizes
from zoo.architectures.core.mixer import along, wide
from zoo.architectures.core.routing import real_first
from zoo.architectures.core.sparse import SparseArgs, SparseAttention, View
from zoo.kernels import checks
from zoo.kernels.block_sparse_attention.select import choose_blocks

EXAMPLE = {"heads": 4, "head_dim": 16, "kv_heads": 2, "rope": "default", "block": 3, "budget": 1.0}
VARIANTS = {"small": {**EXAMPLE, "budget": 9}}


@dataclass(frozen=True, kw_only=True)
class Args(SparseArgs):
    """`block` tokens stand before each landmark; the `budget` counts blocks with the own one and their landmarks."""

    block: int = 50
    budget: Any = 1.0

    @property
    def block_size(self) -> int:
        return self.block + 1

    def check_method(self) -> None:
        check_sizes(block=self.block)
        super().check_method()


def with_landmarks(ids: Tensor, landmark: int, block: int) -> Tensor:
    """`ids [B, T]` with the token `landmark` behind every `block` tokens, `[B, T + T // block]`."""
    length = ids.shape[1]
    whole = ids[:, : length // block * block].unflatten(1, (-1, block))
    marked = F.pad(whole, (0, 1), value=landmark).flatten(1)
    return torch.cat([marked, ids[:, whole.shape[1] * block :]], 1)


class Landmarks:
    """Attention of two levels over a `View`, `[B, T, H, V]`."""

    def __init__(self, args: Args) -> None:
        self.args = args

    def __call__(self, view: View) -> Tensor:
        with checks.autocast_off(view.q):
            return by_sequence(self._attend, view)

    def _attend(self, view: View) -> Tensor:
        q, at = real_first(view)
        if q.shape[1] == 1 and not self.args.everything:
            return self._retrieve(view, q, at)
        k, v = (self._blocks(x, view.starts) for x in (view.k, view.v))
        learning = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        parts = []
        for part in slices(q.shape[1], q.shape[0] * q.shape[2] * k.shape[1] * k.shape[2]):
            inputs = (view, q[:, part], at[:, part], k, v)
            parts.append(checkpoint(self._slice, *inputs, use_reentrant=False) if learning else self._slice(*inputs))
        o = torch.cat(parts, 1)
        if view.starts is None and view.q_positions is None:
            return o
        padding = (torch.atleast_2d(view.query_positions()) < 0).sum(1, keepdim=True)
        index = (torch.arange(o.shape[1], device=o.device) - padding).clamp(min=0).expand(o.shape[:2])
        return along(o, index)

    def _blocks(self, x: Tensor, starts: Tensor | None) -> Tensor:
        """`[B, S, G, K]` as blocks `[B, N, C, G, K]` of each sequence."""
        size, length = self.args.block_size, x.shape[1]
        if starts is not None:
            index = (starts[:, None] + torch.arange(length, device=x.device)).clamp(max=length - 1)
            x = along(x, index)
        return F.pad(x, (0, 0, 0, 0, 0, -length % size)).unflatten(1, (-1, size))

    def _slice(self, view: View, q: Tensor, at: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries `[B, R, H, K]` at positions `at` over all blocks."""
        scores = torch.einsum("brghk,bncgk->bghrnc", self._scaled(view, q), wide(k)).flatten(1, 2)
        number = torch.arange(k.shape[1], device=k.device).expand(scores.shape[:4])
        if not self.args.everything:
            lists, counts = self._choose(view, q, at, scores[..., -1].detach())
            number = self._listed(number, lists, counts)
        weights = two_level(scores, number, at).unflatten(1, (k.shape[3], -1))
        return torch.einsum("bghrnc,bncgv->brghv", weights, wide(v)).flatten(2, 3).to(q.dtype)

    @staticmethod
    def _scaled(view: View, q: Tensor) -> Tensor:
        """`[B, R, G, H / G, K]`"""
        return view.factor * wide(q).unflatten(2, (view.k.shape[2], -1))

    def _choose(self, view: View, q: Tensor, at: Tensor, marks: Tensor) -> tuple[Tensor, Tensor]:
        """Lists of blocks by the scores of their landmarks, `marks [B, H, R, N]`."""
        past = torch.arange(marks.shape[3], device=at.device) < (at // self.args.block_size)[:, None, :, None]
        weights = marks.masked_fill(~past, -torch.inf).softmax(-1).masked_fill(~past, 0.0)
        places: dict[str, Any] = dict(q_positions=at, starts=view.starts)
        return choose_blocks(
            weights, q, view.k, self.args.schedule, query_block=1, block=self.args.block_size, **places
        )

    @staticmethod
    def _listed(number: Tensor, lists: Tensor, counts: Tensor) -> Tensor:
        """`number [B, H, R, N]`, -1 where a block is not listed."""
        unread = torch.arange(lists.shape[3], device=lists.device) >= counts[..., None]
        index = lists.long().masked_fill(unread | (lists < 0), number.shape[3])
        listed = torch.zeros(*number.shape[:3], number.shape[3] + 1, dtype=torch.bool, device=number.device)
        return number.masked_fill(~listed.scatter(3, index, True)[..., :-1], -1)

    def _retrieve(self, view: View, q: Tensor, at: Tensor) -> Tensor:
        """One query of each row over the blocks that it lists, and no others."""
        size, heads = self.args.block_size, view.k.shape[2]
        begin: Any = 0 if view.starts is None else view.starts[:, None]
        ends = begin + torch.arange(-(-view.k.shape[1] // size), device=q.device) * size + size - 1
        landmarks = take(view.k, ends.expand(q.shape[0], -1))
        q_heads = self._scaled(view, q)
        marks = torch.einsum("brghk,bngk->bghrn", q_heads, wide(landmarks)).flatten(1, 2)
        lists, counts = self._choose(view, q, at, marks)
        unread = torch.arange(lists.shape[3], device=lists.device) >= counts[..., None]
        number = lists.long().masked_fill(unread, -1)
        tokens = number[:, :, 0, :, None].clamp(min=0) * size + torch.arange(size, device=q.device)  # [B, H, L, C]
        tokens = tokens + (0 if view.starts is None else view.starts[:, None, None, None])
        k, v = (pick_heads(x, tokens.unflatten(1, (heads, -1))) for x in (view.k, view.v))
        scores = torch.einsum("brghk,bghnck->bghrnc", q_heads, wide(k)).flatten(1, 2)
        weights = two_level(scores, number, at).unflatten(1, (heads, -1))
        return torch.einsum("bghrnc,bghncv->brghv", weights, wide(v)).flatten(2, 3).to(q.dtype)


def take(x: Tensor, index: Tensor) -> Tensor:
    """The tokens `index [B, N]` of `x [B, S, G, K]`, the last one where there is none."""
    return x.gather(1, index.clamp(max=x.shape[1] - 1)[..., None, None].expand(-1, -1, *x.shape[2:]))


def pick_heads(x: Tensor, tokens: Tensor) -> Tensor:
    """The tokens `[B, G, H / G, L, C]` of `x [B, S, G, K]`, `[B, G, H / G, L, C, K]`."""
    shape = tokens.shape
    rows = torch.arange(shape[0], device=x.device)[:, None, None]
    heads = torch.arange(shape[1], device=x.device)[:, None]
    return x[rows, tokens.clamp(max=x.shape[1] - 1).flatten(2), heads].unflatten(2, shape[2:])


def two_level(scores: Tensor, number: Tensor, at: Tensor) -> Tensor:
    """The weights of tokens, from their scores `[B, H, R, N, C]` in the blocks `number [B, H, R, N]` (-1: not read),
    for queries at positions `at [B, R]`."""
    size = scores.shape[-1]
    offset, own = torch.arange(size, device=scores.device), (at // size)[:, None, :, None]
    local, past = number == own, (number >= 0) & (number < own)
    mark = offset == size - 1
    seen = local[..., None] & ~mark & (number[..., None] * size + offset <= at[:, None, :, None, None])
    outer = scores.masked_fill(~(seen | (past[..., None] & mark)), -torch.inf)
    outer = outer.flatten(-2).softmax(-1).unflatten(-1, (-1, size))
    inner = scores.masked_fill(mark, -torch.inf).softmax(-1)
    return torch.where(local[..., None], outer, outer[..., -1:] * inner)


class LandmarkAttention(SparseAttention):
    options = Args
    phase_consistent = True

    def make_rule(self, args: Any) -> Any:
        return Landmarks(args)


MODULE = LandmarkAttention
