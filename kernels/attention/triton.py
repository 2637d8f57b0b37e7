"""Attention in our own Triton kernels: every mask, softcap, sinks and a differentiable lse. The formulas are in
triton_kernels.

Shapes: B batch, Tq queries, Tk keys, H query heads, Hk key heads, K and V head widths.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

from zoo.kernels import custom, launch
from zoo.kernels.attention.mask import Call

WIDE_ENOUGH = 128  # programs: below this, the query heads of a group go to programs of their own
LIMIT = 1 << 30  # options beyond this mean the same


def supports(call: Call) -> str | None:
    q, width = call.q, call.v.shape[3]
    if q.dtype == torch.float64:
        return "its kernels compute in fp32 and the inputs are fp64"
    most = 512 if q.dtype == torch.bfloat16 else 256  # wider tiles of 4 bytes leave no room on chip
    if q.shape[3] > 256 or width > most:
        return f"in {q.dtype} K and V go up to 256 and {most}, and they are {q.shape[3]} and {width}"
    if call.scale <= 0:
        return f"its scale must be positive and it is {call.scale}"
    return launch.device_reason(q)


def run(call: Call) -> tuple[Tensor, Tensor]:
    mask = call.mask
    at: list[Tensor | None] = [None, None]
    window = None if mask.window is None else mask.window * (mask.dilation or 1)
    if call.q_positions is not None or call.k_positions is not None:
        at = [x.expand(y.shape[:2]) for x, y in zip(call.positions(), (call.q, call.k), strict=True)]
        if mask.chunk is not None:  # no new limit, but one that narrows the search for blocks
            window = min(window or mask.chunk, mask.chunk)
    small = (window, mask.sink_tokens if mask.local else 0, mask.chunk, mask.stride, mask.dilation)
    options = [None if x is None else min(x, LIMIT) for x in small]
    tensors = (call.q, call.k, call.v, call.sink_logits, *at, call.cu_seqlens)
    o, lse = OP(*tensors, call.mask.causal, *options, call.softcap, call.scale)
    return o, lse.transpose(1, 2)


def _forward(q: Tensor, k: Tensor, v: Tensor, sink_logits: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    """o, and lse [B, H, Tq]."""
    (b, tq, h, _), width = q.shape, v.shape[3]
    o, lse = q.new_empty(b, tq, h, width), q.new_empty(b, h, tq, dtype=torch.float32)
    tensors = [x if x is None else x.contiguous() for x in (q, k, v, sink_logits, *rest[:2])]
    _start("forward", (*tensors, o, lse), rest)
    return o, lse


def _backward(given: dict[str, Any], results: list[Tensor], grads: list[Tensor | None]) -> dict[str, Any]:
    tensors: list[Any] = [x if x is None else x.contiguous() for x in (*list(given.values())[:6], *grads)]
    q, k, v, sink_logits, *at, do, dlse = tensors
    rest, (o, lse) = list(given.values())[4:], results
    do = torch.zeros_like(o) if do is None else do
    dq, delta = torch.empty_like(q), torch.empty_like(lse)
    _start("query_gradients", (q, k, v, *at, o, lse, do, dlse, dq, delta), rest)
    # Programs write apart and what is of one key head is summed after: no atomics.
    programs = -(-k.shape[1] // _choice("key_gradients", q, v)["BN"]) * k.shape[2]
    groups = q.shape[2] // k.shape[2]
    splits = next(n for n in range(1, groups + 1) if groups % n == 0 and (programs * n >= WIDE_ENOUGH or n == groups))
    kind = k.dtype if splits == 1 else torch.float32
    dk, dv = (x.new_empty(*x.shape[:2], x.shape[2] * splits, x.shape[3], dtype=kind) for x in (k, v))
    _start("key_gradients", (q, k, v, *at, lse, delta, do, dk, dv), rest, splits)
    if splits > 1:
        dk, dv = (x.unflatten(2, (-1, splits)).sum(3).to(k.dtype) for x in (dk, dv))
    found = {"q": dq, "k": dk, "v": dv}
    if sink_logits is not None:
        weight = torch.exp(sink_logits[:, None] - lse.masked_fill(lse == -torch.inf, torch.inf))
        found["sink_logits"] = -(weight * delta).sum((0, 2))
    return found


def _choice(kernel: str, q: Tensor, v: Tensor) -> dict[str, int]:
    """By the mean width of q's and v's tiles; a few queries, as in decoding, have a small tile of their own."""
    kernel = "decode" if kernel == "forward" and q.shape[1] <= 16 else kernel
    return launch.choice(f"attention.{kernel}", (launch.power(q.shape[3]) + launch.power(v.shape[3])) // 2, q)


def _start(kernel: str, tensors: tuple[Any, ...], rest: Any, splits: int = 0) -> None:
    """Tiles of queries have a program each, or with `splits` tiles of keys."""
    q, k, v = tensors[:3]
    positions, _, cu_seqlens, causal, window, sinks, chunk, stride, dilation, softcap, scale = rest
    chosen, (b, tq, h, width), (_, tk, hk, values) = _choice(kernel, q, v), q.shape, v.shape
    length, size, heads = (tk, chosen["BN"], hk * splits) if splits else (tq, chosen["BM"], h)
    plan, owners, tiles = launch.plan(b, length, size, cu_seqlens), None, -(-length // size)
    if plan.starts is not None:
        owners = torch.searchsorted(cu_seqlens.long(), plan.starts, right=True).clamp(1, plan.sequences) - 1
        tiles = plan.count
    language = importlib.import_module("triton.language")
    kind = language.bfloat16 if launch.operand_dtype(q.dtype) == torch.bfloat16 else language.float32
    layout, mask = (plan.starts, plan.sizes, owners, cu_seqlens), (window, sinks or None, chunk, stride, dilation)
    units = (scale / softcap if softcap else 0.0, (softcap or scale) * 1.4426950408889634, scale)
    widths = (width, values, launch.power(width), launch.power(values))
    flags = (causal, softcap is not None, cu_seqlens is not None, positions is not None)
    kernels = importlib.import_module("zoo.kernels.attention.triton_kernels")
    numbers = (tq, tk, h, h // hk, tiles, splits)
    args = (*tensors, *layout, *numbers, *mask, *units, *widths, *flags, kind, launch.precision(q.dtype))
    launch.start(getattr(kernels, kernel), (tiles * heads * b,), *args, **chosen)


ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? sink_logits, Tensor? q_positions, Tensor? k_positions, Tensor? cu_seqlens, "
    "bool causal, int? window, int sink_tokens, int? chunk, int? stride, int? dilation, float? softcap, float scale"
)
OP = custom.differentiable("attention", ARGUMENTS, 2, _forward, _backward)
