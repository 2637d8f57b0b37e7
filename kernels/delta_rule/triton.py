"""The delta rule in Triton kernels: no decay, or one per head or per token. The formulas are in triton_forward and
triton_backward, the launches in triton_launch.

Shapes: B batch, T tokens, N sequences, H key heads, Hv value heads, K and V head widths.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from zoo.kernels import launch
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
    o, final, *_ = _forward(q, k, v, beta, decay, qk_l2norm, scale, initial_state, cu_seqlens)
    return o, final if output_final_state else None


def _call(
    q: Tensor,
    k: Tensor,
    beta: Tensor,
    value_width: int,
    decay_form: int,
    qk_l2norm: bool,
    scale: float,
    cu_seqlens: Tensor | None,
) -> Call:
    return Call(
        q.contiguous(), k.contiguous(), beta.contiguous(), value_width, decay_form, qk_l2norm, scale, cu_seqlens
    )


def _decay_form(decay: Tensor | None) -> int:
    return 0 if decay is None else 1 if decay.dim() == 1 else 2


@torch.library.custom_op("zoo::delta_rule", mutates_args=())
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o, the final state, and the six tensors of `Saved`."""
    call = _call(q, k, beta, v.shape[3], _decay_form(decay), qk_l2norm, scale, cu_seqlens)
    decay, initial_state = (None if x is None else x.contiguous() for x in (decay, initial_state))
    with _on(q):
        o, final, saved = triton_launch.forward(call, v.contiguous(), decay, initial_state)
    return (o, final, *saved)


@_forward.register_fake
def _(
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
    call = Call(q, k, beta, v.shape[3], _decay_form(decay), qk_l2norm, scale, cu_seqlens)
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = q.new_empty((sequences, v.shape[2], q.shape[3], v.shape[3]), dtype=torch.float32)
    saved = [q.new_empty(shape, dtype=dtype) for shape, dtype in triton_launch.saved_shapes(call)]
    return (v.new_empty(v.shape), final, *saved)


@torch.library.custom_op("zoo::delta_rule_backward", mutates_args=())
def _backward(
    q: Tensor,
    k: Tensor,
    beta: Tensor,
    z: Tensor,
    y: Tensor,
    entering: Tensor,
    sums: Tensor,
    q_norms: Tensor,
    k_norms: Tensor,
    do: Tensor,
    dfinal: Tensor | None,
    decay_form: int,
    qk_l2norm: bool,
    scale: float,
    restarts: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, beta, the log decay of every token and the initial state."""
    call = _call(q, k, beta, do.shape[3], decay_form, qk_l2norm, scale, cu_seqlens)
    dfinal = None if dfinal is None else dfinal.contiguous()
    with _on(q):
        saved = Saved(z, y, entering, sums, q_norms, k_norms)
        dq, dk, dv, dbeta, ddecay, dinitial = triton_launch.backward(call, saved, do.contiguous(), dfinal, restarts)
        return _sum_groups(dq, q), _sum_groups(dk, k), dv, dbeta, ddecay, dinitial


@_backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    beta: Tensor,
    z: Tensor,
    y: Tensor,
    entering: Tensor,
    sums: Tensor,
    q_norms: Tensor,
    k_norms: Tensor,
    do: Tensor,
    dfinal: Tensor | None,
    decay_form: int,
    qk_l2norm: bool,
    scale: float,
    restarts: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, ...]:
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = (sequences, do.shape[2], q.shape[3], do.shape[3]) if restarts else (0,)
    ddecay = beta.new_empty(beta.shape if decay_form else (0,))
    wide = (x.new_empty(x.shape) for x in (q, k, do, beta))
    return (*wide, ddecay, beta.new_empty(state))


def _sum_groups(x: Tensor, like: Tensor) -> Tensor:
    """[B, T, Hv, K] to [B, T, H, K] in the dtype of `like`."""
    if x.shape == like.shape:
        return x
    return x.unflatten(2, (like.shape[2], -1)).sum(3).to(like.dtype)


def _on(x: Tensor) -> Any:
    """Triton launches on the current device, which need not be that of x."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, _, beta, decay, qk_l2norm, scale, initial_state, cu_seqlens = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, beta, cu_seqlens, *output[2:])
    ctx.like = output[0].shape, output[0].dtype
    ctx.options = _decay_form(decay), qk_l2norm, scale, initial_state is not None


def _gradients(ctx: Any, do: Tensor | None, dfinal: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
    q, k, beta, cu_seqlens, *saved = ctx.saved_tensors
    shape, dtype = ctx.like
    do = q.new_zeros(shape, dtype=dtype) if do is None else do
    dq, dk, dv, dbeta, ddecay, dinitial = _backward(q, k, beta, *saved, do, dfinal, *ctx.options, cu_seqlens)
    form, restarts = ctx.options[0], ctx.options[3]
    d_decay = None if not form else ddecay.sum((0, 1)) if form == 1 else ddecay
    return dq, dk, dv, dbeta, d_decay, None, None, dinitial if restarts else None, None


_forward.register_autograd(_gradients, setup_context=_setup)
