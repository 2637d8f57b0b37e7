"""The elementwise recurrence in chunks: a scan inside each, a short recurrence from chunk to chunk.

Inside a chunk, with b the running sum of its log decays and l the scan from zero, h_i = l_i + exp(b_i) h_0. Chunked
arrays of M chunks of C tokens are [M, B, 1, C, D].
"""

from typing import Any

import torch
from torch import Tensor

from zoo.kernels import chunks as ch
from zoo.kernels.checks import state_dtype
from zoo.kernels.halves import decayed_max, decayed_sum
from zoo.kernels.sequential import carry, each_chunk


def run(*args: Any) -> tuple[Tensor, Tensor]:
    x, decay, initial_state, _, cu_seqlens = args
    return scan(x.to(state_dtype(x.dtype)), decay, initial_state, False, cu_seqlens)


def scan(
    x: Tensor, decay: Tensor, state: Tensor | None, maximum: bool, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """h [B, T, D] and the final state; with `maximum`, no gradient and a state, h_t = max(h_{t-1} + decay_t, x_t)."""
    plan = ch.layout(x.shape[1], cu_seqlens)
    steps, x = plan.split(decay.unsqueeze(2)), plan.split(x.unsqueeze(2), -torch.inf if maximum else 0.0)
    begin, since = None if state is None else state[:, None, None], steps.cumsum(3)
    if maximum:
        local = decayed_max(steps, x, 3)
        ends = (since[..., -1:, :], local[..., -1:, :])
        entering, (final,) = each_chunk(plan, lambda m, c, x: (m[0], (torch.maximum(m[0] + c, x),)), (begin,), ends)
        h = torch.maximum(local, since + entering)
    else:
        since, local = since.exp(), decayed_sum(steps.exp(), x, 3)
        entering, final = carry(plan, since[..., -1:, :], local[..., -1:, :], begin)
        h = local + since * entering
    return plan.join(h).squeeze(2), final[:, 0, 0]
