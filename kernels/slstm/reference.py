"""The scalar LSTM, token by token.

    (i_t, f_t, z_t, o_t) = inputs_t + h_{t-1} R
    m_t = max(log f_t + m_{t-1}, i_t)        f'_t = exp(log f_t + m_{t-1} - m_t)        i'_t = exp(i_t - m_t)
    c_t = f'_t c_{t-1} + i'_t tanh(z_t)      n_t = f'_t n_{t-1} + i'_t
    h_t = sigmoid(o_t) c_t / n_t

Before the first write n is 0 and m counts as -inf, so n is at least 1 from then on.

Shapes: B batch, T tokens, N sequences, H heads, D head width; c, n, h, m [N, H, D].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.checks import count_sequences, state_dtype
from zoo.kernels.sequential import each_sequence

State = tuple[Tensor, Tensor, Tensor, Tensor]


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
        h, state = each_sequence(lambda s, x: _tokens(s, x, recurrent), (inputs,), initial, cu_seqlens)
        return h.to(cell_input.dtype), state if output_final_state else None


def _tokens(state: State, inputs: Tensor, recurrent: Tensor) -> tuple[Tensor, State]:
    outputs = [inputs[:, :0, :, 0]]
    for t in range(inputs.shape[1]):
        state = cell(state, inputs[:, t] + torch.einsum("bhd,ghde->bhge", state[2], recurrent))
        outputs.append(state[2].unsqueeze(1))
    return torch.cat(outputs, 1), state


def prepare(
    cell_input: Tensor, input_gate: Tensor, forget_gate: Tensor, output_gate: Tensor, recurrent: Tensor
) -> tuple[Tensor, Tensor]:
    """All four inputs [B, T, H, 4, D] in the order of `recurrent`, and that, in the state dtype."""
    dtype = state_dtype(cell_input.dtype)
    inputs = torch.stack([input_gate, forget_gate, cell_input.to(dtype), output_gate], 3)
    return inputs, recurrent.to(dtype)


def fresh(cell_input: Tensor, n: int) -> State:
    zero = torch.zeros(n, *cell_input.shape[2:], dtype=state_dtype(cell_input.dtype), device=cell_input.device)
    return zero, zero, zero, zero


def cell(state: State, gates: Tensor) -> State:
    """One token: the state (c, n, h, m) and what the four gates are taken of [B, H, 4, D]."""
    (c, n, _, m), (i, f, z, o) = state, gates.unbind(2)
    faded = torch.where(n == 0, -torch.inf, F.logsigmoid(f) + m)
    m = torch.maximum(faded, i)
    m = torch.where(m == -torch.inf, 0.0, m)  # nothing written yet
    kept, written = (faded - m).exp(), (i - m).exp()
    c, n = kept * c + written * z.tanh(), kept * n + written
    return c, n, o.sigmoid() * c / torch.where(n == 0, 1.0, n), m
