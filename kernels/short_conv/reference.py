"""Short convolution, token by token.

    y_t[d] = bias[d] + sum over i < W of weight[d, i] x_{t - W + 1 + i}[d]

Shapes: B batch, T tokens, N sequences, D channels, W filter width; the state holds the last W inputs, [N, D, W].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.checks import state_dtype
from zoo.kernels.packed import each_sequence


def supports(*args: object) -> str | None:
    return None


def run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    dtype, wide = x.dtype, state_dtype(x.dtype)
    weight, bias = weight.to(wide), None if bias is None else bias.to(wide)
    state = None if initial_state is None else initial_state.to(wide)
    y, state = each_sequence(lambda s, x: _tokens(s, weight, bias, x), (x.to(wide),), state, cu_seqlens)
    y = F.silu(y) if activation == "silu" else y
    return y.to(dtype), state.to(dtype) if output_final_state else None


def _tokens(state: Tensor | None, weight: Tensor, bias: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
    state = x.new_zeros(x.shape[0], *weight.shape) if state is None else state
    outputs = [x[:, :0]]
    for t in range(x.shape[1]):
        state = torch.cat([state[..., 1:], x[:, t, :, None]], -1)
        y = (state * weight).sum(-1)
        outputs.append((y if bias is None else y + bias)[:, None])
    return torch.cat(outputs, 1), state
