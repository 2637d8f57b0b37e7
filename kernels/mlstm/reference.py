"""The matrix LSTM, token by token.

    m_t = max(log f_t + m_{t-1}, i_t)        f'_t = exp(log f_t + m_{t-1} - m_t)        i'_t = exp(i_t - m_t)
    S_t = f'_t S_{t-1} + i'_t k_t^T [v_t, 1]        S = [C, n]: the normaliser is one more column
    h_t = scale q_t C_t / (max(|scale q_t n_t^T|, exp(-m_t)) + 1e-6)

Shapes: B batch, T tokens, N sequences, H key heads, Hv value heads, K and V head widths; S [N, Hv, K, V + 1],
m [N, Hv].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.checks import count_sequences, state_dtype
from zoo.kernels.packed import heads
from zoo.kernels.sequential import each_sequence

EPSILON = 1e-6

State = tuple[Tensor, Tensor, Tensor]


def supports(*args: object) -> str | None:
    return None


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    input_gate: Tensor,
    forget_gate: Tensor,
    scale: float,
    initial_state: State | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, State | None]:
    dtype = q.dtype
    with torch.autocast(q.device.type, enabled=False):
        state = joined(initial_state, q, v, count_sequences(q, cu_seqlens))
        q, k, v = prepare(q, k, v)
        inputs = (q, k, v, input_gate, F.logsigmoid(forget_gate))
        h, (s, m) = each_sequence(lambda s, *x: _tokens(s, scale, *x), inputs, state, cu_seqlens)
        return h.to(dtype), separate(s, m) if output_final_state else None


def _tokens(
    state: tuple[Tensor, Tensor],
    scale: float,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    write: Tensor,
    forget: Tensor,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    s, m = state
    outputs = [v[:, :0, :, :-1]]
    for i in range(v.shape[1]):
        before, m = m, torch.maximum(forget[:, i] + m, write[:, i])
        kept, written = (forget[:, i] + before - m).exp(), (write[:, i] - m).exp()
        update = k[:, i, :, :, None] * v[:, i, :, None, :]
        s = kept[..., None, None] * s + written[..., None, None] * update
        read = (q[:, i, :, None, :] @ s).squeeze(-2)
        outputs.append(normalised(scale * read, m).unsqueeze(1))
    return torch.cat(outputs, 1), (s, m)


def prepare(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs in the state dtype with Hv heads, v with a column of ones: it gathers the normaliser."""
    dtype = state_dtype(q.dtype)
    q, k, v = heads(q.to(dtype), v), heads(k.to(dtype), v), v.to(dtype)
    return q, k, F.pad(v, [0, 1], value=1.0)


def joined(state: State | None, q: Tensor, v: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """(C, n, m), or zeros, as S and m."""
    if state is not None:
        return torch.cat([state[0], state[1].unsqueeze(-1)], -1), state[2]
    zero = torch.zeros(n, v.shape[2], q.shape[3], v.shape[3] + 1, dtype=state_dtype(q.dtype), device=q.device)
    return zero, zero[..., 0, 0]


def separate(s: Tensor, m: Tensor) -> State:
    return s[..., :-1].contiguous(), s[..., -1].contiguous(), m


def normalised(read: Tensor, m: Tensor) -> Tensor:
    """q S [..., V + 1] to h [..., V]; m [...]."""
    limit = 80.0 if m.dtype == torch.float32 else 700.0  # exp would overflow beyond; h is zero there anyway
    d = torch.maximum(read[..., -1].abs(), (-m).clamp(max=limit).exp())
    return read[..., :-1] / (d + EPSILON).unsqueeze(-1)
