"""The elementwise recurrence, token by token; the state is h, [N, D].

h_t = exp(decay_t) h_{t-1} + x_t
"""

from typing import Any

from torch import Tensor

from zoo.kernels.checks import count_sequences, state_dtype
from zoo.kernels.sequential import State, each_token


def run(*args: Any) -> tuple[Tensor, Tensor]:
    x, decay, state, _, cu_seqlens = args
    x = x.to(state_dtype(x.dtype))
    begin = x.new_zeros(count_sequences(x, cu_seqlens), x.shape[2]) if state is None else state
    h, (state,) = each_token(_token, x, (x, decay), (begin,), cu_seqlens)
    return h, state


def _token(state: State, x: Tensor, decay: Tensor) -> tuple[Tensor, State]:
    h = decay.exp() * state[0] + x
    return h, (h,)
