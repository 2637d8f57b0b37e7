"""The elementwise recurrence in chunks: a scan inside each, a short recurrence from chunk to chunk.

Inside a chunk, with b the running sum of its log decays and l the scan from zero, h_i = l_i + exp(b_i) h_0.

Shapes: B batch, T tokens, C tokens of a chunk, M chunks, N sequences, D channels; chunked arrays are [M, B, 1, C, D].
"""

from __future__ import annotations

from torch import Tensor

from zoo.kernels import chunks as ch
from zoo.kernels.carry import carry
from zoo.kernels.checks import state_dtype
from zoo.kernels.prefix import decayed_sum


def supports(*args: object) -> str | None:
    return None


def run(
    x: Tensor, decay: Tensor, initial_state: Tensor | None, output_final_state: bool, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    plan = ch.layout(x.shape[1], cu_seqlens)
    steps = plan.split(decay.unsqueeze(2))
    local = decayed_sum(steps.exp(), plan.split(x.to(state_dtype(x.dtype)).unsqueeze(2)), 3)
    since = steps.cumsum(3).exp()
    begin = None if initial_state is None else initial_state[:, None, None]
    entering, final = carry(plan, since[..., -1:, :], local[..., -1:, :], begin)
    h = plan.join(local + since * entering).squeeze(2).to(x.dtype)
    return h, final[:, 0, 0] if output_final_state else None
