"""Diagonal state spaces in Triton kernels (B batch, T tokens, D channels, n states of each, G groups)."""

import importlib
import math
from typing import Any

import torch
from torch import Tensor

from zoo.kernels import custom, launch, vector


def supports(x: Tensor, dt: Tensor, a: Tensor | None, b: Tensor, *rest: object) -> str | None:
    if b.shape[-1] > 256:
        return f"it takes up to 256 states per channel, and they are {b.shape[-1]}"
    return "it has no kernel for complex states" if a is not None and a.is_complex() else vector.supports(x)


def run(*args: Any) -> tuple[Tensor, Tensor]:
    *tensors, _, cu_seqlens = args
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    return OP(*tensors, save, cu_seqlens)[:2]


def _prepare(inputs: list[Any], cu_seqlens: Tensor | None) -> Any:
    """The kernels, the cut, the number of kept states, and flags."""
    (x, _, a, b, c, d, begin), n = inputs, inputs[3].shape[-1]
    groups = [{2: 0, 3: 1}.get(y.dim(), y.shape[-2]) for y in (b, c)]
    channels = math.gcd(*(x.shape[2] // max(g, 1) for g in groups)) if max(groups) > 1 else 0
    cut = vector.cut("selective_scan.tile", x, cu_seqlens, n, channels)
    plan = launch.plan(x.shape[0], x.shape[1], cut.options["BT"], cu_seqlens)
    flags = {"GB": groups[0], "GC": groups[1], "n": n, "NS": 1 << (n - 1).bit_length()}
    flags |= {"RATE": a is not None, "SKIP": d is not None, "INITIAL": begin is not None}
    flags |= {"chunks": plan.per_sequence, "first_chunk": plan.first}
    return importlib.import_module("zoo.kernels.selective_scan.triton_kernels"), cut, plan.count, flags


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and the state before each tile of tokens."""
    *tensors, save, cu_seqlens = args
    x, dt, *_ = inputs = vector.contiguous(*tensors)
    kernels, cut, count, flags = _prepare(inputs, cu_seqlens)
    n, d = flags["n"], x.shape[2]
    y, final, kept = torch.empty_like(x), dt.new_empty(cut.sequences, d, n), dt.new_empty(count if save else 0, n, d)
    vector.start(kernels.forward, cut, cu_seqlens, 2 * n, *inputs, y, final, kept, SAVE=save, **flags)
    return y, final, kept


def _backward(given: dict[str, Any], results: list[Tensor], grads: list[Tensor | None]) -> dict[str, Any]:
    x, dt, *_ = inputs = vector.contiguous(*(given[name] for name in ("x", "dt", "a", "b", "c", "d", "begin")))
    kernels, cut, _, flags = _prepare(inputs, given["cu_seqlens"])
    dy, dend = vector.contiguous(torch.zeros_like(x) if grads[0] is None else grads[0], grads[1])
    rows, n, d, parts = x.shape[0] * x.shape[1], flags["n"], x.shape[2], cut.sequences * cut.segments
    dx, ddt, sums, dd = torch.empty_like(x), torch.empty_like(dt), dt.new_empty(parts, 3, n, d), dt.new_empty(parts, d)
    tokens = [dt.new_empty(cut.tiles if flags[name] else 0, rows, n) for name in ("GB", "GC")]
    dbegin = dt.new_empty(0 if given["begin"] is None else given["begin"].shape)
    flags |= {"FINAL": dend is not None, "rows": rows}
    tensors = (*inputs[:-1], results[2], dy, dend, dx, ddt, *tokens, sums, dd, dbegin)
    vector.start(kernels.backward, cut, given["cu_seqlens"], 2 * n, *tensors, **flags)
    da, *fixed = sums.sum(0).mT
    found = {"x": dx, "dt": ddt, "a": da.clone(), "d": dd.sum(0), "begin": dbegin}
    for name, token, own in zip("bc", tokens, fixed, strict=True):
        if groups := flags[f"G{name.upper()}"]:
            own = token.unflatten(0, (groups, -1)).sum(1).transpose(0, 1)
        found[name] = own.reshape(given[name].shape).to(given[name].dtype, copy=True)
    return found


TENSORS = "Tensor x, Tensor dt, Tensor? a, Tensor b, Tensor c, Tensor? d, Tensor? begin"
OP = custom.differentiable("selective_scan", f"{TENSORS}, bool save, Tensor? cu_seqlens", 3, _forward, _backward)
