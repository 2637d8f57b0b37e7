"""Short convolution in Triton kernels (B batch, T tokens, N sequences, D channels, W filter width)."""

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels import custom, launch, vector

supports = vector.supports


def run(*args: Any) -> tuple[Tensor, Tensor | None]:
    x, weight, bias, activation, state, output_final_state, cu_seqlens = args
    y, _ = OP(x, weight, bias, state, activation == "silu", cu_seqlens)
    return y, _final(x, weight.shape[1], state, cu_seqlens) if output_final_state else None


def _final(x: Tensor, width: int, state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """The last W inputs of each sequence: [N, D, W] in x's dtype."""
    found, seen, sizes = _edge(x, width, cu_seqlens, last=True)
    if state is not None:
        place = (sizes + torch.arange(width, device=x.device)).clamp(max=width - 1)
        found = torch.where(seen, found, torch.take_along_dim(state.to(x.dtype), place[:, None], 2).mT)
    return found.mT.contiguous()


def _edge(x: Tensor, width: int, cu_seqlens: Tensor | None, *, last: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The first or last W tokens of each sequence [N, W, D], zero where `seen` [N, W, 1] is not; its sizes [N, 1]."""
    b, t, d = x.shape
    ends = torch.arange(b + 1, device=x.device) * t if cu_seqlens is None else cu_seqlens.long()
    row = (ends[1:, None] - width if last else ends[:-1, None]) + torch.arange(width, device=x.device)
    seen = ((row >= ends[:-1, None]) & (row < ends[1:, None]))[..., None]
    rows = x.flatten(0, 1) if t else x.new_zeros(1, d)
    return torch.where(seen, rows[row.clamp(0, max(b * t - 1, 0))], 0), seen, ends.diff()[:, None]


def _start(x: Tensor, weight: Tensor, bias: Any, state: Any, cu_seqlens: Any, *results: Any, **flags: Any) -> Tensor:
    """Launch for y, dy and partial sums, and return those."""
    (b, t, d), width, owner, chosen = x.shape, weight.shape[1], None, launch.choice("short_conv.rows", 1, x)
    tile, blocks = min(chosen["BD"], 1 << (d - 1).bit_length()), -(-b * t // chosen["BT"])
    partial = x.new_empty(blocks if flags["WEIGHTS"] else 0, width + 1, d, dtype=torch.float32)
    if cu_seqlens is not None:
        owner = torch.searchsorted(cu_seqlens[1:], torch.arange(t, dtype=torch.int32, device=x.device), right=True)
    options = chosen | flags | {"BD": tile, "D": d, "W": width, "PACKED": cu_seqlens is not None}
    options |= {"BIAS": bias is not None, "INITIAL": state is not None}
    sizes, kernels = (t, b * t, -(-d // tile)), importlib.import_module("zoo.kernels.short_conv.triton_kernels")
    tensors = (x, weight, bias, state, *results, partial, owner, cu_seqlens)
    launch.start(kernels.convolve, (blocks * sizes[2],), *tensors, *sizes, **options)
    return partial


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    *tensors, silu, cu_seqlens = args
    x, *rest = vector.contiguous(*tensors)
    y = torch.empty_like(x)
    return y, _start(x, *rest, cu_seqlens, y, None, STEP=-1, SILU=silu, WEIGHTS=False)


def _backward(given: dict[str, Any], results: list[Tensor], grads: list[Tensor | None]) -> dict[str, Any]:
    x, weight, bias, state = vector.contiguous(*(given[name] for name in ("x", "weight", "bias", "state")))
    dy = torch.zeros_like(x) if grads[0] is None else grads[0].contiguous()
    dpre, dx = torch.empty_like(x) if given["silu"] else dy, torch.empty_like(x)
    width, cu_seqlens, flags = weight.shape[1], given["cu_seqlens"], {"STEP": 1, "SILU": False, "WEIGHTS": False}
    sums = _start(x, weight, bias, state, cu_seqlens, dpre, dy, STEP=-1, SILU=given["silu"], WEIGHTS=True).sum(0)
    _start(dpre, weight, None, None, cu_seqlens, dx, None, **flags)
    found = {"x": dx, "weight": sums[:width].mT.to(weight.dtype, copy=True)}
    if state is not None:  # its inputs are like W tokens before the first
        head = F.pad(_edge(dpre, width, cu_seqlens, last=False)[0], (0, 0, width, 0))
        _start(head, weight, None, None, None, dhead := torch.empty_like(head), None, **flags)
        found["state"] = dhead[:, :width].mT.to(state.dtype).contiguous()
    return found if bias is None else found | {"bias": sums[width].to(bias.dtype, copy=True)}


ARGUMENTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? state, bool silu, Tensor? cu_seqlens"
OP = custom.differentiable("short_conv", ARGUMENTS, 2, _forward, _backward)
