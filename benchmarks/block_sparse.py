"""Block-sparse attention beside the fastest SDPA backend and FlexAttention: prefill, training and decoding at length.

    python benchmarks/block_sparse.py --out benchmarks/results/block-sparse-h200.csv

32 query heads share 8 key heads of 128 in bf16; selection reads random queries and keys. Every time is the median of
CUDA-graph replays in milliseconds. Without a GPU the sizes are tiny, and the times those of eager calls.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from zoo.commands.bench_timing import clock, graphed
from zoo.kernels.block_sparse_attention import block_sparse_attention
from zoo.kernels.block_sparse_attention.budget import BudgetSchedule
from zoo.kernels.block_sparse_attention.select import select_blocks

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
H, HK, D = (32, 8, 128) if CUDA else (4, 2, 16)
PREFILL, TRAIN, BATCH = (131072, 32768, 8) if CUDA else (512, 128, 2)
BACKENDS = ["FLASH_ATTENTION", "CUDNN_ATTENTION"] if CUDA else ["FLASH_ATTENTION", "MATH"]
Rows = list[dict[str, Any]]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE)


def median(step: Callable[[], Any]) -> float:
    return graphed([step]) if CUDA else clock([step])


def note(rows: Rows, what: str, ms: float, sdpa: float | None = None) -> float:
    rows.append({"what": what, "ms": f"{ms:.4g}", "times_sdpa": "" if sdpa is None else f"{sdpa / ms:.3g}"})
    print(f"{what:60s} {ms:10.4g} ms" + ("" if sdpa is None else f"  {sdpa / ms:.2f}x the speed of SDPA"), flush=True)
    return ms


def fastest_sdpa(rows: Rows, what: str, step: Callable[[], Any]) -> float:
    """Of the backends that can run it."""
    found = []
    for name in BACKENDS:
        with sdpa_kernel(getattr(SDPBackend, name)):
            try:
                found.append(note(rows, f"{what}: SDPA {name}", median(step)))
            except RuntimeError as error:
                print(f"{what}: SDPA {name} does not run: {str(error).splitlines()[0][:100]}", flush=True)
    return min(found)


def heads_first(*tensors: Tensor) -> list[Tensor]:
    """As SDPA takes them, key heads repeated: [B, H, T, D]."""
    return [x.repeat_interleave(H // x.shape[2], 2).transpose(1, 2).contiguous() for x in tensors]


def flex(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, size: int) -> Callable[[], Tensor]:
    """FlexAttention over the same lists, of which the own block alone is masked inside."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    count = -(-k.shape[1] // size)
    own = torch.arange(blocks.shape[2], device=DEVICE)[:, None]
    lists = blocks.repeat_interleave(H // HK, 1)
    whole = (lists >= 0) & (lists != own)
    full = torch.where(whole, lists, count).sort(-1).values
    full = F.pad(torch.where(full == count, 0, full), (0, count - full.shape[-1])).int().contiguous()
    part = F.pad(own.expand(*lists.shape[:3], 1), (0, count - 1)).int().contiguous()
    mask = BlockMask.from_kv_blocks(
        (lists == own).sum(-1).int(), part, whole.sum(-1).int(), full, BLOCK_SIZE=(size, size),
        mask_mod=lambda b, h, i, j: i >= j, seq_lengths=(q.shape[1], k.shape[1]),
    )  # fmt: skip
    run = torch.compile(flex_attention, dynamic=False) if CUDA else flex_attention
    return partial(run, q.transpose(1, 2), *(x.transpose(1, 2) for x in (k, v)), block_mask=mask, enable_gqa=True)


@torch.no_grad()
def prefill(rows: Rows, share: float = 0.1) -> None:
    size = 128 if CUDA else 16
    what = f"prefill {PREFILL}, {share:.0%} of the blocks of {size}"
    q, k, v = normal(1, PREFILL, H, D), normal(1, PREFILL, HK, D), normal(1, PREFILL, HK, D)
    inputs = heads_first(q, k, v)
    sdpa = fastest_sdpa(rows, what, lambda: F.scaled_dot_product_attention(*inputs, is_causal=True))
    inputs.clear()
    sizes = {"query_block": size, "block": size}
    for score in ("mean", "antidiagonal"):
        select = partial(select_blocks, q, k, BudgetSchedule(fraction=share), score=score, stride=16, **sizes)
        blocks, counts = select()
        attend = partial(block_sparse_attention, q, k, v, blocks, counts, **sizes)
        spent, fed = note(rows, f"{what}: selection {score}", median(select)), median(attend)
        note(rows, f"{what}: attention over its lists", fed, sdpa)
        note(rows, f"{what}: selection {score} and attention", spent + fed, sdpa)
    note(rows, f"{what}: FlexAttention over the same lists", median(flex(q, k, v, blocks, size)), sdpa)


def train(rows: Rows) -> None:
    """MoBA: every query and head lists its own block and the four best of those before."""
    size = 512 if CUDA else 16
    what = f"MoBA {TRAIN}, forward and backward"
    q, k, v = (normal(1, TRAIN, n, D).requires_grad_() for n in (H, HK, HK))
    do = torch.randn_like(q)
    inputs = [x.detach().requires_grad_() for x in heads_first(q, k, v)]
    target = do.transpose(1, 2).contiguous()

    def dense() -> Any:
        return torch.autograd.grad(F.scaled_dot_product_attention(*inputs, is_causal=True), inputs, target)

    sdpa = fastest_sdpa(rows, what, dense)
    sizes = {"query_block": 1, "block": size}

    def select() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return select_blocks(q, k, 5, score="mean", heads="query", **sizes)

    def both(lists: Callable[[], tuple[Tensor, Tensor]]) -> Any:
        return torch.autograd.grad(block_sparse_attention(q, k, v, *lists(), **sizes), (q, k, v), do)

    known = select()
    note(rows, f"{what}: attention alone", median(lambda: both(lambda: known)), sdpa)
    note(rows, f"{what}: with selection", median(lambda: both(select)), sdpa)


@torch.no_grad()
def decode(rows: Rows, kept: int = 4096) -> None:
    what = f"decode {PREFILL} keys, {kept} kept, batch {BATCH}"
    q, k, v = normal(BATCH, 1, H, D), normal(BATCH, PREFILL, HK, D), normal(BATCH, PREFILL, HK, D)
    at = torch.full((BATCH, 1), PREFILL - 1, device=DEVICE)
    inputs = [x.transpose(1, 2) for x in (q, k, v)]
    sdpa = fastest_sdpa(rows, what, lambda: F.scaled_dot_product_attention(*inputs, enable_gqa=True))
    for page in (16, 32):
        sizes = {"query_block": 1, "block": page, "q_positions": at}
        low = normal(BATCH, PREFILL // page, HK, D)
        bounds = torch.cat([low + torch.rand_like(low), low], -1)
        select = partial(
            select_blocks, q, k, max(1, min(kept, PREFILL) // page), score="bounds", pooled=bounds, sink=1, **sizes
        )
        attend = partial(block_sparse_attention, q, k, v, **sizes)
        note(rows, f"{what}: attention alone, page {page}", median(partial(attend, *select())), sdpa)
        note(rows, f"{what}: with selection, page {page}", median(partial(listed, select, attend)), sdpa)


def listed(select: Callable[[], tuple[Tensor, Tensor]], attend: Callable[..., Any]) -> Any:
    return attend(*select())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a CSV file")
    out = parser.parse_args().out
    rows: Rows = []
    name = torch.cuda.get_device_name() if CUDA else "cpu"
    for part in (decode, prefill, train):
        part(rows)
        if out is not None:  # what is measured so far outlives an error
            with out.open("w", newline="") as stream:
                writer = csv.DictWriter(stream, ["what", "ms", "times_sdpa", "gpu", "torch"])
                writer.writeheader()
                writer.writerows(row | {"gpu": name, "torch": torch.__version__} for row in rows)


if __name__ == "__main__":
    main()
