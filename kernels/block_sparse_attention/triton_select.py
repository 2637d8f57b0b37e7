"""Block selection in Triton kernels: pooling, scores of some query blocks at a time, and the choice by them.

Shapes: B batch, Tq queries, Tk keys, H query heads, Hk key heads, Hs heads of the lists, K head width; Nq query blocks,
R of a slice, M queries of a block, P rows of one; Nk key blocks, W that a slice may see, n pieces of keys, S entries.
"""

import struct
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.kernels import custom, launch
from zoo.kernels.block_sparse_attention.rows import query_blocks, rows
from zoo.kernels.block_sparse_attention.triton_launch import (
    Layout,
    Part,
    kind,
    layout,
    parts,
    pool,
    pool_keys,
    reason,
    start,
    tile,
)

LONGEST = 1 << 15  # blocks of a row
LOG2E = 1.4426950408889634


def supports(q: Tensor, k: Tensor, made: Any, pooled: Tensor | None, packed: bool) -> str | None:
    """Why `select` cannot run a call, if it cannot; `made` is a `Selection`."""
    if q.shape[3] > 256:
        return f"K goes up to 256 and it is {q.shape[3]}"
    if -(-k.shape[1] // made.block) > LONGEST:
        return f"rows go up to {LONGEST} blocks"
    if made.score == "bounds" and made.query_block > 128:
        return f"bounds go up to 128 queries of a block and it has {made.query_block}"
    if made.score == "antidiagonal":
        if pooled is not None and packed:
            return "it pools the keys of packed sequences itself"
        if made.block // made.stride > 64:
            return f"blocks go up to 64 tiles and they have {made.block // made.stride}"
    return reason(q)


# ---- scores -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Scorer:
    """The numbers by which blocks are chosen, of one part after another, in memory that is used again."""

    q: Tensor
    k: Tensor
    pooled: Tensor | None
    where: Layout
    cu_seqlens: Tensor | None
    score: str
    block: int
    stride: int
    lists: int
    causal: bool
    factor: float

    @property
    def row_bytes(self) -> int:
        """Of one query block."""
        (b, _, h, width), blocks = self.q.shape, self.columns
        if self.score == "antidiagonal":
            tiles = blocks // self._tiles()[1] + 1
            return 4 * b * (h * self.where.m // self.stride * (blocks + 2 * tiles) + self.lists * blocks)
        return 4 * b * h * (blocks + (width if self.score == "mean" and self.where.m > 1 else 0))

    @property
    def columns(self) -> int:
        """Key blocks, of packed sequences of all."""
        return query_blocks(self.k.shape[1], self.block, self.cu_seqlens)

    @property
    def multiple(self) -> int:
        """Query blocks that fill tiles of rows."""
        if self.score != "antidiagonal":
            return 1
        return max(1, self._tiles()[0]["BM"] // (self.where.m // self.stride))

    def _tiles(self) -> tuple[dict[str, int], int]:
        """The choice of antidiagonals, and blocks of a tile."""
        chosen = launch.choice("block_select.antidiagonal", launch.power(self.q.shape[3]), self.q)
        return chosen, chosen["BN"] // tile(self.block // self.stride)

    def run(self, part: Part, memory: Tensor) -> Tensor:
        """[B, H, R, W], or of antidiagonals [B, Hs, R, W], in `memory`."""
        run = self._antidiagonal if self.score == "antidiagonal" else self._estimates
        return run(part, memory)

    def _estimates(self, part: Part, memory: Tensor) -> Tensor:
        (b, _, h, width), pooled, m = self.q.shape, self.pooled, self.where.m
        assert pooled is not None
        groups, mean, queries = h // pooled.shape[2], self.score == "mean", self.q
        if mean and m > 1:
            queries = pool(self.q, self.where, "mean", torch.float32, part.first, part.count)
        exact = torch.float32 if mean and torch.float32 in (queries.dtype, pooled.dtype) else self.q.dtype
        places = 1 if mean or m == 1 else max(16, tile(m))
        few = part.count * groups * places <= 16
        like = self.q if exact == self.q.dtype else self.q.new_empty(0, dtype=exact)
        chosen = dict(launch.choice(f"block_select.{'few' if few else 'estimates'}", launch.power(width), like))
        chosen["BM"] = max(chosen["BM"], places)
        tiles, units = -(-part.width // chosen["BN"]), -(-part.count * groups // (chosen["BM"] // places))
        numbers = (self.block, part.first, part.count, pooled.shape[1], part.width, tiles, self.factor)
        flags = (self.causal, not mean, mean and m > 1, self.where.table is not None)
        start(
            "estimates", b * pooled.shape[2] * tiles * units, queries, pooled, memory, *self.where.args, *numbers,
            *(h, groups, width, places, *flags, kind(exact), launch.precision(self.q.dtype)),
            **chosen,
        )  # fmt: skip
        return memory

    def _antidiagonal(self, part: Part, memory: Tensor) -> Tensor:
        (b, _, h, width), m, stride = self.q.shape, self.where.m, self.stride
        source, packed = self.k if self.pooled is None else self.pooled, self.where.table is not None
        chosen, each = self._tiles()
        lines, count = h * m // stride * part.count * b, -(-part.width // each)
        # From multiples of 64 on: how an address is aligned is part of what a kernel is compiled for.
        begin = -(-lines * part.width // 64) * 64
        end = begin + -(-2 * lines * count // 64) * 64
        sums, tops, weights = memory[:begin], memory[begin:end], memory[end:]
        spans = None
        if self.cu_seqlens is not None:
            found = rows(1, self.k.shape[1], self.block, None, self.cu_seqlens, self.k)
            spans = torch.stack([found.tokens[0, :, 0], found.known[0].sum(-1)])
        place, sizes = self.where.args, (self.block, part.first, part.count)
        programs = -(-part.count * (m // stride) // chosen["BM"]) * count * h * b
        start(
            "antidiagonal", programs, self.q, source, sums, tops, *place[:3], spans, *place[3:], *sizes,
            *(source.shape[1], part.width, count, lines * count, self.factor * LOG2E, h, h // self.k.shape[2], width),
            *(stride, m // stride, tile(self.block // stride), self.pooled is not None, self.causal, packed),
            *(kind(self.q.dtype), launch.precision(self.q.dtype)), **chosen,
        )  # fmt: skip
        together = tile(h // self.lists * (m // stride))
        start(
            "combine", b * self.lists * part.count, sums, tops, weights, *place, *sizes, part.width, count,
            *(lines * count, self.lists, h // self.lists, stride, m // stride, each, self.causal, packed, together),
            max(16, min(256, 1024 // together)), num_warps=4,
        )  # fmt: skip
        return weights


# ---- the choice -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Choice:
    """How many blocks of each row are listed, and which must be."""

    block: int
    blocks: int  # the longest row
    causal: bool
    local: int
    sink: int
    fixed: int
    least: int
    most: int
    mass: float  # 0 where it does not go by mass


def _choose(
    scores: Tensor, lists: Tensor, counts: Tensor, numbers: Tensor | None, where: Layout, part: Part, options: Choice,
    groups: int, shifted: bool, own: bool, softmax: bool,
) -> None:  # fmt: skip
    (b, hs, _, entries), block = lists.shape, tile(max(16, options.blocks))
    chosen = launch.choice("block_select.choose", block, scores)
    # Heads at a time: up to 64 numbers of a thread, and half of all registers.
    together = max(1, min(tile(groups), 2048 * chosen["num_warps"] // block, 32768 // block))
    high: float = struct.unpack("f", struct.pack("f", options.mass))[0]
    start(
        "choose", b * hs * part.count, scores, lists, counts, numbers, *where.args, options.block, part.first,
        *(part.count, part.width, entries, options.fixed, options.least, options.most, options.local, options.sink),
        *(high, options.mass - high, hs, groups, options.causal, own, softmax, options.mass > 0.0, shifted),
        *(where.table is not None, block, together), **chosen,
    )  # fmt: skip


def _select(
    q: Tensor, k: Tensor, pooled: Tensor | None, q_positions: Tensor | None, starts: Tensor | None,
    cu_seqlens: Tensor | None, numbers: Tensor | None, score: str, each: bool, query_block: int, stride: int,
    entries: int, factor: float, *options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    choice = Choice(*options)
    where = layout(q, k.shape[1], query_block, q_positions, starts, cu_seqlens, choice.block)
    (b, _, h, _), hk = q.shape, k.shape[2]
    hs = h if each else hk
    lists = q.new_empty(b, hs, where.blocks, entries, dtype=torch.int32)
    counts = q.new_empty(b, hs, where.blocks, dtype=torch.int32)
    if launch.held():
        return lists, counts
    if pooled is not None:
        pooled = pooled.contiguous()
    elif score != "antidiagonal":
        dtype = torch.bfloat16 if score == "bounds" and q.dtype == torch.bfloat16 else torch.float32
        pooled = pool_keys(k, starts, cu_seqlens, score, choice.block, dtype)
    else:
        k = k.contiguous()
    scorer = Scorer(
        q.contiguous(), k, pooled, where, cu_seqlens, score, choice.block, stride, hs, choice.causal, factor
    )
    own, softmax = score == "antidiagonal", score != "antidiagonal" and (choice.mass > 0 or hs < h)
    size, memory = scorer.row_bytes, None
    slices = list(parts(where.blocks, size, scorer.multiple, where, choice.block, scorer.columns, choice.causal))
    for part in slices:
        if memory is None:
            memory = q.new_empty(max(x.count for x in slices) * size // 4 + 128, dtype=torch.float32)
        scores = scorer.run(part, memory)
        _choose(scores, lists, counts, numbers, where, part, choice, h // hs if softmax else 1,
                cu_seqlens is not None, own, softmax)  # fmt: skip
    return lists, counts


def _given(
    weights: Tensor, q: Tensor, q_positions: Tensor | None, starts: Tensor | None, cu_seqlens: Tensor | None,
    numbers: Tensor | None, tk: int, query_block: int, entries: int, *options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    choice, (b, hs, blocks, width) = Choice(*options), weights.shape
    where = layout(q, tk, query_block, q_positions, starts, cu_seqlens)
    lists = weights.new_empty(b, hs, blocks, entries, dtype=torch.int32)
    counts = weights.new_empty(b, hs, blocks, dtype=torch.int32)
    part = Part(0, blocks, width)
    _choose(weights.contiguous(), lists, counts, numbers, where, part, choice, 1, False, True, False)
    return lists, counts


PLACES = "Tensor? q_positions, Tensor? starts, Tensor? cu_seqlens, Tensor? numbers, "
OPTIONS = "int block, int blocks, bool causal, int local, int sink, int fixed, int least, int most, float mass"
SCORES = f"str score, bool each, int query_block, int stride, int entries, float factor, {OPTIONS}"
SELECT = custom.register(
    "select_blocks", f"(Tensor q, Tensor k, Tensor? pooled, {PLACES}{SCORES}) -> (Tensor, Tensor)", _select
)
CHOOSE = custom.register(
    "choose_blocks",
    f"(Tensor weights, Tensor q, {PLACES}int tk, int query_block, int entries, {OPTIONS}) -> (Tensor, Tensor)", _given,
)  # fmt: skip
