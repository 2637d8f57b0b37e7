"""The matrix LSTM in chunks: parallel inside a chunk, a short recurrence from chunk to chunk.

Inside a chunk, with c the running sum of log f and m_0 the maximum that enters it,
    m_i = max(c_i + m_0, max over j <= i of (c_i - c_j + i_j))
    q_i S_i = exp(c_i + m_0 - m_i) q_i S_0 + sum over j <= i of exp(c_i - c_j + i_j - m_i) (q_i . k_j) [v_j, 1]
so no exponent is positive. The last row of these weights also makes the state that leaves. The maxima of the chunks are
a recurrence of their own, one number per head; the states follow from them.

Arrays of M chunks of C tokens are [M, B, Hv, C, K or V + 1], gates [M, B, Hv, C], states [M, B, Hv, K, V + 1].
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels import chunks as ch
from zoo.kernels.checks import count_sequences
from zoo.kernels.mlstm.reference import State, joined, normalised, prepare, separate
from zoo.kernels.packed import low_precision, product
from zoo.kernels.sequential import carry, each_chunk


def run(*args: Any) -> tuple[Tensor, State]:
    q, k, v, input_gate, forget_gate, scale, initial_state, _, cu_seqlens = args
    low = low_precision(q)
    s, m = joined(initial_state, q, v, count_sequences(q, cu_seqlens))
    q, k, v = prepare(q, k, v, scale)
    plan = ch.layout(q.shape[1], cu_seqlens)
    q, k, v = plan.split(q), plan.split(k), plan.split(v)
    write, forget = plan.split(input_gate, fill=-torch.inf), plan.split(F.logsigmoid(forget_gate))
    since = forget.cumsum(-1)
    exponents = _between(forget) + write.unsqueeze(-2)  # [M, B, Hv, C, C]
    peaks = exponents.amax(-1)
    entering, (m,) = each_chunk(plan, _next_maximum, (m,), (since[..., -1], peaks[..., -1]))
    faded = since + entering.unsqueeze(-1)
    maxima = torch.maximum(faded, peaks)
    kept = (faded - maxima).exp().unsqueeze(-1)
    weights = (exponents - maxima.unsqueeze(-1)).exp()
    update = (weights[..., -1, :, None] * k).mT @ v
    before, s = carry(plan, kept[..., -1:, :], update, s)
    scores, q = q @ k.mT * weights, kept * q
    read = product(q, before[..., :-1], low) + product(scores, v[..., :-1], low)
    # Only the numerator is rounded to `low`. The normaliser may be a small difference of large sums, and its maximum
    # with exp(-m) has a kink that would send gradients the wrong way.
    sums = q @ before[..., -1:] + scores.sum(-1, keepdim=True)
    return plan.join(normalised(torch.cat([read, sums], -1), maxima)), separate(s, m)


def _next_maximum(state: tuple[Tensor], total: Tensor, peak: Tensor) -> tuple[Tensor, tuple[Tensor]]:
    return state[0], (torch.maximum(state[0] + total, peak),)


def _between(forget: Tensor) -> Tensor:
    """[..., C] to [..., C, C]: the sum over tokens j < l <= i, -inf for j > i. Summed per column, not subtracted: a
    strong gate costs its neighbours no digits."""
    size = forget.shape[-1]
    later = torch.ones(size, size, dtype=torch.bool, device=forget.device).tril(-1)
    sums = forget.unsqueeze(-1).expand(*forget.shape, size).masked_fill(~later, 0.0).cumsum(-2)
    return sums.masked_fill(later.mT, -torch.inf)
