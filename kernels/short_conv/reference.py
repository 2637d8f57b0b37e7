"""Short convolution, token by token; the state holds the last W inputs, [N, D, W].

y_t[d] = bias[d] + sum over i < W of weight[d, i] x_{t - W + 1 + i}[d]
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.checks import count_sequences, state_dtype
from zoo.kernels.sequential import State, each_token


def run(*args: Any) -> tuple[Tensor, Tensor]:
    x, weight, bias, activation, state, _, cu_seqlens = args
    dtype, x, weight = x.dtype, *(y.to(state_dtype(x.dtype)) for y in (x, weight))
    begin = x.new_zeros(count_sequences(x, cu_seqlens), *weight.shape) if state is None else state.to(x.dtype)
    y, (state,) = each_token(partial(_token, weight), x, (x,), (begin,), cu_seqlens)
    y = y if bias is None else y + bias.to(x.dtype)
    return F.silu(y) if activation == "silu" else y, state.to(dtype)


def _token(weight: Tensor, state: State, x: Tensor) -> tuple[Tensor, State]:
    last = torch.cat([state[0][..., 1:], x.unsqueeze(-1)], -1)
    return (last * weight).sum(-1), (last,)
