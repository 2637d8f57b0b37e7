"""Where the blocks of queries and keys lie when they count real tokens of each sequence.

Shapes: B batch, Tq queries, Tk keys, N sequences (B, or the packed ones), M blocks, C tokens of a block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def query_blocks(length: int, size: int, cu_seqlens: Tensor | None = None) -> int:
    """Blocks of `size` tokens; of packed sequences, whose blocks follow each other, as many as always suffice."""
    if cu_seqlens is None:
        return -(-length // size)
    return length if size == 1 else length // size + cu_seqlens.shape[0] - 1


@dataclass(frozen=True)
class Rows:
    """All blocks of one size. Those left over, in packed batches, have no tokens."""

    tokens: Tensor  # [B, M, C] the token at each place; 0 where there is none
    known: Tensor  # [B, M, C] whether there is one
    begin: Tensor  # [B, M] first token of the block's sequence
    length: Tensor  # [B, M] tokens of that sequence
    first: Tensor  # [B, M] first block of that sequence
    sequence: Tensor  # [B, M] its number, in 0 .. N - 1


def rows(batch: int, length: int, size: int, begins: Tensor | None, cu_seqlens: Tensor | None, like: Tensor) -> Rows:
    """The blocks of `length` tokens of which the first `begins` [B] are padding, or of packed sequences."""
    block = torch.arange(query_blocks(length, size, cu_seqlens), device=like.device)
    if cu_seqlens is None:
        sequence = torch.arange(batch, device=like.device)[:, None].expand(-1, len(block))
        first = torch.zeros_like(sequence)
        begin = first if begins is None else begins.long()[:, None].expand_as(first)
        lengths = length - begin
    else:
        ends = cu_seqlens.long()
        counts = (ends.diff() + size - 1) // size
        after = counts.cumsum(0)
        sequence = torch.searchsorted(after, block, right=True).clamp(max=len(counts) - 1)[None]
        first, begin, lengths = (after - counts)[sequence], ends[:-1][sequence], ends.diff()[sequence]
    place = ((block - first) * size)[..., None] + torch.arange(size, device=like.device)
    known = place < lengths[..., None]
    return Rows(torch.where(known, begin[..., None] + place, 0), known, begin, lengths, first, sequence)


def positions(
    batch: int, tq: int, tk: int, q_positions: Tensor | None, starts: Tensor | None, like: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Of queries that are not packed, [B, Tq], and how many of each row are padding, [B], unless none is."""
    if q_positions is None:
        places = torch.arange(tk - tq, tk, device=like.device)
        places = places.expand(batch, -1) if starts is None else places - starts.long()[:, None]
    else:
        places = q_positions.long().expand(batch, -1)
    none = q_positions is None and starts is None and tq <= tk
    return places, None if none else (places < 0).sum(1)


def place_queries(
    q: Tensor, k: Tensor, size: int, q_positions: Tensor | None, starts: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Rows, Tensor]:
    """The query blocks, and the position [B, M, C] of each query in its sequence, -1 where there is none."""
    b, tq = q.shape[:2]
    if cu_seqlens is not None:
        found = rows(b, tq, size, None, cu_seqlens, q)
        places = found.tokens - found.begin[..., None]
    else:
        at, padding = positions(b, tq, k.shape[1], q_positions, starts, q)
        found = rows(b, tq, size, padding, None, q)
        places = at.gather(1, found.tokens.flatten(1)).view_as(found.tokens)
    return found, torch.where(found.known, places, -1)
