"""Diagonal state spaces for one token at a time (decoding)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from zoo.kernels import checks
from zoo.kernels.selective_scan import reference
from zoo.kernels.selective_scan.checking import cast, check_parameters, check_state


@torch.no_grad()
def selective_scan_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor | None,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    state: Tensor,
    transition: Literal["mamba", "longhorn"] = "mamba",
) -> Tensor:
    """One token of `selective_scan`: the same arguments with T = 1.

    `state` [B, D, n] is fp32 (fp64 beside fp64 inputs), complex beside a complex A, and is overwritten. Returns
    y [B, 1, D] in x's dtype. No gradient.
    """
    x, B, C = cast(x, B, C)
    checks.check_tokens("x", x, None)
    checks.check_one_token(x, "x")
    check_parameters(x, dt, A, B, C, D, transition)
    checks.check_tensor("state", state)
    check_state("state", state, x, A, (x.shape[0], x.shape[2], B.shape[-1]))
    dtype = x.dtype
    with torch.autocast(x.device.type, enabled=False):
        x, B, C, _ = reference.prepare(x, A, B, C, state, None)
        b, c = (y if y.dim() == 2 else reference.per_channel(y[:, 0], x) for y in (B, C))
        keep, write = reference.transition(x[:, 0], dt[:, 0], A, b)
        state.mul_(keep).add_(write)
        y = (state * c).sum(-1).real[:, None]
        return reference.skip(y, x, D).to(dtype)
