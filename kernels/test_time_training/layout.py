"""Where mini-batches lie: they count the tokens of each sequence, and the first may have begun in an earlier call.

Shapes: B batch, T tokens, N sequences, C tokens of a mini-batch, M mini-batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.kernels.chunks import Chunks


def layout(length: int, size: int, cu_seqlens: Tensor | None, offset: Tensor | None) -> Chunks:
    """`offset` [N] is the place of the first token in its mini-batch. No value is read on the host: as many
    mini-batches are laid out as always suffice, and those left over are empty."""
    if cu_seqlens is None:
        if offset is None:
            return Chunks(length, min(size, length), -(-length // size))
        token = torch.arange(length, device=offset.device)
        return Chunks(length, size, -(-(length + size - 1) // size), offset.long()[:, None] + token)
    return _packed(length, size, cu_seqlens, offset)


def _packed(length: int, size: int, cu_seqlens: Tensor, offset: Tensor | None) -> Chunks:
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    begin = torch.zeros_like(lengths) if offset is None else offset.long()
    spare = 0 if offset is None else size - 1
    count = max(1, (length + lengths.shape[0] * (size - 1 + spare)) // size)
    own = torch.where(lengths > 0, (begin + lengths + size - 1) // size, 0)
    ends = own.cumsum(0)
    token = torch.arange(length, device=cu_seqlens.device)
    owner = torch.searchsorted(cu_seqlens.long(), token, right=True) - 1
    slots = (ends - own)[owner] * size + begin[owner] + token - starts[owner]
    chunk = torch.arange(count, device=cu_seqlens.device)
    sequence = torch.searchsorted(ends, chunk, right=True).clamp(max=lengths.shape[0] - 1)
    first = chunk == (ends - own)[sequence]
    return Chunks(length, size, count, slots, sequence, first, (ends - 1).clamp(min=0), lengths == 0)


def places(plan: Chunks, size: int, lr: Tensor) -> tuple[Tensor, Sequence[bool] | Tensor]:
    """1 where a token is and 0 elsewhere, [M, B, 1, C]; whether each mini-batch ends with its last token, [M, B] or
    known without looking."""
    there = plan.split(torch.ones_like(lr[:, :, :1]))
    if plan.slots is None:
        return there, [(m + 1) * size <= plan.length for m in range(plan.count)]
    return there, there[:, :, 0, -1] > 0


def next_offset(length: int, size: int, cu_seqlens: Tensor | None, offset: Tensor) -> Tensor:
    lengths = length if cu_seqlens is None else cu_seqlens.diff()
    return ((offset + lengths) % size).to(torch.int32)
