"""What the Triton kernels read beside q, k and v: where tokens lie, lists in order, inverse lists. All of it is made on
the device, and none of its values are read on the host.

Shapes: B batch, Tq queries, Tk keys, Hk key heads; Hs heads of the lists, Nq query blocks, Nk key blocks, S listed
blocks, C columns, N sequences.
"""

import importlib
from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.kernels import launch
from zoo.kernels.block_sparse_attention.call import Call
from zoo.kernels.block_sparse_attention.rows import query_blocks

LIMIT = 1 << 29  # windows and positions beyond this mean the same
ENTRIES = 1024  # that one program of `tidy` looks at together


@dataclass(frozen=True)
class Layout:
    """Where the tokens of each sequence lie, as `triton_tiles` describes it."""

    starts: Tensor | None  # [B]
    firsts: Tensor | None  # [B]
    cu_seqlens: Tensor | None  # [N + 1]
    q_owners: Tensor | None  # [Nq]
    q_firsts: Tensor | None  # [N]
    k_owners: Tensor | None  # [Nk]
    k_firsts: Tensor | None  # [N]
    key_blocks: int

    @classmethod
    def of(cls, call: Call) -> "Layout":
        tq, (b, tk), ends = call.q.shape[1], call.k.shape[:2], call.cu_seqlens
        count = query_blocks(tk, call.block, ends)
        if ends is None:
            starts, firsts = call.starts, call.q_positions
            if firsts is not None:
                firsts = _small(firsts[..., 0].expand(b)).contiguous()
            return cls(
                None if starts is None else starts.int().contiguous(), firsts, None, None, None, None, None, count
            )
        sides = (_blocks(ends, size, n) for size, n in ((call.query_block, query_blocks(tq, call.query_block, ends)),
                                                        (call.block, count)))  # fmt: skip
        (q_owners, q_firsts), (k_owners, k_firsts) = sides
        return cls(None, None, ends, q_owners, q_firsts, k_owners, k_firsts, count)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return tuple(vars(self).values())[:-1]


def _small(x: Tensor) -> Tensor:
    return x.clamp(-LIMIT, LIMIT).int()


def _blocks(ends: Tensor, size: int, count: int) -> tuple[Tensor, Tensor]:
    """The sequence of each block, and the first block of each sequence."""
    counts = (ends.diff() + size - 1) // size
    after = counts.cumsum(0)
    block = torch.arange(count, device=ends.device)
    owners = torch.searchsorted(after, block, right=True).clamp(max=len(counts) - 1)
    return owners.int(), (after - counts).int()


