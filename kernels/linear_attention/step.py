"""Linear attention for one token at a time (decoding)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from zoo.kernels import checks
from zoo.kernels.linear_attention.reference import finish, per_head, prepare
from zoo.kernels.packed import per_token


@torch.no_grad()
def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None = None,
    *,
    state: Tensor,
    value_decay: Tensor | None = None,
    bonus: Tensor | None = None,
    normalize: Literal["sum"] | None = None,
    scale: float | None = None,
) -> Tensor:
    """One token of `linear_attention`: the same arguments with T = 1.

    `state` [B, Hv, K, V] (V + 1 columns under normalize="sum") is fp32 (fp64 beside fp64 inputs) and is overwritten.
    Returns o [B, 1, Hv, V] in q's dtype. No gradient.
    """
    q, k, v = checks.autocast(q, k, v)
    checks.check_qkv(q, k, v)
    checks.check_one_token(q)
    checks.check_decay(decay, q, v)
    checks.check_bonus(bonus, q, v)
    checks.check_gate("value_decay", value_decay, q, v.shape, "B T Hv V")
    checks.check_step_state(state, q, v, v.shape[3] + (normalize == "sum"))
    dtype, scale = q.dtype, q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v, value_decay, scale = prepare(q, k, v, value_decay, normalize, scale)
    factor = per_head(bonus)
    with torch.autocast(q.device.type, enabled=False):
        update = k[:, 0, :, :, None] * v[:, 0, :, None, :]
        early = None if factor is None else state + factor * update
        decays = per_token(decay, v)
        if decays is not None:
            state.mul_(decays[:, 0].exp().unsqueeze(-1))
        if value_decay is not None:
            state.mul_(value_decay[:, 0].exp().unsqueeze(-2))
        state.add_(update)
        o = scale * (q.transpose(1, 2) @ (state if early is None else early))
        return finish(o.transpose(1, 2), normalize).to(dtype)
