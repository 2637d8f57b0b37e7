"""Linear attention, token by token.

    S_t = Diag(exp decay_t) S_{t-1} Diag(exp value_decay_t) + k_t^T v_t
    o_t = scale q_t S_t
    with bonus u:            o_t = scale q_t (S_{t-1} + Diag(u) k_t^T v_t)
    with normalize="sum":    v_t gets one more column, of ones; o_t is divided by that column of q_t S_t

Shapes: B batch, T tokens, N sequences, H key heads, Hv value heads, K and V head widths; S [N, Hv, K, V].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.checks import state_dtype
from zoo.kernels.packed import each_sequence, heads, per_token

SMALLEST = 1e-6


def supports(*args: object) -> str | None:
    return None


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    value_decay: Tensor | None,
    bonus: Tensor | None,
    normalize: str | None,
    scale: float,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    dtype = q.dtype
    q, k, v, value_decay, scale = prepare(q, k, v, value_decay, normalize, scale)
    decay, bonus = per_token(decay, v), per_head(bonus)
    inputs = (q, k, v, decay, value_decay)
    with torch.autocast(q.device.type, enabled=False):
        o, state = each_sequence(lambda s, *x: _tokens(s, bonus, scale, *x), inputs, initial_state, cu_seqlens)
        return finish(o, normalize).to(dtype), state if output_final_state else None


def _tokens(
    state: Tensor | None,
    bonus: Tensor | None,
    scale: float,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    value_decay: Tensor | None,
) -> tuple[Tensor, Tensor]:
    b, t, hv, width = v.shape
    state = q.new_zeros(b, hv, q.shape[-1], width) if state is None else state
    outputs = [v[:, :0]]
    for i in range(t):
        before = state
        if decay is not None:
            state = state * decay[:, i].exp().unsqueeze(-1)
        if value_decay is not None:
            state = state * value_decay[:, i].exp().unsqueeze(-2)
        update = k[:, i, :, :, None] * v[:, i, :, None, :]
        state = state + update
        read = state if bonus is None else before + bonus * update
        outputs.append(scale * (q[:, i, :, None, :] @ read).transpose(1, 2))
    return torch.cat(outputs, 1), state


def prepare(
    q: Tensor, k: Tensor, v: Tensor, value_decay: Tensor | None, normalize: str | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, float]:
    """Inputs in the state dtype with Hv heads; under normalize="sum" v gains a column of ones that never decays."""
    dtype = state_dtype(q.dtype)
    q, k, v = heads(q.to(dtype), v), heads(k.to(dtype), v), v.to(dtype)
    if normalize is None:
        return q, k, v, value_decay, scale
    v = F.pad(v, [0, 1], value=1.0)
    return q, k, v, None if value_decay is None else F.pad(value_decay, [0, 1]), 1.0


def per_head(bonus: Tensor | None) -> Tensor | None:
    """[Hv] or [Hv, K] to [Hv, 1 or K, 1]."""
    return None if bonus is None else bonus.reshape(bonus.shape[0], -1, 1)


def finish(o: Tensor, normalize: str | None) -> Tensor:
    """Divide by the last column, held away from zero with its sign."""
    if normalize is None:
        return o
    d = o[..., -1:]
    return o[..., :-1] / torch.where(d.abs() < SMALLEST, torch.where(d < 0, -SMALLEST, SMALLEST), d)
