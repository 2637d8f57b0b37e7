"""Mean keys of pieces of cached tokens, noted and kept up to date.

A piece is pooled anew, of its own keys, in each call that adds to it: the mean of a piece that is full is that of its
keys, to the bit. What is noted of one that is not full means nothing.

B batch, T new tokens, S keys, G KV heads, K head dimension, n pieces.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.architectures.core.choosing import follows, widened
from zoo.architectures.core.pages import row_positions
from zoo.architectures.core.sparse import View
from zoo.kernels.block_sparse_attention.scores import pool_keys


def means_bytes(length: int, size: int, kv_heads: int, head_dim: int, itemsize: int) -> int:
    """Bytes of the noted means of `length` keys: fp32 (fp64)."""
    return -(-length // size) * kv_heads * head_dim * max(torch.float32.itemsize, itemsize)


@torch.no_grad()
def piece_means(view: View, size: int) -> Tensor:
    """`[B, n, G, K]` in fp32 (fp64), n = S / size rounded up."""
    notes, keys = view.notes, view.k.shape[1]
    if notes is None:
        return pool_keys(view.k, size=size, starts=view.starts)
    old = notes.get("means")
    if old is not None and follows(view, notes["means_of"], old):
        found = _refreshed(view, old, size, -(-keys // size))
    else:
        found = pool_keys(view.k, size=size, starts=view.starts)
    notes |= {"means": found, "means_of": keys}
    return found


def _refreshed(view: View, old: Tensor, size: int, pieces: int) -> Tensor:
    """`old`, with the pieces that the keys of this call lie in pooled anew, and room for `pieces`."""
    old = widened(old, pieces)
    count = min((view.q.shape[1] + size - 2) // size + 1, pieces)
    first = (row_positions(view)[:, None].clamp(min=0) // size).clamp(max=pieces - count)  # [B, 1]
    begins: Any = 0 if view.starts is None else view.starts[:, None]
    places = begins + first * size + torch.arange(count * size, device=old.device)
    keys = view.k.gather(1, places.clamp(max=view.k.shape[1] - 1)[..., None, None].expand(-1, -1, *view.k.shape[2:]))
    fresh = pool_keys(keys, size=size)
    index = first + torch.arange(count, device=old.device)
    return old.scatter_(1, index[..., None, None].expand_as(fresh), fresh)
