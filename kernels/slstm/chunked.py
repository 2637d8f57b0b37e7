"""The scalar LSTM as the same loop with packed sequences told apart on the device, so that it compiles to one graph.
Every token is a chunk, M of them, and the gates are [M, B, H, 4, D].
"""

from typing import Any

from torch import Tensor

from zoo.kernels import chunks as ch
from zoo.kernels.sequential import State, each_chunk
from zoo.kernels.slstm.reference import prepare


def run(*args: Any) -> tuple[Tensor, State]:
    token, inputs, begin, cu_seqlens = prepare(*args)
    plan = ch.layout(inputs.shape[1], cu_seqlens, size=1)
    h, state = each_chunk(plan, token, begin, (plan.split(inputs).squeeze(3),))
    return plan.join(h.unsqueeze(3)), state
