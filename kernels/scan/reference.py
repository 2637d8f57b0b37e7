"""The elementwise recurrence, token by token.

    h_t = exp(decay_t) h_{t-1} + x_t

Shapes: B batch, T tokens, N sequences, D channels; the state is h, [N, D].
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.checks import state_dtype
from zoo.kernels.packed import each_sequence


def supports(*args: object) -> str | None:
    return None


def run(
    x: Tensor, decay: Tensor, initial_state: Tensor | None, output_final_state: bool, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    wide = x.to(state_dtype(x.dtype))
    h, state = each_sequence(_tokens, (wide, decay), initial_state, cu_seqlens)
    return h.to(x.dtype), state if output_final_state else None


def _tokens(state: Tensor | None, x: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    state = x.new_zeros(x.shape[0], x.shape[2]) if state is None else state
    outputs = [x[:, :0]]
    for t in range(x.shape[1]):
        state = decay[:, t].exp() * state + x[:, t]
        outputs.append(state[:, None])
    return torch.cat(outputs, 1), state
