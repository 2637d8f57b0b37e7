"""The delta rule for one token at a time (decoding)."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels import checks
from zoo.kernels.delta_rule.reference import prepare
from zoo.kernels.packed import per_token


@torch.no_grad()
def delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None = None,
    *,
    state: Tensor,
    qk_l2norm: bool = False,
    scale: float | None = None,
) -> Tensor:
    """One token of `delta_rule`: the same arguments with T = 1.

    `state` [B, Hv, K, V] is fp32 (fp64 beside fp64 inputs) and is overwritten. Returns o [B, 1, Hv, V] in q's dtype.
    No gradient.
    """
    q, k, v = checks.autocast(q, k, v)
    checks.check_qkv(q, k, v)
    checks.check_one_token(q)
    checks.check_tensor("beta", beta)
    checks.check_gate("beta", beta, q, v.shape[:3], "B T Hv")
    checks.check_decay(decay, q, v)
    checks.check_step_state(state, q, v, v.shape[3])
    dtype = q.dtype
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = prepare(q, k, v, qk_l2norm, q.shape[-1] ** -0.5 if scale is None else scale)
        decay = per_token(decay, v)
        if decay is not None:
            state.mul_(decay[:, 0].exp().unsqueeze(-1))
        key = k.transpose(1, 2)
        error = v.transpose(1, 2) - key @ state
        state.add_(key.mT @ (beta[:, 0, :, None, None] * error))
        return (q.transpose(1, 2) @ state).transpose(1, 2).to(dtype)
