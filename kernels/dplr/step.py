"""Diagonal-plus-low-rank transitions for one token at a time (decoding)."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels import checks
from zoo.kernels.dplr.checking import check
from zoo.kernels.dplr.reference import prepare
from zoo.kernels.packed import per_token


@torch.no_grad()
def dplr_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    decay: Tensor | None = None,
    *,
    state: Tensor,
    scale: float | None = None,
) -> Tensor:
    """One token of `dplr`: the same arguments with T = 1.

    `state` [B, Hv, K, V] is fp32 (fp64 beside fp64 inputs) and is overwritten. Returns o [B, 1, Hv, V] in q's dtype.
    No gradient.
    """
    q, k, v, a, b = checks.autocast(q, k, v, a, b)
    check(q, k, v, a, b, decay, scale)
    checks.check_one_token(q)
    checks.check_step_state(state, q, v, v.shape[3])
    dtype = q.dtype
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, a, b = prepare(q, k, v, a, b, q.shape[-1] ** -0.5 if scale is None else scale)
        read = a.transpose(1, 2) @ state
        decay = per_token(decay, v)
        if decay is not None:
            state.mul_(decay[:, 0].exp().unsqueeze(-1))
        left, right = torch.cat([b, k], 1).permute(0, 2, 3, 1), torch.cat([read, v.transpose(1, 2)], 2)
        state.add_(left @ right)  # b^T (a S) and k^T v in one product
        return (q.transpose(1, 2) @ state).transpose(1, 2).to(dtype)
