"""Decoding over listed blocks in Triton: every list is split among programs, whose results a second launch merges.

Which part of its keys a program attends depends on shapes and options alone, so a result does not depend on the batch;
no value is read on the host. Strided caches are read where they lie.

Shapes: B batch, Tq queries, Tk keys, H query heads, Hk key heads, K and V head widths; Hs heads of the lists, Nq query
blocks, S listed blocks, C columns.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

from zoo.kernels import custom, launch
from zoo.kernels.block_sparse_attention.call import Call
from zoo.kernels.block_sparse_attention.chunked import ARGUMENTS
from zoo.kernels.block_sparse_attention.lists import first_of_equals

QUERIES = 8  # more are a job for tiles of queries
COMPARED = 1 << 15  # pairs of entries that a program compares to find repeated ones; longer lists are cleaned before
LOG2E = 1.4426950408889634


def supports(call: Call) -> str | None:
    q, tq, widths = call.q, call.q.shape[1], (call.q.shape[3], call.v.shape[3])
    if q.dtype == torch.float64:
        return "its kernels compute in fp32 and the inputs are fp64"
    if call.cu_seqlens is not None:
        return "decoding takes no packed sequences"
    if tq > 1 and (tq > QUERIES or call.query_block > 1):
        return f"decoding takes 1 query, or up to {QUERIES} in blocks of 1; it has {tq} in blocks of {call.query_block}"
    if max(widths) > 256:
        return f"K and V go up to 256, and they are {widths[0]} and {widths[1]}"
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, call.k, call.v, call.bias)):
        return "decoding has no gradients"
    return launch.device_reason(q)


def run(call: Call) -> tuple[Tensor, Tensor]:
    o, lse = OP(*vars(call).values())
    return o, lse


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    call = Call(*args)
    (b, tq, h, width), values, hs = call.q.shape, call.v.shape[3], call.blocks.shape[1]
    groups, chosen, lists = h // hs, _choice(call), b * hs * tq
    keys, rows = chosen["KEYS"], min(launch.power(groups), 64)
    pad, listed, (columns, sinks, near) = _parts(call, keys)
    parts = listed + -(-(columns + sinks + near) // keys)
    programs = parts * -(-groups // rows) * lists
    o, lse = call.q.new_empty(b, tq, h, values), call.q.new_empty(b, tq, h, dtype=torch.float32)
    partial, norms = (lse.new_empty(lists, parts, groups, n) for n in (values, 1))
    blocks, counts, distinct = _lists(call, max(keys // pad, 1))
    tensors, strides, align = _tensors(call)
    tensors = (*tensors[:3], blocks, counts, *tensors[3:], lse.new_empty(programs, keys, dtype=torch.int32))
    language = importlib.import_module("triton.language")
    kind = language.bfloat16 if launch.operand_dtype(call.q.dtype) == torch.bfloat16 else language.float32
    tk, hk = call.k.shape[1:3]
    others = (columns, min(call.window, 1 << 30), near, sinks)
    numbers = (tq, tk, hs, hs // hk, call.blocks.shape[3], *others, parts, listed)
    widths = (groups, width, values, launch.power(width), launch.power(values), call.block, pad)
    flags = (distinct, call.causal, parts > listed, align, kind, launch.precision(call.q.dtype), rows)
    args = (*tensors, partial, norms, *numbers, *strides, call.scale * LOG2E, *widths, *flags)
    kernels = importlib.import_module("zoo.kernels.block_sparse_attention.triton_decode_kernels")
    launch.start(kernels.parts_forward, (programs,), *args, **chosen)
    args = (partial, norms, o, lse, tq, hs, parts, groups, values, launch.power(values))
    launch.start(kernels.merge, (lists * groups,), *args, BN=16, num_warps=4)
    return o, lse


def _choice(call: Call) -> dict[str, int]:
    width = (launch.power(call.q.shape[3]) + launch.power(call.v.shape[3])) // 2
    return launch.choice("block_sparse_attention.decode", width, call.q)


def _parts(call: Call, keys: int) -> tuple[int, int, tuple[int, int, int]]:
    """Keys that a listed block takes of parts of `keys`, these parts, and how many columns, sink and window keys."""
    pad = call.block if call.block > 128 and call.block % keys == 0 else 1 << (call.block - 1).bit_length()
    listed = call.blocks.shape[3] * (pad // keys) if pad >= keys else -(-call.blocks.shape[3] // (keys // pad))
    tk, around = call.k.shape[1], call.window if call.causal else 2 * call.window - 1
    columns = 0 if call.columns is None else call.columns.shape[2]
    return pad, listed, (columns, min(call.sink_tokens, tk), min(around, tk) if call.window else 0)


def _tensors(call: Call) -> tuple[tuple[Any, ...], tuple[int, ...], int]:
    """The tensors that the kernel reads, lists aside; strides of positions, keys and values; ALIGN of the kernel."""
    q, bias, positions, starts = (None if x is None else x.contiguous()
                                  for x in (call.q, call.bias, call.q_positions, call.starts))  # fmt: skip
    k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (call.k, call.v))
    strides = [n if size > 1 else 0 for x in (k, v) for n, size in zip(x.stride()[:3], x.shape, strict=False)]
    align = 8 if all(n % 8 == 0 for n in strides) else 1
    row = positions.shape[1] if positions is not None and positions.dim() == 2 else 0
    return (q, k, v, *_columns(call), bias, positions, starts), (row, *(n // align for n in strides)), align


def _lists(call: Call, entries: int) -> tuple[Tensor, Tensor | None, bool]:
    """Lists and counts, and whether no entry is repeated; a program tests `entries` of them."""
    blocks, counts = (None if x is None else x.contiguous() for x in (call.blocks, call.counts))
    assert blocks is not None
    listed, there = blocks.shape[3], -(-call.k.shape[1] // call.block)
    if listed == 1 or entries * listed <= COMPARED:
        return blocks, counts, listed == 1
    lists = blocks.numel() // listed
    marks, out = (blocks.new_empty(lists, n, dtype=torch.int32) for n in (there, listed))
    kernels = importlib.import_module("zoo.kernels.block_sparse_attention.triton_decode_kernels")
    launch.start(kernels.distinct, (lists,), blocks, counts, marks, out, listed, there, N=1024, num_warps=8)
    return out, None, True


def _columns(call: Call) -> tuple[Tensor | None, Tensor | None]:
    """Columns, -1 where there is none or it is repeated, and whether a key is one, [B, Hs, Tk]."""
    if call.columns is None:
        return None, None
    (b, tk), columns = call.k.shape[:2], call.columns.long()
    begin = 0 if call.starts is None else call.starts.long()[:, None, None]
    columns = torch.where(first_of_equals(columns) & (columns >= 0) & (columns < tk - begin), columns, -1)
    tokens = torch.where(columns < 0, tk, begin + columns)
    marked = torch.zeros(b, columns.shape[1], tk + 1, dtype=torch.uint8, device=columns.device).scatter_(2, tokens, 1)
    return columns.int(), marked[..., :tk].contiguous()


OP = custom.register("block_sparse_attention_decode", f"({ARGUMENTS}) -> (Tensor, Tensor)", _forward)
