"""Exponentially weighted averages for one token at a time (decoding)."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels import checks
from zoo.kernels.weighted_average.checking import check_inputs, parts
from zoo.kernels.weighted_average.reference import prepare, token


@torch.no_grad()
def weighted_average_step(
    k: Tensor,
    v: Tensor,
    decay: Tensor | None = None,
    bonus: Tensor | None = None,
    *,
    state: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    """One token of `weighted_average`: the same arguments with T = 1.

    `state` is (numerator, denominator, maximum), each [B, D], fp32 (fp64 beside fp64 inputs), and is overwritten.
    Returns o [B, 1, D] in k's dtype. No gradient.
    """
    k, v = checks.autocast(k, v)
    checks.check_tokens("k", k, None)
    checks.check_one_token(k, "k")
    check_inputs(k, v, decay, bonus)
    checks.check_states("state", state, k, parts(k.shape[0], k), optional=False)
    dtype = k.dtype
    k, v, decay, _ = prepare(k, v, decay, state, None)
    o, after = token(state, k[:, 0], v[:, 0], decay[:, 0], bonus)
    for old, new in zip(state, after, strict=True):
        old.copy_(new)
    return o[:, None].to(dtype)
