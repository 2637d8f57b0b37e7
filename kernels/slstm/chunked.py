"""The scalar LSTM as the same loop, with all heads and gates in one product per token, and packed sequences told apart
on the device, so that it compiles to one graph.

Shapes: B batch, T tokens, N sequences, H heads, D head width; every token is a chunk, M of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels import chunks as ch
from zoo.kernels.checks import count_sequences
from zoo.kernels.sequential import each_chunk
from zoo.kernels.slstm.reference import State, cell, fresh, prepare


def supports(*args: object) -> str | None:
    return None


def run(
    cell_input: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    output_gate: Tensor,
    recurrent: Tensor,
    initial_state: State | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, State | None]:
    with torch.autocast(cell_input.device.type, enabled=False):
        inputs, recurrent = prepare(cell_input, input_gate, forget_gate, output_gate, recurrent)
        initial = initial_state or fresh(cell_input, count_sequences(cell_input, cu_seqlens))
        plan = ch.layout(cell_input.shape[1], cu_seqlens, size=1)
        weights = recurrent.permute(1, 2, 0, 3).flatten(2)  # [H, D, 4 D]
        parts = (plan.split(inputs).squeeze(3),)  # [M, B, H, 4, D]
        h, state = each_chunk(plan, lambda s, x: _token(s, x, weights), initial, parts)
        return plan.join(h.unsqueeze(3)).to(cell_input.dtype), state if output_final_state else None


def _token(state: State, gates: Tensor, weights: Tensor) -> tuple[Tensor, State]:
    own = torch.bmm(state[2].transpose(0, 1), weights).transpose(0, 1)  # [B, H, 4 D]
    state = cell(state, gates + own.view_as(gates))
    return state[2], state
