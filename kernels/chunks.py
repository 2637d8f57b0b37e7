"""How tokens are laid out in chunks.

Shapes: B batch, T tokens, N sequences (B, or the packed ones), C tokens per chunk, M chunks, H heads, D head width.
Chunked arrays are [M, B, H, C, D]: the recurrence over chunks then reads contiguous slices.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.decays import ChannelDecay, Decay, HeadDecay, NoDecay

CHUNK = 64


@dataclass(frozen=True)
class Chunks:
    """Chunk boundaries of one call. `size` is a power of two; the other tensors exist for packed sequences alone."""

    length: int
    size: int
    count: int
    slots: Tensor | None = None  # [B * T] place of each token in the padded array of B * M * C
    sequence: Tensor | None = None  # [M] the sequence of each chunk
    first: Any = None  # [M] whether a chunk begins its sequence
    last: Any = None  # [N] last chunk of each sequence
    empty: Any = None  # [N]

    def split(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """[B, T, H, ...] to [M, B, H, C, ...], `fill` where no token is."""
        b, rest, padded = x.shape[0], x.shape[2:], self.count * self.size
        if self.slots is not None:
            x = x.new_full((b * padded, *rest), fill).index_copy(0, self.slots, x.flatten(0, 1)).unflatten(0, (b, -1))
        elif padded > self.length:
            x = F.pad(x, [0, 0] * len(rest) + [0, padded - self.length], value=fill)
        return x.unflatten(1, (self.count, self.size)).transpose(2, 3).transpose(0, 1).contiguous()

    def join(self, x: Tensor) -> Tensor:
        """[M, B, H, C, D] back to [B, T, H, D]."""
        x = x.transpose(0, 1).transpose(2, 3).flatten(1, 2)
        if self.slots is None:
            return x[:, : self.length]
        return x.flatten(0, 1).index_select(0, self.slots).unflatten(0, (x.shape[0], self.length))

    def finals(self, after: Tensor, before: Tensor) -> Tensor:
        """Of the states [M, ...] after each chunk those [N, ...] after each packed sequence; an empty one leaves its
        initial state `before` as it was."""
        last = after.index_select(0, self.last)
        return torch.where(self.empty.view(-1, *[1] * (last.dim() - 1)), before, last)


def layout(length: int, cu_seqlens: Tensor | None, size: int = CHUNK) -> Chunks:
    """Chunks of `size` tokens, fewer when the call is shorter; boundaries count from the start of each sequence."""
    size = min(size, 1 << max(length - 1, 0).bit_length())
    return Chunks(length, size, -(-length // size)) if cu_seqlens is None else packed(length, cu_seqlens, size)


def packed(length: int, cu_seqlens: Tensor, size: int, offset: Tensor | None = None) -> Chunks:
    """Packed sequences, each beginning `offset` [N] (below `size`) places into its first chunk.

    They are laid out on the device, from shapes alone: no value of `cu_seqlens` is read on the host, and there are as
    many chunks as always suffice. Those left over are empty and belong to the last sequence.
    """
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    begin = torch.zeros_like(lengths) if offset is None else offset.long()
    spare = size - 1 if offset is None else 2 * (size - 1)
    count = max(1, (length + lengths.shape[0] * spare) // size)
    own = torch.where(lengths > 0, (begin + lengths + size - 1) // size, 0)
    ends = own.cumsum(0)  # [N] chunks up to and with each sequence
    token = torch.arange(length, device=cu_seqlens.device)
    owner = torch.searchsorted(cu_seqlens.long(), token, right=True) - 1
    slots = (ends - own)[owner] * size + begin[owner] + token - starts[owner]
    chunk = torch.arange(count, device=cu_seqlens.device)
    sequence = torch.searchsorted(ends, chunk, right=True).clamp(max=lengths.shape[0] - 1)
    first, last = chunk == (ends - own)[sequence], (ends - 1).clamp(min=0)
    return Chunks(length, size, count, slots, sequence, first, last, lengths == 0)


def inside(chunks: Chunks, decay: Tensor | None, low: torch.dtype | None) -> Decay:
    """The decay [B, T, Hv, 1 or K] as seen inside the chunks; products round their operands to `low`."""
    if decay is None:
        return NoDecay(low)
    split = chunks.split(decay)
    return HeadDecay(split.squeeze(-1), low) if split.shape[-1] == 1 else ChannelDecay(split, low)


def transition(k: Tensor, decay: Decay, low_rank: Tensor) -> Tensor:
    """[M, B, H, K, K] what a chunk makes of the state that enters it: Diag(exp of its decay) + low_rank."""
    eye, keep = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device), decay.total()
    return (eye if keep is None else eye * keep) + low_rank
