"""The delta rule in Triton kernels: no decay, or one per head or per token. The formulas are in triton_forward and
triton_backward, the launches in triton_launch.

Shapes: B batch, T tokens, N sequences, H key heads, Hv value heads, K and V head widths.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.kernels import custom, launch
from zoo.kernels.delta_rule import triton_launch
from zoo.kernels.delta_rule.triton_launch import Call, Saved


def supports(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None, *rest: object) -> str | None:
    if q.dtype == torch.float64:
        return "its kernels compute in fp32 and the inputs are fp64"
    if decay is not None and decay.dim() in (2, 4):
        return "it has no kernel for a decay per channel"
    if q.shape[3] > 256 or v.shape[3] > 512:
        return f"it takes K up to 256 and V up to 512, and they are {q.shape[3]} and {v.shape[3]}"
    return launch.device_reason(q)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    qk_l2norm: bool,
    scale: float,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    o, final, *_ = OP(q, k, v, beta, decay, qk_l2norm, scale, initial_state, cu_seqlens)
    return o, final if output_final_state else None


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    qk_l2norm: bool,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, ...]:
    """o, the final state, and the six tensors of `Saved`."""
    call = _call(q, k, beta, v.shape[3], decay, qk_l2norm, scale, cu_seqlens)
    decay, initial_state = (None if x is None else x.contiguous() for x in (decay, initial_state))
    o, final, saved = triton_launch.forward(call, v.contiguous(), decay, initial_state)
    return (o, final, *saved)


def _call(q: Tensor, k: Tensor, beta: Tensor, width: int, decay: Tensor | None, *rest: Any) -> Call:
    form = 0 if decay is None else 1 if decay.dim() == 1 else 2
    return Call(q.contiguous(), k.contiguous(), beta.contiguous(), width, form, *rest)


def _backward(given: dict[str, Any], results: list[Tensor], grads: list[Tensor | None]) -> dict[str, Any]:
    q, k, beta, decay = (given[name] for name in ("q", "k", "beta", "decay"))
    o, _, *saved = results
    do, dfinal = grads[:2]
    call = _call(q, k, beta, o.shape[3], decay, given["qk_l2norm"], given["scale"], given["cu_seqlens"])
    do = torch.zeros_like(o) if do is None else do.contiguous()
    dfinal, restarts = None if dfinal is None else dfinal.contiguous(), given["initial_state"] is not None
    dq, dk, dv, dbeta, ddecay, dinitial = triton_launch.backward(call, Saved(*saved), do, dfinal, restarts)
    d_decay = None if decay is None else ddecay.sum((0, 1)) if decay.dim() == 1 else ddecay
    found = {"q": _sum_groups(dq, q), "k": _sum_groups(dk, k), "v": dv, "beta": dbeta}
    return found | {"decay": d_decay, "initial_state": dinitial if restarts else None}


def _sum_groups(x: Tensor, like: Tensor) -> Tensor:
    """[B, T, Hv, K] to [B, T, H, K] in the dtype of `like`."""
    if x.shape == like.shape:
        return x
    return x.unflatten(2, (like.shape[2], -1)).sum(3).to(like.dtype)


ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? decay, bool qk_l2norm, float scale, Tensor? initial_state, "
    "Tensor? cu_seqlens"
)
OP = custom.differentiable("delta_rule", ARGUMENTS, 8, _forward, _backward, forgets=("v",))
