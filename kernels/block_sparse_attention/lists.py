"""Which keys each query block gathers, and which of them a query sees.

A key may be listed, be a column, be a sink token or lie in the window; each way gathers keys of its own, and `seen`
leaves a key to the last of these ways that shows it, so that it counts once.

Shapes: B batch, Hs heads of the lists, R query blocks, M queries of a block, L gathered keys of a query block, S listed
blocks, C columns, Tk keys.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.kernels.block_sparse_attention.call import Call
from zoo.kernels.block_sparse_attention.rows import Rows, place_queries


def first_of_equals(x: Tensor) -> Tensor:
    """Whether an entry of the last axis is the first of its value."""
    ordered, order = x.sort(stable=True)
    fresh = torch.ones_like(ordered, dtype=torch.bool)
    fresh[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    return torch.zeros_like(fresh).scatter(-1, order, fresh)


@dataclass(frozen=True)
class Gathered:
    """Keys of some query blocks."""

    tokens: Tensor  # [B, Hs, R, L] where each key is; any token where there is none
    seen: Tensor  # [B, Hs, R, M, L]
    listed: int  # the first of the L are the keys of the listed blocks


@dataclass(frozen=True)
class Lists:
    call: Call
    rows: Rows  # the query blocks
    places: Tensor  # [B, Nq, M] positions of the queries
    begin: Tensor  # [B, Nq] first key of each query block's sequence
    length: Tensor  # [B, Nq] keys of that sequence
    blocks: Tensor  # [B, Hs, Nq, S], -1 where there is none
    columns: Tensor | None  # [B, Hs, Nq or 1, C], -1 where there is none
    is_column: Tensor | None  # [B, Hs, Tk]

    @classmethod
    def of(cls, call: Call) -> "Lists":
        blocks = call.blocks.long()
        if call.counts is not None:
            unread = torch.arange(blocks.shape[3], device=blocks.device) >= call.counts[..., None]
            blocks = blocks.masked_fill(unread, -1)
        blocks = torch.where(first_of_equals(blocks), blocks, -1)
        found, places = place_queries(call.q, call.k, call.query_block, call.q_positions, call.starts, call.cu_seqlens)
        begin, length = found.begin, found.length
        if call.cu_seqlens is None:
            begin = torch.zeros_like(begin) if call.starts is None else call.starts.long()[:, None].expand_as(begin)
            length = call.k.shape[1] - begin
        columns, is_column = _columns(call, found, begin, length)
        return cls(call, found, places, begin, length, blocks, columns, is_column)

    @property
    def window_keys(self) -> int:
        """Keys in reach of the window of any query of a block."""
        call = self.call
        around = call.window if call.causal else 2 * call.window - 1
        return call.query_block - 1 + around if call.window else 0

    @property
    def sinks(self) -> int:
        return min(self.call.sink_tokens, self.call.k.shape[1])

    @property
    def keys(self) -> int:
        """L"""
        columns = 0 if self.columns is None else self.columns.shape[3]
        return self.blocks.shape[3] * self.call.block + columns + self.sinks + self.window_keys

    def gather(self, part: slice) -> Gathered:
        """The keys of some query blocks."""
        ways = list(self._ways(part))
        places, own = torch.cat([x for x, _ in ways], -1), self.places[:, None, part, :, None]
        begin, length = self.begin[:, None, part, None], self.length[:, None, part, None]
        real = (places >= 0) & (places < length)
        tokens = torch.where(real, begin + places, 0)
        seen = (torch.cat([x for _, x in ways], -1) & real)[..., None, :] & (own >= 0)
        at = places[..., None, :]
        if self.call.causal:
            seen = seen & (at <= own)
        if self.call.window:  # the window's keys come last
            near = (own - at).abs() < self.call.window
            last = torch.arange(self.keys, device=at.device) >= self.keys - self.window_keys
            seen = seen & (near == last)
        return Gathered(tokens, seen, self.blocks.shape[3] * self.call.block)

    def _ways(self, part: slice) -> Iterator[tuple[Tensor, Tensor]]:
        """Positions [B, Hs, R, .] and which of them are left to this way, windows aside."""
        call, blocks = self.call, self.blocks[:, :, part]
        listed = (blocks[..., None] * call.block + torch.arange(call.block, device=blocks.device)).flatten(3)
        shape = listed.shape[:3]
        left = listed >= self.sinks  # negative blocks drop out as well
        if self.columns is not None and self.is_column is not None:
            at = (listed + self.begin[:, None, part, None]).clamp(0, call.k.shape[1] - 1)
            left = left & ~self.is_column.gather(2, at.flatten(2)).view_as(at)
        yield listed, left
        if self.columns is not None:
            columns = (self.columns if self.columns.shape[2] == 1 else self.columns[:, :, part]).expand(*shape, -1)
            yield columns, columns >= self.sinks
        if self.sinks:
            sinks = torch.arange(self.sinks, device=blocks.device).expand(*shape, -1)
            yield sinks, torch.ones_like(sinks, dtype=torch.bool)
        if call.window:
            first = self.places[:, None, part, :1] - call.window + 1
            near = (first + torch.arange(self.window_keys, device=blocks.device)).expand(*shape, -1)
            yield near, torch.ones_like(near, dtype=torch.bool)


def _columns(call: Call, found: Rows, begin: Tensor, length: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The columns of each query block, once each, and whether a key is one."""
    if call.columns is None:
        return None, None
    b, tk = call.k.shape[:2]
    columns = torch.where(first_of_equals(call.columns.long()), call.columns.long(), -1)
    if call.cu_seqlens is None:
        begins, lengths = begin[:, :1, None], length[:, :1, None]
    else:
        ends = call.cu_seqlens.long()
        begins, lengths = ends[:-1, None, None], ends.diff()[:, None, None]
    real = (columns >= 0) & (columns < lengths)
    tokens = torch.where(real, begins + columns, tk)
    columns = columns.masked_fill(~real, -1)
    if call.cu_seqlens is None:
        columns = columns[:, :, None]
    else:
        tokens, columns = tokens.transpose(0, 1).flatten(1)[None], columns[found.sequence[0]].transpose(0, 1)[None]
    is_column = torch.zeros(b, tokens.shape[1], tk + 1, dtype=torch.bool, device=tokens.device)
    return columns, is_column.scatter(2, tokens, True)[..., :tk]
