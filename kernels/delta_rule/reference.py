"""The delta rule, token by token.

    S'  = Diag(exp decay_t) S_{t-1}
    S_t = S' + k_t^T beta_t (v_t - k_t S')
    o_t = scale q_t S_t

Shapes: B batch, T tokens, N sequences, H key heads, Hv value heads, K and V head widths; S [N, Hv, K, V].
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.checks import state_dtype
from zoo.kernels.packed import each_sequence, heads, l2norm, per_token


def supports(*args: object) -> str | None:
    return None


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
    dtype = q.dtype
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = prepare(q, k, v, qk_l2norm, scale)
        inputs = (q, k, v, beta, per_token(decay, v))
        o, state = each_sequence(_tokens, inputs, initial_state, cu_seqlens)
        return o.to(dtype), state if output_final_state else None


def _tokens(
    state: Tensor | None, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None
) -> tuple[Tensor, Tensor]:
    b, t, hv, width = v.shape
    state = q.new_zeros(b, hv, q.shape[-1], width) if state is None else state
    outputs = [v[:, :0]]
    for i in range(t):
        if decay is not None:
            state = state * decay[:, i].exp().unsqueeze(-1)
        key = k[:, i, :, None, :]
        error = v[:, i, :, None, :] - key @ state
        state = state + key.mT @ (beta[:, i, :, None, None] * error)
        outputs.append((q[:, i, :, None, :] @ state).transpose(1, 2))
    return torch.cat(outputs, 1), state


def prepare(q: Tensor, k: Tensor, v: Tensor, qk_l2norm: bool, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs in the state dtype with Hv heads, q and k normalised, q scaled."""
    dtype = state_dtype(q.dtype)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if qk_l2norm:
        q, k = l2norm(q), l2norm(k)
    return heads(q * scale, v), heads(k, v), v
