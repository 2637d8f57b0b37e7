"""Attention whose every query and head lists key blocks of its own (MoBA, Lu et al. 2025, arXiv 2502.13189) in Triton.

Entries of the lists are sorted by key block, so that queries which load the same keys share a program; the parts of a
query are merged in the order of its list. The kernels, with their formulas, are in routed_kernels.

Shapes: B batch, Tq queries, Tk keys, H query heads, Hk key heads, G of the former to one of the latter, K and V head
widths; R lists of each query head, S listed blocks; P pairs of a list and a listed block; M key blocks of a row of the
batch, all sequences of a packed one together.
"""

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.kernels import custom, launch
from zoo.kernels.block_sparse_attention.call import Call
from zoo.kernels.block_sparse_attention.chunked import ARGUMENTS
from zoo.kernels.block_sparse_attention.rows import place_queries, rows

LIMIT = 1 << 30  # bytes for the parts of some heads; heads that need more go by themselves
LONGEST = 256  # entries of a list
LOG2E = 1.4426950408889634


def supports(call: Call) -> str | None:
    q, k, widths = call.q, call.k, (call.q.shape[3], call.v.shape[3])
    if q.dtype == torch.float64:
        return "its kernels compute in fp32 and the inputs are fp64"
    if call.query_block != 1 or call.blocks.shape[1] != q.shape[2]:
        return "routing takes a list for each query and query head"
    if call.columns is not None or call.bias is not None or call.window or call.sink_tokens:
        return "routing takes no columns, bias, window or sink tokens"
    if call.block < 16 or call.blocks.shape[3] > LONGEST:
        return f"routing takes lists of up to {LONGEST} blocks of at least 16 tokens"
    if max(widths) > 256:
        return f"K and V go up to 256, and they are {widths[0]} and {widths[1]}"
    if call.scale <= 0:
        return f"its scale must be positive and it is {call.scale}"
    return "there are no keys" if k.shape[1] == 0 else launch.device_reason(q)


def run(call: Call) -> tuple[Tensor, Tensor]:
    o, lse = OP(*vars(call).values())
    return o, lse


@dataclass(frozen=True)
class Layout:
    """Where lists and key blocks lie, all int32."""

    tokens: Tensor  # [B, R] the query of a list
    places: Tensor  # [B, R] its position, -1 where there is none
    firsts: Tensor  # [B, R] first key block of its sequence
    lengths: Tensor  # [B, R] keys of its sequence
    spans: Tensor  # [B * M, 3] first row of keys, number of keys and first position of each key block

    @classmethod
    def of(cls, call: Call) -> "Layout":
        q, k, cu_seqlens = call.q, call.k, call.cu_seqlens
        (b, tk), block = k.shape[:2], call.block
        found, places = place_queries(q, k, 1, call.q_positions, call.starts, cu_seqlens)
        keys = rows(b, tk, block, call.starts, cu_seqlens, k)
        lengths, firsts = keys.length[:, :1].expand_as(found.length), torch.zeros_like(found.length)
        if cu_seqlens is not None:
            counts = (cu_seqlens.long().diff() + block - 1) // block
            lengths, firsts = found.length, (counts.cumsum(0) - counts)[found.sequence]
        begin = torch.arange(b, device=k.device)[:, None] * tk + keys.tokens[..., 0]
        number = torch.arange(begin.shape[1], device=k.device) - keys.first
        spans = torch.stack([begin, keys.known.sum(-1), number * block], -1).flatten(0, 1)
        tensors = (found.tokens[..., 0], places[..., 0], firsts, lengths, spans)
        return cls(*(x.int().contiguous() for x in tensors))


