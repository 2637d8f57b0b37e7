"""The elementwise recurrence for one token at a time (decoding)."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels import checks


@torch.no_grad()
def scan_step(x: Tensor, decay: Tensor, *, state: Tensor) -> Tensor:
    """One token of `scan`: x and decay [B, 1, D].

    `state` [B, D] is fp32 (fp64 beside fp64 inputs) and is overwritten. Returns h [B, 1, D] in x's dtype. No gradient.
    """
    (x,) = checks.autocast(x)
    checks.check_tokens("x", x, None)
    checks.check_one_token(x, "x")
    checks.check_tensor("decay", decay)
    checks.check_gate("decay", decay, x, x.shape, "B T D")
    checks.check_tensor("state", state)
    checks.check_gate("state", state, x, (x.shape[0], x.shape[2]), "B D")
    state.mul_(decay[:, 0].exp()).add_(x[:, 0])
    return state.to(x.dtype, copy=True)[:, None]
