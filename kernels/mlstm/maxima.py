"""The matrix LSTM as linear attention: under its running maximum m it has
    log decay = log f_t + m_{t-1} - m_t <= 0,    log gain = i_t - m_t <= 0 on what token t writes.
h does not depend on m but for the 1e-6. So gates take m as a number, and its own gradient is that of a factor on what
is read: what nearly cancels is never summed over tokens.

Shapes: B batch, T tokens, N sequences, Hv value heads; gates and m [B, T, Hv], in fp64 where that exists.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.checks import count_sequences
from zoo.kernels.mlstm.reference import State, denominator, joined, separate


def under_maxima(read: Callable[..., tuple[Tensor, Tensor, Tensor]], args: Any) -> tuple[Tensor, State]:
    """The op by `read(q, k, v, decay, gain, scale, state, cu_seqlens)`: scale q_t C_t, scale q_t n_t^T and the final
    state [N, Hv, K, V + 1], whose last column is n."""
    q, k, v, input_gate, forget_gate, scale, initial_state, _, cu_seqlens = args
    state, start = joined(initial_state, q, v, count_sequences(q, cu_seqlens))
    kind, wide = start.dtype, torch.float32 if q.device.type == "mps" else torch.float64
    write, forget, begin = (x.to(wide) for x in (input_gate, F.logsigmoid(forget_gate), start))
    t, place = q.shape[1], torch.arange(q.shape[1], device=q.device)
    if cu_seqlens is None:
        begin = begin.unsqueeze(1)  # m before each token's sequence, [B, 1 or T, Hv]
    else:
        sequence = torch.searchsorted(cu_seqlens[1:], place, right=True)
        place, begin = place - cu_seqlens[sequence], begin[sequence].unsqueeze(0)
    maxima = _maxima(write, forget, begin, place)
    fixed = maxima.detach()
    before = torch.where(place.view(1, t, 1) == 0, begin.detach(), F.pad(fixed, [0, 0, 1, 0])[:, :t])
    decay, gain, factor = (x.to(kind) for x in (forget + (before - fixed), write - fixed, (fixed - maxima).exp()))
    state = state * (start - start.detach()).exp()[..., None, None]
    found, normal, final = read(q, k, v, decay, gain, scale, state, cu_seqlens)
    h = found * (factor / denominator(factor * normal, maxima.to(kind))).unsqueeze(-1)
    if cu_seqlens is None:
        m = maxima[:, -1].to(kind)
    else:  # an empty sequence leaves it as it was
        row = torch.where(cu_seqlens.diff() > 0, cu_seqlens[1:] - 1, torch.arange(len(start), device=q.device) + t)
        m = torch.cat([maxima[0].to(kind), start])[row]
    return h, separate(final * (m.detach() - m).exp()[..., None, None], m)


def _maxima(write: Tensor, forget: Tensor, begin: Tensor, place: Tensor) -> Tensor:
    """m_t = max(log f_t + m_{t-1}, i_t), looking back 1, 2, 4, .. tokens but never before `place` 0: no scattered sum,
    whose order would vary, in its gradient."""
    peak, sums, step = write, forget, 1
    while step < place.shape[0]:
        first = (place < step).view(1, -1, 1)
        earlier = F.pad(peak[:, :-step], [0, 0, step, 0]).masked_fill(first, -torch.inf)
        peak = torch.maximum(peak, earlier + sums)
        sums = sums + F.pad(sums[:, :-step], [0, 0, step, 0]).masked_fill(first, 0.0)
        step *= 2
    return torch.maximum(begin + sums, peak)
