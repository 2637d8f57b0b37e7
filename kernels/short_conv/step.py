"""Short convolution for one token at a time (decoding)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels import checks
from zoo.kernels.short_conv.checking import check_filter, check_state


@torch.no_grad()
def short_conv_step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    state: Tensor,
    activation: Literal["silu"] | None = None,
) -> Tensor:
    """One token of `short_conv`: x [B, 1, D]; `state` [B, D, W], the last W inputs, is overwritten.

    Returns y [B, 1, D] in x's dtype. No gradient.
    """
    (x,) = checks.autocast(x)
    checks.check_float("x", x)
    checks.check_dims("x", x, "B T D")
    if x.shape[1] != 1:
        raise ValueError(f"x has T = {x.shape[1]}; a step takes exactly one token")
    check_filter(x, weight, bias, activation)
    checks.check_tensor("state", state)
    check_state("state", state, x, (x.shape[0], x.shape[2], weight.shape[1]))
    wide = checks.state_dtype(x.dtype)
    state.copy_(torch.cat([state[..., 1:], x.mT.to(state.dtype)], -1))
    y = (state.to(wide) * weight.to(wide)).sum(-1)
    y = y if bias is None else y + bias.to(wide)
    return (F.silu(y) if activation == "silu" else y).to(x.dtype)[:, None]
