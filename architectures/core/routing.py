"""Lists of key blocks for each query, by weights that a mixer computes for a slice of the queries at a time.

B batch, T new tokens, R queries of a slice, S keys, N compressed keys, C key blocks, H query heads, G KV heads, K head
dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.architectures.core.choosing import slices
from zoo.architectures.core.mixer import wide
from zoo.architectures.core.sparse import View
from zoo.kernels import checks
from zoo.kernels.block_sparse_attention.budget import BudgetSchedule
from zoo.kernels.block_sparse_attention.select import choose_blocks

Weigh = Callable[[Tensor, Tensor], Tensor]


def real_first(view: View) -> tuple[Tensor, Tensor]:
    """The queries `[B, T, H, K]` and their positions `[B, T]`, counted as the lists of the sparse ops are: from the
    first that is no padding. What follows the last one means nothing."""
    at = torch.atleast_2d(view.query_positions()).expand(view.q.shape[0], -1)
    if view.q_positions is None and view.starts is None:
        return view.q, at
    padding, steps = (at < 0).sum(1, keepdim=True), torch.arange(at.shape[1], device=at.device)
    order = (padding + steps).clamp(max=at.shape[1] - 1)
    q = view.q.gather(1, order[..., None, None].expand_as(view.q))
    return q, at[:, :1].clamp(min=0) + steps


@torch.no_grad()
def route(
    view: View, weigh: Weigh, budget: BudgetSchedule, *, block: int, width: int, query_block: int = 1, local: int = 1,
    sink: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Lists `[B, Hs, Nq, L]` and their lengths `[B, Hs, Nq]`, one list for each block of queries.

    Args:
        weigh: `(q [B, R, H, K], positions [B, R])`, whole blocks of queries, to the weights `[B, Hs, Nq, C]` of all
            blocks of `block` keys.
        width: how many numbers `weigh` makes for a query block and head.
        local, sink: as in `choose_blocks`.
    """
    q, at = real_first(view)
    options: dict[str, Any] = dict(query_block=query_block, block=block, local=local, sink=sink, starts=view.starts)
    found = []
    with checks.autocast_off(q):
        one = q.shape[0] * q.shape[2] * max(width, -(-view.k.shape[1] // block))
        for part in slices(q.shape[1], one, query_block):
            weights = weigh(q[:, part], at[:, part])
            found.append(choose_blocks(weights, q[:, part], view.k, budget, q_positions=at[:, part], **options))
    longest = max(blocks.shape[3] for blocks, _ in found)
    lists = torch.cat([F.pad(blocks, (0, longest - blocks.shape[3]), value=-1) for blocks, _ in found], 2)
    return lists, torch.cat([counts for _, counts in found], 2)


def window_weights(q: Tensor, k: Tensor, at: Tensor, size: int, stride: int, scale: float | None) -> Tensor:
    """What softmax over compressed keys gives to each, summed over the query heads of a KV head: `[B, G, R, N]`.

    Args:
        q: `[B, R, H, K]` at positions `at [B, R]`; k: `[B, N, G, K]`, of windows of `size` tokens every `stride` ones.
    """
    heads, scale = k.shape[2], checks.default_scale(scale, q)
    scores = scale * torch.einsum("brghk,bngk->bghrn", wide(q).unflatten(2, (heads, -1)), wide(k))
    seen = torch.arange(k.shape[1], device=k.device) * stride + size - 1 <= at[..., None]
    scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    return scores.softmax(-1).masked_fill(~seen[:, None, None], 0.0).sum(2)


def block_weights(weights: Tensor, size: int, stride: int, block: int, blocks: int, by: str) -> Tensor:
    """Weights `[..., C]` of `blocks` blocks of `block` tokens, from those of windows, `[..., N]`.

    `by` "max": the largest of a window that overlaps the block; "sum": their sum, each times the strides of it that lie
    in the block.
    """
    own, step = size // stride, block // stride
    lead, width = own - 1, own + step - 1
    padded = F.pad(weights, (lead, (blocks - 1) * step + width - lead - weights.shape[-1]))
    parts = padded.unfold(-1, width, step)
    if by == "max":
        return parts.amax(-1)
    place = torch.arange(1, width + 1, device=weights.device)
    overlap = torch.minimum(place, width + 1 - place).clamp(max=min(own, step))
    return parts @ overlap.to(weights.dtype)
