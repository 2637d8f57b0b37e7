"""Diagonal-plus-low-rank transitions, token by token.

    S_t = Diag(exp decay_t) S_{t-1} + b_t^T (a_t S_{t-1}) + k_t^T v_t
    o_t = scale q_t S_t

Shapes: B batch, T tokens, N sequences, H key heads, Hv value heads, K and V head widths; S [N, Hv, K, V].
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.checks import state_dtype
from zoo.kernels.packed import each_sequence, heads, per_token


def supports(*args: object) -> str | None:
    return None


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    dtype = q.dtype
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, a, b = prepare(q, k, v, a, b, scale)
        inputs = (q, k, v, a, b, per_token(decay, v))
        o, state = each_sequence(_tokens, inputs, initial_state, cu_seqlens)
        return o.to(dtype), state if output_final_state else None


def _tokens(
    state: Tensor | None, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, decay: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, t, hv, width = v.shape
    state = q.new_zeros(batch, hv, q.shape[-1], width) if state is None else state
    outputs = [v[:, :0]]
    for i in range(t):
        read = a[:, i, :, None, :] @ state
        kept = state if decay is None else state * decay[:, i].exp().unsqueeze(-1)
        state = kept + b[:, i, :, :, None] @ read + k[:, i, :, :, None] @ v[:, i, :, None, :]
        outputs.append((q[:, i, :, None, :] @ state).transpose(1, 2))
    return torch.cat(outputs, 1), state


def prepare(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Inputs in the state dtype with Hv heads, q scaled."""
    dtype = state_dtype(q.dtype)
    v = v.to(dtype)
    q, k, a, b = (heads(x.to(dtype), v) for x in (q, k, a, b))
    return q * scale, k, v, a, b
