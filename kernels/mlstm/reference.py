"""The matrix LSTM, token by token; S is [N, Hv, K, V + 1] and m [N, Hv].

m_t = max(log f_t + m_{t-1}, i_t)        f'_t = exp(log f_t + m_{t-1} - m_t)        i'_t = exp(i_t - m_t)
S_t = f'_t S_{t-1} + i'_t k_t^T [v_t, 1]        S = [C, n]: the normaliser is one more column
h_t = scale q_t C_t / (max(|scale q_t n_t^T|, exp(-m_t)) + 1e-6)        log f_t = logsigmoid(forget_gate_t)
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels import packed, sequential
from zoo.kernels.checks import count_sequences, state_dtype

EPSILON = 1e-6

State = tuple[Tensor, Tensor, Tensor]


def run(*args: Any) -> tuple[Tensor, State]:
    q, k, v, input_gate, forget_gate, scale, initial_state, _, cu_seqlens = args
    begin = joined(initial_state, q, v, count_sequences(q, cu_seqlens))
    q, k, v = prepare(q, k, v, scale)
    inputs = (q, k, v, input_gate, F.logsigmoid(forget_gate))
    h, (s, m) = sequential.each_token(_token, v[..., :-1], inputs, begin, cu_seqlens)
    return h, separate(s, m)


def _token(
    state: sequential.State, q: Tensor, k: Tensor, v: Tensor, write: Tensor, forget: Tensor
) -> tuple[Tensor, sequential.State]:
    (s, before), m = state, torch.maximum(forget + state[1], write)
    kept, written = (forget + before - m).exp(), (write - m).exp()
    s = kept[..., None, None] * s + written[..., None, None] * (k.unsqueeze(-1) * v.unsqueeze(-2))
    read = (q.unsqueeze(-2) @ s).squeeze(-2)
    return read[..., :-1] / denominator(read[..., -1], m).unsqueeze(-1), (s, m)


def prepare(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """As `packed.prepare`, v with a column of ones: it gathers the normaliser."""
    q, k, v = packed.prepare(q, k, v, scale=scale)
    return q, k, F.pad(v, [0, 1], value=1.0)


def joined(state: State | None, q: Tensor, v: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """(C, n, m), or zeros, as S and m."""
    if state is not None:
        return torch.cat([state[0], state[1].unsqueeze(-1)], -1), state[2]
    zero = torch.zeros(n, v.shape[2], q.shape[3], v.shape[3] + 1, dtype=state_dtype(q.dtype), device=q.device)
    return zero, zero[..., 0, 0]


def separate(s: Tensor, m: Tensor) -> State:
    return s[..., :-1].contiguous(), s[..., -1].contiguous(), m


def denominator(normal: Tensor, m: Tensor) -> Tensor:
    """What scale q_t C_t is divided by, from scale q_t n_t^T and m."""
    limit = 80.0 if m.dtype == torch.float32 else 700.0  # exp would overflow beyond; h is zero there anyway
    return torch.maximum(normal.abs(), (-m).clamp(max=limit).exp()) + EPSILON
