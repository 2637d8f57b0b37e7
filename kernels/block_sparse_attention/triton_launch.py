"""What the launches of block selection share: where blocks lie, slices of them, and pooling.

Shapes: B batch, Tq queries, Tk keys, K head width; M tokens of a block.
"""

import importlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.kernels import custom, dispatch, launch
from zoo.kernels.block_sparse_attention.rows import query_blocks, rows

LIMIT = 3 << 27  # bytes of scores at a time
KINDS = {"mean": 0, "bounds": 1, "antidiagonal": 2}  # as the kernels count them
INSTALLED = importlib.util.find_spec("triton") is not None


@dataclass(frozen=True)
class Layout:
    """Where blocks of M tokens lie, as the kernels' `place` reads it."""

    positions: Tensor | None
    starts: Tensor | None
    table: Tensor | None  # [5, blocks]
    tq: int
    tk: int
    blocks: int
    m: int

    @property
    def args(self) -> tuple[Any, ...]:
        step = self.tq if self.positions is not None and self.positions.dim() == 2 else 0
        return self.positions, self.starts, self.table, step, self.tq, self.tk, self.blocks, self.m


@dataclass(frozen=True)
class Part:
    """Query blocks of one launch, and how many key blocks they may see."""

    first: int
    count: int
    width: int


def reason(q: Tensor) -> str | None:
    """Why no kernel of selection can run, if none can."""
    if not INSTALLED:
        return "triton is not installed"
    if dispatch.pinned() not in (None, "triton"):
        return f"backend {dispatch.pinned()!r} is pinned"
    if q.dtype == torch.float64:
        return "its kernels compute in fp32 and the inputs are fp64"
    return launch.device_reason(q)


def layout(
    x: Tensor, tk: int, m: int, q_positions: Tensor | None, starts: Tensor | None, cu_seqlens: Tensor | None,
    block: int = 1,
) -> Layout:  # fmt: skip
    """Of blocks of M of x's tokens; `block` counts the key blocks of packed sequences."""
    tq, table = x.shape[1], None
    if cu_seqlens is not None:
        found = rows(1, tq, m, None, cu_seqlens, x)
        at = (torch.arange(found.first.shape[1], device=x.device) - found.first[0]) * m
        counts = (cu_seqlens.long().diff() + block - 1) // block
        first = (counts.cumsum(0) - counts)[found.sequence[0]]
        table = torch.stack([found.begin[0] + at, found.known[0].sum(-1), at, found.length[0], first])
    at_each = None if q_positions is None else q_positions.contiguous()
    return Layout(at_each, starts, table, tq, tk, query_blocks(tq, m, cu_seqlens), m)


def parts(blocks: int, size: int, multiple: int, where: Layout, block: int, width: int, causal: bool) -> Iterator[Part]:
    """About equal slices of the query blocks, of `size` bytes each; where `multiple` of them fit, whole multiples."""
    most = max(1, LIMIT // size)
    most = -(-blocks // -(-blocks // most))
    most = -(-most // multiple) * multiple if LIMIT // size > multiple else most
    known = causal and where.positions is None and where.table is None
    for first in range(0, blocks, most):
        count = min(most, blocks - first)
        last = max(where.tk - where.tq, 0) + (first + count) * where.m
        yield Part(first, count, min(width, -(-last // block)) if known else width)


def start(name: str, programs: int, *args: Any, **options: Any) -> None:
    file = {"choose": "topk", "pool": "place", "extend": "place"}.get(name, "scores")
    kernels = importlib.import_module(f"zoo.kernels.block_sparse_attention.triton_{file}")
    launch.start(getattr(kernels, name), (programs,), *args, **options)


def kind(dtype: torch.dtype) -> Any:
    language = importlib.import_module("triton.language")
    return language.bfloat16 if launch.operand_dtype(dtype) == torch.bfloat16 else language.float32


def tile(size: int) -> int:
    return 1 << (size - 1).bit_length()


# ---- pooling ----------------------------------------------------------------------------------------------------
def pool(x: Tensor, where: Layout, score: str, dtype: torch.dtype, first: int, count: int) -> Tensor:
    """[B, count, heads, F] of x [B, T, heads, K]."""
    b, _, heads, width = x.shape
    out = x.new_empty(b, count, heads, width * (2 if score == "bounds" else 1), dtype=dtype)
    chosen = dict(launch.choice("block_select.pool", 1, x))
    chosen["BT"] = min(chosen["BT"], tile(where.m))
    programs = b * count * -(-(heads * width) // chosen["BC"])
    flags = (heads * width, width, score == "bounds", where.table is not None)
    start("pool", programs, x, out, *where.args, first, count, *flags, **chosen)
    return out


def pool_keys(
    k: Tensor, starts: Tensor | None, cu_seqlens: Tensor | None, score: str, size: int, dtype: torch.dtype
) -> Tensor:
    where = layout(k, k.shape[1], size, None, starts, cu_seqlens)
    return pool(k.contiguous(), where, score, dtype, 0, where.blocks)


def _extend(pooled: Tensor, k: Tensor, positions: Tensor, score: str, size: int) -> None:
    b, pieces, heads, _ = pooled.shape
    k, width = k if k[0].is_contiguous() else k.contiguous(), k.shape[3]
    flags = (heads, width, size if score == "antidiagonal" else 1, launch.power(width), KINDS[score])
    start("extend", b * heads, pooled, k, positions.contiguous(), pieces, size, k.stride(0), *flags, num_warps=1)


POOL = custom.register(
    "pool_keys",
    "(Tensor k, Tensor? starts, Tensor? cu_seqlens, str score, int size, ScalarType dtype) -> Tensor",
    pool_keys,
)
EXTEND = custom.register(
    "extend_pooled", "(Tensor(a!) pooled, Tensor k, Tensor positions, str score, int size) -> ()", _extend, ["pooled"]
)