@dataclass(frozen=True)
class Plan:
    """Lists without what other ways show, in ascending order and without gaps; `triton_tiles.tidy` says of what."""

    layout: Layout
    lists: Tensor  # [B, Hs, Nq, S]
    places: Tensor | None  # [B, Hs, Nq, S] where each entry was, beside a bias
    meta: Tensor  # [B, Hs, Nq, 3] entries; the first one and the end of those seen whole
    bias: Tensor | None  # [B, Hs, Nq, S]
    columns: Tensor | None  # [N, Hs, C] in ascending order, then some that are none
    column_counts: Tensor | None  # [N, Hs]
    is_column: Tensor | None  # [B, Hs, Tk] bytes

    @classmethod
    def of(cls, call: Call) -> "Plan":
        layout, blocks = Layout.of(call), _small(call.blocks) if call.blocks.dtype == torch.int64 else call.blocks
        (b, hs, count, s), (_, tq), tk = blocks.shape, call.q.shape[:2], call.k.shape[1]
        if call.counts is not None:
            unread = torch.arange(s, device=blocks.device) >= call.counts[..., None]
            blocks = blocks.masked_fill(unread, -1)
        ordered, order = blocks.contiguous().sort(stable=True)
        lists, meta = torch.empty_like(ordered), ordered.new_empty(b, hs, count, 3)
        places = None if call.bias is None else torch.zeros_like(order)
        wide = min(launch.power(s), ENTRIES)
        rows, each = b * hs * count, max(1, ENTRIES // wide)
        args = (ordered, order, lists, places, meta, *layout.tensors, tq, tk, rows, hs, count, s, *near(call))
        switches = (call.query_block, call.block, call.causal, call.columns is not None, call.cu_seqlens is not None)
        kernel = importlib.import_module("zoo.kernels.block_sparse_attention.triton_tiles").tidy
        launch.start(kernel, (-(-rows // each),), *args, *switches, each, wide, num_warps=4)
        bias = None if call.bias is None or places is None else call.bias.gather(3, places)
        return cls(layout, lists, places, meta, bias, *_columns(call))


def near(call: Call) -> tuple[int, int]:
    return min(call.window, LIMIT), min(call.sink_tokens, LIMIT)


def _columns(call: Call) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The columns that are no sink tokens, once each, how many they are, and whether a key is one."""
    if call.columns is None:
        return None, None, None
    (b, tk), device = call.k.shape[:2], call.k.device
    if call.cu_seqlens is not None:
        begins = call.cu_seqlens[:-1, None, None]
        lengths = call.cu_seqlens.diff()[:, None, None]
    else:
        begins = torch.zeros(b, 1, 1, dtype=torch.int32, device=device)
        begins = begins if call.starts is None else begins + call.starts[:, None, None].int()
        lengths = tk - begins
    columns = _small(call.columns).sort().values
    fresh = torch.ones_like(columns, dtype=torch.bool)
    fresh[..., 1:] = columns[..., 1:] != columns[..., :-1]
    kept = fresh & (columns >= call.sink_tokens) & (columns >= 0) & (columns < lengths)
    tokens = torch.where(kept, begins + columns, tk).long()
    tokens = tokens if call.cu_seqlens is None else tokens.transpose(0, 1).flatten(1)[None]
    is_column = torch.zeros(b, tokens.shape[1], tk + 1, dtype=torch.uint8, device=device).scatter(2, tokens, 1)
    columns = columns.masked_fill(~kept, LIMIT).sort().values
    return columns, kept.sum(-1, dtype=torch.int32), is_column[..., :tk].contiguous()


@dataclass(frozen=True)
class Inverse:
    """Which query blocks list a key block, as `triton_backward` reads it."""

    bounds: Tensor  # [B * Hk * Nk + 1]
    owners: Tensor  # one for each entry of the lists: query block * (Hs // Hk) + list of the key head
    bias: Tensor | None

    @classmethod
    def of(cls, call: Call, plan: Plan) -> "Inverse":
        (b, hs, count, s), hk, device = plan.lists.shape, call.k.shape[2], plan.lists.device
        each, keys = hs // hk, plan.layout.key_blocks
        total = b * hk * keys
        unread = torch.arange(s, device=device) >= plan.meta[..., :1]
        dtype = torch.int32 if total < 1 << 31 else torch.int64
        first = torch.arange(b * hk, device=device, dtype=dtype).view(b, hk, 1, 1, 1) * keys
        if plan.layout.q_owners is not None and plan.layout.k_firsts is not None:
            first = first + plan.layout.k_firsts[plan.layout.q_owners].view(1, 1, -1, 1, 1)
        blocks = _by_block(plan.lists, each) + first
        ordered, order = blocks.masked_fill(_by_block(unread, each), total).flatten().sort(stable=True)
        bounds = torch.searchsorted(ordered, torch.arange(total + 1, device=device, dtype=dtype), out_int32=True)
        bias = None if plan.bias is None else _by_block(plan.bias, each).flatten()[order]
        return cls(bounds, (order // s % (count * each)).int(), bias)


def _by_block(x: Tensor, each: int) -> Tensor:
    """[B, Hs, Nq, S] to [B, Hk, Nq, Hs / Hk, S]."""
    return x.unflatten(1, (-1, each)).transpose(2, 3)
