"""Sequences cut into segments of a fixed length, wherever padding, packing or an earlier call left them.

B batch, T new tokens, N sequences (B, or the packed ones), C tokens of a segment, M segments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.architectures.core.mixer import Context, along


class Segments:
    """Slots `[N, M C]` for the tokens of a call, so that every row's segments begin at multiples of C.

    `offset [N]` is how many tokens of a row's segment earlier calls have seen (None: none); `there` is True on slots
    that hold a token, `filled [N]` the first slot after them.
    """

    def __init__(self, ctx: Context, size: int, offset: Tensor | None) -> None:
        self.size, self.shape = size, ctx.positions.shape
        device, tokens = ctx.positions.device, self.shape[1]
        if ctx.cu_seqlens is not None:
            bounds, index = ctx.cu_seqlens.long(), torch.arange(tokens, device=device)
            row = torch.searchsorted(bounds, index, right=True) - 1
            column, longest, self.rows = index - bounds[row], ctx.max_seqlen or tokens, bounds.shape[0] - 1
            counts, real = bounds.diff(), None
        else:
            row = torch.arange(self.shape[0], device=device)[:, None].expand(self.shape)
            real, longest, self.rows = ctx.padding_mask, tokens, self.shape[0]
            there = torch.ones(self.shape, dtype=torch.bool, device=device) if real is None else real
            column, counts = there.cumsum(1) - 1, there.sum(1)
        if offset is not None:
            offset, longest = offset.long(), longest + size - 1
            column, counts = column + offset[:, None], counts + offset
        self.count = -(-longest // size)
        self.filled, slots = counts, torch.arange(self.count * size, device=device)
        place = row * self.length + column
        self.place = place if real is None else torch.where(real, place, self.rows * self.length)
        self.there = (slots < counts[:, None]) & (slots >= (0 if offset is None else offset[:, None]))

    @property
    def length(self) -> int:
        return self.count * self.size

    def lay(self, x: Tensor) -> Tensor:
        """`[B, T, ...]` to `[N, M C, ...]`, zero where no token is."""
        spare = self.rows * self.length  # padding goes to a slot of its own
        laid = x.new_zeros(spare + 1, *x.shape[2:]).index_copy(0, self.place.flatten(), x.flatten(0, 1))
        return laid[:spare].unflatten(0, (self.rows, self.length))

    def gather(self, x: Tensor) -> Tensor:
        """`[N, M C, ...]` to `[B, T, ...]`; what padding gets means nothing."""
        places = self.place.clamp(max=self.rows * self.length - 1)
        return x.flatten(0, 1)[places.flatten()].unflatten(0, self.shape)

    def last(self, x: Tensor) -> Tensor:
        """Of `[N, M C, ...]` the segment `[N, C, ...]` in which each row's next token falls."""
        start = (self.filled // self.size * self.size)[:, None]
        index = (start + torch.arange(self.size, device=x.device)).clamp(max=self.length - 1)
        return along(x, index)
