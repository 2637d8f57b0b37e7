"""The scalar LSTM, token by token.

    (i_t, f_t, z_t, o_t) = inputs_t + h_{t-1} R        per head, R = (R_i, R_f, R_z, R_o)
    m_t = max(log f_t + m_{t-1}, i_t)        f'_t = exp(log f_t + m_{t-1} - m_t)        i'_t = exp(i_t - m_t)
    c_t = f'_t c_{t-1} + i'_t tanh(z_t)      n_t = f'_t n_{t-1} + i'_t                  log f = logsigmoid(f_t)
    h_t = sigmoid(o_t) c_t / n_t

c, n, h, m are [N, H, D]. Before the first write n is 0 and m counts as -inf, so n is at least 1 from then on.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.checks import count_sequences
from zoo.kernels.sequential import State, each_token


def run(*args: Any) -> tuple[Tensor, State]:
    token, inputs, begin, cu_seqlens = prepare(*args)
    return each_token(token, inputs[..., 0, :], (inputs,), begin, cu_seqlens)


def prepare(*args: Any) -> tuple[Any, Tensor, State, Tensor | None]:
    """The function for one token, all four inputs [B, T, H, 4, D] in the order of `recurrent`, and the first state, in
    the state dtype."""
    x, write, keep, read, recurrent, state, _, cu_seqlens = args
    inputs = torch.stack([write, keep, x.to(write.dtype), read], 3)
    zero = inputs.new_zeros(count_sequences(x, cu_seqlens), *x.shape[2:])
    weights = recurrent.to(write.dtype).permute(1, 2, 0, 3).flatten(2)  # [H, D, 4 D]
    return partial(_token, weights), inputs, state or (zero, zero, zero, zero), cu_seqlens


def _token(weights: Tensor, state: State, inputs: Tensor) -> tuple[Tensor, State]:
    c, n, h, m = state
    gates = inputs + torch.bmm(h.transpose(0, 1), weights).transpose(0, 1).view_as(inputs)
    i, f, z, o = gates.unbind(2)
    faded = torch.where(n == 0, -torch.inf, F.logsigmoid(f) + m)
    m = torch.maximum(faded, i)
    m = torch.where(m == -torch.inf, 0.0, m)  # nothing written yet
    kept, written = (faded - m).exp(), (i - m).exp()
    c, n = kept * c + written * z.tanh(), kept * n + written
    h = o.sigmoid() * c / torch.where(n == 0, 1.0, n)
    return h, (c, n, h, m)
