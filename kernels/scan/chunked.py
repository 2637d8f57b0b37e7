"""The elementwise recurrence in chunks: a scan inside each, a short recurrence from chunk to chunk.

Inside a chunk, with b the running sum of its log decays and l the scan from zero, h_i = l_i + exp(b_i) h_0. Chunked
arrays of M chunks of C tokens are [M, B, 1, C, D].
"""

from typing import Any

from torch import Tensor

from zoo.kernels import chunks as ch
from zoo.kernels.checks import state_dtype
from zoo.kernels.halves import decayed_sum
from zoo.kernels.sequential import carry


def run(*args: Any) -> tuple[Tensor, Tensor]:
    x, decay, initial_state, _, cu_seqlens = args
    plan = ch.layout(x.shape[1], cu_seqlens)
    steps = plan.split(decay.unsqueeze(2))
    local = decayed_sum(steps.exp(), plan.split(x.to(state_dtype(x.dtype)).unsqueeze(2)), 3)
    since = steps.cumsum(3).exp()
    begin = None if initial_state is None else initial_state[:, None, None]
    entering, final = carry(plan, since[..., -1:, :], local[..., -1:, :], begin)
    return plan.join(local + since * entering).squeeze(2), final[:, 0, 0]