@dataclass(frozen=True)
class Routes:
    """The pairs of some key heads, sorted by bucket, which is a key block and head."""

    call: Call
    layout: Layout
    head: int  # the first of these key heads
    heads: int
    bucket: Tensor  # [P] of each pair; `buckets` of one that there is not
    order: Tensor  # [P] the pairs, sorted
    begins: Tensor  # [buckets + 1] where each bucket begins among the sorted

    @property
    def groups(self) -> int:
        return self.call.q.shape[2] // self.call.k.shape[2]

    @property
    def blocks(self) -> int:
        """M"""
        return self.layout.spans.shape[0] // self.call.q.shape[0]

    @property
    def buckets(self) -> int:
        return self.begins.shape[0] - 1

    @property
    def sizes(self) -> tuple[int, ...]:
        """R, S, Tq, H and the key heads, as kernels take them."""
        (_, h, count, listed), tq = self.call.blocks.shape, self.call.q.shape[1]
        return count, listed, tq, h, self.head, self.heads

    @property
    def lists(self) -> int:
        return self.call.q.shape[0] * self.heads * self.groups

    def tiles(self, size: int) -> Tensor:
        """[n, 3] bucket, first place among the sorted and number of pairs of tiles of up to `size`; as many as always
        suffice, the last ones empty."""
        counts = self.begins.diff()
        ends = ((counts + size - 1) // size).cumsum(0)
        tile = torch.arange(self.order.shape[0] // size + self.buckets, device=ends.device)
        owner = torch.searchsorted(ends, tile, right=True).clamp(max=self.buckets - 1)
        passed = (tile - ends[owner]) * size + (counts[owner] + size - 1) // size * size
        return torch.stack([owner, self.begins[owner] + passed, (counts[owner] - passed).clamp(0, size)], 1).int()

    def resolve(self, lse: Tensor | None = None, delta: Tensor | None = None) -> tuple[Tensor | None, ...]:
        """Row, position, norm and delta [P] of the sorted pairs."""
        layout, pairs = self.layout, self.order.shape[0]
        row, own = (self.order.new_empty(pairs, dtype=torch.int32) for _ in range(2))
        norms, changes = (None if x is None else x.new_empty(pairs) for x in (lse, delta))
        tensors = (self.order, self.begins, layout.tokens, layout.places, lse, delta, row, own, norms, changes)
        _start("resolve", -(-pairs // 1024), *tensors, *self.sizes, self.buckets, self.groups, N=1024)
        return row, own, norms, changes


def _routes(call: Call, layout: Layout) -> Iterator[Routes]:
    """All pairs, a few key heads at a time."""
    (b, h, count, listed), hk = call.blocks.shape, call.k.shape[2]
    wide = max(call.q.shape[3], call.v.shape[3]) * _partial(call.q).itemsize
    slices = -(-b * h * count * listed * wide // LIMIT)
    step = -(-hk // max(slices, 1))
    blocks, counts = (None if x is None else x.contiguous() for x in (call.blocks, call.counts))
    held, key_blocks = 1 << (listed - 1).bit_length(), layout.spans.shape[0] // b
    tile = max(2048 // held, 1)
    for head in range(0, hk, step):
        heads = min(step, hk - head)
        buckets, lists = b * heads * key_blocks, b * heads * (h // hk)
        bucket = layout.tokens.new_empty(lists * count * listed)
        tensors = (blocks, counts, layout.places, layout.firsts, layout.lengths, bucket)
        numbers = (count, listed, h, head, heads, key_blocks, -(-count // tile), buckets)
        options = (h // hk, call.block, call.causal, tile, held)
        _start("assign", lists * -(-count // tile), *tensors, *numbers, *options)
        ordered, order = bucket.sort(stable=True)
        number = torch.arange(buckets + 1, device=order.device, dtype=torch.int32)
        begins = torch.searchsorted(ordered, number, out_int32=True)
        yield Routes(call, layout, head, heads, bucket, order, begins)


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    call = _contiguous(Call(*args))
    (b, tq, h, _), width = call.q.shape, call.v.shape[3]
    o, lse = call.q.new_zeros(b, tq, h, width), call.q.new_full((b, tq, h), -torch.inf, dtype=torch.float32)
    if launch.held():
        return o, lse
    layout, choice = Layout.of(call), _choice("routed", call)
    for routes in _routes(call, layout):
        pairs = routes.order.shape[0]
        parts, norms = call.q.new_empty(pairs, width, dtype=_partial(call.q)), lse.new_empty(pairs)
        tiles, (row, own, *_) = routes.tiles(choice["BM"]), routes.resolve()
        tensors: Any = (call.q, call.k, call.v, layout.spans, tiles, routes.order, row, own, parts, norms)
        numbers = (call.k.shape[2], routes.head, routes.heads, routes.blocks, call.scale * LOG2E)
        _start("pairs_forward", tiles.shape[0], *tensors, *numbers, *_widths(call), **choice)
        tensors = (parts, norms, routes.bucket, layout.tokens, layout.places, o, lse)
        _merge("merge_outputs", routes, tensors, (), width)
    return o, lse


def _backward(given: dict[str, Any], results: list[Tensor], grads: list[Tensor | None]) -> dict[str, Any]:
    call, (o, lse) = _contiguous(Call(**given)), (x.contiguous() for x in results)
    do, dlse = (None if x is None else x.contiguous() for x in grads)
    do = torch.zeros_like(o) if do is None else do
    dq, dk, dv = (torch.zeros_like(x) for x in (call.q, call.k, call.v))
    found = {"q": dq, "k": dk, "v": dv}
    if launch.held():
        return found
    (width, values), count, delta = (call.q.shape[3], call.v.shape[3]), lse.numel(), torch.empty_like(lse)
    _start("deltas", -(-count // 32), o, do, lse, dlse, delta, count, values, launch.power(values), BR=32)
    layout, of_queries, of_keys = Layout.of(call), _choice("routed_queries", call), _choice("routed_keys", call)
    for routes in _routes(call, layout):
        parts = call.q.new_empty(routes.order.shape[0], width, dtype=_partial(call.q))
        tiles, of_pairs = routes.tiles(of_queries["BM"]), routes.resolve(lse, delta)
        numbers = (call.k.shape[2], routes.head, routes.heads, routes.blocks)
        tensors = (call.q, call.k, call.v, do, layout.spans)
        args = (*tensors, tiles, routes.order, *of_pairs, parts, *numbers, call.scale * LOG2E, *_widths(call))
        _start("pairs_queries", tiles.shape[0], *args, **of_queries)
        tensors_of_lists = (parts, routes.bucket, layout.tokens, layout.places, dq)
        _merge("merge_queries", routes, tensors_of_lists, (call.scale,), width)
        by_size = routes.begins.diff().argsort(descending=True, stable=True)
        key_tiles = -(-call.block // of_keys["BN"])
        args = (*tensors, by_size, routes.begins, *of_pairs, dk, dv, *numbers, key_tiles)
        args = (*args, call.scale * LOG2E, call.scale, *_widths(call))
        _start("pairs_keys", key_tiles * routes.buckets, *args, **of_keys)
    return found


def _contiguous(call: Call) -> Call:
    fields: dict[str, Any] = {n: x.contiguous() if isinstance(x, Tensor) else x for n, x in vars(call).items()}
    return Call(**fields)


def _partial(q: Tensor) -> torch.dtype:
    """What the parts of a query are kept in."""
    return torch.bfloat16 if launch.operand_dtype(q.dtype) == torch.bfloat16 else torch.float32


def _choice(kernel: str, call: Call) -> dict[str, int]:
    """Tiles of keys no larger than blocks are."""
    width = (launch.power(call.q.shape[3]) + launch.power(call.v.shape[3])) // 2
    chosen = launch.choice(f"block_sparse_attention.{kernel}", width, call.q)
    return chosen | {"BN": min(chosen["BN"], launch.power(call.block))}


def _widths(call: Call) -> tuple[Any, ...]:
    k, v = call.q.shape[3], call.v.shape[3]
    language = importlib.import_module("triton.language")
    kind = language.bfloat16 if launch.operand_dtype(call.q.dtype) == torch.bfloat16 else language.float32
    return k, v, launch.power(k), launch.power(v), call.causal, kind, launch.precision(call.q.dtype)


def _merge(kernel: str, routes: Routes, tensors: tuple[Tensor, ...], last: tuple[float, ...], width: int) -> None:
    size = max(4096 // launch.power(width), 16)
    tiles = -(-routes.sizes[0] // size)
    numbers = (*routes.sizes, tiles, routes.buckets, *last, routes.groups, width, launch.power(width))
    _start(kernel, tiles * routes.lists, *tensors, *numbers, BR=size)


def _start(kernel: str, programs: int, *args: Any, **options: int) -> None:
    kernels = importlib.import_module("zoo.kernels.block_sparse_attention.routed_kernels")
    launch.start(getattr(kernels, kernel), (programs,), *args, **options)


OP = custom.differentiable("block_sparse_attention_routed", ARGUMENTS, 2, _forward, _backward)
