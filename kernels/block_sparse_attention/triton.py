"""Block-sparse attention in Triton. Decoding and lists of single queries and heads have launches of their own, in
triton_decode and routed; the kernels of all other calls are in triton_forward and triton_backward.

Shapes: B batch, Tq queries, Tk keys, H query heads, Hk key heads, K and V head widths; Hs heads of the lists, Nq query
blocks, S listed blocks, C columns.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

from zoo.kernels import custom, launch
from zoo.kernels.block_sparse_attention import routed, triton_decode
from zoo.kernels.block_sparse_attention.call import Call
from zoo.kernels.block_sparse_attention.chunked import ARGUMENTS
from zoo.kernels.block_sparse_attention.plans import Inverse, Plan, near

FEW = 64  # cells: smaller tiles of queries or keys have launch choices of their own
PROGRAMS = 1024  # into as many the gradients of columns are split, where each still has
TOKENS = 512  # queries or more
LOG2E = 1.4426950408889634
SPECIAL = (triton_decode, routed)


def supports(call: Call) -> str | None:
    if any(special.supports(call) is None for special in SPECIAL):
        return None
    q, widths = call.q, (call.q.shape[3], call.v.shape[3])
    if q.dtype == torch.float64:
        return "its kernels compute in fp32 and the inputs are fp64"
    if max(widths) > 256:
        return f"K and V go up to 256, and they are {widths[0]} and {widths[1]}"
    if call.scale <= 0:
        return f"its scale must be positive and it is {call.scale}"
    if call.blocks.numel() >= 1 << 31:
        return f"its lists may hold less than 2 ** 31 entries, and they hold {call.blocks.numel()}"
    return launch.device_reason(q)


def run(call: Call) -> tuple[Tensor, Tensor]:
    for special in SPECIAL:
        if special.supports(call) is None:
            return special.run(call)
    o, lse = OP(*vars(call).values())
    return o, lse


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    call = Call(*args)
    q, k, v = (x.contiguous() for x in (call.q, call.k, call.v))
    o, lse = q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)
    if launch.held():
        return o, lse
    if _padded(call):
        o.zero_(), lse.fill_(-torch.inf)
    plan = Plan.of(call)
    _start("forward", call, plan, (q, k, v, *_lists(plan), o, lse))
    return o, lse


def _backward(given: dict[str, Any], results: list[Tensor], grads: list[Tensor | None]) -> dict[str, Any]:
    call = Call(**given)
    q, k, v, o, lse = (x.contiguous() for x in (call.q, call.k, call.v, *results))
    do, dlse = (None if x is None else x.contiguous() for x in grads)
    do = torch.zeros_like(o) if do is None else do
    dq, norms, delta = torch.empty_like(q), torch.empty_like(lse), torch.empty_like(lse)
    dk, dv = (torch.empty_like(x, dtype=x.dtype if call.columns is None else torch.float32) for x in (k, v))
    if launch.held():
        dbias = None if call.bias is None else torch.empty_like(call.bias)
        return {"q": dq, "k": torch.empty_like(k), "v": torch.empty_like(v), "bias": dbias}
    if _padded(call):
        dq.zero_(), dk.zero_(), dv.zero_()
    plan = Plan.of(call)
    dbias = _bias_parts(call)
    tensors = (q, k, v, *_lists(plan), o, lse, do, dlse, dq, norms, delta, dbias)
    _start("query_gradients", call, plan, tensors)
    inverse = Inverse.of(call, plan)
    tensors = (q, k, v, norms, delta, do, inverse.bounds, inverse.owners, inverse.bias, plan.is_column, dk, dv)
    _start_keys("key_gradients", call, plan, tensors)
    if plan.columns is not None:
        _add_columns(call, plan, (q, k, v, norms, delta, do), dk, dv)
    found = {"q": dq, "k": dk.to(k.dtype), "v": dv.to(v.dtype)}
    if dbias is not None and call.bias is not None and plan.places is not None:
        whole = dbias.unflatten(1, (call.blocks.shape[1], -1)).sum((2, 5))
        whole.masked_fill_(torch.arange(whole.shape[3], device=q.device) >= plan.meta[..., :1], 0.0)
        found["bias"] = torch.zeros_like(call.bias).scatter_add_(3, plan.places, whole)
    return found


def _padded(call: Call) -> bool:
    """Whether there may be tokens in no block."""
    none = call.starts is None and call.q_positions is None
    return not (none and (call.cu_seqlens is not None or call.q.shape[1] <= call.k.shape[1]))


def _lists(plan: Plan) -> tuple[Tensor | None, ...]:
    return plan.lists, plan.meta, plan.bias, plan.columns, plan.column_counts, plan.is_column


def _tile(call: Call, kernel: str) -> tuple[int, int, dict[str, int]]:
    """Heads of a tile of queries, tiles of a query block and all heads, and what their kernel is launched with."""
    heads = call.q.shape[2] // call.blocks.shape[1]
    most = _choice(call, kernel)["BM"]
    group = next(n for n in range(heads, 0, -1) if heads % n == 0 and (n * call.query_block <= most or n == 1))
    size = min(launch.power(group * call.query_block), most)
    chosen = _choice(call, kernel if size >= min(FEW, most) else f"{kernel}_few")
    tiles = call.q.shape[2] // group * -(-group * call.query_block // size)
    return group, tiles, {**chosen, "BM": size, "BN": _keys(call, chosen["BN"])}


def _keys(call: Call, most: int) -> int:
    """Keys of a tile: a power of two that divides blocks, unless it had to be small; then tiles gather their keys."""
    divisor = min(call.block & -call.block, most)
    return divisor if divisor >= min(FEW, most) else most


def _choice(call: Call, kernel: str) -> dict[str, int]:
    """By the mean width of the tiles of q and v."""
    width = (launch.power(call.q.shape[3]) + launch.power(call.v.shape[3])) // 2
    return launch.choice(f"block_sparse_attention.{kernel}", width, call.q)


def _bias_parts(call: Call) -> Tensor | None:
    """[B, tiles, Nq, S, parts of a block]"""
    if call.bias is None:
        return None
    _, tiles, chosen = _tile(call, "query_gradients")
    (b, _, count, s), size = call.bias.shape, chosen["BN"]
    parts = call.block if call.block % size else call.block // size
    return call.bias.new_empty(b, tiles, count, s, parts)


def _start(kernel: str, call: Call, plan: Plan, tensors: tuple[Tensor | None, ...]) -> None:
    """A program for each tile of queries."""
    group, tiles, chosen = _tile(call, kernel)
    b, (count, s) = call.q.shape[0], call.blocks.shape[2:]
    columns = 0 if plan.columns is None else plan.columns.shape[2]
    sizes, widths, switches = _arguments(call)
    args = (*tensors, *plan.layout.tensors, *sizes, b, count, s, columns, *near(call), call.scale * LOG2E, call.scale)
    kernels = importlib.import_module("zoo.kernels.block_sparse_attention.triton_forward")
    launch.start(getattr(kernels, kernel), (count * tiles * b,), *args, *widths, group, *switches, **chosen)


def _start_keys(
    kernel: str, call: Call, plan: Plan, tensors: tuple[Tensor | None, ...], splits: int = 0, rows: int = 0
) -> None:
    """A program for each tile of keys, or of the columns of `rows` lists and one of `splits` parts of the queries."""
    blocks, hk, b = plan.layout.key_blocks, call.k.shape[2], call.q.shape[0]
    columns = 0 if plan.columns is None else plan.columns.shape[2]
    chosen = _choice(call, "key_gradients")
    size = min(chosen["BN"], launch.power(columns if splits else call.block))
    if size < min(FEW, chosen["BN"]):
        chosen = _choice(call, "key_gradients_few")
    programs = -(-columns // size) * splits * rows if splits else -(-call.block // size) * blocks * hk * b
    sizes, widths, switches = _arguments(call)
    args = (*tensors, *plan.layout.tensors, *sizes, b, call.blocks.shape[2], blocks, columns, splits, *near(call))
    units = (call.scale * LOG2E, call.scale)
    kernels = importlib.import_module("zoo.kernels.block_sparse_attention.triton_backward")
    options = {**chosen, "BN": size}
    launch.start(getattr(kernels, kernel), (programs,), *args, *units, *widths, *switches, **options)


def _add_columns(call: Call, plan: Plan, tensors: tuple[Tensor, ...], dk: Tensor, dv: Tensor) -> None:
    """The gradients of columns, into those of all keys: a column is there once in each list."""
    if plan.columns is None or plan.column_counts is None or not plan.columns.numel():
        return
    (n, hs, c), (b, tk, hk) = plan.columns.shape, call.k.shape[:3]
    splits = max(1, min(PROGRAMS // (n * hs * -(-c // FEW)), -(-call.q.shape[1] // TOKENS)))
    parts = [x.new_empty(n, hs, splits, c, x.shape[3], dtype=torch.float32) for x in (dk, dv)]
    arguments = (*tensors, plan.columns, plan.column_counts, *parts)
    _start_keys("column_gradients", call, plan, arguments, splits, n * hs)
    if call.cu_seqlens is not None:
        begins = call.cu_seqlens[:-1]
    else:
        begins = torch.arange(b, device=dk.device) * tk + (0 if call.starts is None else call.starts)
    known = torch.arange(c, device=dk.device) < plan.column_counts[..., None]
    tokens = torch.where(known, plan.columns + begins[:, None, None], b * tk).long()
    head = torch.arange(hk, device=dk.device)[:, None]
    for total, part in zip((dk, dv), parts, strict=True):
        rows = torch.cat([total.flatten(0, 2), total.new_zeros(hk, total.shape[3])])  # the last ones take what is none
        for i in range(hs // hk):
            own = slice(i, None, hs // hk)
            index = (tokens[:, own] * hk + head).flatten()
            rows.index_copy_(0, index, rows.index_select(0, index) + part[:, own].sum(2).flatten(0, 2))
        total.copy_(rows[:-hk].view_as(total))


def _arguments(call: Call) -> tuple[tuple[int, ...], tuple[int, ...], tuple[Any, ...]]:
    """Sizes, widths and switches that all kernels take."""
    (_, tq, h, width), (_, tk, hk, values), hs = call.q.shape, call.v.shape, call.blocks.shape[1]
    language = importlib.import_module("triton.language")
    kind = language.bfloat16 if launch.operand_dtype(call.q.dtype) == torch.bfloat16 else language.float32
    widths = (h, hk, hs, width, values, launch.power(width), launch.power(values), call.query_block, call.block)
    close, packed = call.window > 0 or call.sink_tokens > 0, call.cu_seqlens is not None
    return (tq, tk), widths, (call.causal, close, packed, kind, launch.precision(call.q.dtype))


OP = custom.differentiable("block_sparse_attention", ARGUMENTS, 2, _forward, _backward)
