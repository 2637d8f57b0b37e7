"""The scalar LSTM as the same loop, with all heads and gates in one product per token, and packed sequences told apart
on the device, so that it compiles to one graph. Every token is a chunk, M of them.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from zoo.kernels import chunks as ch
from zoo.kernels.sequential import each_chunk
from zoo.kernels.slstm.reference import State, cell, prepare


def run(*args: Any) -> tuple[Tensor, State]:
    inputs, recurrent, begin, cu_seqlens = prepare(*args)
    plan = ch.layout(inputs.shape[1], cu_seqlens, size=1)
    weights = recurrent.permute(1, 2, 0, 3).flatten(2)  # [H, D, 4 D]
    parts = (plan.split(inputs).squeeze(3),)  # [M, B, H, 4, D]
    h, (c, n, last, m) = each_chunk(plan, partial(_token, weights), begin, parts)
    return plan.join(h.unsqueeze(3)), (c, n, last, m)


def _token(weights: Tensor, state: State, gates: Tensor) -> tuple[Tensor, State]:
    own = torch.bmm(state[2].transpose(0, 1), weights).transpose(0, 1)  # [B, H, 4 D]
    state = cell(state, gates + own.view_as(gates))
    return state[2], state
